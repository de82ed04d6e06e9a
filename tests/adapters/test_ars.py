from __future__ import annotations

import copy
from functools import cache, partial
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

from lightning_peft import (
    BudgetPenalty,
    ElementMasks,
    Factorized,
    Hypernetwork,
    LearnedRanks,
    LoRA,
    MaskAlignment,
    MaskSampler,
    MonotoneMasks,
    RankBudget,
    inject,
)
from lightning_peft.adapters import ars
from lightning_peft.functional.rank_masks import keep_probability, prefix

LAYERS = {"a": 8, "b": 6, "c": 8, "d": 6, "e": 8}
SAMPLERS = {"hypernetwork": Hypernetwork, "elements": ElementMasks, "monotone": MonotoneMasks}
every_sampler = pytest.mark.parametrize("kind", SAMPLERS.values(), ids=SAMPLERS.keys())


@cache
def bert() -> RankBudget:
    """BERT-base's shapes, without memory."""
    with torch.device("meta"):
        model = BertModel(BertConfig())
        inject(model, partial(Factorized, trained=False), ["encoder.layer.*"], train=[])
    return RankBudget.of(model)


def test_the_hypernetwork_has_the_papers_size() -> None:
    layers = {name: len(site.gate) for name, site in bert().items()}
    assert len(layers) == 72
    network = Hypernetwork(layers)
    assert sum(p.numel() for p in network.gru.parameters()) == 37_632
    assert sum(p.numel() for p in network.heads) == 72 * 128 * 768 == 7_077_888
    assert network.z.shape == (72, 32)
    assert not network.z.requires_grad
    with torch.no_grad():
        (logits,) = network.logits()
    assert 0.3 < float(logits.std()) < 0.45
    assert float(logits.abs().max()) < 2.5


def test_property_2_everything_is_open_at_the_start() -> None:
    """For a logit of 0 to one in 5e8; the smallest of BERT's 55,296 logits makes it a few in a million on average."""
    assert float(1 - keep_probability(torch.zeros(1, dtype=torch.float64), 3.0)) < 1e-8
    network = Hypernetwork({str(i): 768 for i in range(72)}).requires_grad_(False)
    (kept,) = network.probabilities()
    assert float(1 - kept.double().mean()) < 2e-5
    for step in range(5):
        (mask,) = network.masks(step)
        assert int((mask == 0).sum()) <= 3


def test_the_totals_of_bert_base() -> None:
    """The paper's parameters at uniform ranks, and T_total = sum M N of what is compressed."""
    whole = BertModel.config_class()  # the defaults are BERT-base's
    with torch.device("meta"):
        total = sum(p.numel() for p in BertModel(whole).parameters())
    dense = bert().dense_parameters
    assert dense == 12 * (4 * 768 * 768 + 2 * 768 * 3072) == 84_934_656
    for rank, millions in ((253, 66.52), (168, 52.41)):
        factors = sum(rank * site.gate.cost for site in bert().values())
        assert (total - dense + factors) / 1e6 == pytest.approx(millions, abs=0.01)
    for ratio, millions in ((0.48, 65.3), (0.33, 52.57)):
        assert (total - dense + ratio * dense) / 1e6 == pytest.approx(millions, abs=0.02)
    assert bert().capacity_parameters / dense == 1.5


def test_heads_are_one_product_and_each_layer_has_its_own() -> None:
    network = Hypernetwork(LAYERS, seed=3)
    h, _ = network.gru(network.z)
    h = nn.functional.gelu(nn.functional.layer_norm(h, (128,), network.norm.weight, network.norm.bias))
    rows = dict(zip(LAYERS, h, strict=True))  # the sequence is the layers, in their order
    heads = {name: H for names, group in zip(network.groups.values(), network.heads, strict=True)
             for name, H in zip(names, group, strict=True)}  # fmt: skip
    for name, o in network.by_layer(network.logits()).items():
        assert o.shape == (LAYERS[name],)
        assert torch.allclose(o, heads[name] @ rows[name], atol=1e-6)
    assert list(network.by_layer(network.logits())) == list(LAYERS)


def test_the_start_depends_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = Hypernetwork(LAYERS, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(9)
    again, other = Hypernetwork(LAYERS, seed=3).state_dict(), Hypernetwork(LAYERS, seed=4).state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name])
    assert not torch.equal(first["z"], other["z"])
    assert not torch.equal(first["heads.0"], other["heads.0"])


def test_the_generators_of_accelerators_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` seeds those as well, and nobody puts them back."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    Hypernetwork(LAYERS, seed=3)
    assert seeded == []
    torch.manual_seed(3)
    assert seeded == [3]


def test_evaluating_the_model_leaves_the_network_able_to_learn() -> None:
    """cuDNN has no backward of a GRU in eval mode."""
    network = Hypernetwork(LAYERS)
    host = nn.ModuleDict({"masks": network}).eval()
    assert network.gru.training
    host.train()
    assert network.gru.training


@every_sampler
def test_the_start_does_not_depend_on_what_surrounds_it(kind: Any) -> None:
    """`configure_model` runs where precision and strategy have set the default dtype and device."""
    net = factorised()
    starts = []
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "meta")):
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                starts.append(LearnedRanks(0.5, kind).build(RankBudget.of(net)).state_dict())
                assert torch.get_default_dtype() == dtype
                assert torch.empty(1).device.type == device
        finally:
            torch.set_default_dtype(torch.float32)
    for name, value in starts[0].items():
        assert torch.equal(starts[1][name], value)
        assert starts[1][name].dtype == torch.float32


@every_sampler
def test_a_step_has_its_masks(kind: Any) -> None:
    sampler: MaskSampler = kind(LAYERS)
    with torch.no_grad():
        for p in sampler.parameters():
            p.sub_(0.03)  # away from full rank, where every draw is alike
    for mask, n in zip(sampler.masks(4), (8, 6), strict=True):
        assert mask.shape == (len(sampler.groups[n]), n)
        assert set(mask.detach().unique().tolist()) <= {0.0, 1.0}
    for mask, again in zip(sampler.masks(4), sampler.masks(4), strict=True):
        assert torch.equal(mask, again)


@every_sampler
def test_gradients_reach_what_draws(kind: Any) -> None:
    sampler: MaskSampler = kind(LAYERS)
    sum(mask.sum() for mask in sampler.masks(0)).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and bool(p.grad.any()) for p in sampler.parameters())


@every_sampler
def test_sixteen_bits_are_the_models_affair(kind: Any) -> None:
    """A step of 1e-3 on what has grown to 1 would be lost in bfloat16."""
    sampler: MaskSampler = kind(LAYERS)
    before = copy.deepcopy(sampler.state_dict())
    host = nn.ModuleDict({"masks": sampler}).to(torch.bfloat16)
    for name, value in host["masks"].state_dict().items():
        assert torch.equal(value, before[name])
    torch.set_default_dtype(torch.bfloat16)
    try:
        inside = [mask.dtype for mask in sampler.masks(0)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert inside == [torch.float32, torch.float32]
    assert {mask.dtype for mask in sampler.double().masks(0)} == {torch.float64}


def test_free_logits_move_as_far_as_the_optimizer_lets_them_times_their_scale() -> None:
    sampler = ElementMasks(LAYERS, scale=50.0)
    optimizer = torch.optim.Adam(sampler.parameters(), lr=1e-3)
    sum(mask.sum() for mask in sampler.masks(0)).backward()  # type: ignore[union-attr]
    optimizer.step()
    for theta, logits in zip(sampler.theta, sampler.logits(), strict=True):
        seen = theta.grad != 0  # where noise is large, a soft mask is exactly 1 and has no slope
        assert float(seen.float().mean()) > 0.8
        assert torch.allclose(logits, torch.where(seen, -0.05, 0.0), rtol=1e-3)


@pytest.mark.parametrize("theta", [0.0, -0.05, -0.11, -0.2, -0.249])
def test_monotone_masks_are_prefixes(theta: float) -> None:
    sampler = MonotoneMasks({"a": 200, "b": 200})
    with torch.no_grad():
        sampler.theta[0][0] = theta
    (mask,) = sampler.masks(0)
    assert torch.equal(mask.detach(), prefix(mask))
    assert mask.sum(1).tolist() == [round(200 * (1 + 4 * theta)), 200]
    kept = sampler.by_layer(sampler.probabilities())["a"]
    assert abs(float(kept.sum().detach()) - 200 * (1 + 4 * theta)) < 3


class Net(nn.Module):
    """Three layers of two shapes, whose weights have spectra of their own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.a, self.b, self.c = nn.Linear(12, 16, bias=False), nn.Linear(16, 12), nn.Linear(12, 12)
        with torch.no_grad():
            for i, layer in enumerate((self.a, self.b, self.c)):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * 0.3)
                U, s, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
                layer.weight.copy_((U * s * torch.arange(len(s)).mul(-0.2 * i).exp()) @ Vh)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return y


def factorised(net: nn.Module | None = None) -> nn.Module:
    net = Net() if net is None else net
    inject(net, partial(Factorized, trained=False), [".*"], train=[])
    return net


def built(net: nn.Module, learned: LearnedRanks) -> LearnedRanks:
    learned.build(RankBudget.of(net))
    learned.track(RankBudget.of(net))
    return learned


def undecided(learned: LearnedRanks) -> LearnedRanks:
    """Move every logit to where draws are as often 0 as 1."""
    sampler = learned.sampler
    assert isinstance(sampler, Hypernetwork)
    sampler.shift = -0.4
    return learned


def test_terms_are_the_papers_sums() -> None:
    net = factorised()
    undecided(built(net, ars.policy(0.4))).draw(3)
    budget = RankBudget.of(net)
    masks = {name: site.gate.drawn.detach() for name, site in budget.items()}  # type: ignore[union-attr]
    T = sum(float(m.sum()) * cost for m, cost in zip(masks.values(), (28, 28, 24), strict=True))
    P = 0.4 * (12 * 16 + 16 * 12 + 12 * 12)
    assert T > P
    assert float(BudgetPenalty(0.4)(net, None, None).detach()) == pytest.approx(log(T / P), rel=1e-5)
    assert float(BudgetPenalty(0.9, sides="two")(net, None, None).detach()) == pytest.approx(
        abs(log(T / P * 0.4 / 0.9)), rel=1e-4
    )
    raw, shares = [], []
    for name, site in budget.items():
        m, s = masks[name], site.gate.gain
        assert s is not None
        count = int(m.sum())
        value = sum((float(m[i]) - (i < count)) ** 2 * float(s[i]) ** 2 for i in range(len(s)))
        raw.append(value)
        shares.append(value / float(s.detach().square().sum()))
    assert sum(raw) > 0
    assert float(MaskAlignment(scale="raw")(net, None, None).detach()) == pytest.approx(sum(raw) / 3, rel=1e-5)
    assert float(MaskAlignment()(net, None, None).detach()) == pytest.approx(sum(shares) / 3, rel=1e-5)


def test_property_5_the_energys_share_does_not_change_with_the_weights_scale() -> None:
    values = []
    for scale in (1.0, 100.0):
        net = Net()
        with torch.no_grad():
            for p in (net.a.weight, net.b.weight, net.c.weight):
                p.mul_(scale)
        factorised(net)
        undecided(built(net, ars.policy(0.4))).draw(3)
        values.append([float(MaskAlignment(scale=kind)(net, None, None).detach()) for kind in ("energy", "raw")])  # type: ignore[arg-type]
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-4)
    assert values[0][1] == pytest.approx(values[1][1] / 1e4, rel=1e-4)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_of_masks_and_terms_does_not_wait_for_the_device() -> None:
    """Numbers are neither read from it nor copied to it (`lift_fresh`, as of torch.tensor)."""
    net = factorised()
    learned = undecided(built(net, ars.policy(0.4)))
    with Operations() as seen:
        learned.draw(0)
        (BudgetPenalty(0.4)(net, None, None) + MaskAlignment()(net, None, None)).backward()
    assert not seen.names & {"lift_fresh", "_local_scalar_dense", "nonzero", "masked_select"}
    assert "bmm" in seen.names
    with Operations() as seen:
        torch.tensor([28.0]).item()
    assert seen.names >= {"lift_fresh", "_local_scalar_dense"}


def test_terms_need_masks_that_are_drawn() -> None:
    net = factorised()
    for term in (BudgetPenalty(0.5), MaskAlignment()):
        with pytest.raises(RuntimeError, match=r"no mask is drawn for layer 'a', .* put RankSelection, which draws"):
            term(net, None, None)
        with pytest.raises(RuntimeError, match="no adapter is there for a mask to be drawn for"):
            term(Net(), None, None)


def loss_of(net: nn.Module, seed: int) -> Tensor:
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        target = Net()(x)
    return nn.functional.mse_loss(net(x), target)


def test_property_6_gradients_reach_the_hypernetwork_alone() -> None:
    net = factorised()
    before = copy.deepcopy(net.state_dict())
    learned = undecided(built(net, ars.policy(0.4)))
    sampler = learned.sampler
    assert sampler is not None
    optimizer = torch.optim.Adam([*net.parameters(), *sampler.parameters()], lr=0.01)
    start = copy.deepcopy(sampler.state_dict())
    for step in range(3):
        learned.draw(step)
        optimizer.zero_grad()
        (
            loss_of(net, step) + 16 * BudgetPenalty(0.4)(net, None, None) + 10 * MaskAlignment()(net, None, None)
        ).backward()
        assert all(p.grad is None for p in net.parameters())
        assert all(p.grad is not None for p in sampler.parameters())
        optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(sampler.state_dict()["z"], start["z"])
    assert all(not torch.equal(value, start[name]) for name, value in sampler.state_dict().items() if name != "z")


def test_the_masks_gradient_is_the_first_order_effect_of_a_component() -> None:
    """dL/dm_k = s_k u_k^T (dL/dW) v_k, with W the weight that the masks leave."""
    net = factorised()
    undecided(built(net, ars.policy(0.4))).draw(0)
    site = RankBudget.of(net)["b"]
    adapter, mask = site.adapter, site.gate.drawn
    assert mask is not None
    mask.retain_grad()
    loss_of(net, 0).backward(retain_graph=True)
    dense = nn.Linear(16, 12)
    with torch.no_grad():
        dense.weight.copy_(adapter.weight)
        dense.bias.copy_(adapter.base.bias)  # type: ignore[arg-type]
    plain = copy.deepcopy(net)
    for name, other in RankBudget.of(plain).items():
        other.gate.drawn = RankBudget.of(net)[name].gate.drawn.detach()  # type: ignore[union-attr]
    plain.b = dense
    loss_of(plain, 0).backward()
    assert dense.weight.grad is not None
    wanted = site.gate.gain * torch.einsum("ok,oi,ki->k", adapter.U, dense.weight.grad, adapter.Vh)
    assert mask.grad is not None
    assert torch.allclose(mask.grad, wanted.detach(), atol=1e-6)


class Checkpointed(nn.Module):
    """The net, with what is between its layers computed again in the backward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.net
        for layer in (net.a, net.b):
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)), x, use_reentrant=False)  # type: ignore[assignment]
        y: Tensor = net.c(x)
        return y


def test_property_11_activation_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for wrap in (lambda net: net, Checkpointed):
        net = factorised()
        learned = undecided(built(net, ars.policy(0.4)))
        learned.draw(5)
        loss_of(wrap(net), 0).backward()
        assert learned.sampler is not None
        gradients.append([p.grad for p in learned.sampler.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None
        assert bool(plain.any())
        assert torch.equal(plain, again)


def learn(net: nn.Module, ratio: float, steps: int, loss: Any, masks: ars.Masks = "hypernetwork") -> LearnedRanks:
    """The second stage of the paper, without a Trainer; ten times its learning rate, for a tenth of its steps."""
    learned = built(net, ars.policy(ratio, masks, price="factors"))
    assert learned.sampler is not None
    optimizer = torch.optim.Adam(learned.sampler.parameters(), lr=1e-2 if masks == "hypernetwork" else 2e-3)
    budget, align = BudgetPenalty(ratio), MaskAlignment()
    for step in range(steps):
        learned.draw(step)
        optimizer.zero_grad()
        (loss(step) + 16 * budget(net, None, None) + 10 * align(net, None, None)).backward()
        optimizer.step()
    return learned


def finish(net: nn.Module, learned: LearnedRanks) -> dict[str, int]:
    learned.clear()
    learned.apply(learned.decide(10, 10), 10, 10)
    return RankBudget.of(net).ranks()


class Branches(nn.Module):
    """One layer of exact rank that the output is made of, beside others that hardly matter."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.needed, self.idle, self.other = (nn.Linear(32, 32, bias=False) for _ in range(3))
        with torch.no_grad():
            for layer in (self.needed, self.idle, self.other):
                layer.weight.copy_(torch.randn(32, 32, generator=generator) / 32**0.5)
            U, s, Vh = torch.linalg.svd(self.needed.weight)
            self.needed.weight.copy_((U[:, :rank] * s[:rank]) @ Vh[:rank])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.needed(x) + 1e-3 * (self.idle(x) + self.other(x))
        return y


@pytest.mark.parametrize("masks", SAMPLERS)
def test_property_7_the_rank_that_is_needed_is_found(masks: ars.Masks) -> None:
    rank = 10
    plain = Branches(rank)
    net = factorised(copy.deepcopy(plain))

    def loss(step: int) -> Tensor:
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
        return nn.functional.mse_loss(net(x), plain(x)) * 10

    learned = learn(net, 0.25, 200, loss, masks)
    kept = learned.importance.scores()
    expected = {name: float(row.sum()) for name, row in kept.items()}
    agree = [(site.gate.drawn == prefix(site.gate.drawn)).float() for site in RankBudget.of(net).values()]  # type: ignore[arg-type]
    assert float(torch.cat(agree).mean()) >= 0.99
    assert expected["needed"] >= rank - 0.5
    assert max(expected["idle"], expected["other"]) < 0.4 * expected["needed"]
    ranks = finish(net, learned)
    assert ranks["needed"] >= rank
    assert RankBudget.of(net).spent_parameters <= 0.25 * 3 * 32 * 32


class Unlike(nn.Module):
    """Four layers side by side, of ranks 2, 4, 8 and 16 but for a rest that hardly matters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList([nn.Linear(24, 24, bias=False) for _ in range(4)])
        with torch.no_grad():
            for layer, rank in zip(self.layers, (2, 4, 8, 16), strict=True):
                U, _, Vh = torch.linalg.svd(torch.randn(24, 24, generator=generator))
                layer.weight.copy_((U * torch.where(torch.arange(24) < rank, 1.0, 0.05)) @ Vh)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(part) for layer, part in zip(self.layers, x.split(24, dim=1), strict=True)], dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_property_10_learned_ranks_beat_uniform_ones(seed: int) -> None:
    """Layers of unlike spectra, at no more parameters than the same rank for all."""
    plain = Unlike(seed)
    net = factorised(copy.deepcopy(plain))

    def loss(number: int) -> Tensor:
        x = torch.randn(64, 96, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            target = plain(x)
        return nn.functional.mse_loss(net(x), target) * 10

    rank = 8
    cost = sum(rank * site.gate.cost for site in RankBudget.of(net).values())
    learned = learn(net, cost / (4 * 24 * 24), 200, loss)
    finish(net, learned)
    assert RankBudget.of(net).spent_parameters <= cost
    with torch.no_grad():
        found = sum(float(loss(10_000 + i)) for i in range(8))
        RankBudget.of(net).keep({name: torch.arange(24) < rank for name in RankBudget.of(net)})
        uniform = sum(float(loss(10_000 + i)) for i in range(8))
    assert found < 0.5 * uniform


def test_property_8_the_last_event_is_within_the_budget_and_uses_it_up() -> None:
    net = factorised()
    learned = undecided(built(net, ars.policy(0.4)))
    with pytest.warns(
        UserWarning, match=r"masks have learned to keep \d+ parameters, and the budget is 211: ranks were"
    ):
        masks = learned.decide(20, 20)
    budget = RankBudget.of(net)
    budget.keep(masks)
    P = 0.4 * (12 * 16 + 16 * 12 + 12 * 12)
    assert learned.budget_at(20, 20) == int(P) == 211
    assert P - 24 < budget.spent_parameters <= P
    for mask in masks.values():
        assert torch.equal(mask.float(), prefix(mask.float()))
    torch.manual_seed(77)
    with pytest.warns(UserWarning, match="masks have learned to keep"):
        again = learned.decide(20, 20)
    assert all(torch.equal(masks[name], again[name]) for name in masks)


def test_a_layer_that_is_as_cheap_dense_is_whole_and_counts_as_dense() -> None:
    """528 parameters dense, 820 as factors at full rank: where the ratio is 0.9 most layers are dense."""
    net = factorised()
    learned = built(net, ars.policy(0.9, price="cheapest"))
    budget = RankBudget.of(net)
    with pytest.warns(UserWarning, match="masks have learned to keep 528 parameters, and the budget is 475"):
        budget.keep(learned.decide(20, 20))  # nothing is learned yet: all layers are whole
    dense = [name for name, k in budget.ranks().items() if k == 12]
    assert 1 <= len(dense) < 3
    for name, k in budget.ranks().items():
        assert k == 12 or k * budget[name].gate.cost < budget[name].adapter.dense_parameters
    assert 0.9 * 528 - 28 < learned.spent(budget.ranks()) <= 0.9 * 528
    assert budget.spent_parameters > 0.9 * 528 >= built(net, ars.policy(0.9)).budget_at(1, 1)


def test_before_the_last_event_it_is_what_draws_keep_on_average() -> None:
    net = factorised()
    learned = undecided(built(net, ars.policy(0.4)))
    masks = learned.decide(10, 20)
    probabilities = learned.importance.scores()
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        name: round(float(row.double().sum())) for name, row in probabilities.items()
    }
    counts = torch.zeros(3, dtype=torch.float64)
    for step in range(400):
        learned.draw(step)
        counts += torch.stack([site.gate.drawn.sum() for site in RankBudget.of(net).values()]).detach() / 400  # type: ignore[union-attr]
    wanted = torch.stack([row.double().sum() for row in probabilities.values()])
    assert torch.allclose(counts, wanted, atol=0.4)


def test_what_draws_is_built_once_for_the_same_adapters() -> None:
    net = factorised()
    learned = ars.policy(0.4)
    sampler = learned.build(RankBudget.of(net))
    assert learned.build(RankBudget.of(net)) is sampler
    assert learned.build(RankBudget.of(factorised(Branches(3)))) is not sampler


def test_what_one_model_has_learned_is_not_the_start_of_another() -> None:
    learned = ars.policy(0.4)
    first = learned.build(RankBudget.of(factorised()))
    with torch.no_grad():
        next(first.parameters()).add_(1.0)
    second = learned.build(RankBudget.of(factorised()))
    for name, value in ars.policy(0.4).build(RankBudget.of(factorised())).state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def test_masks_that_have_diverged_are_told() -> None:
    net = factorised()
    learned = built(net, ars.policy(0.4))
    with torch.no_grad():
        next(learned.sampler.parameters()).fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"the masks of a, b, c have diverged: .* Lower the learning rate"):
        learned.decide(10, 20)


def test_what_cannot_be() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    inject(net, partial(LoRA, rank=2), ["0"], train=[])
    with pytest.raises(ValueError, match=r"the adapter at '0', a LoRA, has none. Factorise the layers"):
        ars.policy(0.5).build(RankBudget.of(net))
    net = factorised()
    with pytest.raises(
        ValueError, match=r"ratio=0.1 keeps 52 of the 528 .* \(minimum=1\) has 80. The ratio must be at least 0.152"
    ):
        built(net, ars.policy(0.1))
    learned = built(net, ars.policy(0.4))
    learned.track(RankBudget.of(factorised(Branches(3))))
    with pytest.raises(RuntimeError, match="the adapters were changed after masks began to be learned for them"):
        learned.draw(0)
    with pytest.raises(TypeError, match=r"sampler makes what draws the masks, once the layers are known: .* Got Hyper"):
        LearnedRanks(0.5, Hypernetwork({"a": 3}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="masks='gumbel': choose 'hypernetwork', 'elements', 'monotone'."):
        ars.policy(masks="gumbel")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="price='dense': choose 'factors' or 'cheapest'."):
        ars.policy(price="dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="refill=True: choose 'spend' or 'keep'."):
        ars.policy(refill=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="minimum is a number of components, at least 1"):
        ars.policy(minimum=0)
    with pytest.raises(ValueError, match="temperature divides, and must be positive. Got 0."):
        ars.policy(temperature=0)
    with pytest.raises(TypeError, match="seed must be an integer. Got 0.5."):
        ars.policy(seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sides='both': choose 'one'"):
        BudgetPenalty(0.5, sides="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale='norm': choose 'energy'"):
        MaskAlignment(scale="norm")  # type: ignore[arg-type]
