"""What a job has done so far, in a folder beside the one it will write: run again, it goes on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.archive import AdapterFileError
from lightning_peft.atomic import write_whole
from lightning_peft.callbacks import Calibration
from lightning_peft.callbacks.order import callbacks_of

_JOB = "job.json"
_CONTENTS = "the contents of "


class Progress:
    """The stages of a job that are over, with what they gave, and where its fits stand.

    The folder is there from the first checkpoint, or the first stage that is over, until the job is done. Every file in
    it is written whole or not at all, and says nothing that another must agree with, so a job may be stopped at any
    moment.

    Args:
        out: folder that the job will write; this one is beside it, `<out>.unfinished`.
        arguments: all that the result depends on, as plain values by name.
        late: names of those arguments that only the last stages depend on.
        last: names of these stages; changed late arguments cost them, and nothing that went before.

    Attributes:
        folder: where it is.
        begun: whether an earlier run of the job has left something here.

    Raises:
        FileExistsError: the folder holds a job with other arguments, or something else.
        AdapterFileError: it holds a damaged file.
    """

    def __init__(
        self, out: Path, arguments: Mapping[str, Any], late: Collection[str] = (), last: Collection[str] = ()
    ) -> None:
        out = out if out.name.strip(".") else out.resolve()  # "." and ".." have names of their own
        self.folder = out.with_name(f"{out.name}.unfinished")
        self.arguments = json.loads(json.dumps(arguments))  # a tuple is a list then, as in the file
        found = self._read()
        self.begun = found is not None
        self._stages: dict[str, Any] = found["stages"] if found else {}
        if found is not None:
            before = found["arguments"]
            self._require_same({name: self.arguments.get(name) if name in late else before[name] for name in before})
            if before != self.arguments:
                self._forget(last)

    def _forget(self, stages: Collection[str]) -> None:
        """Begin stages anew, with the arguments of today."""
        for stage in stages:  # before the arguments: what is left of a stage is never under other ones
            self.checkpoint(stage).unlink(missing_ok=True)
            self._stages.pop(stage, None)
        self._write()

    def _read(self) -> dict[str, Any] | None:
        file = self.folder / _JOB
        if not file.is_file():
            # A process that is killed in its first write leaves a part of a file.
            others = sorted(p.name for p in self.folder.glob("*") if p.suffix != ".part")
            if others or self.folder.is_file():
                raise FileExistsError(
                    f"{self.folder} holds no compression that was stopped ({', '.join(others[:3]) or 'it is a file'}), "
                    "and its name is that of what a job keeps until it is done. Move it, or give another output folder."
                )
            return None
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(found["arguments"], dict) or not isinstance(found["stages"], dict):
                raise TypeError("its entries are of another kind")
            return found
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterFileError(
                f"{file} cannot be read: it is damaged, or of another version ({error}). Delete {self.folder} to begin "
                "anew."
            ) from error

    def _require_same(self, before: Mapping[str, Any]) -> None:
        names = [*self.arguments, *(name for name in before if name not in self.arguments)]
        odd = [
            _change(n, before.get(n), self.arguments.get(n)) for n in names if before.get(n) != self.arguments.get(n)
        ]
        if odd:
            raise FileExistsError(
                f"{self.folder} holds what a job with other arguments has done: {'; '.join(odd)}. Give the same to go "
                f"on with it, give another output folder, or delete {self.folder} to begin anew."
            )

    def once(self, stage: str, call: Callable[[], Any]) -> tuple[Any, float]:
        """What a stage gives, as plain values, and the seconds that it took before, in an earlier run."""
        if stage in self._stages:
            return self._stages[stage]["value"], float(self._stages[stage]["seconds"])
        start = time.perf_counter()
        value = call()
        self._stages[stage] = {"value": value, "seconds": time.perf_counter() - start}
        self._write()
        return value, 0.0

    def _write(self) -> None:
        content = {"arguments": self.arguments, "stages": self._stages}
        write_whole(self.folder / _JOB, (json.dumps(content, indent=2) + "\n").encode())

    def checkpoint(self, stage: str) -> Path:
        """The file of where a stage that trains stands."""
        return self.folder / f"{stage}.ckpt"

    def claim(self) -> None:
        """Say whose folder it is, before a checkpoint is written there, if no stage that is over has said so."""
        if not (self.folder / _JOB).is_file():
            self._write()

    def clear(self) -> None:
        """The job is done. Killed in between, this leaves a job that has kept less, and no other one."""
        for file in self.folder.glob("*.ckpt"):
            file.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)


class Saving(Callback):
    """Keep where a fit stands: when the statistics are there, every few minutes, and when it is over.

    Args:
        done: the job's progress.
        stage: of the job, that the fit is.
        minutes: between two checkpoints.

    Attributes:
        stage: as above.
        path: file to write, whole or not at all.
        seconds_before: time that the fit took in earlier runs, up to the checkpoint that this one goes on from.
    """

    def __init__(self, done: Progress, stage: str, minutes: float) -> None:
        self.stage, self.path, self.minutes = stage, done.checkpoint(stage), minutes
        self._done = done
        self.seconds_before = 0.0
        self._start = self._saved = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last of the callbacks: whoever calibrates has done so. A run that goes on has this file already."""
        if any(isinstance(c, Calibration) for c in callbacks_of(trainer)) and not self.path.exists():
            self._save(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every few minutes, but for the last step: what is to be done at the end would be left undone."""
        if trainer.global_step < trainer.max_steps and time.perf_counter() - self._saved >= 60 * self.minutes:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._done.claim()
        trainer.save_checkpoint(self.path)
        self._saved = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds_before + time.perf_counter() - self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds_before = float(state_dict["seconds"])


def contents(**paths: str | None) -> dict[str, str]:
    """Digests of files, and of the files in folders: the same name may come to hold something else."""
    return {_CONTENTS + name: _digest(Path(path)) for name, path in paths.items() if path is not None}


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            total.update(f"{file.name}\0{file.stat().st_size}\0".encode() if path.is_dir() else b"")
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    total.update(block)
    return total.hexdigest()


def _change(name: str, before: Any, now: Any) -> str:
    if name.startswith(_CONTENTS):
        return f"{name} were {str(before)[:12]} and are {str(now)[:12]}"
    return f"{name} was {before!r} and is {now!r}"
