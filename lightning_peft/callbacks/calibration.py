"""Calibration: a few batches are looked at before training, and adapters start from what was seen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_peft.agreement import small
from lightning_peft.arguments import require_instance, require_integer
from lightning_peft.callbacks.apart import training_batches
from lightning_peft.callbacks.compaction import compact_in_training, require_compactable
from lightning_peft.callbacks.monitor import RankMonitor
from lightning_peft.callbacks.order import callbacks_of, require_before
from lightning_peft.callbacks.placement import AdapterPlacement
from lightning_peft.callbacks.preflight import Preflight
from lightning_peft.callbacks.pruning import RankPruning
from lightning_peft.callbacks.steps import scaler_of
from lightning_peft.callbacks.undisturbed import undisturbed
from lightning_peft.distributed import agreed, broadcast, gather_objects, like, whole
from lightning_peft.listening import heard, is_square, positions, samples
from lightning_peft.rank.budget import RankBudget
from lightning_peft.rank.probe import Probe
from lightning_peft.strategies import each_alone, flattens

_NONE = object()


class Calibration(Preflight):
    """Run a few training batches before the first step, let a probe listen to the adapted layers, and let it act once.

    The probe (:class:`lightning_peft.EVA`, :class:`lightning_peft.GoRA`, :class:`lightning_peft.WeightedSVD`, or one of
    your own) sets ranks, as masks, and fills the adapters' factors. The batches are the training data's, through the
    module's own `training_step`; with several processes each has its own, and all of them end with the same adapters.

    Training then goes on as if nobody had looked: the same batches in the same order, the same random numbers, modes,
    buffers and metrics; no gradient is left and nothing is logged. See :func:`~.undisturbed.undisturbed` for what
    cannot be put back. Compiled modules run uncompiled meanwhile.

    It happens once, in the fit that starts from step 0. A checkpoint from later says that it is done, and holds what it
    did: a resumed run does not calibrate again, and goes on exactly.

    Args:
        probe: what listens and acts.
        batches: at most so many batches per process; fewer if the probe has seen enough, or the epoch has no more.
        data: batches to take instead of the training data's: a DataLoader, or a list of batches.
        mode: "eval" runs the batches without dropout; "train" is for a `training_step` that needs it, such as a
            detection model's that has a loss only then.
        compact: "at_once" cuts closed components out of the adapters before the first step, so that training has the
            size of what is open, on one device and under DDP; "never" leaves ranks as masks.

    Raises:
        TypeError: probe is no Probe.
        ValueError: batches is below 1, or mode or compact is unknown.
        MisconfigurationException: no adapter is there, the callbacks are in the wrong order, the module optimizes by
            hand, there is no batch, the training data cannot be read twice, a probe of gradients meets float16
            scaling or a `training_step` without a loss, or a probe of weights meets FSDP1.
        RuntimeError: the probe cannot act on the adapters as they are, or `training_step` calls no adapted layer.

    Example:
        >>> from lightning_peft import EVA
        >>> calibration = Calibration(EVA(rank=8), batches=32)
    """

    def __init__(
        self,
        probe: Probe,
        batches: int = 64,
        data: Iterable[Any] | None = None,
        mode: Literal["eval", "train"] = "eval",
        compact: Literal["never", "at_once"] = "never",
    ) -> None:
        require_instance("probe", probe, Probe, "EVA(rank=8)")
        require_integer("batches", batches)
        if batches < 1:
            raise ValueError(f"batches is how many batches are looked at, at least 1. Got {batches}.")
        if mode not in ("eval", "train"):
            raise ValueError(f"mode={mode!r}: choose 'eval' (no dropout) or 'train'.")
        if compact not in ("never", "at_once"):
            raise ValueError(f"compact={compact!r}: choose 'never' (ranks are masks) or 'at_once'.")
        self.probe = probe
        self.batches = batches
        self.data = data
        self.mode = mode
        self.compact = compact
        self.done = False
        """Whether the adapters of this run have been calibrated, here or before the checkpoint was written."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.done = False  # a checkpoint of this run says otherwise later
        super().setup(trainer, pl_module, stage)
        require_before(trainer, self, AdapterPlacement)
        for other in callbacks_of(trainer):
            if isinstance(other, RankPruning | RankMonitor):
                require_before(trainer, other, Calibration)
        if stage == "fit" and self.compact == "at_once":
            require_compactable(trainer, "Calibration(compact='at_once')")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not RankBudget.of(pl_module):
            raise MisconfigurationException(
                "Calibration found no adapter. Put AdapterInjection before it in the Trainer's callbacks, or call "
                "inject() on the module first."
            )
        if any(site.adapter.hosted for site in RankBudget.of(pl_module).values()):
            raise MisconfigurationException(
                "Calibration gives our adapters their ranks and first values, and an adopted PEFT model has PEFT's. "
                "Take Calibration out; PEFT has such starts of its own (init_lora_weights)."
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes by hand (automatic_optimization=False), so its training_step "
                "would take optimizer steps on the batches that are only to be looked at. Take Calibration out."
            )
        if trainer.limit_train_batches == 0 and self.data is None:
            raise MisconfigurationException(
                "Calibration has no batch to look at: limit_train_batches=0. Raise it, or take Calibration out."
            )
        name = type(self.probe).__name__
        if self.probe.reads != "inputs" and scaler_of(trainer) is not None:
            raise MisconfigurationException(
                f"{name} reads gradients, and float16 gradients need a loss scale that is found while training. "
                "Use bf16-mixed or 32-true."
            )
        if self.probe.weights and flattens(trainer.strategy):
            raise MisconfigurationException(
                f"{name} reads the base's weights, which {type(trainer.strategy).__name__} has in flat slices. Use "
                "DDP, or FSDP2 (ModelParallelStrategy)."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Weights, loops and this callback's own state are restored by now, under every strategy.
        if self.done:
            return
        self.done = True
        if trainer.global_step > 0:
            if trainer.ckpt_path is not None:
                rank_zero_warn(
                    f"This checkpoint is from step {trainer.global_step} of a run that was not calibrated. Its "
                    "adapters have been trained, so Calibration leaves them as they are."
                )
            return
        self.done = False
        budget = RankBudget.of(pl_module)
        self.probe.begin(budget, _Everyone(trainer))
        called = self._look(trainer, pl_module, budget)
        masks = agreed(self.probe.act(), trainer.strategy.root_device)
        unseen = self.probe.unseen()
        if len(unseen) == len(budget):
            if any(gather_objects(called)):
                if self.probe.reads == "inputs":
                    raise RuntimeError(
                        f"training_step of {type(pl_module).__name__} calls the {len(unseen)} adapted layers, the "
                        f"first of them {unseen[0]!r}, with nothing that {type(self.probe).__name__} can look at, such "
                        "as an embedding's indices. Adapt layers whose inputs are vectors."
                    )
                raise RuntimeError(
                    f"training_step of {type(pl_module).__name__} calls adapted layers, and its loss depends on none "
                    f"of the {len(unseen)}, the first of them {unseen[0]!r}, so there is nothing to calibrate by. Is "
                    "what they give detached, or the loss computed under no_grad?"
                )
            raise RuntimeError(
                f"training_step of {type(pl_module).__name__} called none of the {len(unseen)} adapted layers, the "
                f"first of them {unseen[0]!r}, so there is nothing to calibrate by. Adapt layers that it calls."
            )
        if unseen:
            rank_zero_warn(
                f"Calibration saw nothing of {len(unseen)} adapted layers, whose start owes nothing to data: "
                f"{', '.join(unseen[:5])}{', ...' if len(unseen) > 5 else ''}. They are embeddings, or their weight is "
                "read and they are never called, or no batch came by them."
            )
        budget.keep(masks)
        if trainer.world_size > 1:
            broadcast(list(small(pl_module).values()))  # what should be equal is equal bit for bit
        self.done = True
        rank_zero_info(self.probe.report())
        if self.compact == "at_once":
            compact_in_training(trainer)
        for other in callbacks_of(trainer):
            if isinstance(other, RankPruning):
                # Its schedule begins with what is open now.
                other.policy.importance.release()
                other.policy.track(RankBudget.of(pl_module))

    def _look(self, trainer: Trainer, module: LightningModule, budget: RankBudget) -> bool:
        """Run batches until the probe has seen enough, or one process has no more. Whether a layer was called."""
        seen, called = 0, set[str]()
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        gradients = self.probe.reads != "inputs"
        losses = 0
        with (
            undisturbed(trainer, module),
            torch.set_grad_enabled(gradients),
            torch.compiler.set_stance("force_eager"),  # hooks that come after a compilation are not heard
            Tqdm(total=self.batches, desc="Calibration", disable=not shown, leave=False) as bar,
        ):
            if self.mode == "eval":
                module.eval()
            batches = islice(training_batches(trainer) if self.data is None else self.data, self.batches)
            for index in range(self.batches):
                wanted = self.probe.wanted()
                if not wanted:
                    break
                batch = next(batches, _NONE)
                if not all(gather_objects(batch is not _NONE)):
                    break
                losses += self._step(trainer, module, budget, wanted, batch, index, called)
                self.probe.fold()
                seen += 1
                bar.update()
        if not seen and self.probe.wanted():
            raise MisconfigurationException(
                "Calibration has no batch to look at: its data are empty on one process at least. Give it some."
            )
        if gradients and seen and not any(gather_objects(losses)):
            raise MisconfigurationException(
                f"training_step of {type(module).__name__} returned no loss, and {type(self.probe).__name__} reads its "
                "gradients. Return it, or use a probe that reads inputs."
            )
        return bool(called)

    def _step(
        self,
        trainer: Trainer,
        module: LightningModule,
        budget: RankBudget,
        wanted: Collection[str],
        batch: Any,
        i: int,
        called: set[str],
    ) -> bool:
        """One batch as Lightning itself would run it, up to the backward; each process alone. Whether it has a loss."""
        strategy = trainer.strategy
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = strategy.batch_to_device(batch, dataloader_idx=0)
        indexed = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        count = samples(batch)
        if self.probe.reads == "samples" and count is not None and is_square(batch, count):
            # Which of a layer's dimensions is the samples' could not be told: one sample fewer, and it can.
            count -= 1
            batch = apply_to_collection(batch, Tensor, lambda tensor: tensor[:count] if tensor.dim() else tensor)
        with each_alone(strategy), heard(self.probe, budget, wanted, positions(batch), count) as names:
            outputs = strategy.training_step(*((batch, i) if indexed else (batch,)))
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if self.probe.reads != "inputs" and loss is not None and loss.requires_grad:
                loss.backward()
        called |= names
        for parameter in module.parameters():
            parameter.grad = None
        return loss is not None

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = bool(state_dict["done"])


class _Everyone:
    """All processes of a Trainer, as a probe asks them; see :class:`lightning_peft.rank.probe.Processes`."""

    def __init__(self, trainer: Trainer) -> None:
        self.count = trainer.world_size
        self.rank = trainer.global_rank
        self._strategy = trainer.strategy

    def gather(self, value: Any) -> list[Any]:
        if not isinstance(value, Tensor):
            return gather_objects(value)
        # Each in a row of its own: to add zeros is exact.
        every = value.new_zeros(self.count, *value.shape)
        every[self.rank] = value
        return list(self.sum(every))

    def mean(self, tensor: Tensor) -> Tensor:
        mean: Tensor = self._strategy.reduce(tensor.clone(), reduce_op="mean")
        return mean

    def sum(self, tensor: Tensor) -> Tensor:
        total: Tensor = self._strategy.reduce(tensor.clone(), reduce_op="sum")
        return total

    def whole(self, tensor: Tensor) -> Tensor:
        return whole(tensor)

    def like(self, value: Tensor, parameter: Tensor) -> Tensor:
        return like(value, parameter)
