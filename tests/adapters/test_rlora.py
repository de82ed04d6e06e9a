"""RLoRA: what it computes, what is drawn and kept, and how many numbers it trains."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    Budget,
    DynamicDoRA,
    RankBudget,
    RLoRA,
    compact,
    convert,
    eject,
    inject,
    load,
    merge,
    plan,
    to_hf_peft,
)
from lightning_peft.adapters import LowRankUpdate, NormShare, component_shares
from lightning_peft.adapters.rlora import Mode, Scale
from lightning_peft.checkpoint import ENTRY, AdapterFileError, adapter_state_dict, describe, digest
from lightning_peft.functional.srht import Kron, Rows
from lightning_peft.rank.budget import Site
from lightning_peft.rank.importance import by_shape

MODES = get_args(Mode)


def moved(adapter: RLoRA, seed: int = 0) -> RLoRA:
    """Its parameters off their start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter.own_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw).to(parameter))
    return adapter


class Net(nn.Module):
    def __init__(self, prefix: str = "first") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module(prefix, nn.Linear(24, 24))
        self.second = nn.Linear(24, 24)
        self.third = nn.Linear(24, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def adapted(factory: Any = None, prefix: str = "first") -> Net:
    net = Net(prefix)
    inject(net, factory or partial(RLoRA, rank=6), targets=[prefix, "second", "third"], train=[])
    return net


@pytest.mark.parametrize("mode", MODES)
def test_property_1_starts_as_its_base(mode: Mode) -> None:
    base = nn.Linear(24, 16)
    adapter, x = RLoRA(base, rank=6, mode=mode), torch.randn(5, 24)
    assert torch.equal(adapter(x), base(x))
    adapter(x).square().sum().backward()
    if mode == "diag":
        assert adapter.b.grad.abs().min() > 0  # type: ignore[union-attr]
        assert not adapter.gate.gain.grad.any()  # type: ignore[union-attr]
    else:
        moves = {"io": adapter.b, "core": adapter.R, "half": adapter.U}[mode]
        assert moves.grad.abs().min() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("rank", [6, 24])
def test_property_2_the_scale_of_the_projections_is_veras(rank: int) -> None:
    adapter = RLoRA(nn.Linear(24, 36), rank=rank)
    nn.init.ones_(adapter.b)  # type: ignore[arg-type]
    A, B = adapter.A, adapter.B
    torch.testing.assert_close(A @ A.t(), 2 * torch.eye(rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(B.t() @ B, 2 * 36 / rank * torch.eye(rank), rtol=0, atol=1e-5)
    # +-sqrt(2 / d_in) and +-sqrt(2 / r), the deviations of kaiming_uniform_(gain sqrt 2) on VeRA's A and B
    torch.testing.assert_close(A.abs(), torch.full_like(A, (2 / 24) ** 0.5))
    torch.testing.assert_close(B.abs(), torch.full_like(B, (2 / rank) ** 0.5))
    plain = RLoRA(nn.Linear(24, 36), rank=rank, scale="orthonormal")
    nn.init.ones_(plain.b)  # type: ignore[arg-type]
    torch.testing.assert_close(plain.A @ plain.A.t(), torch.eye(rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.B.t() @ plain.B, torch.eye(rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d_in", [96, 86])
def test_property_4_rows_and_kron_are_one_adapter(mode: Mode, d_in: int) -> None:
    base, x = nn.Linear(d_in, 24), torch.randn(2, 3, d_in)
    rows, kron = (moved(RLoRA(base, rank=40, mode=mode, path=path)) for path in ("rows", "kron"))  # type: ignore[arg-type]
    torch.testing.assert_close(rows(x), kron(x), rtol=0, atol=1e-4)
    assert rows.digest() == kron.digest()


@pytest.mark.parametrize("mode", MODES)
def test_property_6_merge_and_back(mode: Mode) -> None:
    net = adapted(partial(RLoRA, rank=6, mode=mode))
    before = {name: layer.base.weight.clone() for name, layer in net.named_children() if name != "head"}  # type: ignore[union-attr]
    for name in before:
        moved(getattr(net, name))
    x = torch.randn(4, 24)
    expected, twin = net(x), copy.deepcopy(net)
    merge(twin)
    assert (twin(x) - expected).norm() < 1e-5 * expected.norm()
    eject(net)
    assert all(torch.equal(getattr(net, name).weight, weight) for name, weight in before.items())


@pytest.mark.parametrize("mode", MODES)
def test_property_7_the_update_has_rank_r(mode: Mode) -> None:
    adapter = moved(RLoRA(nn.Linear(24, 36).double(), rank=6, mode=mode))
    assert torch.linalg.matrix_rank(adapter.update()) == 6


def test_property_8_one_hot_inputs() -> None:
    """|P_in x|^2 = 2 r / d_in exactly."""
    A = RLoRA(nn.Linear(768, 24), rank=64).A
    torch.testing.assert_close(A.square().sum(0), torch.full((768,), 2 * 64 / 768))


def test_property_9_two_processes_and_two_dtypes_have_the_same_projections() -> None:
    code = (
        "from torch import nn; from lightning_peft import RLoRA\n"
        "print(RLoRA(nn.Linear(44, 24).double(), rank=6, seed=3, share_projection=False, key='a.b').digest())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300, env={**os.environ}
    )
    here = RLoRA(nn.Linear(44, 24), rank=6, seed=3, share_projection=False, key="a.b")
    assert run.stdout.strip() == here.digest()
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(copy.deepcopy(here).to(dtype).A.sign(), here.A.sign().to(dtype))


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("diag", {"b", "gate.gain"}),
        ("io", {"a", "b", "gate.gain"}),
        ("core", {"R"}),
        ("half", {"U"}),
    ],
)
def test_property_10_the_state_is_what_is_trained(mode: Mode, names: set[str]) -> None:
    state = RLoRA(nn.Linear(24, 16), rank=6, mode=mode).state_dict()
    assert {key for key in state if not key.startswith("base.")} == names | {"gate.mask"}


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    with torch.device("meta"):
        return RobertaForSequenceClassification(RobertaConfig())  # its defaults are the base model's sizes


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())  # its defaults are the 7B model's


ALL_OF_LLAMA = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("build", "targets", "counts"),
    [
        (roberta, ["query", "value"], (24_576, 43_008, 36_864, 98_304)),
        (llama, ["q_proj", "v_proj"], (278_528, 327_680, 524_288, 262_144)),
        (llama, ALL_OF_LLAMA, (917_504, 1_040_384, 1_753_088, 655_360)),
    ],
)
def test_property_12_parameter_counts(build: Any, targets: list[str], counts: tuple[int, ...]) -> None:
    settings: list[dict[str, Any]] = [
        {"rank": 256},
        {"rank": 1024},
        {"rank": 8, "mode": "io"},
        {"rank": 64, "mode": "core"},
    ]
    for setting, count in zip(settings, counts, strict=True):
        model = build()
        done = inject(model, partial(RLoRA, **setting), targets=targets, train=[])
        assert done.parameters == count
        found = plan(model)
        # The vector that stands still in "io" is written, and not trained.
        assert found.start.weights == 4 * count
        assert found.start.buffers == 0  # nothing is broadcast


def test_property_13_without_noise_a_draw_per_example_is_the_plain_forward() -> None:
    adapter, x = moved(RLoRA(nn.Linear(24, 16), rank=6)), torch.randn(5, 3, 24)
    plain = adapter(x)
    with replaced(adapter, 5, 0.0):
        torch.testing.assert_close(adapter(x), plain, rtol=1e-5, atol=1e-6)


def test_property_13_noise_per_example_has_the_mean_and_variance_of_drawn_weights() -> None:
    """Draws per example are draws of the weights: 4000 of them in one pass, beside 4000 one by one."""
    torch.manual_seed(0)
    adapter, x = moved(RLoRA(nn.Linear(24, 16).double(), rank=6)), torch.randn(1, 2, 24).double()
    n, sigma = 4000, 0.2
    with torch.no_grad(), replaced(adapter, n, sigma):
        together = adapter(x.expand(n, 2, 24))
    singly = []
    with torch.no_grad():
        for _ in range(n):
            with replaced(adapter, None, sigma):
                singly.append(adapter(x)[0])
    apart = torch.stack(singly)
    # The same noise for both tokens of an example: their outputs vary together as they do in the second way.
    for statistic in (lambda y: y.mean(0), lambda y: y.var(0), lambda y: (y - y.mean(0)).prod(1).mean(0)):
        one, other = statistic(together), statistic(apart)
        spread = max(statistic(apart[: n // 2]).sub(statistic(apart[n // 2 :])).abs().max().item(), 1e-3)
        assert (one - other).abs().max() < 4 * spread
    assert together.var(0).min() > 0


class replaced:
    """For a while g and b are drawn, once or once per example, as a posterior does it."""

    def __init__(self, adapter: RLoRA, examples: int | None, sigma: float) -> None:
        self.places = [(adapter.gate, "gain"), (adapter, "b")]
        self.shape, self.sigma = (() if examples is None else (examples,)), sigma
        self.kept = [owner._parameters[name] for owner, name in self.places]

    def __enter__(self) -> None:
        for (owner, name), mean in zip(self.places, self.kept, strict=True):
            assert mean is not None
            noisy = mean + self.sigma * torch.randn(*self.shape, len(mean), dtype=mean.dtype)
            owner._parameters[name] = noisy  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        for (owner, name), mean in zip(self.places, self.kept, strict=True):
            owner._parameters[name] = mean


def test_a_weight_cannot_be_read_while_there_is_one_draw_per_example() -> None:
    adapter = moved(RLoRA(nn.Linear(24, 16), rank=6))
    with (
        replaced(adapter, 5, 0.1),
        pytest.raises(RuntimeError, match="asked for while 5 draws of RLoRA's vectors stand"),
    ):
        _ = adapter.weight


# what is drawn, and from which names


def test_layers_of_a_shape_share_their_projections() -> None:
    net: Any = adapted()
    assert net.first._into is net.second._into
    assert net.first._out is net.second._out
    assert net.third._into is not net.first._into
    assert torch.equal(net.first.A, net.second.A)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.deepcopy(net).double()):
        assert twin.first._into is twin.second._into
    empty: Any = Net().to("meta")
    inject(empty, partial(RLoRA, rank=6), targets=["first", "second", "third"], train=[])
    empty.to_empty(device="cpu")
    assert empty.first._into is empty.second._into
    assert empty.third._into is not empty.first._into


def test_projections_of_its_own_come_from_a_layers_name() -> None:
    net: Any = adapted(partial(RLoRA, rank=6, share_projection=False))
    assert [net.first.key, net.second.key, net.third.key] == ["first", "second", "third"]
    assert not torch.equal(net.first.A, net.second.A)
    by_hand = RLoRA(nn.Linear(24, 24), rank=6, share_projection=False, key="first")
    assert torch.equal(net.first.A, by_hand.A)


def test_another_name_changes_no_projection(tmp_path: Path) -> None:
    """Trained inside a larger module, loaded into the model alone: names are shorter, keys are what they were."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Net()

    outer: Any = Outer()
    inject(outer, partial(RLoRA, rank=6, share_projection=False), targets=["first", "second"], train=[])
    moved(outer.model.first)
    save(outer, tmp_path / "a.ckpt")
    loaded: Any = load(Net(), tmp_path / "a.ckpt")
    assert loaded.first.key == "model.first"
    x = torch.randn(3, 24)
    assert torch.equal(loaded(x), outer.model(x))


def save(module: nn.Module, path: Path, **changes: Any) -> None:
    state = adapter_state_dict(module)
    entry = describe(module, state) | changes
    torch.save({"state_dict": state, ENTRY: entry | {"digest": digest(state, entry)}}, path)


def test_a_checkpoint_of_other_constants_is_refused(tmp_path: Path) -> None:
    net = adapted()
    own = describe(net, adapter_state_dict(net))["derived"]
    assert set(own) == {"first", "second", "third"}
    assert own["first"] == own["second"] != own["third"]
    save(net, tmp_path / "other.ckpt", derived=own | {"third": "0123456789abcdef"})
    plain = Net()
    with pytest.raises(AdapterFileError, match=rf"other constants at 'third' .* 0123456789abcdef, here {own['third']}"):
        load(plain, tmp_path / "other.ckpt")
    assert not RankBudget.of(plain)
    save(net, tmp_path / "none.ckpt", derived={})
    with pytest.raises(AdapterFileError, match=r"other constants at 'first' .* digest None, here"):
        load(Net(), tmp_path / "none.ckpt")
    save(net, tmp_path / "odd.ckpt", derived={"first": 7})
    with pytest.raises(AdapterFileError, match=r"derived\['first'\] is 7; it must be a digest as text"):
        load(Net(), tmp_path / "odd.ckpt")


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 1), ("rank", 7), ("share_projection", False), ("components", [0, 1, 2, 3, 4])]
)
def test_a_digest_tells_what_is_drawn(name: str, value: Any) -> None:
    base = nn.Linear(24, 24)
    settings: dict[str, Any] = {"rank": 6, "components": None}
    assert RLoRA(base, **settings).digest() != RLoRA(base, **settings | {name: value}).digest()


def test_what_was_built_without_memory_gets_its_projections_with_it() -> None:
    net: Any = Net().to("meta")
    inject(net, partial(RLoRA, rank=6), targets=["first", "third"], train=[])
    with pytest.raises(RuntimeError, match="RLoRA was called on the meta device, where there are no numbers"):
        net.first(torch.empty(2, 24, device="meta"))
    assert net.first.A.is_meta
    assert net.first.A.shape == (6, 24)
    assert net.first.B.shape == (24, 6)
    net.to_empty(device="cpu")
    for adapter in (net.first, net.third):
        adapter.reset_parameters()
        adapter.gate.reset_parameters()
    here: Any = adapted()
    assert torch.equal(net.third.A, here.third.A)
    assert torch.equal(net.third.gate.value(), here.third.gate.value())
    assert net.first.digest() == here.first.digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_built_without_memory_may_take_a_files_tensors(dtype: torch.dtype) -> None:
    """`load_state_dict(assign=True)` puts parameters in place and moves nothing."""
    net: Any = adapted().to(dtype)
    moved(net.first)
    empty: Any = Net().to("meta")
    inject(empty, partial(RLoRA, rank=6), targets=["first", "second", "third"], train=[])
    empty.load_state_dict(net.state_dict(), assign=True)
    x = torch.randn(3, 24, dtype=dtype)
    assert torch.equal(empty(x), net(x))
    assert empty.first.A.dtype is dtype
    assert empty.first._into is empty.second._into


def test_a_default_device_is_not_where_constants_are() -> None:
    base, x = nn.Linear(24, 16), torch.randn(3, 24)
    with torch.device("meta"):
        adapter = RLoRA(base, rank=6)
        found = adapter.digest()
    here = RLoRA(base, rank=6)
    assert found == here.digest()
    assert torch.equal(moved(adapter)(x), moved(here)(x))


def test_nothing_frozen_is_a_buffer() -> None:
    adapter = RLoRA(nn.Linear(24, 16), rank=6)
    assert [name for name, _ in adapter.named_buffers()] == ["gate.mask"]


def test_the_global_generator_is_left_alone() -> None:
    base, before = nn.Linear(24, 16), torch.get_rng_state()
    RLoRA(base, rank=6)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["rows", "kron"])
def test_narrow_models_compute_in_their_own_dtype(dtype: torch.dtype, path: Any) -> None:
    adapter, x = moved(RLoRA(nn.Linear(768, 24), rank=16, path=path)), 30 * torch.randn(4, 768)
    exact = adapter(x)
    narrow = copy.deepcopy(adapter).to(dtype)
    y = narrow(x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
    assert torch.equal(narrow._into.whole().float(), adapter._into.whole())  # type: ignore[union-attr]
    y.float().square().sum().backward()
    assert narrow.b.grad.dtype == dtype
    assert narrow.b.grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("path", ["rows", "kron"])
def test_autocast_computes_in_its_dtype(mode: Mode, dtype: torch.dtype, near: float, path: Any) -> None:
    """Output and gradients are those of float32 up to its rounding; gradients have the dtype of what they belong to."""
    adapter = moved(RLoRA(nn.Linear(80, 48), rank=100, mode=mode, path=path))
    draw = torch.Generator().manual_seed(1)
    x, grad = torch.randn(3, 2, 80, generator=draw).requires_grad_(), torch.randn(3, 2, 48, generator=draw)
    wanted = [x, *(p for _, p in adapter.own_parameters() if p.requires_grad)]
    exact = adapter(x)
    with torch.autocast("cpu", dtype):
        y = adapter(x)
    assert y.dtype is dtype
    found = [y.float(), *torch.autograd.grad(y, wanted, grad.to(dtype))]
    for one, other in zip(found, [exact, *torch.autograd.grad(exact, wanted, grad)], strict=True):
        assert one.dtype is other.dtype
        assert (one - other).norm() < near * other.norm()


# rank


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d_out", [12, 16])
def test_layers_of_several_widths_are_scored_together(mode: Mode, d_out: int) -> None:
    """Parameters say nothing of d_in: 14 components are orthogonal on 24 inputs, and blocks on 12."""
    net = nn.Sequential(*[nn.Linear(d_in, d_out).double() for d_in in (24, 12, 24, 12)])
    inject(net, partial(RLoRA, rank=14, mode=mode), targets=[r"\d"], train=[])
    for i, layer in enumerate(net):
        moved(layer, i)  # type: ignore[arg-type]
    budget = RankBudget.of(net)
    for group in by_shape(budget.values()):
        for site, found in zip(group, NormShare().measure(group), strict=True):
            A, B, value = site.adapter.A[None], site.adapter.B[None], site.gate.value()[None]
            torch.testing.assert_close(found, component_shares(A, B, value.to(A))[0].float())


def test_auto_takes_what_is_faster_for_what_is_left() -> None:
    """Kron's way is as long for four components as for a thousand."""
    net = nn.Sequential(nn.Linear(768, 768))
    inject(net, RLoRA, targets=["0"], train=[])
    adapter: Any = net[0]
    assert {type(adapter._into), type(adapter._out)} == {Kron}
    adapter.gate.keep(torch.arange(1024) % 256 == 0)
    compact(net)
    adapter = net[0]
    assert adapter.components == [0, 256, 512, 768]
    assert {type(adapter._into), type(adapter._out)} == {Rows}
    given: Any = RLoRA(nn.Linear(768, 768), rank=1024, path="kron", components=[0, 256])
    assert {type(given._into), type(given._out)} == {Kron}


@pytest.mark.parametrize("mode", MODES)
def test_cut_twice_it_is_what_the_mask_had_left(mode: Mode) -> None:
    net: Any = adapted(partial(RLoRA, rank=6, mode=mode, share_projection=False))
    for name in ("first", "second", "third"):
        moved(getattr(net, name))
    x = torch.randn(3, 24)
    for keep, left in (([1, 0, 1, 1, 0, 1], [0, 2, 3, 5]), ([0, 1, 1, 0], [2, 3])):
        net.first.gate.keep(torch.tensor(keep))
        expected = net(x)
        compact(net)
        assert net.first.components == left
        assert len(net.first.gate) == len(left)
        assert net.first.key == "first"
        torch.testing.assert_close(net(x), expected)
    whole: Any = adapted(partial(RLoRA, rank=6, mode=mode, share_projection=False))
    if mode == "io":
        whole.first.a = net.first.a
    assert torch.equal(net.first.A, whole.first.A[[2, 3]])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("d_in", "d_out"), [(24, 40), (24, 86), (40, 8)])
def test_components_are_scored_without_their_matrices(mode: Mode, d_in: int, d_out: int) -> None:
    """Where projections are orthogonal the products are a diagonal, which comes from the vectors alone."""
    base = nn.Linear(d_in, d_out).double()
    group = [moved(RLoRA(base, rank=12, mode=mode, scale=scale), i) for i, scale in enumerate(get_args(Scale))]
    found, whole = RLoRA.products(group), LowRankUpdate.products.__func__(RLoRA, group)  # type: ignore[attr-defined]
    assert found.dim() == (2 if d_out == 40 and mode != "io" else 3)
    torch.testing.assert_close(found if found.dim() == 3 else found.diag_embed(), whole)
    c = torch.stack([1 + torch.arange(12.0) for _ in group])
    sites = [Site(str(i), each.gate, each) for i, each in enumerate(group)]
    for site, row in zip(sites, c, strict=True):
        site.gate.mask.copy_(row)
    A, B = (torch.stack([getattr(each, name) for each in group]) for name in "AB")
    values = torch.stack([site.gate.value() for site in sites]).to(A)
    torch.testing.assert_close(NormShare().measure(sites), component_shares(A, B, values).float())


@pytest.mark.parametrize("mode", MODES)
def test_exported_it_is_a_plain_lora_of_rank_r(mode: Mode, tmp_path: Path) -> None:
    """A = D(g) P_in D(a) and B = D(b) P_out or their like, exactly; loaded by stock PEFT."""
    net: Any = adapted(partial(RLoRA, rank=6, mode=mode))
    for name in ("first", "second", "third"):
        moved(getattr(net, name))
    net.first.gate.keep(torch.tensor([1, 1, 0, 1, 1, 1]))
    report = to_hf_peft(net, tmp_path / "adapter", check="peft", inputs=torch.randn(3, 24))
    assert report.ranks == {"first": 5, "second": 6, "third": 6}
    assert report.max_difference < 1e-5
    A, B = net.third.factors()
    torch.testing.assert_close(B @ A, net.third.update())


def test_converted_it_is_lora_of_a_smaller_rank() -> None:
    net: Any = adapted()
    for name in ("first", "second", "third"):
        moved(getattr(net, name))
    x = torch.randn(3, 24)
    expected = net(x)
    convert(net, 6)
    assert type(net.first).__name__ == "LoRA"
    assert net.first.A.requires_grad
    torch.testing.assert_close(net(x), expected)


def test_a_budget_in_megabytes_counts_what_is_exported(tmp_path: Path) -> None:
    """b is folded into B: the file has two matrices per layer and no vector."""
    net: Any = adapted()
    for name in ("first", "second", "third"):
        moved(getattr(net, name))
    budget = RankBudget.of(net)
    costs = sum(budget[name].gate.cost * 6 for name in budget)
    header = sum(2 * (len(name) + 120) for name in budget)
    assert Budget(megabytes=(4 * costs + header + 1) / 1e6).amount(budget) == costs
    to_hf_peft(net, tmp_path / "a", "compact", check="files")
    assert abs((tmp_path / "a" / "adapter_model.safetensors").stat().st_size - 4 * costs - header) < header


# mistakes


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"rank": 0}, ValueError, r"rank is the number of components, at least 1\. Got 0\."),
        ({"rank": 10**12, "components": [0]}, ValueError, "rank=1000000000000 is more than a layer of "),
        ({"rank": 4.0}, TypeError, r"rank must be an integer\. Got 4\.0\."),
        ({"mode": "full"}, ValueError, r"mode='full': choose 'diag', 'io', 'core', 'half'\."),
        ({"scale": "kaiming"}, ValueError, r"scale='kaiming': choose 'vera', 'orthonormal'\."),
        ({"path": "fft"}, ValueError, r"path='fft': choose 'auto', 'rows', 'kron'\."),
        ({"scaling": 0.0}, ValueError, r"scaling multiplies the update and must be positive and finite\. Got 0\.0\."),
        (
            {"d_initial": 0.2, "mode": "io"},
            ValueError,
            r"d_initial=0\.2 is where g starts in mode='diag', and mode='io' has no such start: leave it out\.",
        ),
        ({"d_initial": 0}, ValueError, r"d_initial multiplies the update and must be positive and finite\. Got 0\."),
        ({"seed": 0.5}, TypeError, r"seed must be an integer\. Got 0\.5\."),
        ({"key": "a"}, ValueError, r"key='a' names projections .* give share_projection=False, or no key\."),
        ({"rank": 4, "components": [0, 4]}, ValueError, r"which of the 4 drawn ones .* from 0 to 3, .* Got \[0, 4\]\."),
        ({"rank": 4, "components": [1, 1]}, ValueError, r"distinct, ascending"),
        ({"rank": 4, "components": []}, ValueError, r"at least one\. Got \[\]\."),
        ({"rank": 4, "components": [0.5]}, TypeError, r"a component must be an integer\. Got 0\.5\."),
        ({"rank": 4, "components": "01"}, TypeError, r"components is a list of positions\. Got '01'\."),
    ],
)
def test_arguments_that_cannot_be(settings: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        RLoRA(nn.Linear(24, 16), **settings)


def test_layers_that_are_not_linear_are_refused() -> None:
    for layer in (nn.Embedding(24, 16), nn.Conv2d(3, 4, 3)):
        kind = type(layer).__name__
        sentence = rf"RLoRA cannot adapt this layer: {kind} is no linear layer; leave it out of the targets\."
        with pytest.raises(TypeError, match=sentence):
            RLoRA(layer)


def test_a_width_without_small_factors_takes_rows() -> None:
    layer = nn.Linear(4, 8209, bias=False)  # a prime
    with pytest.raises(ValueError, match=r"path='kron' is not possible on a layer of 4 inputs and 8209 outputs"):
        RLoRA(layer, rank=3, path="kron")
    adapter = RLoRA(layer, rank=3)
    assert {type(adapter._into), type(adapter._out)} == {Rows}
    # Without a projection on that side it is no obstacle.
    assert type(RLoRA(layer, rank=3, mode="half", path="kron")._into) is Kron


def test_default_ranks_are_those_of_the_width() -> None:
    assert len(RLoRA(nn.Linear(24, 1024)).gate) == 1024
    assert len(RLoRA(nn.Linear(24, 1025)).gate) == 256


def test_it_can_be_told_from_other_adapters_with_the_same_gate() -> None:
    assert DynamicDoRA.elementwise == ()
    assert RLoRA.elementwise == ("gate.gain", "a", "b")
    names = [name for name, _ in RLoRA(nn.Linear(24, 16), rank=4, mode="io").own_parameters()]
    assert set(RLoRA.elementwise) == set(names)
