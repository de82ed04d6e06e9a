"""Distillation: keep close to a teacher, as a rule the dense model that is being compressed (Hinton et al., 2015)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.arguments import require_number
from lightning_peft.functional.distillation import mean_square, softened_kl
from lightning_peft.regularizers.base import Regularizer, Weight
from lightning_peft.regularizers.calls import Call, Calls, logits_of, shown_rows, with_logits
from lightning_peft.regularizers.teacher import dense_copy, fingerprint

Loss = Literal["kl", "mse"]


class Distillation(Regularizer):
    """How far the model's outputs are from those of a frozen teacher on the same inputs.

        logits:   T^2 KL( softmax(teacher / T) || softmax(student / T) )     ("kl"), or the mean squared error ("mse")
        hidden:   hidden_weight * mean over modules of the mean squared error of their outputs

    The teacher runs without gradients and in eval mode, on what the student was called with, in the same precision, at
    steps at which the weight is not 0. Where the student is called with a 2-d `attention_mask`, positions that it hides
    count for nothing.

    Without a `teacher`, it is a copy of the module as it was handed to the Trainer, made before adapters are put in. So
    compress a model that is trained for its task, and build it in the same way when you resume: a checkpoint knows the
    teacher by a few of its values, and does not contain it.

    The teacher is no child of the module. It is in no optimizer, no checkpoint and no wrapper, whole on every process,
    and costs its weights in memory and a forward per step.

    Args:
        weight: what the term is multiplied by: a number, or a function of (step, total).
        teacher: a module to call as the student is called, which is frozen and put into eval mode; or what builds it,
            on every process alike; or ``None`` for the module itself, before adapters. A module of the class of
            the one that is trained may be given whole: its part `of` is the teacher.
        of: name of the module inside that is the student, whose output has the logits; "" for the whole module, where
            `training_step` calls `self(...)`. ``None`` for the only child that has parameters.
        loss: "kl" for classes, "mse" for regression and raw logits; ``None`` to compare hidden states alone.
        temperature: T of "kl".
        hidden: names, within the student, of modules whose outputs are compared too.
        hidden_weight: what their part is multiplied by.
        read: gets the logits from the student's output; ``None`` for the output itself, or its `logits`.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a value is out of range, there is no module of a name, or teacher and student share parameters.
        RuntimeError: while training: there is no teacher, it is another one than the checkpoint's, the student or a
            module of `hidden` was not called, or its output is of another shape than the teacher's.

    Reference:
        Hinton et al., 2015, arXiv 1503.02531 (logits); Sun et al., Patient Knowledge Distillation, EMNLP 2019, arXiv
        1908.09355 (hidden states); both remembered. Departure: hidden states are compared as they are, where the
        latter normalises them: student and teacher begin with the same ones.

    Example:
        >>> Distillation(0.5, temperature=4.0, hidden=["encoder.layer.5"]).loss
        'kl'
    """

    teacher_print: Tensor

    def __init__(
        self,
        weight: Weight = 1.0,
        teacher: nn.Module | Callable[[], nn.Module] | None = None,
        of: str | None = None,
        loss: Loss | None = "kl",
        temperature: float = 2.0,
        hidden: Sequence[str] = (),
        hidden_weight: float = 1.0,
        read: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(weight)
        if loss not in ("kl", "mse", None):
            raise ValueError(
                f"loss={loss!r}: choose 'kl' (classes), 'mse' (regression), or None (hidden states alone)."
            )
        require_number("temperature", temperature)
        require_number("hidden_weight", hidden_weight)
        if not temperature > 0:
            raise ValueError(f"temperature divides the logits and must be positive. Got {temperature}.")
        if not hidden_weight > 0:
            raise ValueError(
                f"hidden_weight must be positive; leave `hidden` empty for no hidden states. Got {hidden_weight}."
            )
        if isinstance(hidden, str):
            raise TypeError(f"hidden must be a list of names, not one string. Write hidden=[{hidden!r}].")
        if loss is None and not hidden:
            raise ValueError(
                "loss=None compares hidden states alone, and hidden names none: hidden=['encoder.layer.5']."
            )
        if teacher is not None and not callable(teacher):
            raise TypeError(f"teacher must be a module, or what builds one when it is called. Got {teacher!r}.")
        self.of, self.loss, self.temperature, self.read = of, loss, float(temperature), read
        self.hidden, self.hidden_weight = tuple(hidden), float(hidden_weight)
        # Beside the module's children: whatever walks through the module must not meet the teacher.
        self.__dict__["_given"] = teacher
        self.__dict__["_teacher"] = None
        self._copied = 0  # id of the module that the teacher is a copy of
        self._print = 0
        self._checked = False
        self._student_calls: Calls | None = None
        self._teacher_calls: Calls | None = None
        self._heard: list[tuple[Call, Call]] = []
        self.register_buffer("teacher_print", torch.zeros((), dtype=torch.int64))

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher, once there is one."""
        found: nn.Module | None = self.__dict__["_teacher"]
        return found

    def before_adapters(self, module: nn.Module) -> None:
        """Copy the student, if it is to be its own teacher and this is a module that was not seen before."""
        if self.__dict__["_given"] is not None or any(child is self for child in module.modules()):
            return
        student = with_logits(module, self.of, "Distillation")
        teacher = dense_copy(student)
        if teacher is not None:  # else there is no dense model any more, as `begin` will say
            self._take(teacher)
            self._copied = id(module)

    def begin(self, module: nn.Module) -> None:
        """Have the teacher ready, and the hooks in place."""
        student, given = with_logits(module, self.of, "Distillation"), self.__dict__["_given"]
        if given is not None and self.teacher is None:
            teacher = given if isinstance(given, nn.Module) else given()
            if not isinstance(teacher, nn.Module):
                raise TypeError(f"teacher must build a module. Got a {type(teacher).__name__}.")
            alike = isinstance(teacher, type(module)) or isinstance(module, type(teacher))
            if student is not module and alike:
                teacher = with_logits(teacher, self.of, "Distillation")
            shared = {id(p) for p in teacher.parameters()} & {id(p) for p in module.parameters()}
            if shared:
                name = next(name for name, p in module.named_parameters() if id(p) in shared)
                raise ValueError(
                    f"the teacher shares {name!r} with the module that is trained, so it would learn with it. Give a "
                    "copy (copy.deepcopy), or leave teacher out: Distillation then copies the module itself."
                )
            self._take(teacher)
        if self.teacher is None or (given is None and self._copied != id(module)):
            raise RuntimeError(
                "Distillation has no teacher: it copies the module before adapters are put in, and when the Trainer "
                "came by they were in already, or the module was sharded or without memory. Leave the injection to "
                "AdapterInjection, or give Distillation(teacher=<a module, or a function that builds it>)."
            )
        self._checked = False
        self.end()
        self._student_calls, self._teacher_calls = Calls(student, self.hidden), Calls(self.teacher, self.hidden)
        self._student_calls.attach()

    def end(self) -> None:
        """Take the hooks off."""
        for calls in (self._student_calls, self._teacher_calls):
            if calls is not None:
                calls.detach()
        self._student_calls = self._teacher_calls = None
        self._heard = []

    def companions(self) -> Iterable[nn.Module]:
        return () if self.teacher is None else (self.teacher,)

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Hear what the student does inside the block, then have the teacher do the same."""
        if self._student_calls is None or self._teacher_calls is None or self.teacher is None:
            raise RuntimeError("Distillation.watching comes after begin(module), which has the teacher ready.")
        self._require_same_teacher()
        student, teacher = self._student_calls, self._teacher_calls
        student.attach()
        teacher.attach()
        self._heard = []
        student.taken()
        student.on = True
        try:
            yield
        finally:
            student.on = False
        heard = student.taken()
        # Here and not in `forward`, which is outside autocast.
        teacher.on = True
        try:
            with torch.no_grad():
                for call in heard:
                    self.teacher(*call.args, **call.kwargs)
        finally:
            teacher.on = False
        self._heard = list(zip(heard, teacher.taken(), strict=True))

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        heard, self._heard = self._heard, []
        if not heard:
            raise RuntimeError(
                f"training_step did not call {self._called()}, whose outputs are to be distilled. Name what it calls, "
                "as `of`; calling a module's forward() does not call the module."
            )
        return torch.stack([self._compare(student, teacher) for student, teacher in heard]).mean()

    def _compare(self, student: Call, teacher: Call) -> Tensor:
        parts = [] if self.loss is None else [self._compare_logits(student, teacher)]
        if self.hidden:
            mask = student.kwargs.get("attention_mask")
            pairs = [pair for name in self.hidden for pair in self._states(name, student, teacher)]
            errors = [mean_square(one, other, shown_rows(mask, one)) for one, other in pairs]
            parts.append(self.hidden_weight * torch.stack(errors).mean())
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _compare_logits(self, student: Call, teacher: Call) -> Tensor:
        ours, theirs = self._logits(student.output), self._logits(teacher.output)
        _require_alike("logits", ours, theirs)
        shown = shown_rows(student.kwargs.get("attention_mask"), ours)
        if self.loss == "mse":
            return mean_square(ours, theirs, shown)
        if ours.shape[-1] == 1:
            raise RuntimeError(
                "loss='kl' compares distributions over classes, and the logits have one column. Use loss='mse'."
            )
        return softened_kl(ours, theirs, self.temperature, shown)

    def _states(self, name: str, student: Call, teacher: Call) -> list[tuple[Tensor, Tensor]]:
        ours, theirs = student.inside.get(name, []), teacher.inside.get(name, [])
        if not ours or len(ours) != len(theirs):
            raise RuntimeError(
                f"hidden={name!r}: the student called it {len(ours)} times and the teacher {len(theirs)} times. Name a "
                "module that both call alike and that returns a tensor."
            )
        assert self._student_calls is not None
        if name in self._student_calls.blind and torch.is_grad_enabled():
            raise RuntimeError(
                f"hidden={name!r}: it ran without gradients, as re-entrant activation checkpointing runs layers. Set "
                "use_reentrant=False, or name modules outside of what is checkpointed."
            )
        for one, other in zip(ours, theirs, strict=True):
            _require_alike(f"outputs of {name!r}", one, other)
        return list(zip(ours, theirs, strict=True))

    def _logits(self, output: Any) -> Tensor:
        return logits_of(output, self.read, self._called(), "Distillation")

    def _called(self) -> str:
        return "the module itself" if self.of == "" else f"{self.of or 'its only child'!r}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._checked = False  # a learning-rate finder restores what was before the first step

    def _take(self, teacher: nn.Module) -> None:
        self.__dict__["_teacher"] = teacher.eval().requires_grad_(False)
        self._print = fingerprint(teacher)
        self.teacher_print.zero_()

    def _require_same_teacher(self) -> None:
        # At the first step: before it, every strategy has restored what there is to restore.
        if self._checked:
            return
        self._checked = True
        known = int(self.teacher_print)
        if known not in (0, self._print):
            raise RuntimeError(
                "the teacher is not the one that this run began with: its weights are others. Build the module from "
                "the same weights as then, its head too, or give that model as Distillation(teacher=...)."
            )
        self.teacher_print.fill_(self._print)


def _require_alike(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise RuntimeError(
            f"the {what} are of shape {tuple(student.shape)}, and the teacher's of shape {tuple(teacher.shape)}: "
            "compare modules of equal widths."
        )
