"""Compress a model in a folder: look at data, find ranks, fine-tune what is left, write it, say what it is now."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_peft.arguments import require_integer, require_number
from lightning_peft.callbacks import AdapterCheckpoint, Regularization
from lightning_peft.compression.console import silence, without_remarks
from lightning_peft.compression.figures import Clock, milliseconds, peak_bytes, size
from lightning_peft.compression.layers import components
from lightning_peft.compression.methods import DEFAULT, METHODS, WEIGHTINGS, Method, Plan, Training, method
from lightning_peft.compression.progress import Progress, Saving, contents
from lightning_peft.compression.report import Report
from lightning_peft.compression.stored import Stored
from lightning_peft.compression.task import Source, Task, hub_model, task_of
from lightning_peft.interop.folder import refuse_to_overwrite
from lightning_peft.interop.plain import save_compressed, thin_layers, to_plain
from lightning_peft.modules.planned_data import PlannedData
from lightning_peft.planning.skeleton import skeleton
from lightning_peft.rank.budget import RankBudget
from lightning_peft.rank.weighted_svd import Weighting
from lightning_peft.regularizers import Distillation

_HEAD_LR = 5e-3  # of a new head, which needs larger steps than what is pretrained
_LAST = ("fine-tuning", "the fine-tuned model", "the model as it is written")  # stages
_PACKAGES = ("lightning-peft", "torch", "lightning", "transformers")


@dataclass(frozen=True)
class Compression:
    """A description of a compression; :meth:`run` does it.

    Args:
        method: "svd", "fwsvd", "asvd" and "svd-llm" give every layer the same share, by four weightings; "ars" learns
            the layers' ranks; "rankdyna" trains the factorised model and cuts it meanwhile, in one round.
        ratio: kept share of the weights of the layers that are compressed, in (0, 1).
        task: "classification" or "lm"; ``None`` for what the model's config says.
        targets: patterns of the layers to compress, see :func:`lightning_peft.inject`; ``None`` for all but the head.
        weighting: what the decomposition of "ars" goes by: "none", "fisher" (the default), "taylor", "activation" or
            "whiten".
        calibration: batches that are looked at before, at most.
        steps: optimizer steps of "ars" and "rankdyna"; ``None`` for 1000.
        fine_tuning: optimizer steps after compression, on all that is left, plain; 0 for none.
        lr: peak learning rate of fine-tuning, and of "rankdyna".
        distill: weight of distillation from the dense model while fine-tuning; 0 for none.
        precision: of the Trainers.
        seed: of everything that is drawn.
        progress: whether bars are shown.
        save_every: minutes of training between two checkpoints, from which the job goes on if it is stopped; 0 for one
            after every step.

    Raises:
        TypeError: a number is none.
        ValueError: a name is unknown, or a number is out of range.
    """

    method: str = DEFAULT
    ratio: float = 0.5
    task: str | None = None
    targets: Sequence[str] | None = None
    weighting: Weighting | None = None
    calibration: int = 64
    steps: int | None = None
    fine_tuning: int = 0
    lr: float = 1e-4
    distill: float = 0.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    seed: int = 0
    progress: bool = True
    save_every: float = 5.0

    def __post_init__(self) -> None:
        found = method(self.method)
        for name, number in (
            ("ratio", self.ratio),
            ("lr", self.lr),
            ("distill", self.distill),
            ("save_every", self.save_every),
        ):
            require_number(name, number)
            if not isfinite(number):
                raise ValueError(f"{name}={number}: it is a finite number.")
        for name, count in (("calibration", self.calibration), ("fine_tuning", self.fine_tuning)):
            require_integer(name, count)
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio}: it is the share of the weights that is kept, above 0 and below 1.")
        if self.calibration < 1:
            raise ValueError(f"calibration={self.calibration}: at least 1 batch is looked at.")
        if self.fine_tuning < 0:
            raise ValueError(f"fine_tuning={self.fine_tuning}: it is a number of steps, 0 for none.")
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr}: it is the peak learning rate, above 0; 1e-4 where nothing is known.")
        if self.distill < 0:
            raise ValueError(f"distill={self.distill}: it is the weight of a loss term, 0 for none.")
        if self.save_every < 0:
            raise ValueError(f"save_every={self.save_every}: it is a number of minutes, 0 for after every step.")
        if self.distill and not self.fine_tuning:
            raise ValueError(
                f"distill={self.distill} is for fine-tuning after compression, and there is none: fine_tuning=0. Give "
                "it steps, or leave distill out."
            )
        if self.steps is not None:
            require_integer("steps", self.steps)
            if not found.trains:
                raise ValueError(
                    f"steps={self.steps}: {self.method} takes none. For those afterwards, give fine_tuning."
                )
            if self.steps < 1:
                raise ValueError(f"steps={self.steps}: {self.method} trains, for at least 1 step.")
        if self.weighting is not None and found.weighting is None:
            raise ValueError(f"weighting={self.weighting!r}: {self.method} has its own.")
        if self.weighting is not None and self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting={self.weighting!r}: choose {', '.join(WEIGHTINGS)}.")

    @isolate_rng()  # the caller's generators are left as they were
    def run(self, model: str | Path, source: Source | str | Path, out: str | Path, overwrite: bool = False) -> Report:
        """Compress a model.

        What was stopped goes on: called again with the same arguments, a job begins where it stood when it last kept
        something in the folder `<out>.unfinished`, and gives the same bits as if it had not been stopped. Arguments of
        fine-tuning alone may change: then it begins anew, and what was found before is kept.

        A model that is stored in 16 bits is compressed and trained in 32, where small steps are not lost to rounding,
        and written as it was stored.

        Args:
            model: folder of a transformers model and its tokenizer.
            source: texts; a file, or more than that.
            out: folder for the result, written whole or not at all; see :func:`lightning_peft.save_compressed`. The
                tokenizer goes with it, and the report: report.md, report.json, ranks.png.
            overwrite: write into a folder that holds other things than an earlier result, which are kept.

        Returns:
            What was done; print it.

        Raises:
            FileNotFoundError, FileExistsError, ValueError: what is wrong with the model, the texts, or `out`; or
                `<out>.unfinished` holds a job with other arguments.
            FloatingPointError: training has diverged.
            RuntimeError: the written model was checked, and is not right.
        """
        with nullcontext() if self.progress else silence():
            return self._run(model, source, Path(out), overwrite)

    def _run(self, model: str | Path, source: Source | str | Path, out: Path, overwrite: bool) -> Report:
        refuse_to_overwrite(out, overwrite)  # now, not after an hour
        task, chosen = task_of(str(model), self.task), method(self.method)
        full = components(skeleton(task.folder, task.architecture()), self.targets, self.ratio, not chosen.trains)
        clock = Clock()
        source = source if isinstance(source, Source) else Source(str(source), seed=self.seed)
        with clock.stage("reading"):
            self._draw_anew()
            data = task.data(source)
            data.setup("fit")
            module: Any = task.module(data)
            self._require_head(task, module, data, chosen)
            stored = Stored(hub_model(module))
            done = Progress(out, self._arguments(str(model), source), self._late(chosen), _LAST)
        if done.begun:
            self._say(f"Going on with what {done.folder} holds.")
        before = size(hub_model(module), full)
        stored.widen()
        quality_before = {} if task.missing(module) else self._quality(module, data, "the dense model", clock, done)
        with clock.stage("compression"):
            steps = (chosen.steps if self.steps is None else self.steps) if chosen.trains else 0
            self._say(f"{chosen.title}: {len(full)} layers to ratio {self.ratio:g}.")
            clock.add("compression", self._find_ranks(module, data, task, chosen, steps, done))
            ranks = _below(RankBudget.of(module).ranks(), "model.")
            to_plain(module)
        quality = compressed = self._quality(module, data, "the compressed model", clock, done)
        if self.fine_tuning:
            with clock.stage("fine-tuning"):
                clock.add("fine-tuning", self._fine_tune(module, data, task, done))
        if stored.narrow() or self.fine_tuning:
            result = "the fine-tuned model" if self.fine_tuning else "the model as it is written"
            quality = self._quality(module, data, result, clock, done)
        plain = hub_model(module).cpu()
        after = size(plain, full)
        rows: Any = data.val_dataloader().dataset
        with clock.stage("timing"):
            timed_on, batch = task.timed(rows, data)
            dense = hub_model(task.module(data))
            times = milliseconds([dense, plain], batch)
            del dense
        thin = thin_layers(plain)
        took = dict(clock.seconds)
        report = Report(
            model=Path(model).name,
            method=chosen.title,
            asked=self.ratio,
            ratio=after.linear_parameters / before.linear_parameters,
            ranks=ranks,
            full=full,
            dense=tuple(name for name in full if name not in thin),
            before=before,
            after=after,
            quality_before=quality_before,
            quality_compressed=compressed,
            quality_after=quality,
            quality_on=f"{len(rows):,} rows, {'of the test file' if source.test else 'held out'}",
            milliseconds=(times[0], times[1]),
            timed_on=timed_on,
            steps={"compression": steps, "fine-tuning": self.fine_tuning},
            seconds=took,
            peak_bytes=peak_bytes(),
            versions={package: version(package) for package in _PACKAGES},
        )

        def beside(folder: Path) -> None:
            data.load_tokenizer().save_pretrained(folder)
            report.write(folder)

        save_compressed(plain, out, overwrite=overwrite, beside=beside)
        done.clear()
        return report

    def _arguments(self, model: str, source: Source) -> dict[str, Any]:
        """All that the result depends on."""
        own = asdict(self)
        del own["progress"], own["save_every"]
        texts = asdict(source)
        texts = {"data": texts.pop("train"), "seed of the texts": texts.pop("seed"), **texts}
        files = contents(model=model, data=source.train, test=source.test)
        return {"model": model, **texts, **own, **files, **{package: version(package) for package in _PACKAGES}}

    def _late(self, chosen: Method) -> set[str]:
        """Arguments of fine-tuning alone."""
        return {"fine_tuning", "distill"} | ({"lr"} if chosen.training or not chosen.trains else set())

    def _draw_anew(self) -> None:
        """Every stage draws from the seed, so that what is drawn in one does not depend on which went before."""
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)

    def _require_head(self, task: Task, module: Any, data: PlannedData, chosen: Method) -> None:
        missing = task.missing(module)
        others = ", ".join(name for name, other in METHODS.items() if other.heads)
        if missing and not chosen.heads:
            raise ValueError(
                f"{task.folder!r} has no weights for {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
                f"{task.wanted(data)}, so there is no quality for {self.method} to keep. Fine-tune the model for its "
                f"task first, or take a method that does so itself: {others}."
            )
        if missing and self.distill:
            raise ValueError(
                f"distill={self.distill}: {task.folder!r} has no weights for {', '.join(missing[:3])}, so there is no "
                "dense model of this task to learn from. Fine-tune the model for it first, or leave distill out."
            )

    def _find_ranks(
        self, module: Any, data: PlannedData, task: Task, chosen: Method, steps: int, done: Progress
    ) -> float:
        weighting = self.weighting or chosen.weighting
        plan = Plan(self.ratio, self.targets, self.calibration, weighting, steps, self.seed)
        training = chosen.training or Training(self.lr, _HEAD_LR if task.missing(module) else self.lr)
        saving = Saving(done, "compression", self.save_every)
        try:
            return self._fit(module, data, task, chosen.callbacks(plan), steps or 1, training, saving)
        except FloatingPointError:
            done.clear()  # nothing is there to go on from
            raise

    def _fine_tune(self, module: Any, data: PlannedData, task: Task, done: Progress) -> float:
        callbacks: list[Callback] = []
        if self.distill:
            teacher: Any = task.module(data)
            Stored(hub_model(teacher)).widen()
            callbacks = [Regularization({"distillation": Distillation(self.distill, teacher, of="model")})]
        self._say(f"Fine-tuning for {self.fine_tuning} steps.")
        saving = Saving(done, "fine-tuning", self.save_every)
        return self._fit(module, data, task, callbacks, self.fine_tuning, Training(self.lr, self.lr), saving)

    def _fit(
        self,
        module: Any,
        data: PlannedData,
        task: Task,
        callbacks: list[Callback],
        steps: int,
        training: Training,
        saving: Saving,
    ) -> float:
        """Train, or train on; one that is over is only brought back. Seconds that it took in earlier runs."""
        self._draw_anew()
        task.set_rates(module, training.lr, training.head_lr)
        module.weight_decay, module.schedule = training.weight_decay, training.schedule
        callbacks = [*callbacks, AdapterCheckpoint(), saving]
        trainer = self._trainer(callbacks, steps, data.batches(), training.clip)
        trainer.fit(module, datamodule=data, ckpt_path=saving.path if saving.path.exists() else None)
        odd = [name for name, parameter in module.named_parameters() if not bool(parameter.isfinite().all())]
        if odd:
            saving.path.unlink(missing_ok=True)
            raise FloatingPointError(
                f"{saving.stage} has diverged: {len(odd)} parameters are not finite, {odd[0]!r} first. Nothing was "
                f"written. Its peak learning rate was {training.lr:g}: give a smaller one, such as lr={self.lr / 10:g}."
            )
        return saving.seconds_before

    def _quality(
        self, module: LightningModule, data: PlannedData, what: str, clock: Clock, done: Progress
    ) -> dict[str, float]:
        def measured() -> dict[str, float]:
            self._draw_anew()
            found = self._trainer([], 1, 1, None).validate(module, datamodule=data, verbose=False)[0]
            return {name.rpartition("/")[2]: value for name, value in found.items()}

        quality: dict[str, float]
        with clock.stage("evaluation"):
            quality, earlier = done.once(what, measured)
        clock.add("evaluation", earlier)
        self._say(f"Quality of {what}: {', '.join(f'{name} {value:.4f}' for name, value in quality.items())}.")
        return quality

    def _trainer(self, callbacks: list[Callback], steps: int, batches: int, clip: float | None) -> Trainer:
        with without_remarks():
            return Trainer(
                accelerator="auto",
                devices=1,
                precision=self.precision,
                max_epochs=-(-steps // batches),  # a bar says so; the steps are what ends it
                max_steps=steps,
                gradient_clip_val=clip,
                callbacks=callbacks,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=self.progress,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                check_val_every_n_epoch=None,
                val_check_interval=10**9,  # quality is measured before and after, not on the way
            )

    def _say(self, text: str) -> None:
        if self.progress:
            rank_zero_info(text)


def compress(
    model: str | Path, source: Source | str | Path, out: str | Path, overwrite: bool = False, **options: Any
) -> Report:
    """Compress a transformers model in a folder; see :class:`Compression` for the options and `run` for the rest.

    Example:
        >>> compress("no/such/folder", "texts.csv", "out", method="svd")
        Traceback (most recent call last):
        FileNotFoundError: there is no config.json at 'no/such/folder'; ...
    """
    return Compression(**options).run(model, source, out, overwrite)


def _below(ranks: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): rank for name, rank in ranks.items()}
