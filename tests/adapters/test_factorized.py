"""The factorised layer: the properties of ARS (15) and RankDyna (16) that are its own, by number, and its life."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft import LoRA, RankBudget, adapter_state_dict, eject, inject, load, merge
from lightning_peft.adapters import Factorized, ThinLinear
from lightning_peft.checkpoint import ENTRY, AdapterFileError, describe
from lightning_peft.compaction import compact_training
from lightning_peft.functional.factorized import factorized_linear
from lightning_peft.interop import plain_loader
from lightning_peft.surgery import adapters


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(16, 24)  # type: ignore[no-untyped-call]
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "wide": lambda: nn.Linear(24, 16),
    "tall": lambda: nn.Linear(24, 40, bias=False),
    "conv1d": conv1d,
    "convolution": lambda: nn.Conv2d(3, 8, (3, 2), stride=2, padding=1, padding_mode="reflect"),
}
kinds = pytest.mark.parametrize("kind", list(LAYERS))


def layer(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A layer of a kind, with a random bias where it has one, and a batch for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = LAYERS[kind]()
        if isinstance(built.bias, Tensor):
            nn.init.normal_(built.bias)
        x = torch.randn(5, 3, 7, 6) if kind == "convolution" else torch.randn(2, 30, 24)
    return built.to(dtype), x.to(dtype)


def trained(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Factorized, Tensor]:
    """A factorised layer whose triplets are no singular value decomposition any more, some gains negative."""
    built, x = layer(kind, dtype)
    factorized = Factorized(built)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in factorized.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return factorized, x


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))


@kinds
def test_property_15_1_and_16_1_all_open_it_is_the_dense_layer(kind: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        dense, x = layer(kind, dtype)
        y = dense(x)
        difference = (Factorized(dense)(x) - y).abs().max()
        assert difference <= tolerance * y.abs().max()


def test_the_start_is_sorted_orthonormal_and_of_full_rank() -> None:
    dense, _ = layer("wide")
    factorized = Factorized(dense)
    s = factorized.gate.value().detach()
    assert len(s) == 16
    assert bool((s[:-1] >= s[1:]).all())
    assert bool((s > 0).all())
    assert torch.allclose(factorized.U.mT @ factorized.U, torch.eye(16), atol=1e-5)
    assert torch.allclose(factorized.Vh @ factorized.Vh.mT, torch.eye(16), atol=1e-5)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exact_start_has_the_weight_itself(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit, in the base's own dtype, beside an identity on the smaller side."""
    dense, x = layer(kind, dtype)
    factorized = Factorized(dense, start="exact")
    assert torch.equal(factorized.weight, dense.weight)  # type: ignore[arg-type]
    d_out, d_in = factorized.U.shape[0], factorized.Vh.shape[1]
    one = factorized.U if d_out < d_in else factorized.Vh
    assert torch.equal(one, torch.eye(min(d_out, d_in), dtype=dtype))
    assert torch.equal(factorized.gate.value(), torch.ones(min(d_out, d_in)))
    rounding = 1e-6 if dtype == torch.float32 else 1e-2
    y = dense(x).detach()
    torch.testing.assert_close(factorized(x).detach(), y, rtol=0, atol=rounding * float(y.abs().max()))
    with torch.no_grad():
        factorized.U.zero_()
        factorized.Vh.zero_()
    assert bool(dense.weight.any())  # a copy: the layer may go on living elsewhere


def test_who_asks_for_the_weights_dtype_does_not_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """As T5 does at every forward."""
    dense, _ = layer("conv1d", torch.bfloat16)
    factorized = Factorized(dense)
    product = factorized.weight.detach()
    monkeypatch.setattr(Factorized, "effective_weight", None)
    assert isinstance(factorized.weight, Tensor)
    assert factorized.weight.dtype == torch.bfloat16 != torch.int8
    assert factorized.weight.shape == dense.weight.shape == product.shape  # type: ignore[union-attr]
    with pytest.raises(TypeError):
        factorized.weight + 1


def test_an_exact_start_decomposes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.linalg, "svd")
    Factorized(nn.Linear(24, 16), start="exact")
    with pytest.raises(AttributeError):
        Factorized(nn.Linear(24, 16))


def test_an_exact_start_has_no_rank() -> None:
    with pytest.raises(ValueError, match=r"start='exact' has all components, in no order, and rank=3 would cut"):
        Factorized(nn.Linear(24, 16), rank=3, start="exact")
    with pytest.raises(ValueError, match=r"start='svdd': choose 'svd' or 'exact'"):
        Factorized(nn.Linear(24, 16), start="svdd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has values that are not finite"):
        dense = nn.Linear(24, 16)
        nn.init.constant_(dense.weight, float("inf"))
        Factorized(dense, start="exact")


def test_an_exact_start_on_the_meta_device_is_filled_by_a_checkpoint() -> None:
    dense, x = layer("wide")
    with torch.device("meta"):
        shapes = Factorized(LAYERS["wide"](), start="exact")
    assert shapes.U.is_meta
    filled = Factorized(dense, start="exact")
    shapes.load_state_dict(filled.state_dict(), assign=True)
    assert torch.equal(shapes(x), filled(x))


def test_an_exact_start_can_be_cut() -> None:
    """What is left is no whole weight any more, and is built again by what it says of itself."""
    factorized = Factorized(nn.Linear(24, 16), start="exact")
    factorized.gate.keep(torch.arange(16) < 5)
    small = factorized.compacted()
    assert small is not None
    assert torch.equal(small.effective_weight(), factorized.effective_weight())
    again = type(small)(nn.Linear(24, 16), **small.arguments())
    assert {name: p.shape for name, p in again.own_parameters()} == {n: p.shape for n, p in small.own_parameters()}


def test_a_rank_keeps_the_largest_components() -> None:
    """Eckart and Young: what is lost is the tail of the singular values."""
    dense = nn.Linear(24, 16).double()
    tail = torch.linalg.svdvals(dense.weight.detach())[5:].square().sum().sqrt()
    lost = (Factorized(dense, rank=5).effective_weight() - dense.weight).norm()
    assert torch.allclose(lost, tail, rtol=1e-10)


@pytest.mark.parametrize(("sizes", "rank"), [((24, 16), 9), ((768, 768), 384), ((768, 3072), 614), ((1, 1), 1)])
def test_the_rank_that_breaks_even(sizes: tuple[int, int], rank: int) -> None:
    """The card's numbers for BERT-base: 384 and 614."""
    factorized = Factorized(nn.Linear(*sizes, device="meta"), rank="breakeven")
    assert len(factorized.gate) == rank


@kinds
def test_property_16_2_the_triplet_identity(kind: str) -> None:
    """For factors of any kind U dU, s ds and V dV add up to the same, component by component; so does the mask's."""
    factorized, x = trained(kind, torch.float64)
    U, Vh, gate = factorized.U, factorized.Vh, factorized.gate
    mask = gate.mask.requires_grad_(True)
    gain = gate.gain
    assert gain is not None
    factorized(x).sin().square().sum().backward()
    assert U.grad is not None
    assert Vh.grad is not None
    assert gain.grad is not None
    assert mask.grad is not None
    worth = gain.detach() * gain.grad
    assert bool((worth.abs() > 0).all())
    for other in ((U.detach() * U.grad).sum(0), (Vh.detach() * Vh.grad).sum(1)):
        assert torch.allclose(other, worth, rtol=1e-6, atol=0)
    assert torch.allclose(mask.grad.double(), worth, rtol=1e-6, atol=0)  # the mask is float32


@kinds
def test_property_16_6_closed_components_are_dead(kind: str) -> None:
    """Exactly: no gradient in U, s and Vh, and no trace of their values in the output."""
    factorized, x = trained(kind)
    n = len(factorized.gate)
    closed = torch.arange(n) % 3 == 1
    factorized.gate.keep(~closed)
    y = factorized(x)
    y.square().sum().backward()
    gain = factorized.gate.gain
    assert gain is not None
    assert gain.grad is not None
    assert factorized.U.grad is not None
    assert factorized.Vh.grad is not None
    for gradient in (factorized.U.grad[:, closed], gain.grad[closed], factorized.Vh.grad[closed]):
        assert torch.count_nonzero(gradient) == 0
    assert torch.count_nonzero(gain.grad[~closed]) == n - int(closed.sum())
    with torch.no_grad():
        factorized.U[:, closed], factorized.Vh[closed], gain[closed] = 1e6, -1e6, 1e6
    assert torch.equal(factorized(x), y)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("tokens", [3, 500])
@pytest.mark.parametrize("kind", ["wide", "tall"])
def test_every_way_to_multiply_is_the_equation(kind: str, tokens: int, trained: bool) -> None:
    """Folded into U, folded into Vh, or between them: outputs and all gradients are those of the plain formula."""
    dense, _ = layer(kind, torch.float64)
    d_out, d_in = dense.weight.shape  # type: ignore[union-attr, misc]
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int, wanted: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(wanted)

    U, Vh, bias, value = draw(d_out, 6, wanted=trained), draw(6, d_in, wanted=trained), draw(d_out), draw(6)
    x = draw(tokens, d_in)
    wanted = [t for t in (x, U, Vh, value, bias) if t.requires_grad]
    y = factorized_linear(x, U, Vh, value, bias)
    plain = x @ (U @ torch.diag(value) @ Vh).mT + bias
    torch.testing.assert_close(y, plain)
    gradients = torch.autograd.grad(y.sin().sum(), wanted)
    for gradient, expected in zip(gradients, torch.autograd.grad(plain.sin().sum(), wanted), strict=True):
        torch.testing.assert_close(gradient, expected)


def saved_between(tokens: int) -> int:
    """How many tensors of tokens x K numbers a call keeps for its backward."""
    factorized, x = Factorized(nn.Linear(8, 12), rank=5), torch.randn(tokens, 8, requires_grad=True)
    shapes: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        factorized(x)
    return shapes.count(torch.Size((tokens, 5)))


def test_what_is_between_the_products_is_not_multiplied_where_a_factor_is_smaller() -> None:
    assert saved_between(tokens=6) == 2  # before and after the gate
    assert saved_between(tokens=100) == 1


@pytest.mark.parametrize(("trained", "products"), [(True, 6), (False, 4)])
def test_frozen_factors_cost_two_products_forward_and_two_backward(trained: bool, products: int) -> None:
    """Though their gate asks for its gradient: it is no third one."""
    factorized, x = Factorized(nn.Linear(8, 8), trained=trained), torch.randn(100, 8, requires_grad=True)
    factorized.gate.mask.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        factorized(x).sum().backward()
    assert counter.get_total_flops() == products * 2 * 100 * 8 * 8


@pytest.mark.parametrize("step", [1, 4])
def test_property_16_7_compaction_changes_nothing_but_the_size(step: int) -> None:
    """Loss, gradients and Adam's updates of the next steps are those of the masked twin."""
    host = net()
    inject(host, Factorized, train=[".*"])
    generator = torch.Generator().manual_seed(3)
    batches = torch.randn(8, 32, 12, generator=generator)
    optimizer = torch.optim.AdamW(host.parameters(), lr=0.01)

    def take(module: nn.Module, adam: torch.optim.Optimizer, i: int) -> Tensor:
        loss = (module(batches[i]) - batches[i][:, :3].sin()).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach()

    for i in range(step):
        take(host, optimizer, i)
    RankBudget.of(host).keep({"0": torch.arange(12) % 2 == 0, "2": torch.arange(16) < 5})
    twin, its = copy.deepcopy((host, optimizer))
    before = sum(p.numel() for p in host.parameters())
    assert compact_training(host, [optimizer]) == {"0": 6, "2": 5}
    after = sum(p.numel() for p in host.parameters())
    assert before - after == 6 * (12 + 20 + 1) + 11 * (20 + 16 + 1)
    for i in range(step, step + 3):
        torch.testing.assert_close(take(host, optimizer, i), take(twin, its, i), rtol=1e-6, atol=1e-6)
        for name, keep in (("0", torch.arange(12) % 2 == 0), ("2", torch.arange(16) < 5)):
            cut, masked = host.get_submodule(name), twin.get_submodule(name)
            assert isinstance(cut, Factorized)
            assert isinstance(masked, Factorized)
            for one, other in ((cut.U, masked.U[:, keep]), (cut.Vh, masked.Vh[keep])):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
            assert cut.U.grad is not None
            assert masked.U.grad is not None
            torch.testing.assert_close(cut.U.grad, masked.U.grad[:, keep], rtol=1e-6, atol=1e-6)


def test_compaction_leaves_a_layer_without_components_its_bias() -> None:
    host = net()
    inject(host, Factorized)
    budget = RankBudget.of(host)
    budget.keep({"0": torch.zeros(12)})
    x = torch.randn(4, 12)
    y = host(x)
    assert compact_training(host, []) == {"0": 0, "2": 16}
    cut = host.get_submodule("0")
    assert isinstance(cut, Factorized)
    assert len(cut.gate) == 1
    assert RankBudget.of(host).ranks() == {"0": 0, "2": 16}
    assert torch.equal(host(x), y)
    assert torch.allclose(cut(x), cut.bias.expand(4, -1))


@pytest.mark.parametrize("fold", ["both", "U"])
@pytest.mark.parametrize("open_", [0, 1, 4])
@kinds
def test_property_15_9_and_16_8_thin_and_merged_layers_are_the_masked_one(kind: str, open_: int, fold: Any) -> None:
    factorized, x = trained(kind)
    factorized.gate.keep(torch.arange(len(factorized.gate)).flip(0) < open_)
    y = factorized(x)
    thin = factorized.thin(fold)
    assert not any(isinstance(child, Factorized) for child in thin.modules())
    torch.testing.assert_close(thin(x), y, rtol=1e-5, atol=1e-5)
    d_out, d_in = factorized.U.shape[0], factorized.Vh.shape[1]
    sizes = [p.numel() for name, p in thin.named_parameters() if name.endswith("weight")]
    assert sorted(sizes) == sorted([max(1, open_) * d_in, max(1, open_) * d_out])
    host = nn.Sequential(copy.deepcopy(factorized))
    merge(host)
    assert type(host[0]) is type(LAYERS[kind]())
    torch.testing.assert_close(host(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rank", "dense"), [(9, False), (10, True)])
def test_property_15_9_where_factoring_does_not_pay_the_layer_is_dense(rank: int, dense: bool) -> None:
    """24 x 16: nine components cost 360 of 384 parameters, ten cost 400."""
    base, x = layer("wide")
    factorized = Factorized(base, rank=rank)
    thin = factorized.thin()
    assert isinstance(thin, nn.Linear if dense else ThinLinear)
    torch.testing.assert_close(thin(x), factorized(x), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in thin.parameters()) <= 24 * 16 + 16


def test_a_thin_layer_answers_for_the_one_whose_place_it_takes() -> None:
    base, _ = layer("wide")
    thin = Factorized(base, rank=4).thin()
    assert isinstance(thin, ThinLinear)
    assert (thin.in_features, thin.out_features, thin.weight.shape) == (24, 16, (16, 24))
    assert thin.bias is not None
    assert torch.equal(thin.bias, base.bias)
    assert list(thin.state_dict()) == ["down.weight", "up.weight", "up.bias"]
    plain = nn.Sequential(*copy.deepcopy(thin))
    x = torch.randn(3, 24)
    assert torch.equal(plain(x), thin(x))
    with pytest.raises(ValueError, match="fold='V': choose 'both' or 'U'"):
        Factorized(base).thin("V")  # type: ignore[arg-type]


@pytest.mark.parametrize("of", ["the package", "the exported file"])
def test_adapters_on_top_of_thin_layers(of: str) -> None:
    """The two halves are layers like any other; their common name is what a user tries first."""
    made = Factorized(nn.Linear(24, 16), rank=4).thin()
    thin: Any = plain_loader.ThinLinear(24, 16, 4, bias=True) if of == "the exported file" else made
    host, x = nn.Sequential(OrderedDict(query=thin, out=nn.Linear(16, 3))), torch.randn(5, 24)
    before = host(x)
    with pytest.raises(ValueError, match=r"matches 'query', which is compressed: .* 'query\.down' and 'query\.up', or"):
        inject(host, partial(LoRA, rank=2), targets=["query"])
    with pytest.raises(ValueError, match=r"'query' is compressed already: .* train adapters on top, such as LoRA"):
        inject(host, Factorized, targets=["query.up"])
    inject(host, partial(LoRA, rank=2), targets=["query.down", "query.up"])
    assert torch.equal(host(x), before)
    with torch.no_grad():
        for site in RankBudget.of(host).values():
            site.adapter.B.normal_()
    trained = host(x)
    assert not torch.allclose(trained, before)
    merge(host)
    torch.testing.assert_close(host(x), trained, rtol=1e-5, atol=1e-5)
    assert list(host.query.state_dict()) == ["down.weight", "up.weight", "up.bias"]


@pytest.mark.parametrize("of", ["the package", "the exported file"])
def test_who_asks_for_a_thin_layers_dtype_does_not_multiply(of: str) -> None:
    """As T5 does three times in every forward, also where the package is not."""
    made = Factorized(nn.Linear(24, 16), rank=4).thin()
    thin: Any = plain_loader.ThinLinear(24, 16, 4, bias=True) if of == "the exported file" else made
    with FlopCounterMode(display=False) as counter:
        assert isinstance(thin.weight, Tensor)
        assert thin.weight.dtype == torch.float32 != torch.int8
        assert thin.weight.device == thin.up.weight.device
        assert (thin.weight.shape, thin.weight.ndim, thin.weight.numel()) == ((16, 24), 2, 384)
        assert counter.get_total_flops() == 0
        y = nn.functional.linear(torch.ones(1, 24), thin.weight)
        assert counter.get_total_flops() == 2 * 16 * 4 * 24 + 2 * 24 * 16
    product = thin.up.weight @ thin.down.weight
    assert torch.equal(y.detach(), nn.functional.linear(torch.ones(1, 24), product).detach())
    y.sum().backward()
    assert thin.up.weight.grad.shape == (16, 4)
    assert torch.equal(thin.weight.detach(), product.detach())
    assert torch.equal(_Twice.apply(thin.weight).detach(), 2 * product.detach())
    thin.bfloat16()
    assert thin.weight.dtype == torch.bfloat16
    read = torch.compile(lambda x: nn.functional.linear(x, thin.weight), backend="eager", fullgraph=True)
    x = torch.ones(1, 24, dtype=torch.bfloat16)
    assert torch.equal(read(x), nn.functional.linear(x, thin.up.weight @ thin.down.weight))


class _Twice(torch.autograd.Function):
    """Takes tensors by a way that is none of torch's functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def test_the_weight_is_released() -> None:
    """Nobody holds it: the adapter's own copy of the layer has none, and the layer itself is gone."""
    host = net()
    gone = [weakref.ref(host[0].weight), weakref.ref(host[2].weight)]
    kept = host[0].bias
    before = sum(p.numel() for p in host.parameters())
    inject(host, lambda base: Factorized(base, rank=2))
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert host[0].bias is kept
    rest = sum(p.numel() for p in host.parameters())
    assert before - rest == 12 * 20 + 20 * 16 - 2 * (12 + 20 + 1) - 2 * (20 + 16 + 1)
    stored = {
        id(t.untyped_storage()): t.untyped_storage().nbytes()
        for t in vars(host[0].base).values()
        if isinstance(t, Tensor)
    }
    assert sum(stored.values()) == 4


def test_it_answers_for_the_layer() -> None:
    dense, _ = layer("wide")
    factorized = Factorized(dense)
    assert (factorized.in_features, factorized.out_features) == (24, 16)
    assert factorized.bias is dense.bias
    torch.testing.assert_close(factorized.weight.detach(), dense.weight)
    assert factorized.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert factorized.base.weight.isnan().all()  # not a number that could be taken for the weight


def test_factors_have_the_layers_dtype_and_gains_at_least_float32() -> None:
    factorized = Factorized(nn.Linear(24, 16).to(torch.bfloat16))
    assert {factorized.U.dtype, factorized.Vh.dtype, factorized.weight.dtype} == {torch.bfloat16}
    assert factorized.gate.value().dtype == torch.float32


def test_eject_is_refused_and_merge_is_named() -> None:
    host = net()
    inject(host, Factorized)
    with pytest.raises(RuntimeError, match=r"cannot bring back the layer '0': Factorized .* Call merge\(model\)"):
        eject(host)
    assert isinstance(host[0], Factorized)


def test_merge_gives_back_plain_layers_as_trainable_as_they_were() -> None:
    host = net()
    host[2].weight.requires_grad_(False)
    plain = copy.deepcopy(host)
    inject(host, Factorized)
    merge(host)
    assert list(host.state_dict()) == list(plain.state_dict())
    for (name, one), other in zip(host.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)
        assert one.requires_grad == other.requires_grad, name
    inject(host, Factorized)  # and they are layers like any other


def test_biases_are_trained_where_they_are_named() -> None:
    host = net()
    done = inject(host, Factorized, train=["0.bias", "4"])
    assert done.trained == ("0.bias", "4.bias", "4.weight")
    assert "0.bias" not in done.frozen
    assert "2.bias" in done.frozen
    host(torch.randn(3, 12)).sum().backward()
    assert host[0].bias.grad is not None
    assert host[2].bias.grad is None
    assert {n for n, p in host.named_parameters() if p.requires_grad and "bias" in n} == {"0.base.bias", "4.bias"}


def test_an_attentions_biases_are_trained_where_they_are_named() -> None:
    """The bias of its input projection stays on the attention, and goes by its name there."""
    for train, expected in (
        ([".*"], {"0.in_proj_bias", "0.out_proj.base.bias", "1.weight", "1.bias"}),
        (["in_proj_bias"], {"0.in_proj_bias"}),
    ):
        host = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 2))
        inject(host, Factorized, targets=["in_proj", "out_proj"], train=train)
        own = {id(p) for adapter in adapters(host).values() for _, p in adapter.own_parameters()}
        assert {n for n, p in host.named_parameters() if p.requires_grad and id(p) not in own} == expected


def test_a_bias_beside_a_layer_that_keeps_its_weight_is_not_trained() -> None:
    with pytest.raises(ValueError, match=r"train=\['0.bias'\] matches no module or parameter that is not adapted"):
        inject(net(), lambda base: LoRA(base, rank=2), train=["0.bias"])


def test_frozen_it_is_moved_by_its_mask_alone() -> None:
    factorized = Factorized(nn.Linear(24, 16), trained=False)
    assert not any(p.requires_grad for p in factorized.parameters())
    mask = factorized.gate.mask.requires_grad_(True)
    factorized(torch.randn(3, 24)).square().sum().backward()
    assert mask.grad is not None
    assert bool((mask.grad != 0).all())


def test_fill_writes_in_place_or_nothing() -> None:
    factorized = Factorized(nn.Linear(24, 16), rank=3)
    held = [factorized.U, factorized.Vh, factorized.gate.gain]
    U, s, Vh = torch.randn(16, 3), torch.rand(3), torch.randn(3, 24)
    before = factorized.effective_weight().detach()
    for wrong in ((U, s, Vh[:2]), (U, s[:2], Vh), (U.mT, s, Vh)):
        with pytest.raises(ValueError, match="must have shape"):
            factorized.fill(*wrong)
        assert torch.equal(factorized.effective_weight(), before)
    factorized.gate.keep(torch.tensor([1, 0, 1]))
    factorized.fill(U, s, Vh)
    assert all(
        one is other for one, other in zip(held, [factorized.U, factorized.Vh, factorized.gate.gain], strict=True)
    )
    keep = torch.tensor([0, 2])
    torch.testing.assert_close(factorized.effective_weight(), (U * s)[:, keep] @ Vh[keep])


def save(host: nn.Module, path: Path) -> Path:
    state = adapter_state_dict(host)
    torch.save({"state_dict": state, ENTRY: describe(host, state)}, path)
    return path


def test_it_is_loaded_without_a_decomposition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = net()
    inject(host, Factorized, train=["0.bias", "4"])
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.add_(0.1)
    RankBudget.of(host).keep({"0": torch.arange(12) < 3})
    host[2].base.bias.copy_(net()[2].bias)  # frozen: the base's own
    path = save(host, tmp_path / "a.ckpt")
    x = torch.randn(4, 12)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a decomposition was asked for")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    other = load(net(), path)
    assert torch.equal(other(x), host(x))
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in host.named_parameters() if p.requires_grad
    }


def test_a_file_of_another_base_leaves_the_weights_in_place(tmp_path: Path) -> None:
    """What can be told from what is left of the base: its biases."""
    host = net()
    inject(host, Factorized)
    path = save(host, tmp_path / "a.ckpt")
    other = net()
    with torch.no_grad():
        other[0].bias.add_(1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(AdapterFileError, match="made for another base model: '0.base.bias' differs"):
        load(other, path)
    assert [type(child) for child in other] == [type(child) for child in net()]
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert all(p.requires_grad for p in other.parameters())


def test_a_layer_that_is_refused_leaves_all_weights_in_place() -> None:
    host = net()
    with torch.no_grad():
        host[2].weight[0, 0] = torch.nan
    before = dict(host.named_parameters())
    with pytest.raises(ValueError, match="layer '2': the layer's weight has values that are not finite"):
        inject(host, Factorized)
    assert {name: id(p) for name, p in host.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert all(p.requires_grad for p in host.parameters())


def test_a_pooler_stays_dense_unless_it_is_named() -> None:
    def host() -> nn.Module:
        parts = {"encoder": nn.Linear(8, 8), "pooler": nn.Sequential(nn.Linear(8, 8)), "head": nn.Linear(8, 2)}
        return nn.ModuleDict(parts)

    for factory in (Factorized, partial(Factorized, rank=2), partial(partial(Factorized, rank=2), trained=False)):
        assert inject(host(), factory).adapted == ("encoder",)
    assert inject(host(), Factorized, targets=["pooler.0"]).adapted == ("pooler.0",)
    assert inject(host(), partial(LoRA, rank=2)).adapted == ("encoder", "pooler.0")


def test_of_two_layers_with_one_weight_each_has_factors_of_its_own() -> None:
    host = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    host[1].weight = host[0].weight
    x = torch.randn(3, 8)
    y = host(x)
    with pytest.warns(UserWarning, match="the weight of '1' was one parameter with '0.weight' and no longer is"):
        inject(host, Factorized)
    torch.testing.assert_close(host(x), y)
    assert host[0].U is not host[1].U


@pytest.mark.parametrize("kind", ["wide", "convolution"])
@pytest.mark.parametrize("rank", [1, None])
def test_plain_layers_share_no_hook_with_the_layer_that_was_there(kind: str, rank: int | None) -> None:
    dense, x = layer(kind)
    factorized = Factorized(dense, rank)
    thin, other = factorized.thin(), factorized.thin()
    called: list[str] = []
    for name, module in (("dense", dense), ("other", other)):
        for part in module.modules():
            part.register_forward_hook(lambda *_, name=name: called.append(name))
    thin(x)
    assert called == []


def test_what_was_built_on_the_meta_device_cannot_be_filled() -> None:
    with torch.device("meta"):
        host = net()
    inject(host, Factorized, targets=["0"])
    host.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="only copy of its layer's weight.* weights before adapters are injected"):
        for child in host.modules():
            if hasattr(child, "reset_parameters"):  # as Lightning does
                child.reset_parameters()


def test_what_it_refuses() -> None:
    with pytest.raises(TypeError, match="an embedding is looked up and not multiplied"):
        Factorized(nn.Embedding(8, 4))
    hooked = nn.Linear(8, 4)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="it has hooks, and it will never be called"):
        Factorized(hooked)
    for rank, error, says in (
        (
            5,
            ValueError,
            "rank=5 is not possible on a layer of 8 inputs and 4 outputs: give a rank from 1 to 4, or None",
        ),
        (0, ValueError, "rank=0 is not possible"),
        ("half", ValueError, "rank='half': give a number of components, 'breakeven', or None"),
        (2.0, TypeError, "rank must be an integer"),
    ):
        with pytest.raises(error, match=says):
            Factorized(nn.Linear(8, 4), rank=rank)  # type: ignore[arg-type]
    host = net()
    inject(host, Factorized)
    with pytest.raises(ValueError, match="has adapters already, the first at '0': call merge first"):
        inject(host, Factorized)


def test_nothing_is_drawn() -> None:
    """Neither the start, nor a cut, nor a thin layer asks the global generator for a number."""
    state = torch.random.get_rng_state()
    dense, _ = layer("wide")
    factorized = Factorized(dense)
    factorized.gate.keep(torch.arange(16) < 3)
    factorized.compacted()
    factorized.thin()
    assert torch.equal(torch.random.get_rng_state(), state)
