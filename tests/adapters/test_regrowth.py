"""Entries that are chosen: at the start by magnitude or gradient, and as training goes on by dropping and regrowing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Calibration,
    DropAndRegrow,
    EntrySelection,
    LoRA,
    RankBudget,
    RankPruning,
    SpaRTA,
    eject,
    inject,
    presets,
)
from lightning_peft.adapters.entry_gradients import EntryGradients, largest
from lightning_peft.callbacks.placement import COPIERS
from lightning_peft.compaction import follow_moves
from lightning_peft.rank.probe import Alone
from lightning_peft.rank.schedule import Linear
from lightning_peft.surgery.layers import adapters

WIDTH, DENSITY, LR = 8, 0.2, 1e-2


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 6), nn.Tanh())
            self.head = nn.Linear(6, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.body(batch)).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=LR, weight_decay=0.0)


def loader() -> DataLoader[Any]:
    x = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(1))
    return DataLoader(x, batch_size=4)  # type: ignore[arg-type]


def callbacks(**policy: Any) -> list[L.Callback]:
    options = {"share": 0.3, "schedule": Linear(warmup=0.25, tail=0.25), "interval": 3} | policy
    return [
        AdapterInjection(partial(SpaRTA, density=DENSITY), ["0", "2"]),
        RankPruning(DropAndRegrow(**options)),
        AdapterCheckpoint(),
    ]


def fit(*more: L.Callback, ckpt_path: Path | None = None, **options: Any) -> tuple[Net, L.Trainer]:
    torch.manual_seed(2)
    net = Net()
    trainer = L.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
           "enable_progress_bar": False, "enable_model_summary": False, "callbacks": [*callbacks(), *more]} | options
    )  # fmt: skip
    trainer.fit(net, loader(), ckpt_path=ckpt_path)
    return net, trainer


class Watch(L.Callback):
    """What entries are trained, and what Adam knows of them, after every step; and the gradients of whole weights."""

    def __init__(self) -> None:
        self.indices: list[list[Tensor]] = []
        self.delta: list[list[Tensor]] = []
        self.moments: list[list[Tensor]] = []
        self.dense: list[list[Tensor]] = []
        self._sums: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, i: int) -> None:
        # The same loss with whole weights that want a gradient, beside the run.
        plain = Net()
        for ours, theirs in zip(self._linears(pl_module), (plain.body[0], plain.body[2]), strict=True):
            theirs.weight.data.copy_(ours.effective_weight().detach())  # type: ignore[union-attr]
        plain.head.load_state_dict(pl_module.head.state_dict())  # type: ignore[union-attr]
        plain.training_step(batch, i).backward()
        now = [plain.body[0].weight.grad, plain.body[2].weight.grad]  # type: ignore[union-attr]
        self._sums = [a + b for a, b in zip(self._sums, now, strict=True)] if self._sums else now  # type: ignore[operator, assignment]

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.dense.append(self._sums)
        self._sums = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        found = self._linears(pl_module)
        state = trainer.optimizers[0].state
        if trainer.global_step > len(self.indices):
            self.indices.append([a.indices.clone() for a in found])
            self.delta.append([a.delta.detach().clone() for a in found])
            self.moments.append([state[a.delta]["exp_avg"].clone() for a in found])

    @staticmethod
    def _linears(module: nn.Module) -> list[Any]:
        return list(adapters(module).values())


def test_entries_move_at_events_and_the_base_comes_back() -> None:
    watch = Watch()
    net, _ = fit(watch)
    steps = [
        step for step in range(1, 12) if any(map(different, watch.indices[step - 1], watch.indices[step]))
    ]  # counted from 0: what differs after the step `step + 1`
    assert [step + 1 for step in steps] == [3, 6]  # 9 is the last event, at which the share is 0
    assert [a.delta.numel() for a in watch._linears(net)] == [round(DENSITY * 64), round(DENSITY * 48)]
    start = Net()
    for adapter, base in zip(watch._linears(net), (start.body[0], start.body[2]), strict=True):
        changed = (adapter.effective_weight() != base.weight).flatten().nonzero().flatten()
        assert set(changed.tolist()) <= set(adapter.indices.tolist())
        assert bool((adapter.indices.diff() > 0).all())
    eject(net)
    assert torch.equal(net.body[0].weight, start.body[0].weight)  # type: ignore[union-attr]
    assert torch.equal(net.body[2].weight, start.body[2].weight)  # type: ignore[union-attr]


def different(one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one, other)


def test_least_moved_go_and_largest_gradients_come() -> None:
    """An event beside the same loss differentiated by whole weights, over two micro-batches."""
    watch = Watch()
    fit(watch, accumulate_grad_batches=2)
    event, count = 1, [int(0.3 * 13), int(0.3 * 10)]  # after the second of six steps: floor(0.25 * 6) is the first
    # The deltas of that step, before entries moved: one of a run without moves.
    still = Watch()
    fit(still, accumulate_grad_batches=2, callbacks=[callbacks()[0], still])
    moved = [i for i in range(6) if any(map(different, watch.indices[i], still.indices[i]))]
    event = moved[0]
    for layer in (0, 1):
        before, after = still.indices[event][layer].tolist(), watch.indices[event][layer].tolist()
        size = still.delta[event][layer].abs()
        gone = [before.index(i) for i in before if i not in after]
        assert 0 < len(gone) <= count[layer]
        assert sorted(gone) == sorted(size.argsort(stable=True)[: len(gone)].tolist())
        dense = watch.dense[event][layer].flatten().abs()
        dense[before] = 0
        assert sorted(set(after) - set(before)) == sorted(dense.topk(len(gone)).indices.tolist())
        # Adam's mean goes on where it was, and from zero for what is new.
        for place, i in enumerate(after):
            old = still.moments[event][layer][before.index(i)] if i in before else torch.zeros(())
            assert watch.moments[event][layer][place] == old
            assert watch.delta[event][layer][place] == (
                still.delta[event][layer][before.index(i)] if i in before else 0
            )


class StopAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise SystemExit


@pytest.mark.parametrize("stop", [2, 3, 5, 7])  # before, at and after events
def test_interrupted_is_uninterrupted(stop: int, tmp_path: Path) -> None:
    whole, trainer = fit()
    with pytest.raises(SystemExit):
        fit(StopAt(stop, tmp_path / "stop.ckpt"))
    resumed, again = fit(ckpt_path=tmp_path / "stop.ckpt")
    wanted, found = whole.state_dict(), resumed.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    states = [t.optimizers[0].state_dict()["state"] for t in (trainer, again)]
    assert all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i])


def test_selection_by_magnitude() -> None:
    net = Net()
    inject(net, partial(SpaRTA, density=DENSITY), ["0", "2"])
    probe, budget = EntrySelection("magnitude"), RankBudget.of(net)
    probe.begin(budget, Alone())
    assert not probe.wanted()
    masks = probe.act()
    assert all(mask.all() for mask in masks.values())
    for adapter in adapters(net).values():
        weight = adapter.base.weight.flatten().abs()  # type: ignore[union-attr, operator]
        chosen = torch.zeros_like(weight, dtype=torch.bool)
        chosen[adapter.indices.long()] = True
        assert weight[chosen].min() >= weight[~chosen].max()
    next(iter(adapters(net).values())).delta.data[0] = 1.0  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match=r"'body\.0' has been trained, and to choose other entries"):
        probe.begin(budget, Alone())


def test_selection_by_gradient_before_the_first_step() -> None:
    watch = Watch()
    chosen = [callbacks()[0], Calibration(EntrySelection("gradient"), batches=3), watch]
    net, _ = fit(callbacks=chosen)
    plain = Net()
    for batch in list(loader())[:3]:
        plain.training_step(batch, 0).backward()
    for adapter, base in zip(adapters(net).values(), (plain.body[0], plain.body[2]), strict=True):
        wanted = base.weight.grad.flatten().abs().topk(adapter.indices.numel()).indices  # type: ignore[union-attr]
        assert sorted(wanted.tolist()) == adapter.indices.tolist()
    assert all(torch.equal(row[0], watch.indices[0][0]) for row in watch.indices)  # once


class Picture(L.LightningModule):
    """One layer of every kind whose entries may be chosen."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.words = nn.Embedding(12, 6)
            self.conv = nn.Conv2d(2, 4, 3, groups=2)
            self.norm = nn.LayerNorm(16)
            nn.init.normal_(self.norm.weight)
            self.head = nn.Linear(16, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        picture = self.words(batch).view(-1, 2, 4, 3).repeat(1, 1, 1, 2)[..., :4]
        return self.head(self.norm(self.conv(picture).flatten(1))).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=LR, weight_decay=0.0)

    def train_dataloader(self) -> DataLoader[Any]:
        words = torch.randint(12, (16, 4), generator=torch.Generator().manual_seed(1))
        return DataLoader(words, batch_size=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["magnitude", "gradient"])
def test_the_preset_chooses_in_every_kind_of_layer(by: Literal["magnitude", "gradient"]) -> None:
    batches = 2 if by == "gradient" else None
    chosen = presets.sparta(density=0.25, start=by, batches=batches, targets=["words", "conv", "norm"])
    torch.manual_seed(2)
    net, plain = Picture(), Picture()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=chosen, **options)  # type: ignore[arg-type]
    if by == "gradient":
        with pytest.warns(UserWarning, match="Calibration saw nothing of 2 adapted layers, .*: words, norm"):
            trainer.fit(net)
    else:
        trainer.fit(net)
    for batch in list(plain.train_dataloader())[:2]:
        plain.training_step(batch, 0).backward()
    drawn = Picture()
    inject(drawn, partial(SpaRTA, density=0.25), ["words", "conv", "norm"])
    for name, adapter in adapters(net).items():
        weight: Any = getattr(plain, name).weight
        worth = weight.detach() if by == "magnitude" else weight.grad
        wanted = sorted(worth.flatten().abs().topk(len(adapter.indices)).indices.tolist())
        if by == "gradient" and name in ("words", "norm"):
            wanted = adapters(drawn)[name].indices.tolist()  # for these no gradient is gathered
        assert adapter.indices.tolist() == wanted
        moved = adapter.base.weight.flatten() != weight.flatten()  # type: ignore[union-attr, operator]
        assert moved.any()
        assert set(moved.nonzero().flatten().tolist()) <= set(wanted)


def test_largest_takes_the_first_of_equal_ones() -> None:
    worth = torch.tensor([1.0, -3.0, 2.0, 3.0, 2.0, 0.0, 2.0])
    places, size = largest(worth, 4)
    assert (places.tolist(), size.tolist()) == ([1, 3, 2, 4], [3.0, 3.0, 2.0, 2.0])
    assert largest(worth, 0)[0].numel() == 0


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_gradient_that_overflowed_proposes_nothing(odd: float) -> None:
    """As a step in float16 that is skipped has it: as many candidates as ever, and none of them is taken in."""
    for worth in (torch.tensor([odd, 1.0, 2.0, 3.0]), torch.full((4,), odd)):
        places, size = largest(worth, 3)
        assert places.numel() == size.numel() == 3
        assert not bool(size.isfinite().all())
    net = Net()
    inject(net, partial(SpaRTA, density=DENSITY), ["0", "2"])
    importance, x = EntryGradients(0.3), next(iter(loader()))
    importance.track(RankBudget.of(net))
    for scale in (1.0, odd):
        net.zero_grad()
        importance.listen()
        (net.training_step(x, 0) * scale).backward()
        importance.update()
        found = {name: (places.clone(), size.clone()) for name, (places, size) in importance.candidates().items()}
        if scale == 1:
            fine = found
    for name, (places, size) in found.items():
        assert torch.equal(places, fine[name][0])
        assert torch.equal(size, fine[name][1])
        assert bool((size > 0).all())


@pytest.mark.parametrize(
    "begin",
    [
        lambda budget: EntrySelection("magnitude").begin(budget, Alone()),
        lambda budget: EntrySelection("gradient").begin(budget, Alone()),
        lambda budget: DropAndRegrow().track(budget),
    ],
)
def test_entries_in_blocks_are_refused_before_anything_is_trained(begin: Any) -> None:
    net = Net()
    inject(net, partial(SpaRTA, density=DENSITY, block=2), ["0"])
    with pytest.raises(ValueError, match=r"'body\.0' gates its entries in blocks of 2, and these cannot move.*block=1"):
        begin(RankBudget.of(net))


AVERAGING: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adam": partial(torch.optim.Adam, lr=LR),
    "AdamW, largest": partial(torch.optim.AdamW, lr=LR, weight_decay=0.0, amsgrad=True),
    "Adamax": partial(torch.optim.Adamax, lr=LR),
    "NAdam": partial(torch.optim.NAdam, lr=LR),
    "RMSprop": partial(torch.optim.RMSprop, lr=LR),
    "RMSprop with momentum": partial(torch.optim.RMSprop, lr=LR / 10, momentum=0.9),
}


@pytest.mark.parametrize("before", [20, 200])
@pytest.mark.parametrize("make", AVERAGING.values(), ids=AVERAGING)
def test_grown_entries_take_steps_of_the_usual_size(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], before: int
) -> None:
    moved, plain = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))
    gradient = torch.linspace(0.8, 1.2, 6)
    optimizers = make([moved]), make([plain])

    def step() -> None:
        for parameter, optimizer in zip((moved, plain), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()

    for _ in range(before):
        step()
    order = torch.tensor([0, 1, 2, -1, 4, 5])
    follow_moves(optimizers[:1], {moved: order})
    for _ in range(50):
        was, old = moved.detach()[3].clone(), plain.detach()[3].clone()
        step()
        usual = abs(float(plain.detach()[3] - old))  # above LR where the optimizer corrects nothing (RMSprop)
        assert abs(float(moved.detach()[3] - was)) <= 1.5 * max(LR, usual)
    stays = order >= 0
    assert torch.equal(moved[stays], plain[stays])
    for key, value in optimizers[0].state[moved].items():
        other = optimizers[1].state[plain][key]
        assert torch.equal(value[stays], other[stays]) if value.shape == moved.shape else torch.equal(value, other)


def test_state_of_a_grown_entry() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([p], amsgrad=True)
    value = torch.tensor([1.0, 2.0, 4.0, 9.0])
    optimizer.state[p] = {key: value.clone() for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "unknown")}
    follow_moves([optimizer], {p: torch.tensor([1, -1, 2, -1])})
    squares, nothing = torch.tensor([2.0, 3.0, 4.0, 3.0]), torch.tensor([2.0, 0.0, 4.0, 0.0])
    expected = {"exp_avg": nothing, "exp_avg_sq": squares, "max_exp_avg_sq": squares, "unknown": nothing}
    for key, found in optimizer.state[p].items():
        assert torch.equal(found, expected[key]), key
    # Where none stays, those that went are all that is known.
    follow_moves([optimizer], {p: torch.full((4,), -1)})
    assert torch.equal(optimizer.state[p]["exp_avg_sq"], torch.full((4,), 3.0))
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.zeros(4))


@pytest.mark.parametrize("make", [partial(torch.optim.Adagrad, lr=LR), partial(torch.optim.Adafactor, lr=LR)])
def test_grown_entries_of_other_optimizers_are_as_old_as_their_neighbours(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = make([p])
    for _ in range(100):
        p.grad = torch.ones(4)
        optimizer.step()
    follow_moves([optimizer], {p: torch.tensor([0, -1, 2, 3])})
    was = p.detach().clone()
    p.grad = torch.ones(4)
    optimizer.step()
    step = was - p.detach()
    torch.testing.assert_close(step[1], step[0])


def test_state_that_cannot_follow_is_refused() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p])
    optimizer.state[p] = {"curvature": torch.zeros(3, 3)}
    with pytest.raises(TypeError, match=r"SGD keeps 'curvature' for a parameter of shape \(3,\) in another shape"):
        follow_moves([optimizer], {p: torch.tensor([0, 1, -1])})


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"in \(0, 1\]. Got 1.5"):
        DropAndRegrow(share=1.5)
    with pytest.raises(ValueError, match="choose 'magnitude' or 'gradient'"):
        EntrySelection("size")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="moves entries between components there"):
        RankPruning(DropAndRegrow(), compact=2)
    net = Net()
    inject(net, partial(LoRA, rank=2), ["0"])
    with pytest.raises(TypeError, match=r"chooses among the entries of a weight, and LoRA at 'body\.0' has"):
        DropAndRegrow().track(RankBudget.of(net))


@pytest.mark.parametrize("average", COPIERS)
def test_an_average_over_entries_that_move_is_refused(average: type[L.Callback]) -> None:
    made: Any = average(**({"swa_lrs": 0.1} if average is L.callbacks.StochasticWeightAveraging else {}))
    with pytest.raises(MisconfigurationException, match=rf"DropAndRegrow moves entries, and {average.__name__} would"):
        fit(made)
