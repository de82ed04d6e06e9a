"""The lengths of rows are what the definition says, whatever becomes of components; PEFT's DoRA computes the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    Budget,
    Cubic,
    RankBudget,
    RankPolicy,
    Taylor,
    WeightDecomposed,
    compact,
    eject,
    inject,
    small_parameters,
)
from lightning_peft.adapters import dynamic_dora
from lightning_peft.compaction import compact_training

STARTS = ("lora", "dynamic_dora", "adalora")


@pytest.fixture(autouse=True)
def _own_draws() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def moved(adapter: WeightDecomposed, seed: int = 3) -> WeightDecomposed:
    """The adapter as training might leave it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter.own_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter


def assert_rows_are_as_long_as_the_magnitude_says(module: nn.Module) -> None:
    for site in RankBudget.of(module).values():
        assert isinstance(site.adapter, WeightDecomposed)
        lengths = site.adapter.effective_weight().norm(dim=1)
        torch.testing.assert_close(lengths, site.adapter.magnitude.weight.abs(), rtol=1e-6, atol=1e-7)


def test_the_equation_as_it_is_printed() -> None:
    base = nn.Linear(7, 5)
    layer = moved(WeightDecomposed(base, rank=3, alpha=6.0, components="dynamic_dora"))
    layer.gate.keep(torch.tensor([1, 0, 1]))
    turned = base.weight + 2.0 * layer.B @ torch.diag(layer.gate.gain * torch.tensor([1.0, 0.0, 1.0])) @ layer.A
    expected = layer.magnitude.weight[:, None] * turned / turned.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.effective_weight(), expected)
    x = torch.randn(4, 7)
    torch.testing.assert_close(layer(x), x @ expected.T + base.bias)


@pytest.mark.parametrize("components", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_starts_with_the_lengths_of_its_base(components: Any, dtype: torch.dtype) -> None:
    base = nn.Linear(300, 200).to(dtype)
    layer = WeightDecomposed(base, rank=3, components=components)
    expected = base.weight.double().norm(dim=1)
    torch.testing.assert_close(layer.magnitude.weight.double(), expected, rtol=1e-6, atol=0)
    assert layer.magnitude.weight.dtype == torch.promote_types(dtype, torch.float32)
    x = torch.randn(9, 300).to(dtype)
    assert torch.equal(layer(x), base(x))


def test_the_norm_is_a_constant_for_the_gradient() -> None:
    layer = moved(WeightDecomposed(nn.Linear(7, 5).double(), rank=3))
    x = torch.randn(4, 7).double()
    with layer.constants_held():
        norms = (layer.base.weight + layer.update()).norm(dim=1).detach()
        plain = layer.magnitude.weight / norms * (x @ (layer.base.weight + layer.update()).T) + layer.base.bias
    own = [p for _, p in layer.own_parameters()]
    expected = torch.autograd.grad(plain.square().sum(), own)
    for got, wanted in zip(torch.autograd.grad(layer(x).square().sum(), own), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def network(components: Any) -> nn.Sequential:
    module = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    inject(module, partial(WeightDecomposed, rank=4, components=components), targets=["0", "2"])
    return module


POLICIES = {
    "dynamic_dora": lambda: dynamic_dora.policy(Budget(rank=2), warmup=0.0, tail=0.2, interval=2),
    "taylor": lambda: RankPolicy(Cubic(0.0, 0.2), Taylor(), Budget(rank=2), 2),
    "taylor, soft": lambda: RankPolicy(Cubic(0.0, 0.2), Taylor(), Budget(rank=2), 2, soft=True),
    "taylor, to nothing almost": lambda: RankPolicy(Cubic(0.0, 0.2), Taylor(), Budget(rank=0.5), 2),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("components", STARTS)
def test_pruned_layers_keep_the_lengths_that_the_definition_asks_for(name: str, components: Any) -> None:
    if components == "lora" and name in ("dynamic_dora", "taylor, soft"):
        with pytest.raises(ValueError, match="soft"):
            POLICIES[name]().track(RankBudget.of(network(components)))
        return
    module, policy, total = network(components), POLICIES[name](), 20
    budget = RankBudget.of(module)
    policy.track(budget)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.05)
    seen = set()
    for step in range(1, total + 1):
        optimizer.zero_grad()
        module(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        if policy.observes(step, total):
            policy.importance.update()
        if policy.is_event(step, total):
            policy.apply(policy.decide(step, total), step, total)
        seen.add(budget.spent)
        assert_rows_are_as_long_as_the_magnitude_says(module)
    policy.importance.release()
    assert len(seen) > 1
    assert budget.spent == policy.final.amount(budget)
    x = torch.randn(5, 8)
    expected, ranks = module(x).detach(), budget.ranks()
    again = copy.deepcopy(module)
    compact(again)
    compact_training(module, [optimizer])
    for small in (module, again):
        assert_rows_are_as_long_as_the_magnitude_says(small)
        torch.testing.assert_close(small(x), expected, rtol=1e-6, atol=1e-6)
        assert RankBudget.of(small).ranks() == ranks
        assert {n: len(s.gate) for n, s in RankBudget.of(small).items()} == {n: max(1, r) for n, r in ranks.items()}


def test_training_goes_on_after_a_layer_lost_all_its_components() -> None:
    module = network("lora")
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    module(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
    RankBudget.of(module).keep({"0": torch.zeros(4)})
    magnitude = module[0].magnitude.weight
    moment = optimizer.state[magnitude]["exp_avg"].clone()
    assert compact_training(module, [optimizer]) == {"0": 0, "2": 4}
    assert torch.equal(optimizer.state[module[0].magnitude.weight]["exp_avg"], moment)
    assert optimizer.state[module[0].A]["exp_avg"].shape == (1, 8)
    before = module[0].magnitude.weight.detach().clone()
    optimizer.zero_grad()
    module(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(module[0].magnitude.weight, before)
    assert RankBudget.of(module).ranks() == {"0": 0, "2": 4}


# A norm that was kept from an earlier forward would be wrong after each of these.
def in_place(layer: WeightDecomposed) -> None:
    with torch.no_grad():
        layer.B.mul_(2)


def past_the_version_counter(layer: WeightDecomposed) -> None:
    layer.A.data.mul_(3)
    layer.base.weight.data.add_(1)


def loaded(layer: WeightDecomposed) -> None:
    layer.load_state_dict(moved(WeightDecomposed(nn.Linear(7, 5), rank=3, components="dynamic_dora"), 9).state_dict())


def cast(layer: WeightDecomposed) -> None:
    layer.to(torch.bfloat16).to(torch.float32)


def masked(layer: WeightDecomposed) -> None:
    layer.gate.keep(torch.tensor([1, 0, 0]))


def replaced(layer: WeightDecomposed) -> None:
    layer.gate.gain = nn.Parameter(torch.tensor([3.0, 2.0, 1.0]))


@pytest.mark.parametrize("write", [in_place, past_the_version_counter, loaded, cast, masked, replaced])
@pytest.mark.parametrize("copied", [True, False])
def test_the_norm_is_that_of_what_is_there(write: Any, copied: bool) -> None:
    layer = moved(WeightDecomposed(nn.Linear(7, 5), rank=3, components="dynamic_dora")).eval()
    x = torch.randn(4, 7)
    with torch.no_grad():
        before = layer(x)
        layer = copy.deepcopy(layer) if copied else layer
        write(layer)
        turned = layer.base.weight + layer.update()
        weight = layer.magnitude.weight[:, None] * turned / turned.norm(dim=1, keepdim=True)
        assert not torch.equal(layer(x), before)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.base.bias))


def test_a_row_of_zeros_stays_one_and_makes_no_nan() -> None:
    base = nn.Linear(7, 5)
    with torch.no_grad():
        base.weight[2] = 0
    x, layer = torch.randn(4, 7), WeightDecomposed(base, rank=3)
    assert torch.equal(layer(x), base(x))
    moved(layer)
    with torch.no_grad():
        layer.B[2] = 0
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for _, p in layer.own_parameters())
    assert torch.equal(layer(x)[:, 2], base.bias[2].expand(4))


class _Wrapped(nn.Module):
    """What a sharding library puts in place of a layer: the weight is there in the layer's own forward alone."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.hidden = layer, layer.weight.data
        layer.weight.data = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data = self.hidden
        y: Tensor = self.layer(x)
        self.layer.weight.data = torch.empty(0)
        return y


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_that_is_only_there_while_its_layer_runs(bias: bool) -> None:
    layer = moved(WeightDecomposed(nn.Linear(7, 5, bias=bias), rank=3))
    x = torch.randn(4, 7)
    expected = layer(x)
    layer.base = _Wrapped(layer.base)
    torch.testing.assert_close(layer(x), expected)
    assert not layer.base.layer._forward_pre_hooks


def test_a_base_that_somebody_listens_to() -> None:
    layer = moved(WeightDecomposed(nn.Linear(7, 5), rank=3))
    x, heard = torch.randn(4, 7), []
    expected = layer(x)
    layer.base.register_forward_hook(lambda module, args, output: heard.append(output))
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(heard[0], layer.base(x))


def test_the_magnitude_is_a_module_that_stays_whole_and_is_trained() -> None:
    module = network("dynamic_dora")
    magnitude = module[0].magnitude
    assert [name for name, _ in magnitude.named_parameters()] == ["weight"]
    assert any(p is magnitude.weight for p in small_parameters(module))
    assert RankBudget.of(module)["0"].gate.cost == 8 + 12
    assert RankBudget.of(module).capacity_parameters == 4 * (8 + 12) + 4 * (12 + 8)  # magnitudes are no component's
    eject(module)
    assert type(module[0]) is nn.Linear


def test_reset_parameters_measures_the_base_again() -> None:
    layer = moved(WeightDecomposed(nn.Linear(7, 5), rank=3, components="dynamic_dora"))
    layer.reset_parameters()
    x = torch.randn(4, 7)
    assert torch.equal(layer(x), layer.base(x))


def test_built_without_memory() -> None:
    with torch.device("meta"):
        layer = WeightDecomposed(nn.Linear(7, 5), rank=3)
    assert layer.magnitude.weight.is_meta
    assert layer.magnitude.weight.shape == (5,)


@pytest.mark.parametrize("components", ["dora", "", None])
def test_unknown_components(components: Any) -> None:
    with pytest.raises(ValueError, match="choose 'lora', 'dynamic_dora', 'adalora'"):
        WeightDecomposed(nn.Linear(7, 5), components=components)


# PEFT's own layers, given the same tensors.


def peft_twin(base: nn.Module, layer: WeightDecomposed) -> nn.Module:
    """PEFT's DoRA on a copy of the base, with the tensors of the adapter."""
    peft = pytest.importorskip("peft")
    host = nn.Sequential()
    host.add_module("layer", copy.deepcopy(base))
    conv1d = type(base).__name__ == "Conv1D"
    config = peft.LoraConfig(
        r=layer.rank, lora_alpha=layer.alpha, lora_dropout=0.0, target_modules=["layer"], use_dora=True,
        fan_in_fan_out=conv1d,
    )  # fmt: skip
    twin = peft.get_peft_model(host, config).base_model.model.layer
    with torch.no_grad():
        if isinstance(base, nn.Embedding):
            twin.lora_embedding_A["default"].copy_(layer.A)
            twin.lora_embedding_B["default"].copy_(layer.B)
        else:
            for mine, parameter in ((layer.A, twin.lora_A), (layer.B, twin.lora_B)):
                parameter["default"].weight.copy_(mine.view(parameter["default"].weight.shape))
        magnitude = twin.lora_magnitude_vector["default"].weight
        magnitude.copy_(layer.magnitude.weight.view(magnitude.shape))
    return twin


def peft_parameters(twin: Any) -> list[nn.Parameter]:
    if hasattr(twin, "lora_embedding_A") and len(twin.lora_embedding_A):
        factors = [twin.lora_embedding_A["default"], twin.lora_embedding_B["default"]]
    else:
        factors = [twin.lora_A["default"].weight, twin.lora_B["default"].weight]
    return [*factors, twin.lora_magnitude_vector["default"].weight]


def conv1d() -> nn.Module:
    layer: nn.Module = pytest.importorskip("transformers.pytorch_utils").Conv1D(40, 30)
    return layer


KINDS = {
    "linear": lambda: nn.Linear(30, 40),
    "linear without bias": lambda: nn.Linear(30, 40, bias=False),
    "conv1d": conv1d,
    "embedding": lambda: nn.Embedding(30, 40),
    "convolution": lambda: nn.Conv2d(5, 40, (3, 2), stride=2, padding=1),
}


def inputs(kind: str) -> Tensor:
    if kind == "embedding":
        return torch.randint(30, (3, 5))
    return torch.randn(3, 5, 6, 6) if kind == "convolution" else torch.randn(3, 5, 30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_gradients_are_those_of_pefts_dora(kind: str, training: bool) -> None:
    base = KINDS[kind]()
    layer = moved(WeightDecomposed(base, rank=4, alpha=6.0)).train(training)
    twin, x = peft_twin(base, layer).train(training), inputs(kind)
    ours, theirs = layer(x), twin(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    weighing = torch.randn(ours.shape) / ours.numel()
    (ours * weighing).sum().backward()
    (theirs * weighing).sum().backward()
    for mine, parameter in zip((layer.A, layer.B, layer.magnitude.weight), peft_parameters(twin), strict=True):
        torch.testing.assert_close(mine.grad, parameter.grad.view(mine.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_is_that_of_pefts_dora(kind: str) -> None:
    base = KINDS[kind]()
    layer = WeightDecomposed(base, rank=4, alpha=6.0)
    twin = peft_twin(base, layer)
    x = inputs(kind)
    target = torch.randn(layer(x).shape)
    ours = [layer.A, layer.B, layer.magnitude.weight]
    for parameters, module in ((ours, layer), (peft_parameters(twin), twin)):
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        for _ in range(2):  # at the first only B and the magnitude move
            optimizer.zero_grad()
            (module(x) - target).square().mean().backward()
            optimizer.step()
    assert all(p.grad.any() for p in ours)
    for mine, parameter in zip(ours, peft_parameters(twin), strict=True):
        torch.testing.assert_close(mine, parameter.view(mine.shape), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-6, atol=1e-6)
