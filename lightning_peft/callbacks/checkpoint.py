"""AdapterCheckpoint: every checkpoint is small, and resuming from it is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_peft.accumulation import partial_gradients, restore_gradients
from lightning_peft.adapters.base import Adapter
from lightning_peft.archive import check_archive, reading
from lightning_peft.callbacks.checkpoint_io import write_checkpoints_whole
from lightning_peft.callbacks.compaction import fitting
from lightning_peft.callbacks.order import require_before
from lightning_peft.callbacks.placement import AdapterPlacement
from lightning_peft.callbacks.preflight import Preflight
from lightning_peft.checkpoint import (
    ENTRY,
    AdapterFileError,
    adapter_state_dict,
    check,
    check_entry,
    dense,
    describe,
)
from lightning_peft.distributed import gather_objects, rank, together
from lightning_peft.fingerprint import fingerprint
from lightning_peft.rank.budget import whole
from lightning_peft.resume import (
    ResumableLoader,
    begin_anew,
    make_plain,
    make_resumable,
    rng_state,
    set_rng_state,
)
from lightning_peft.seams import when_built, wrap_method
from lightning_peft.strategies import flattens, is_sharded, whole_checkpoints
from lightning_peft.surgery.layers import adapters, is_flattened

_GRADIENTS = "lightning_peft_gradients"
"""The key of the gradients so far, in a checkpoint from between the micro-batches of one optimizer step."""


class AdapterCheckpoint(Preflight):
    """Keep the frozen base out of every checkpoint, and make `fit(ckpt_path=...)` continue as if never interrupted.

    Whatever writes checkpoints (ModelCheckpoint, also with `save_weights_only`, or `trainer.save_checkpoint`) writes
    adapters, masks, terms, the trained head and buffers; and beside Lightning's own entries a recipe to inject again, a
    digest of the tensors and a fingerprint of the base. All are checked when a checkpoint is loaded.

    For resuming, the global generators' state and the place in the training data are saved too; validation during a fit
    draws its random numbers apart, so that training does not depend on how often it is validated. Lightning resumes in
    the middle of an epoch with the first batches of a new one; with this callback a plain DataLoader goes on with the
    batch that would have come next, whether it shuffles or not. Other loaders are left to their own means. A checkpoint
    from between two accumulated micro-batches holds the gradients so far as well.

    With several processes, and whether the base is sharded or not, a checkpoint is one file that any strategy and any
    number of processes can load.

    A checkpoint file is written whole or not at all: killed in the middle, or on a full disk, what was there before
    stays as it was.

    Args:
        full: keep the base in the checkpoint as well.

    Raises:
        AdapterFileError: at loading, if the file is damaged, changed, or made for another base model or other adapters.
    """

    def __init__(self, full: bool = False) -> None:
        self.full = full
        self._base: Mapping[str, Tensor] | None = None
        self._undo: list[Callable[[], object]] = []
        self._undo_after: list[Callable[[], object]] = []
        self._adopted: list[ResumableLoader] = []
        self._loaders: list[ResumableLoader] = []
        self._left: list[dict[str, Any]] = []  # where the loaders stood when the run ended
        self._restored: Mapping[str, Any] | None = None
        self._gradients: Mapping[str, Any] | None = None  # restored, and not yet in place
        self._outside: Mapping[str, Any] | None = None  # the training's random numbers, during a validation
        self._stopped: Mapping[str, Any] | None = None  # where an exception ended the run
        self._precision: str | None = None  # for who runs the model again from the file alone

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        require_before(trainer, self, AdapterPlacement)
        self._detach()
        self._restored = self._gradients = self._stopped = None
        self._precision = str(trainer.precision)
        if not flattens(trainer.strategy):
            self._base = None  # of another module
        _call_all(self._undo)
        strict = pl_module.strict_loading
        pl_module.strict_loading = False  # the base is not in the file; `check` is stricter than strict about the rest
        # These stay after the run: `trainer.save_checkpoint` is often called when fit has returned.
        self._undo = [
            wrap_method(pl_module, "on_save_checkpoint", self._save),
            wrap_method(pl_module, "on_load_checkpoint", self._load),
            write_checkpoints_whole(trainer.strategy),
        ]
        self._undo_after = [lambda: setattr(pl_module, "strict_loading", strict)]
        if is_sharded(trainer.strategy):
            if self.full:
                raise MisconfigurationException(
                    f"AdapterCheckpoint(full=True) would gather the base that {type(trainer.strategy).__name__} shards "
                    "into one file. Leave full=False: the base is frozen, and its own files hold it."
                )
            self._undo += whole_checkpoints(trainer.strategy)
        if flattens(trainer.strategy):
            when_built(pl_module, self._print_base)
        self._undo_after.append(wrap_method(trainer.strategy, "load_checkpoint", _read))
        self._undo.append(wrap_method(trainer.strategy, "save_checkpoint", _write))
        if stage == "fit":
            self._left = []
            self._watch_loaders(trainer)
            validation = trainer.fit_loop.epoch_loop.val_loop
            for name in ("run", "increment_progress_to_evaluation_end"):
                self._undo_after.append(wrap_method(validation, name, self._apart))

    def _print_base(self, module: LightningModule) -> None:
        if not any(map(is_flattened, module.parameters())):
            self._base = fingerprint(module)  # FSDP1 keeps no process's values in a shape where they could be found

    def _watch_loaders(self, trainer: Trainer) -> None:
        # Before the first iterator is made, which may be as early as configure_optimizers: where the loaders come from.
        source = trainer.fit_loop._data_source.instance
        if hasattr(source, "train_dataloader"):
            self._undo_after.append(wrap_method(source, "train_dataloader", self._adopt))
        else:
            self._adopt(lambda: source, source)

    def _apart(self, call: Callable[..., Any], loop: Any, *args: Any, **kwargs: Any) -> Any:
        # Lightning skips the validation that was due where a checkpoint was written, and prepares for one that was not:
        # training goes on alike only if validation draws nothing from its random numbers. Lightning keeps its sanity
        # check apart in the same way.
        self._outside = rng_state()
        try:
            return call(*args, **kwargs)
        finally:
            set_rng_state(self._outside)
            self._outside = None

    def _adopt(self, call: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        loaders = call(*args, **kwargs)
        leaves = tree_leaves(getattr(loaders, "iterables", loaders))  # a CombinedLoader holds a collection
        found = [loader for loader in map(make_resumable, leaves) if loader is not None]
        self._adopted.extend(found)
        return loaders

    def _save(self, call: Callable[..., Any], module: LightningModule, checkpoint: dict[str, Any]) -> None:
        call(checkpoint)
        if not any(isinstance(child, Adapter) for child in module.modules()):
            return
        state = checkpoint["state_dict"]
        keep = state.keys() if self.full else adapter_state_dict(module).keys()
        checkpoint["state_dict"] = {key: dense(value) for key, value in state.items() if key in keep}
        checkpoint[ENTRY] = describe(module, checkpoint["state_dict"], self._base)

    def _load(self, call: Callable[..., Any], module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Before any weight is copied: a checkpoint that does not fit leaves the model as it is.
        source = "this checkpoint"
        if "state_dict" not in checkpoint:
            pass  # a sharded checkpoint that Lightning has written and has loaded by now
        elif ENTRY in checkpoint:
            check_entry(checkpoint, source)
            was_cut = bool(whole(module))
            with fitting(module, checkpoint, source):
                check(module, checkpoint, source, self._base, was_cut)
        elif adapters(module) and is_sharded(module.trainer.strategy):
            raise AdapterFileError(
                f"{source} was not written by AdapterCheckpoint, and a model with adapters that "
                f"{type(module.trainer.strategy).__name__} shards loads no other. Load it into the model before "
                "adapters are injected."
            )
        else:  # written without us: as strict as Lightning itself
            odd = sorted(checkpoint["state_dict"].keys() ^ module.state_dict().keys())
            if odd:
                raise AdapterFileError(
                    f"{source} was not written by AdapterCheckpoint and does not fit this model: {odd[0]!r} is in one "
                    "and not in the other. Load it into the model before adapters are injected."
                )
        precision = module.trainer.precision_plugin
        if isinstance(precision, DoublePrecision):
            precision.convert_module(module)  # Lightning does it after loading, and float32 would round the numbers
        call(checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._loaders = _iterated(trainer)
        # The last thing before the first batch: sanity checks and dataloaders have drawn what they wanted.
        states, self._restored = self._restored, None
        if states is None:
            return
        as_many = len(states["ranks"]) == trainer.world_size
        if not as_many:
            rank_zero_warn(
                f"This checkpoint was written by {len(states['ranks'])} processes and goes on with "
                f"{trainer.world_size}: random numbers start anew, and each process goes on after as many batches as "
                "one had taken. Weights, masks, optimizer and schedules go on where they stood."
            )
        state = states["ranks"][rank() if as_many else 0]
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current  # Lightning types it as its base class
        mid_epoch = progress.ready > 0 and progress.processed < trainer.num_training_batches
        # Between epochs all loaders begin anew, also where there was none yet: a finder saves before training starts.
        # But an iterator that was made and not asked yet, as where training stopped before its first batch, is gone on
        # with.
        positions = [p if mid_epoch or (p and p["first"] is None) else {} for p in state["loaders"]]
        positions += [{} for _ in self._loaders[len(positions) :]]  # one that is not saved begins, too
        begin_anew([loader for loader, p in zip(self._loaders, positions, strict=False) if not p])
        for loader, position in zip(self._loaders, positions, strict=False):
            if position and progress.ready > progress.processed:
                # Written inside a batch, after an error say: Lightning takes that batch again, and so do we.
                position = {**position, "taken": position["taken"] - 1}
            if position:
                loader.load_state_dict(position)
        if as_many:
            set_rng_state(state["rng"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not in on_train_start, where RankPruning begins anew with the masks' gradients. Lightning sets gradients to
        # zero before the first micro-batch of a step only, and this is a later one.
        if self._gradients is None:
            return
        state, self._gradients = self._gradients, None
        if state:
            restore_gradients(pl_module, state)
        else:
            rank_zero_warn(
                "This checkpoint was written inside a batch, amid an optimizer step: the gradients of the step's "
                "earlier micro-batches are lost, and the step goes on without them."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()
        # Validation of a checkpoint loads it as well; a later fit is not its continuation.
        self._restored = self._gradients = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._loaders = self._loaders or _iterated(trainer)  # where training had not started yet
        self._stopped = self._here()  # for those who save after us
        self._detach()

    def _detach(self) -> None:
        _call_all(self._undo_after)
        self._left = self._places()  # for checkpoints that are written later, by other callbacks or after fit
        for loader in [*self._adopted, *self._loaders]:
            make_plain(loader)
        self._adopted, self._loaders = [], []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current  # Lightning types it as its base class
        if self._gradients is not None:
            checkpoint[_GRADIENTS] = self._gradients
        elif progress.ready == progress.processed:
            if progress.ready and trainer.fit_loop._should_accumulate():
                checkpoint[_GRADIENTS] = partial_gradients(pl_module)
        elif progress.processed % trainer.accumulate_grad_batches:
            checkpoint[_GRADIENTS] = {}  # backward may have added this batch to some of them

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._gradients = checkpoint.get(_GRADIENTS)

    def state_dict(self) -> dict[str, Any]:
        if self._restored is not None:
            return dict(self._restored)  # training has not started: others may save in on_exception
        return {"ranks": gather_objects(self._stopped or self._here()), "precision": self._precision}

    def _here(self) -> dict[str, Any]:
        return {"rng": self._outside or rng_state(), "loaders": self._places()}

    def _places(self) -> list[dict[str, Any]]:
        return [loader.state_dict() for loader in self._loaders] or self._left

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None


def _iterated(trainer: Trainer) -> list[ResumableLoader]:
    """The loaders that are iterated: with several processes Lightning has made others of what the user gave."""
    combined = trainer.fit_loop._combined_loader
    leaves = [] if combined is None else combined.flattened
    return [loader for loader in leaves if isinstance(loader, ResumableLoader)]


def _call_all(undo: list[Callable[[], object]]) -> None:
    while undo:
        undo.pop()()


def _write(call: Callable[..., Any], strategy: Any, *args: Any, **kwargs: Any) -> None:
    """One process writes; where it cannot, all of them stop, and none waits for it."""
    together(lambda: call(*args, **kwargs))


def _read(call: Callable[..., Any], strategy: Any, path: Any, weights_only: bool | None = None) -> Any:
    """Tensors and plain values only, unless the user says otherwise; a damaged file is named."""
    weights_only = True if weights_only is None else weights_only
    if weights_only and Path(path).is_file():  # a folder or an address is its own reader's concern
        check_archive(path)
    with reading(path):
        return call(path, weights_only=weights_only)
