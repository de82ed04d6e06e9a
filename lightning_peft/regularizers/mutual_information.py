"""MutualInformation: features that tell more of the labels, or of another view of the same example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import isfinite, log
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lightning_peft.arguments import require_integer, require_number
from lightning_peft.functional.mutual_information import (
    ESTIMATORS,
    dv,
    dv_surrogate,
    estimate,
    info_nce,
    jsd,
    next_log_moving,
    nwj,
)
from lightning_peft.patterns import require_patterns
from lightning_peft.regularizers.base import Regularizer, Weight
from lightning_peft.regularizers.critics import Critic, CriticFactory, SeparableCritic
from lightning_peft.regularizers.probes import Pool, only_probed, probed, probed_width, require_pool
from lightning_peft.regularizers.views import WORDS, Views
from lightning_peft.regularizers.wide import Wide

EstimatorName = Literal["info_nce", "jsd", "dv", "nwj", "smile"]
_NAMES = ("info_nce", "jsd", "dv", "nwj", "smile")
_LEAST_PAIRS = 8


class MutualInformation(Regularizer, Wide):
    """Reward features of named layers for what they tell of something else, by a lower bound of the information.

        term = - mean over layers of I_hat( x_l; z ),    scores s_ij = T(x_i, z_j) of all pairs of the global batch

    x is what a layer gives for each example, pooled over positions. z is one of these:

        of="labels"     the label, as a learnt embedding ("info_nce" without a critic) or one-hot
        of="dropout"    the same layer on the same inputs under other dropout masks: the model runs twice (SimCSE)
        of="halves"     example i + N/2 of the batch for example i of its first half: views that the data made
        of=<pattern>    what another layer gives, detached: information can then grow only through x

    "info_nce" without a `critic` scores cosine / temperature, and is the mean of both directions. All others are of a
    critic, a network of the term that is trained with the model, for it maximises the same bound. "jsd" and "smile"
    train on the objective of Deep InfoMax, which is in no unit; read are NWJ and SMILE. "dv" has MINE's corrected
    gradient, by a moving average that is a buffer of the term.

    Logged beside the term, in nats: `information` (the mean over layers), its `ceiling` ln N for "info_nce" (the others
    have none), `examples`, which is N, and with several layers each one's own by its name.

    With of="dropout", put it before other terms: what follows it would hear the second pass as well.

    Args:
        layers: patterns of the layers whose features are rewarded, as of `targets`.
        of: "labels", "dropout", "halves", or a pattern of one other layer.
        weight: what the term is multiplied by, at least 0: a number, or a function of (step, total).
        estimator: "info_nce", "jsd", "dv", "nwj" or "smile".
        critic: makes a critic of two widths, one for every layer: `SeparableCritic`; ``None`` for cosines with
            "info_nce", for a SeparableCritic with the others.
        temperature: of cosines.
        classes: how many labels there are; for of="labels".
        nats: how much information the estimate is to be able to show. Batches whose ceiling is below that are refused,
            but for one that an epoch leaves over. ``None`` for half of ln(classes), or for what 8 pairs can show.
        pool: how positions become one row: their "mean" or the "first" or "last", of those that `attention_mask` shows.
        features: width of the layers' features; ``None`` to read it from the layers.
        tau: of "smile".
        rate: of the moving average of "dv".
        called: with of="dropout", the name of the module that is called again; see `of` of
            :class:`~lightning_peft.Distillation`.

    Raises:
        TypeError: an argument is of another type.
        ValueError: one is out of range, or a pattern matches no layer; the weight is negative: to have less
            information, an upper bound is made less.
        RuntimeError: while training: a layer was not called once; there are no labels, or others; the batch is too
            small for what is asked; the two views are the same; batches of processes are of unequal sizes.

    Reference:
        van den Oord et al., 2018, arXiv 1807.03748 (InfoNCE); Hjelm et al., ICLR 2019, arXiv 1808.06670 (JSD);
        Belghazi et al., ICML 2018, arXiv 1801.04062 (DV). Cosines, and a second dropout mask for a view, are as in
        SimCSE (Gao et al., EMNLP 2021, remembered). Critic and model in one step, NWJ as the read-out of JSD, and
        `nats`: our choices.

    Example:
        >>> MutualInformation(["encoder"], classes=4).estimator
        'info_nce'
    """

    log_moving: Tensor

    def __init__(
        self,
        layers: Sequence[str],
        of: str = "labels",
        weight: Weight = 0.05,
        estimator: EstimatorName = "info_nce",
        critic: CriticFactory | None = None,
        temperature: float = 0.1,
        classes: int | None = None,
        nats: float | None = None,
        pool: Pool = "mean",
        features: int | None = None,
        tau: float = 5.0,
        rate: float = 0.01,
        called: str | None = None,
    ) -> None:
        super().__init__(weight)
        require_patterns("layers", layers)
        if not layers:
            raise ValueError("layers=[] names no layer whose features could tell more. Name one: layers=['pooler'].")
        if not isinstance(of, str):
            raise TypeError(f"of must be 'labels', 'dropout', 'halves' or a pattern of a layer. Got {of!r}.")
        if estimator not in _NAMES:
            raise ValueError(f"estimator={estimator!r}: choose {', '.join(map(repr, _NAMES))}.")
        if not callable(weight):
            require_number("weight", weight)
            _require_reward(weight)
        if isinstance(critic, nn.Module) or (critic is not None and not callable(critic)):
            raise TypeError(
                "critic makes a critic for each layer from two widths: SeparableCritic, or partial(ConcatCritic, "
                f"hidden=64). Got {critic!r}."
            )
        for name, value in (("temperature", temperature), ("tau", tau), ("rate", rate)):
            require_number(name, value)
            if not value > 0 or (name == "rate" and value > 1) or (name == "temperature" and not isfinite(value)):
                limit = {"rate": ", at most 1", "temperature": " and finite"}.get(name, "")
                raise ValueError(f"{name} must be positive{limit}. Got {value}.")
        for name, count, least in (("classes", classes, 2), ("features", features, 1)):
            if count is not None:
                require_integer(name, count)
                if count < least:
                    raise ValueError(f"{name} must be at least {least}. Got {count}.")
        if of == "labels" and classes is None:
            raise ValueError(
                "of='labels' learns something for every label: say how many there are, MutualInformation(classes=...)."
            )
        require_pool(pool)
        if nats is not None:
            require_number("nats", nats)
            if not (nats >= 0 and isfinite(nats)):
                raise ValueError(f"nats is an amount of information, at least 0 and finite. Got {nats}.")
        if called is not None and of != "dropout":
            raise ValueError(f"called={called!r} names what is called again, which is done with of='dropout' alone.")
        self.layers, self.of, self.estimator, self.critic = tuple(layers), of, estimator, critic
        self.temperature, self.classes, self.pool, self.width = float(temperature), classes, pool, features
        self.tau, self.rate, self.called = float(tau), float(rate), called
        self.nats = (log(classes) / 2 if of == "labels" and classes else log(_LEAST_PAIRS)) if nats is None else nats
        self.critics, self.embeddings = nn.ModuleList(), nn.ModuleList()
        self.register_buffer("log_moving", torch.empty(0))
        self._names: tuple[str, ...] = ()
        self._other: str | None = None
        self._views: Views | None = None
        self._looked = False  # whether a step of this fit has been looked at where that waits for the device
        self._enough = self._left_over = False  # whether a batch was large enough; whether one was not
        self._figures: dict[str, Tensor] = {}

    @property
    def cosine(self) -> bool:
        """Whether pairs are scored by their cosine and not by a critic."""
        return self.estimator == "info_nce" and self.critic is None

    def attach(self, module: nn.Module) -> None:
        """Make critics or embeddings, for a module that was not seen before."""
        names = tuple(probed(module, self.layers, "layers"))
        self._other = None if self.of in WORDS else only_probed(module, self.of, "of")
        if self._other in names:
            raise ValueError(f"layers and of both name {self._other!r}, which has all information of itself.")
        if names == self._names and any(child is self for child in module.modules()):
            return
        self._names = names
        self.critics, self.embeddings = nn.ModuleList(), nn.ModuleList()
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.log_moving = torch.full((len(names),), -torch.inf, device=device)
        if self.cosine and self.of != "labels":
            return
        for name in names:
            d_x = probed_width(module, name, self.width)
            if self.cosine:
                assert self.classes is not None
                self.embeddings.append(nn.Embedding(self.classes, d_x, device=device))
                continue
            if self.of == "labels":
                assert self.classes is not None
                d_z = self.classes
            else:
                d_z = d_x if self._other is None else probed_width(module, self._other, self.width)
            built = (self.critic or SeparableCritic)(d_x, d_z)
            if not isinstance(built, Critic):
                raise TypeError(f"critic must make a Critic, as SeparableCritic does. Got a {type(built).__name__}.")
            self.critics.append(built.to(device))

    def begin(self, module: nn.Module) -> None:
        """Have the hooks in place."""
        self.end()
        self._views = Views(module, self._names, self.of, self._other, self.pool, self.called)
        self._looked = False

    def end(self) -> None:
        """Take the hooks off."""
        if self._views is not None:
            self._views.detach()
        self._views = None

    def weight_at(self, step: int, total: int) -> float:
        weight = super().weight_at(step, total)
        _require_reward(weight)
        return weight

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Hear what the layers give inside the block; then, with of="dropout", what they give another time."""
        with self._heard().listening(module):
            yield

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        x, other = self._heard().pairs(batch, self.everyone, first=not self._looked)
        z = self._of_labels(other) if isinstance(other, Tensor) else other
        n = len(x[0])
        self._looked = True
        self._require_pairs(n)
        scores, values, objectives = self._grouped(x, z), [], []
        for members, each in scores:
            objective, value = self._estimates(each, self.log_moving[members])
            objectives.append(objective)
            values.append(value)
        if self.estimator == "dv" and torch.is_grad_enabled():
            self._move(scores)
        total = torch.cat(objectives).mean()
        order = [member for members, _ in scores for member in members]
        found = torch.cat(values).detach()
        self._figures = {"information": found.mean(), "examples": torch.tensor(float(n))}
        if ESTIMATORS[self.estimator].capped:
            self._figures["ceiling"] = torch.tensor(log(n))
        if len(order) > 1:
            self._figures |= dict(zip([self._names[member] for member in order], found.unbind(), strict=True))
        return -total

    def figures(self) -> Mapping[str, Tensor]:
        return self._figures

    def progress(self) -> dict[str, Any]:
        return {**super().progress(), "enough": self._enough, "left_over": self._left_over}

    def go_on(self, progress: Mapping[str, Any]) -> None:
        super().go_on(progress)
        self._enough, self._left_over = bool(progress["enough"]), bool(progress["left_over"])

    def _of_labels(self, labels: Tensor) -> list[Tensor]:
        assert self.classes is not None
        if not self._looked or labels.device.type == "cpu":  # elsewhere once in a fit: to look waits for the device
            odd = labels[(labels < 0) | (labels >= self.classes)].tolist()
            if odd:
                raise RuntimeError(
                    f"of='labels' with classes={self.classes} takes labels from 0 to {self.classes - 1}, and this step "
                    f"has {odd[0]}. Say how many there are, MutualInformation(classes=...), and leave out examples "
                    "that have none."
                )
        if self.cosine:
            weights: list[Tensor] = [each.weight for each in self.embeddings]  # type: ignore[misc]
            if len({weight.shape for weight in weights}) == 1:
                return list(torch.stack(weights).index_select(1, labels.long()).unbind())
            return [F.embedding(labels, weight) for weight in weights]
        return [F.one_hot(labels.long(), self.classes).to(self.log_moving.dtype)] * len(self._names)

    def _grouped(self, x: Sequence[Tensor], z: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
        """Scores of all pairs, (L, N, N), of layers of equal widths, with these layers' places."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (one, other) in enumerate(zip(x, z, strict=True)):
            groups.setdefault((one.shape[1], other.shape[1]), []).append(i)
        found = []
        for members in groups.values():
            xs, zs = torch.stack([x[i] for i in members]), torch.stack([z[i] for i in members])
            if self.cosine:
                if xs.shape[2] != zs.shape[2]:
                    raise RuntimeError(
                        f"a cosine is of two rows of equal width, and {self._names[members[0]]!r} gives {xs.shape[2]} "
                        f"features, {self._other!r} {zs.shape[2]}. Give a critic: critic=SeparableCritic."
                    )
                scores = F.normalize(xs, dim=2) @ F.normalize(zs.to(xs.dtype), dim=2).mT / self.temperature
            else:
                scores = self._criticised([self.critics[i] for i in members], xs, zs)  # type: ignore[misc]
            found.append((members, scores))
        return found

    def _criticised(self, critics: Sequence[Critic], xs: Tensor, zs: Tensor) -> Tensor:
        if len(critics) == 1 or not all(critic.stackable for critic in critics):
            return torch.stack([critic(x, z) for critic, x, z in zip(critics, xs, zs, strict=True)])
        names = [name for name, _ in critics[0].named_parameters()]
        own = [dict(critic.named_parameters()) for critic in critics]
        stacked = {name: torch.stack([each[name] for each in own]) for name in names}
        scores: Tensor = vmap(lambda state, x, z: functional_call(critics[0], state, (x, z)))(stacked, xs, zs)
        return scores

    def _estimates(self, scores: Tensor, log_moving: Tensor) -> tuple[Tensor, Tensor]:
        """What is maximised and what is read, of (L, N, N): (L,) each."""
        match self.estimator:
            case "info_nce":
                value = _each(partial(info_nce, symmetric=self.cosine), scores)
                return value, value
            case "nwj":
                value = _each(nwj, scores)
                return value, value
            case "dv":
                value = _each(dv, scores).detach()
                surrogate = _each(dv_surrogate, scores, log_moving)
                return value + (surrogate - surrogate.detach()), value
            case _:
                read = partial(estimate, self.estimator, tau=self.tau)
                return _each(jsd, scores), _each(read, scores.detach())

    @torch.no_grad()
    def _move(self, scores: Sequence[tuple[list[int], Tensor]]) -> None:
        for members, each in scores:
            moved = _each(partial(next_log_moving, rate=self.rate), self.log_moving[members], each.detach())
            self.log_moving[members] = moved.to(self.log_moving.dtype)

    def _require_pairs(self, n: int) -> None:
        if n < 2:
            raise RuntimeError(
                f"information is estimated by comparing examples with one another, and this step has {n} over all "
                "processes. Use larger batches, and drop_last=True where the last one may be smaller."
            )
        ceiling = ESTIMATORS[self.estimator].ceiling(n)
        if ceiling >= self.nats:
            self._enough = True
        elif not self._enough and not self._left_over:
            self._left_over = True  # an epoch's last batch may come first, or first after a checkpoint
        elif not self._enough:
            raise RuntimeError(
                f"the estimate {self.estimator!r} of {n} pairs is never above its ceiling, ln {n} = {ceiling:.2f} "
                f"nats, and is to be able to show {self.nats:.2f}. Use batches of {_pairs(self.nats)} pairs or more "
                "over all processes, or ask for less: MutualInformation(nats=...)."
            )

    def _heard(self) -> Views:
        if self._views is None:
            raise RuntimeError("MutualInformation hears no layer yet: begin(module) comes before a step.")
        return self._views

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MutualInformation:
        # A moving average in bfloat16 would not move.
        before = self.log_moving
        super()._apply(fn, recurse)
        if self.log_moving.dtype not in (torch.float32, torch.float64):
            self.log_moving = before.to(self.log_moving.device)
        return self


def _each(function: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """A function of each layer's tensors: (L, ...) -> (L,), in one pass."""
    if len(stacks[0]) == 1:
        return function(*(stack[0] for stack in stacks)).reshape(1)
    found: Tensor = vmap(function)(*stacks)
    return found


def _pairs(nats: float) -> int:
    return int(torch.tensor(nats, dtype=torch.float64).exp().sub(1e-9).ceil())


def _require_reward(weight: float) -> None:
    if not (weight >= 0 and isfinite(weight)):
        raise ValueError(
            f"a lower bound can be made more and says nothing where it is made less: the weight of MutualInformation "
            f"is at least 0. Got {weight}. To have less information, take an upper bound: CLUB or VIB."
        )
