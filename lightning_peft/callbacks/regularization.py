"""Regularization: terms in the loss of a module that nobody has to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.callbacks.examples import count_examples
from lightning_peft.callbacks.order import callbacks_of, require_before, require_one
from lightning_peft.callbacks.placement import AdapterPlacement
from lightning_peft.callbacks.preflight import Preflight, optimized
from lightning_peft.callbacks.reentrant import recomputes, with_early_gradients
from lightning_peft.default_dtype import float32_by_default
from lightning_peft.distributed import Processes, average_gradients, broadcast, is_shard, world_size
from lightning_peft.regularizers.base import Regularizer, regularized
from lightning_peft.seams import when_built, wrap_method
from lightning_peft.strategies import averaged, counts_gradients, is_sharded, keep_whole

_PROGRESS = "lightning_peft_terms"
"""The key, in a checkpoint, of where terms stand beside their parameters and buffers."""


class Regularization(Preflight):
    """Add terms to what `training_step` returns.

        loss = task + sum_i weight_i term_i

    The loss is still a loss there: accumulation, gradient scaling and synchronisation come after it and need no care.
    Terms are evaluated in float32 outside autocast; each is logged as `loss/<name>`, what the user returned as
    `loss/task`. Validation and test losses stay as they are. A term whose weight is 0 at a step is not evaluated.

    Re-entrant activation checkpointing beside terms, at which DDP stops ("marked as ready twice"), needs no care.
    Whether a model uses it is seen at the first training step.

    Args:
        terms: terms by name; two of one class are fine.

    Raises:
        MisconfigurationException: the module optimizes by hand, or returns no loss.
        ValueError: a name cannot be used in a log.
        TypeError: a term is no Regularizer.

    Example:
        >>> from lightning_peft import DEM, Orthogonality
        >>> regularization = Regularization({"dem": DEM(0.3), "orthogonality": Orthogonality(0.1)})
    """

    def __init__(self, terms: Mapping[str, Regularizer]) -> None:
        given: object = terms
        if not isinstance(given, Mapping) or not terms:
            raise TypeError(f"terms are given by name, at least one: {{'dem': DEM()}}. Got {terms!r}.")
        for name in terms:
            if not name.isidentifier() or name == "task":
                raise ValueError(
                    f"a term's name must be an identifier other than 'task', as in loss/<name>. Got {name!r}."
                )
        for name, term in terms.items():
            if not isinstance(term, Regularizer):
                raise TypeError(f"the term {name!r} must be a Regularizer. Got {_name_of(term)}.")
        self.terms = nn.ModuleDict(terms)
        self._undo: list[Callable[[], None]] = []
        self._total_steps: int | None = None
        self._recomputes: bool | None = None
        self._begun = False
        self._averaged: list[nn.Parameter] = []

    def before_adapters(self, module: LightningModule) -> None:
        for term in self._each().values():
            term.before_adapters(module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._recomputes = None
        require_before(trainer, self, AdapterPlacement)
        require_one(trainer, Regularization, "give all terms to one: Regularization({'first': ..., 'second': ...})")
        when_built(pl_module, self.before_adapters)  # for those whose adapters nobody places
        when_built(pl_module, self._attach)
        when_built(pl_module, self._register)
        when_built(pl_module, lambda module: keep_whole(trainer.strategy, module))
        if stage == "fit" and not self._undo:
            links = [("training_step", self._add_terms), ("backward", self._recompute)]
            self._undo = [wrap_method(pl_module, name, link) for name, link in links]

    def _attach(self, module: LightningModule) -> None:
        # In whatever dtype `configure_model` runs: terms decide for themselves what the Trainer may cast.
        with float32_by_default():
            for term in self._each().values():
                term.attach(module)

    def _register(self, module: LightningModule) -> None:
        # Terms may own parameters: as a child of the module they reach optimizer, strategy and checkpoint. They stay
        # after the run, for checkpoints made then, until another trainer brings its own.
        module.add_module("peft_terms", self.terms)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes by hand (automatic_optimization=False), where the loss is its "
                "own affair and terms added to what training_step returns have no effect. Remove the Regularization "
                "callback and call lightning_peft.regularized(loss, terms, weights) before manual_backward."
            )
        for name, term in self._each().items():
            if any(parameter.requires_grad for parameter in term.apart()):
                raise MisconfigurationException(
                    f"the term {name!r} trains its own parameters by itself, and something has thawed them since "
                    "(unfreeze(), requires_grad_(True), a finetuning callback), so that the module's optimizer would "
                    "train them against it. Thaw the layers that are meant, by name, or before training."
                )
        held = optimized(trainer)
        for name, parameter in self.terms.named_parameters():
            if parameter.requires_grad and id(parameter) not in held:
                raise MisconfigurationException(
                    f"{name!r} of the terms is in no optimizer, so it would not be trained. Let configure_optimizers "
                    "take every parameter that requires grad, or add those of `self.peft_terms` to a group."
                )
        total = trainer.estimated_stepping_batches
        scheduled = [name for name, term in self.terms.items() if callable(term.weight)]
        if total == float("inf") and scheduled:
            raise MisconfigurationException(
                f"the weight of {scheduled[0]!r} follows a schedule, and the Trainer does not know its number of "
                "steps. Set max_steps or max_epochs."
            )
        self._total_steps = _steps(trainer)
        if is_sharded(trainer.strategy):
            if not any(isinstance(c, Preflight) and c.averages_gradients for c in callbacks_of(trainer)):
                self._averaged = averaged(trainer.strategy, pl_module)
                broadcast(self._averaged)
            # Made of adapters that have process 0's start by now.
            broadcast([*self.terms.buffers(), *(p for p in self.terms.parameters() if not is_shard(p))])
        self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        if self._begun:
            return
        self._begun = True
        strategy = trainer.strategy
        for term in self._each().values():
            if term.counts_examples:
                term.examples = count_examples(trainer)
            if world_size() > 1:
                term.everyone = Processes()
            term.begin(module)
            for companion in term.companions():
                strategy.precision_plugin.convert_module(companion).to(strategy.root_device)

    def _each(self) -> dict[str, Regularizer]:
        return dict(self.terms.items())  # type: ignore[arg-type]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._total_steps = _steps(trainer)  # a batch-size finder changes it after our on_fit_start

    def _add_terms(self, call: Callable[..., Any], module: LightningModule, *args: Any, **kwargs: Any) -> Any:
        step = module.trainer.global_step + 1
        if self._total_steps is None:
            self._total_steps = _steps(module.trainer)  # a learning-rate finder trains before our on_fit_start
        self._begin(module.trainer, module)
        terms = self._each()
        weights = {name: term.weight_at(step, self._total_steps) for name, term in terms.items()}
        batch = args[0] if args else next(iter(kwargs.values()), None)
        for term in terms.values():
            term.prepare(module, batch, step, self._total_steps)
        with ExitStack() as watched:
            for name, term in terms.items():
                if weights[name] != 0:
                    watched.enter_context(term.watching(module))
            outputs = call(*args, **kwargs)
        if outputs is None:
            return None  # the user skips this batch
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            kind = f"{type(outputs).__name__} of {', '.join(outputs)}" if isinstance(outputs, Mapping) else _kind(loss)
            raise MisconfigurationException(
                f"training_step of {type(module).__name__} must return a scalar loss, or a dictionary with one under "
                f"'loss', for terms to be added. Got a {kind}."
            )
        with torch.autocast(loss.device.type, enabled=False):
            values = {name: term(module, batch, outputs) for name, term in terms.items() if weights[name] != 0}
            total = self._sum(module, loss, values, weights)
        module.log("loss/task", loss.detach(), rank_zero_only=True)
        for name, value in values.items():
            module.log(f"loss/{name}", value.detach(), rank_zero_only=True)
            for figure, number in terms[name].figures().items():
                module.log(f"{name}/{figure}", number, rank_zero_only=True)
        if isinstance(outputs, Mapping):
            return {**outputs, "loss": total}
        return total

    def _recompute(self, call: Callable[..., Any], module: LightningModule, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as held:
            for term in self._each().values():
                held.enter_context(term.recomputing(module))
            call(*args, **kwargs)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where there are no adapters, whose callback averages all that is whole.
        if self._averaged and not trainer.fit_loop._should_accumulate():
            average_gradients(self._averaged)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for term in self._each().values():
            for parameter in term.resting():
                parameter.grad = None  # a zero would let momentum and weight decay go on

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_PROGRESS] = {name: term.progress() for name, term in self._each().items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for name, progress in checkpoint.get(_PROGRESS, {}).items():
            if name in self.terms:
                self._each()[name].go_on(progress)

    def _sum(
        self, module: LightningModule, loss: Tensor, values: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> Tensor:
        if not (values and loss.requires_grad and counts_gradients(module.trainer.strategy)):
            return regularized(loss, values, weights)
        if self._recomputes is None:
            self._recomputes = recomputes(loss)
        if not self._recomputes:
            return regularized(loss, values, weights)
        noisy = next((name for name, term in self._each().items() if term.perturbs), None)
        if noisy is not None:
            raise MisconfigurationException(
                f"the term {noisy!r} has parameters in every layer that is computed again, and DDP takes their "
                "gradient once: re-entrant activation checkpointing gives it once for each part. Set "
                "use_reentrant=False."
            )
        # A term of what the checkpointed layers gave has its gradient in their backward, and no other.
        late = {name: value for name, value in values.items() if recomputes(value)}
        early = {name: value for name, value in values.items() if name not in late}
        total = regularized(loss, late, weights)
        own = [p for p in self.terms.parameters() if p.requires_grad]
        others = [p for p in module.parameters() if p.requires_grad and not any(p is q for q in own)]
        return with_early_gradients(total, regularized(total.new_zeros(()), early, weights), others, own)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unwrap()
        for term in self._each().values():
            for companion in term.companions():
                companion.cpu()  # as the strategy does with the module

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unwrap()

    def _unwrap(self) -> None:
        self._begun, self._averaged = False, []
        for term in self._each().values():
            term.end()
            term.__dict__.pop("everyone", None)
        while self._undo:
            self._undo.pop()()


def _steps(trainer: Trainer) -> int:
    """How many optimizer steps the Trainer plans; 0 if it does not know."""
    total = trainer.estimated_stepping_batches
    return 0 if total == float("inf") else int(total)


def _name_of(term: object) -> str:
    return f"the class {term.__name__}: write {term.__name__}()" if isinstance(term, type) else type(term).__name__


def _kind(value: object) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
