from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from lightning_peft import Factorized, LoRA, RankBudget, WeightedSVD, inject
from lightning_peft.adapters.factorized import Start
from lightning_peft.functional.weighted_svd import scale, weighted_svd, whitened_svd
from lightning_peft.listening import heard, samples
from lightning_peft.rank.probe import Alone
from lightning_peft.rank.weighted_svd import factored_parameters, uniform_rank

WIDTH, LENGTH, COUNT = 6, 4, 6
TARGETS = ["first", "second", "third"]


class Net(nn.Module):
    """Layers of both layouts, one after positions are pooled, and one that matters to no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(WIDTH, 9), Conv1D(5, 9), nn.Linear(5, 3)
        self.idle = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        h: Tensor = torch.tanh(self.second(torch.tanh(self.first(x))))
        y: Tensor = self.third(h.mean(1))
        return y


def net(build: Callable[[], nn.Module] = Net) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return build().double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, LENGTH, WIDTH, generator=generator) * torch.tensor([1.0, 3.0, 0.1, 1.0, 0.3, 2.0])
    return x.double(), torch.randn(COUNT, 3, generator=generator).double()


def loss_of(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    losses = (model(x) - y).square().sum(-1)
    return losses.mean() if reduction == "mean" else losses.sum()


def calibrated(
    probe: WeightedSVD,
    sizes: Sequence[int] = (COUNT,),
    targets: Sequence[str] = TARGETS,
    trained: bool = True,
    model: Any = None,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = loss_of,
    start: Start = "svd",
) -> tuple[Any, RankBudget]:
    """A model whose layers were filled by what they showed in batches of these sizes."""
    model = net() if model is None else model
    inject(model, lambda layer: Factorized(layer, trained=trained, start=start), list(targets), train=[])
    budget = RankBudget.of(model)
    probe.begin(budget, Alone())
    for x, y in zip(*(part.split(list(sizes)) for part in data()), strict=True):
        with heard(probe, budget, samples=len(x)), torch.set_grad_enabled(probe.reads != "inputs"):
            value = loss(model, x, y)
            if value.requires_grad:
                value.backward()
        probe.fold()
    budget.keep(probe.act())
    return model, budget


def matrices() -> dict[str, Tensor]:
    plain = net()
    weights = {name: plain.get_submodule(name).weight.detach() for name in TARGETS}
    return weights | {"second": weights["second"].T}


def sample_gradients() -> dict[str, list[Tensor]]:
    """Every base weight's gradient of every sample's own loss, as (d_out, d_in), by autograd in batches of one."""
    found: dict[str, list[Tensor]] = {name: [] for name in TARGETS}
    for x, y in zip(*data(), strict=True):
        plain = net()
        loss_of(plain, x[None], y[None]).backward()
        for name in TARGETS:
            gradient = plain.get_submodule(name).weight.grad
            found[name].append(gradient.T if name == "second" else gradient)
    return found


def layer_inputs() -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    plain = net()
    for name in TARGETS:
        plain.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
    with torch.no_grad():
        plain(data()[0])
    return {name: x.flatten(0, -2) for name, x in found.items()}


def expected(weighting: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What the papers say, layer by layer."""
    found = {}
    for name, W in matrices().items():
        X, gradients = layer_inputs()[name], torch.stack(sample_gradients()[name])
        found[name] = {
            "none": lambda W, X, g: weighted_svd(W),
            "fisher": lambda W, X, g: weighted_svd(W, scale(g.square().mean(0).sum(0))),
            "taylor": lambda W, X, g: weighted_svd(W, scale((g * W).square().mean(0).sum(0))),
            "activation": lambda W, X, g: weighted_svd(W, scale(X.abs().mean(0))),
            "whiten": lambda W, X, g: whitened_svd(W, X.T @ X / len(X)),
        }[weighting](W, X, gradients)
    return found


def check(budget: RankBudget, weighting: str, rtol: float = 1e-4) -> None:
    for name, (U, s, Vh) in expected(weighting).items():
        adapter: Any = budget[name].adapter
        assert adapter.gate.gain.dtype == torch.float64
        torch.testing.assert_close(adapter.gate.gain.detach(), s, rtol=rtol, atol=0)
        for k in range(1, len(s) + 1):
            mine = adapter.U[:, :k] * adapter.gate.gain[:k] @ adapter.Vh[:k]
            torch.testing.assert_close(mine.detach(), U[:, :k] * s[:k] @ Vh[:k], rtol=rtol, atol=rtol)


WEIGHTINGS = ["none", "fisher", "taylor", "activation", "whiten"]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("trained", "start"), [(True, "svd"), (False, "svd"), (True, "exact")])
def test_layers_are_filled_as_the_papers_say(weighting: Any, trained: bool, start: Start) -> None:
    """Statistics by autograd in batches of one, from two batches of different sizes, whether U and Vh are trained."""
    model, budget = calibrated(WeightedSVD(weighting), (5, 1), trained=trained, start=start)
    check(budget, weighting)
    x, _ = data()
    torch.testing.assert_close(model(x), net()(x), rtol=1e-4, atol=1e-6)
    assert budget.spent == budget.capacity


@pytest.mark.parametrize("weighting", ["fisher", "taylor"])
def test_batches_do_not_matter(weighting: Any) -> None:
    """A mean over a batch is undone, and samples do not cancel: without either, these would differ by far."""
    for sizes in ((6,), (1,) * 6, (1, 5)):
        check(calibrated(WeightedSVD(weighting), sizes)[1], weighting)
    by_sum = WeightedSVD(weighting, reduction="sum")
    check(calibrated(by_sum, (1, 5), loss=lambda *a: loss_of(*a, reduction="sum"))[1], weighting)
    # The same loss, its reduction not told: a batch of five counts for 25 times as much as one of one.
    _, budget = calibrated(WeightedSVD(weighting, reduction="sum"), (1, 5))
    with pytest.raises(AssertionError):
        check(budget, weighting, rtol=1e-2)


def test_the_square_of_a_mean_gradient_would_be_too_small() -> None:
    for gradients in sample_gradients().values():
        squares = torch.stack(gradients)
        of_mean, mean_of = squares.mean(0).square().sum(), squares.square().mean(0).sum()
        assert of_mean < 0.8 * mean_of
    probe = WeightedSVD("fisher")
    model = net()
    inject(model, Factorized, TARGETS, train=[])
    probe.begin(RankBudget.of(model), Alone())
    with heard(probe, RankBudget.of(model), samples=COUNT):
        loss_of(model, *data()).backward()
    for name, gradients in sample_gradients().items():
        fisher = torch.stack(gradients).square().sum(0).sum(0)
        torch.testing.assert_close(probe._sums[name], fisher, rtol=1e-4, atol=1e-9)


class Twice(nn.Module):
    """One layer that is called three times; the loss depends on two of the calls. Lengths differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.length_first = False

    def forward(self, x: Tensor) -> Tensor:
        self.first(x[:, 1:] * 3)
        if self.length_first:
            x = x.transpose(0, 1)
        h = torch.tanh(self.first(torch.tanh(self.first(x))))
        y: Tensor = self.head(h.mean(0 if self.length_first else 1))
        return y


@pytest.mark.parametrize("length_first", [False, True])
def test_calls_of_a_sample_add_up(length_first: bool) -> None:
    """Before they are squared; also where samples are the second dimension, as in nn.MultiheadAttention."""
    x, y = data()
    fisher = torch.zeros(WIDTH).double()
    for one, target in zip(x, y, strict=True):
        plain = net(Twice)
        loss_of(plain, one[None], target[None]).backward()
        fisher += plain.first.weight.grad.square().sum(0)
    model = net(Twice)
    model.length_first = length_first
    probe = WeightedSVD("fisher")
    _, budget = calibrated(probe, targets=["first"], model=model)
    U, s, _ = weighted_svd(net(Twice).first.weight, scale(fisher / COUNT))
    torch.testing.assert_close(budget["first"].gate.gain, s, rtol=1e-4, atol=0, check_dtype=False)
    torch.testing.assert_close(budget["first"].adapter.U, U, rtol=1e-3, atol=1e-4)
    assert probe._counts == {"first": COUNT}


def test_a_square_of_samples_and_positions_is_refused() -> None:
    """As many positions as samples: of (length, samples, d) the first dimension would be taken for samples."""
    for length_first in (False, True):
        model = net(Twice)
        model.length_first = length_first
        with pytest.raises(RuntimeError, match=r"\(4, 4, 6\) are of 4 samples and as many positions, in one order or"):
            calibrated(WeightedSVD("fisher"), (LENGTH, 2), targets=["first"], model=model)


def test_one_sample_is_no_question_and_what_was_called_is_known() -> None:
    model, probe = net(Twice).float(), WeightedSVD("fisher")
    inject(model, Factorized, ["first"], train=[])
    probe.begin(RankBudget.of(model), Alone())
    with heard(probe, RankBudget.of(model), samples=1) as called:
        loss_of(model, torch.randn(1, 2, WIDTH), torch.randn(1, 3)).backward()
    assert called == {"first"}
    assert probe._counts == {"first": 1}


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv1d(LENGTH, 8, 3, stride=2, padding=1, groups=2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.first(x)).mean(-1))
        return y


def test_a_convolution_in_groups_is_a_matrix() -> None:
    x, y = data()
    fisher = torch.zeros(6).double()
    for one, target in zip(x, y, strict=True):
        plain = net(Convolutional)
        loss_of(plain, one[None], target[None]).backward()
        fisher += plain.first.weight.grad.flatten(1).square().sum(0)
    _, budget = calibrated(WeightedSVD("fisher"), (2, 4), targets=["first"], model=net(Convolutional))
    _, s, _ = weighted_svd(net(Convolutional).first.weight.flatten(1), scale(fisher / COUNT))
    torch.testing.assert_close(budget["first"].gate.gain, s, rtol=1e-4, atol=0, check_dtype=False)


class Flat(Twice):
    """Positions of all samples in one dimension."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.flatten(0, 1)))
        y: Tensor = self.head(h.unflatten(0, (len(x), -1)).mean(1))
        return y


def test_rows_of_nobody_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"at 'first' it cannot be told whose is whose: rows of shape \(24, 6\)"):
        calibrated(WeightedSVD("fisher"), targets=["first"], model=net(Flat))
    # One at a time there is no question, nor is there one for what asks no sample.
    calibrated(WeightedSVD("fisher"), (1,) * COUNT, targets=["first"], model=net(Flat))
    calibrated(WeightedSVD("whiten"), targets=["first"], model=net(Flat))


def test_samples_are_counted_where_all_tensors_agree() -> None:
    x, y = data()
    assert samples((x, y)) == samples({"x": x, "y": [y, torch.tensor(1.0)]}) == COUNT
    assert samples((x, y[:3])) is None
    assert samples(torch.tensor(1.0)) is None
    model = net()
    inject(model, Factorized, TARGETS, train=[])
    probe, budget = WeightedSVD("taylor"), RankBudget.of(model)
    probe.begin(budget, Alone())
    with pytest.raises(RuntimeError, match="how many samples a batch has cannot be told"), heard(probe, budget):
        loss_of(model, x, y).backward()


def test_padding_counts_for_no_input_and_labels_for_no_gradient() -> None:
    """What a position carries counts where it is shown; a gradient is a sum over all positions."""
    x, y = data()
    shown = torch.ones(COUNT, LENGTH, dtype=torch.bool)
    shown[:, 2:] = False
    for weighting, sums in (("whiten", x[:, :2].flatten(0, 1)), ("fisher", None)):
        model = net()
        inject(model, Factorized, ["first"], train=[])
        probe, budget = WeightedSVD(weighting), RankBudget.of(model)  # type: ignore[arg-type]
        probe.begin(budget, Alone())
        with heard(probe, budget, shown=shown, samples=COUNT):
            loss_of(model, x, y).backward()
        squares = torch.stack(sample_gradients()["first"]).square().sum((0, 1))
        sums = squares if sums is None else sums.T @ sums
        torch.testing.assert_close(probe._sums["first"], sums, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_autocast_does_not_reach_the_statistics() -> None:
    """Products of the model are in bfloat16; second moments of what its layers were called with are not."""
    for weighting in ("whiten", "fisher"):
        model = net().float()
        inject(model, Factorized, ["first"], train=[])
        probe, budget = WeightedSVD(weighting), RankBudget.of(model)  # type: ignore[arg-type]
        probe.begin(budget, Alone())
        x, y = (part.float() for part in data())
        held: list[tuple[Tensor, Tensor]] = []

        def hold(_: Any, args: tuple[Tensor], output: Tensor, held: list[tuple[Tensor, Tensor]] = held) -> None:
            output.register_hook(lambda g: held.append((args[0], g)))

        model.first.register_forward_hook(hold)
        with heard(probe, budget, samples=COUNT), torch.autocast("cpu", torch.bfloat16):
            loss_of(model, x, y).backward()
        ((X, G),) = held
        assert G.dtype == torch.bfloat16
        rows = X.flatten(0, 1).double()
        squares = (G.double().mT @ X.double() * COUNT).square().sum((0, 1))
        expected = rows.T @ rows if weighting == "whiten" else squares
        torch.testing.assert_close(probe._sums["first"].double(), expected, rtol=1e-5, atol=1e-5)


class Overwrites(nn.Module):
    """What a layer was called with is gone when its gradient comes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += torch.tanh(self.first(x))
        y: Tensor = self.head(x.mean(1))
        return y


def test_inputs_that_are_written_over_are_refused() -> None:
    """Where the layer is not trained autograd has not saved them, and does not tell."""
    with pytest.raises(RuntimeError, match=r"'first' was called with .* in place since\. Write x = x \+ y for x \+= y"):
        calibrated(WeightedSVD("fisher"), targets=["first"], model=net(Overwrites), trained=False)
    calibrated(WeightedSVD("activation"), targets=["first"], model=net(Overwrites), trained=False)


@pytest.mark.parametrize("start", ["svd", "exact"])
def test_layers_that_were_not_seen_get_the_plain_decomposition(start: Start) -> None:
    """Called and without effect on the loss; also where nothing had decomposed them before."""
    probe = WeightedSVD("fisher", ratio=0.7)
    _, budget = calibrated(probe, targets=[*TARGETS, "idle"], start=start)
    assert probe.unseen() == ["idle"]
    U, s, Vh = weighted_svd(net().idle.weight)
    adapter: Any = budget["idle"].adapter
    for found, expected in ((adapter.U, U), (adapter.gate.gain, s), (adapter.Vh, Vh)):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-9)
    assert budget.ranks()["idle"] == uniform_rank(4, WIDTH, 0.7)
    assert probe.report().startswith("WeightedSVD: 4 layers decomposed, weighting 'fisher', of them 1 without it; ")
    assert WeightedSVD("none").unseen() == []


def test_batches_without_a_position_that_counts_are_none() -> None:
    model, probe = net(), WeightedSVD("activation")
    inject(model, Factorized, ["first"], train=[])
    budget = RankBudget.of(model)
    probe.begin(budget, Alone())
    with heard(probe, budget, shown=torch.zeros(COUNT, LENGTH, dtype=torch.bool)):
        model(data()[0])
    probe.act()
    assert probe.unseen() == ["first"]


def test_ratio_and_rank_leave_the_first_components() -> None:
    _, budget = calibrated(WeightedSVD("activation", ratio=0.7))
    shapes = {name: tuple(W.shape) for name, W in matrices().items()}
    assert budget.ranks() == {name: uniform_rank(*shape, 0.7) for name, shape in shapes.items()}
    for name, site in budget.items():
        r = budget.ranks()[name]
        assert site.gate.mask.tolist() == [float(i < r) for i in range(len(site.gate))]
        d_out, d_in = shapes[name]
        assert r * (d_out + d_in) <= 0.7 * d_out * d_in < (r + 1) * (d_out + d_in)
    probe = WeightedSVD("none", rank=4)
    _, budget = calibrated(probe)
    assert budget.ranks() == {"first": 4, "second": 4, "third": 3}
    dense, kept = 54 + 45 + 15, 54 + 45 + 15  # all of them are dense from break-even on
    assert probe.report().endswith(f"{kept} of their {dense} parameters are kept, 100.0%.")
    probe = WeightedSVD("none", rank=2)
    calibrated(probe)
    assert probe.report().endswith(f"{30 + 28 + 15} of their 114 parameters are kept, 64.0%.")


@pytest.mark.parametrize(("rank", "total"), [(253, 66_517_248), (168, 52_416_768)])
def test_bert_base_has_the_papers_sizes(rank: int, total: int) -> None:
    """66.52 and 52.41 million parameters at uniform ranks of 0.33 and 0.22 of 768, to 0.01 million."""
    assert rank == int({66_517_248: 0.33, 52_416_768: 0.22}[total] * 768)
    with torch.device("meta"):
        bert = BertModel(BertConfig())
    linears = [m.weight.shape for name, m in bert.named_modules() if isinstance(m, nn.Linear) and "pooler" not in name]
    assert len(linears) == 72
    dense = sum(d_out * d_in for d_out, d_in in linears)
    assert dense == 84_934_656
    rest = sum(p.numel() for p in bert.parameters()) - dense
    assert rest + sum(factored_parameters(*shape, rank) for shape in linears) == total
    assert total / 1e6 == pytest.approx({253: 66.52, 168: 52.41}[rank], abs=0.01)
    assert rest + sum(factored_parameters(*s, min(s)) for s in linears) == rest + dense
    for ratio in (0.48, 0.33):
        kept = sum(factored_parameters(*shape, uniform_rank(*shape, ratio)) for shape in linears)
        assert 0.995 * ratio < kept / dense <= ratio


def test_whitening_keeps_what_layers_give() -> None:
    """Of all weightings, on the data that were seen, at the same ranks."""
    errors = {}
    for weighting in WEIGHTINGS:
        _, budget = calibrated(WeightedSVD(weighting, rank=2), (1, 5))  # type: ignore[arg-type]
        errors[weighting] = {
            name: float((X @ (matrices()[name] - budget[name].adapter.effective_weight()).T).detach().norm())
            for name, X in layer_inputs().items()
        }
    for name in TARGETS:
        assert errors["whiten"][name] < 0.99 * errors["none"][name]
        assert all(errors["whiten"][name] <= errors[weighting][name] for weighting in WEIGHTINGS)


def test_alpha_is_the_power_of_what_inputs_are_worth() -> None:
    _, budget = calibrated(WeightedSVD("activation", alpha=1.5))
    for name, X in layer_inputs().items():
        _, s, _ = weighted_svd(matrices()[name], scale(X.abs().mean(0), power=1.5))
        torch.testing.assert_close(budget[name].gate.gain, s, rtol=1e-4, atol=0, check_dtype=False)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"weighting": "fischer"}, ValueError, "weighting='fischer': choose 'none', 'fisher', 'taylor', 'activation'"),
        ({"reduction": "median"}, ValueError, "reduction='median': choose 'mean' or 'sum'"),
        ({"ratio": 0.5, "rank": 3}, ValueError, "give one. Got ratio=0.5 and rank=3"),
        ({"ratio": 1.0}, ValueError, r"in \(0, 1\). Got 1.0"),
        ({"ratio": 0}, ValueError, r"in \(0, 1\). Got 0"),
        ({"ratio": "half"}, TypeError, "ratio must be a number"),
        ({"rank": 0}, ValueError, "at least 1. Got 0"),
        ({"rank": 2.0}, TypeError, "rank must be an integer"),
        ({"alpha": 0}, ValueError, "alpha is a power, above 0"),
        ({"weighting": "whiten", "alpha": 0.5}, ValueError, "and 'whiten' is none"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        WeightedSVD(**arguments)


def test_what_it_cannot_act_on_is_refused() -> None:
    def begin(adapter: Any, probe: WeightedSVD, keep: int | None = None) -> None:
        model = net()
        inject(model, adapter, ["first"], train=[])
        budget = RankBudget.of(model)
        if keep is not None:
            budget.keep({"first": torch.arange(6) < keep})
        probe.begin(budget, Alone())

    with pytest.raises(RuntimeError, match="and LoRA at 'first' has none. Inject Factorized"):
        begin(lambda layer: LoRA(layer, rank=2), WeightedSVD())
    with pytest.raises(RuntimeError, match="'first' is compressed already: 2 of its 6 components are open"):
        begin(Factorized, WeightedSVD(), keep=2)
    with pytest.raises(RuntimeError, match="has 3 components of 6: what a plain decomposition has cut off"):
        begin(lambda layer: Factorized(layer, rank=3), WeightedSVD())
    begin(lambda layer: Factorized(layer, rank=3), WeightedSVD("none"))
    with pytest.raises(RuntimeError, match=r"ratio=0.2 leaves no component at 'first'.*0.278 of its parameters"):
        begin(Factorized, WeightedSVD(ratio=0.2))


def test_data_that_say_nothing_are_refused() -> None:
    with pytest.raises(RuntimeError, match="has no gradient by any factorised layer"):
        calibrated(WeightedSVD("fisher"), loss=lambda *a: loss_of(*a) * 0)
    with pytest.raises(RuntimeError, match="what was seen at 'first' is not finite"):
        calibrated(WeightedSVD("taylor"), loss=lambda *a: loss_of(*a) * float("inf"))
    with pytest.raises(RuntimeError, match="the inputs of all factorised layers are zero"):
        calibrated(WeightedSVD("whiten"), targets=["first"], loss=lambda m, x, y: loss_of(m, x * 0, y))
