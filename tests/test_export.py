"""merge and compact keep outputs on every kind of layer; eject restores the base bit for bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_peft.adapters import Adapter, DynamicDoRA, LoRA
from lightning_peft.export import compact, merge
from lightning_peft.rank.budget import RankBudget
from lightning_peft.surgery import adapters, eject, inject

RANK = 4
LORA = partial(LoRA, rank=RANK, alpha=6.0)
DORA = partial(DynamicDoRA, rank=RANK, dropout=0.0)


class Linear(nn.Module):
    """Two linear layers of unequal shape and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 12), nn.Linear(12, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x).tanh()))
        return out


def linear() -> tuple[nn.Module, tuple[Any, ...], list[str]]:
    return Linear(), (torch.randn(5, 8),), ["first", "second"]


def gpt2() -> tuple[nn.Module, tuple[Any, ...], list[str]]:
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return GPT2LMHeadModel(config), (torch.arange(12)[None],), ["c_attn", "c_fc", "c_proj"]


def embedding() -> tuple[nn.Module, tuple[Any, ...], list[str]]:
    return nn.Sequential(nn.Embedding(10, 6, padding_idx=0), nn.Linear(6, 5)), (torch.arange(10),), ["0"]


def encoder() -> tuple[nn.Module, tuple[Any, ...], list[str]]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2), (torch.randn(3, 4, 8),), ["self_attn", "linear1", "linear2"]


KINDS: list[Callable[[], tuple[nn.Module, tuple[Any, ...], list[str]]]] = [linear, gpt2, embedding, encoder]


def outputs(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        out = module(*inputs)
    return out.logits if hasattr(out, "logits") else out


def fill(module: nn.Module, *ranks: int) -> dict[str, int]:
    """Give the adapters values, as training would, and close components: without `ranks`, 0, 1, 2, ... stay open."""
    kept = {}
    for i, (name, site) in enumerate(RankBudget.of(module).items()):
        nn.init.normal_(site.adapter.B, std=0.2)
        if site.gate.gain is not None:
            nn.init.normal_(site.gate.gain)
        kept[name] = ranks[i] if ranks else i % (RANK + 1)
        site.gate.keep(torch.randperm(RANK) < kept[name])
    return kept


@pytest.fixture(params=[LORA, DORA], ids=["lora", "dynamic_dora"])
def factory(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_merge_keeps_outputs_and_leaves_plain_layers(kind: Any, factory: Any, training: bool) -> None:
    module, inputs, targets = kind()
    module.eval()
    wanted_grad = {name: i % 3 > 0 for i, (name, _) in enumerate(module.named_parameters())}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(wanted_grad[name])
    before, kinds = outputs(module, inputs), {name: type(child) for name, child in module.named_modules()}
    base = copy.deepcopy(module.state_dict())
    inject(module, factory, targets)
    ranks = fill(module, *([2] if kind is embedding else []))
    adapted = outputs(module, inputs)
    assert (adapted - before).abs().max() > 1e-3
    merged = merge(module.train(training))
    assert (set(merged.layers), merged.untied) == (set(ranks), ())
    assert str(merged) == f"Merged the adapters of {len(ranks)} layers."
    torch.testing.assert_close(outputs(module.eval(), inputs), adapted, rtol=0, atol=1e-5)
    assert {name: type(child) for name, child in module.named_modules()} == kinds
    assert {name: p.requires_grad for name, p in module.named_parameters()} == wanted_grad
    assert list(module.state_dict()) == list(base)
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed == {in_base(name) for name, rank in ranks.items() if rank}


def in_base(layer: str) -> str:
    return f"{layer}_weight" if layer.endswith("in_proj") else f"{layer}.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_eject_restores_the_base_bit_for_bit(kind: Any, factory: Any) -> None:
    module, inputs, targets = kind()
    module.eval()
    parameters, before = dict(module.named_parameters()), outputs(module, inputs)
    values = copy.deepcopy(module.state_dict())
    inject(module, factory, targets)
    fill(module)
    eject(module)
    assert list(dict(module.named_parameters())) == list(parameters)
    assert all(p is parameters[name] and p.requires_grad for name, p in module.named_parameters())
    assert all(torch.equal(tensor, values[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(outputs(module, inputs), before)


@pytest.mark.parametrize("kind", KINDS)
def test_compact_keeps_outputs_and_cuts_tensors(kind: Any, factory: Any) -> None:
    module, inputs, targets = kind()
    inject(module.eval(), factory, targets)
    ranks = fill(module, *([2] if kind is embedding else []))
    adapted = outputs(module, inputs)
    state = torch.get_rng_state()
    assert compact(module) == ranks
    assert torch.equal(torch.get_rng_state(), state)  # the user's random stream did not notice
    torch.testing.assert_close(outputs(module, inputs), adapted, rtol=0, atol=1e-5)
    budget = RankBudget.of(module)
    left = {name: rank for name, rank in ranks.items() if rank}
    assert budget.ranks() == left
    assert budget.capacity == budget.spent == sum(left.values())
    for name, site in budget.items():
        assert site.adapter.A.shape[0] == site.adapter.B.shape[1] == left[name]
        assert all(p.requires_grad for _, p in site.adapter.own_parameters())
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert compact(module) == left  # nothing is left to cut
    torch.testing.assert_close(outputs(module, inputs), adapted, rtol=0, atol=1e-5)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == trainable


def test_a_compacted_module_trains_on_and_merges() -> None:
    module, inputs, targets = linear()
    inject(module, DORA, targets)
    fill(module, 2, 3)
    base = {name: p.clone() for name, p in module.named_parameters() if ".base." in name}
    compact(module)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    before = outputs(module, inputs)
    module(*inputs).square().sum().backward()
    optimizer.step()
    after = outputs(module, inputs)
    assert not torch.equal(after, before)
    assert all(torch.equal(p, base[name]) for name, p in module.named_parameters() if ".base." in name)
    merge(module)
    torch.testing.assert_close(outputs(module, inputs), after, rtol=0, atol=1e-5)


def test_compact_leaves_a_frozen_adapter_frozen() -> None:
    module, _, targets = linear()
    inject(module, LORA, targets)
    fill(module, 2, 3)
    RankBudget.of(module)["first"].adapter.A.requires_grad_(False)
    compact(module)
    adapter = RankBudget.of(module)["first"].adapter
    assert adapter.A.shape[0] == 2
    assert (adapter.A.requires_grad, adapter.B.requires_grad) == (False, True)


def test_eject_after_compact_restores_the_base() -> None:
    module, inputs, targets = encoder()
    parameters, before = dict(module.named_parameters()), outputs(module.eval(), inputs)
    inject(module, DORA, targets)
    fill(module)
    compact(module)
    eject(module)
    assert all(p is parameters[name] and p.requires_grad for name, p in module.named_parameters())
    assert torch.equal(outputs(module, inputs), before)


def test_merging_one_of_two_tied_weights_unties_them_and_says_so() -> None:
    module, inputs, _ = gpt2()
    assert module.lm_head.weight is module.transformer.wte.weight
    inject(module.eval(), DORA, ["wte"])
    fill(module, 3)
    adapted, output_layer = outputs(module, inputs), module.lm_head.weight.clone()
    with pytest.warns(UserWarning, match=r"transformer\.wte\.weight, lm_head\.weight were one parameter and no longer"):
        merged = merge(module)
    assert merged.untied == (("transformer.wte.weight", "lm_head.weight"),)
    assert "No longer tied: transformer.wte.weight, lm_head.weight." in str(merged)
    assert torch.equal(module.lm_head.weight, output_layer)
    assert not torch.equal(module.transformer.wte.weight, output_layer)
    torch.testing.assert_close(outputs(module, inputs), adapted, rtol=0, atol=1e-5)
    # One trainable parameter before, two now.
    assert (module.lm_head.weight.requires_grad, module.transformer.wte.weight.requires_grad) == (True, True)


def test_a_layer_shared_by_two_parents_is_merged_once_and_stays_shared(factory: Any) -> None:
    layer = nn.Linear(6, 6)
    module = nn.Sequential(nn.Sequential(layer, nn.Tanh()), nn.Sequential(layer, nn.Linear(6, 2)))
    x = torch.randn(4, 6)
    inject(module, factory, ["0.0"])
    fill(module, 2)
    adapted = outputs(module, (x,))
    assert compact(module) == {"0.0": 2}
    assert module[0][0] is module[1][0]
    torch.testing.assert_close(outputs(module, (x,)), adapted, rtol=0, atol=1e-5)
    assert merge(module).untied == ()
    assert module[0][0] is module[1][0] is layer
    torch.testing.assert_close(outputs(module, (x,)), adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cast_adapters", [False, True])
def test_merging_rounds_once(cast_adapters: bool) -> None:
    module = nn.Sequential(nn.Linear(64, 64).bfloat16(), nn.Linear(64, 2).bfloat16())
    base = module[0].weight.detach().clone()
    inject(module, LORA, ["0"])
    fill(module, RANK)
    if cast_adapters:
        module.bfloat16()
    adapter = RankBudget.of(module)["0"].adapter
    exact = base.double() + adapter.scaling * adapter.B.detach().double() @ adapter.A.detach().double()
    merge(module)
    assert module[0].weight.dtype == torch.bfloat16
    # Half a unit in the last of bfloat16's 8 binary digits, and a little for float32's own rounding.
    assert ((module[0].weight.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


class Ungated(Adapter):
    """A third party's adapter without a gate: it scales a layer's output."""

    def __init__(self, base: nn.Module, factor: float = 2.0) -> None:
        super().__init__(base)
        self.factor = nn.Parameter(torch.tensor(factor))

    def effective_weight(self) -> Tensor:
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return self.factor * weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.effective_weight(), self.base.bias)  # type: ignore[arg-type]


class Unmergeable(Ungated):
    """And one whose effect is no weight."""

    mergeable = False


def test_adapters_without_a_gate_merge_too() -> None:
    module, inputs, _ = linear()
    inject(module, Ungated, ["first"])
    assert list(adapters(module)) == ["first"]
    adapted = outputs(module, inputs)
    assert merge(module).layers == ("first",)
    assert torch.equal(outputs(module, inputs), adapted)


def test_names_are_cleaned_of_wrappers() -> None:
    module, _, targets = linear()
    inject(module, LORA, targets)
    assert list(adapters(torch.compile(module, backend="eager"))) == ["first", "second"]  # type: ignore[arg-type]


def test_what_cannot_be_merged_is_refused_by_name_and_nothing_changes() -> None:
    module, _, _ = linear()
    inject(module, lambda layer: Unmergeable(layer) if layer.in_features == 12 else LORA(layer), ["first", "second"])
    kept = list(module.modules())
    with pytest.raises(TypeError, match=r"merge cannot write these adapters into a weight: 'second' \(Unmergeable\)"):
        merge(module)
    with pytest.raises(TypeError, match="layer 'second': Unmergeable has no gate, so there is nothing to cut"):
        compact(module)
    assert all(a is b for a, b in zip(module.modules(), kept, strict=True))


@pytest.mark.parametrize("verb", [merge, compact])
def test_without_adapters_both_say_so(verb: Callable[[nn.Module], object]) -> None:
    with pytest.raises(ValueError, match=f"{verb.__name__} found no adapter in Linear; inject puts them in"):
        verb(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="inside a module and got a single LoRA; call it on the module that holds it"):
        verb(LoRA(nn.Linear(8, 8), rank=2))


def test_merging_warns_only_when_something_was_untied() -> None:
    module, _, _ = gpt2()
    inject(module, LORA, ["c_attn"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(module)
    assert module.lm_head.weight is module.transformer.wte.weight
