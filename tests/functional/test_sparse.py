"""Which entries are drawn, and their gradient by every kernel, against the whole gradient in double precision."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import pytest
import torch
from torch import Tensor

from lightning_peft.functional import sparse
from lightning_peft.functional.sparse import (
    Kernel,
    Pattern,
    choose_kernel,
    draw_bernoulli,
    draw_indices,
    embedding_entry_gradient,
    entry_gradient,
    index_fault,
    share_of,
)
from lightning_peft.functional.sparse_layers import Entries, embedding_entries, linear_entries, weight_entries

KERNELS: tuple[Kernel, ...] = ("sampled", "dense", "chunked")


@pytest.mark.parametrize(("numel", "k"), [(1, 1), (7, 0), (100, 3), (100, 50), (100, 51), (100, 99), (100, 100)])
def test_property_7_and_8_as_many_as_wanted_ascending_distinct_in_range(numel: int, k: int) -> None:
    found = draw_indices(numel, k, 3, "encoder.layer")
    assert found.dtype == torch.int32
    assert len(found) == k
    assert index_fault(found, numel) is None
    assert found.tolist() == sorted(set(found.tolist()))


def test_a_smaller_draw_is_part_of_a_larger_one() -> None:
    few, many = (set(draw_indices(10_000, k, 0, "a").tolist()) for k in (100, 101))
    assert few < many


def test_every_entry_is_drawn_equally_often() -> None:
    counts = torch.zeros(20)
    for seed in range(800):
        counts[draw_indices(20, 5, seed, "a").long()] += 1
    assert float(((counts - 200).square() / 200).sum()) < 45  # chi-square of 19: one in a thousand is above 43.8


def test_names_and_seeds_have_draws_of_their_own() -> None:
    draws = [tuple(draw_indices(1000, 20, seed, name).tolist()) for seed in (0, 1) for name in ("a", "b")]
    assert len(set(draws)) == 4
    assert draw_indices(100, 4, 0, "layer").tolist() == [27, 83, 88, 92]  # on every machine and release


def test_positions_beyond_two_to_the_31_have_64_bits() -> None:
    found = draw_indices(2**33, 50, 0, "large")
    assert found.dtype == torch.int64
    assert int(found[-1]) > 2**31


def test_property_7_bernoulli_has_its_mean_and_its_spread() -> None:
    n, q = 20_000, 0.02
    counts = torch.tensor([float(len(draw_bernoulli(n, q, seed, "a"))) for seed in range(50)])
    assert abs(float(counts.mean()) - n * q) < 5 * sqrt(n * q * (1 - q) / 50)
    assert 0.5 < float(counts.var()) / (n * q * (1 - q)) < 2
    assert index_fault(draw_bernoulli(n, q, 0, "a"), n) is None
    assert draw_bernoulli(9, 1.0, 0, "a").tolist() == list(range(9))
    assert len(draw_bernoulli(9, 0.0, 0, "a")) == 0


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="k=5 distinct entries cannot be drawn from 4: give a number from 0 to 4"):
        draw_indices(4, 5, 0, "a")
    with pytest.raises(ValueError, match=r"density is a share of a tensor's entries, in \[0, 1\]\. Got 1\.5\."):
        draw_bernoulli(4, 1.5, 0, "a")
    with pytest.raises(ValueError, match="kernel='fast': choose 'sampled', 'dense', 'chunked'"):
        entry_gradient(torch.ones(1, 2), torch.ones(1, 2), pattern(2, 2, 1), "fast")  # type: ignore[arg-type]


def test_shares_are_whole_blocks() -> None:
    assert [share_of(1000, q) for q in (0.0, 0.0501, 1.0)] == [1, 50, 1000]
    assert [share_of(1000, q, 16) for q in (0.0, 0.05, 1.0)] == [16, 48, 992]


def test_positions_that_are_none_are_told() -> None:
    assert index_fault(torch.tensor([1, 1]), 4) == "they do not ascend, or one of them is there twice"
    assert index_fault(torch.tensor([0, 4]), 4) == "they run from 0 to 4, outside of 0 to 3"


def pattern(m: int, n: int, k: int) -> Pattern:
    return Pattern.of(draw_indices(m * n, k, 0, "pattern"), (m, n))


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("tokens", "m", "n", "k"), [(5, 6, 4, 7), (1, 4, 9, 1), (3, 5, 5, 25), (0, 3, 3, 2), (4, 3, 3, 0)]
)
def test_property_13_all_kernels_agree_with_the_whole_product(
    kernel: Kernel, tokens: int, m: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "CAP", 4 * 2 * n * 8)  # two rows at a time
    a, b, where = normal(tokens, m), normal(tokens, n, seed=1), pattern(m, n, k)
    whole = (a.t() @ b).flatten()[where.indices.long()]
    torch.testing.assert_close(entry_gradient(a, b, where, kernel), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_low_precision_is_right_up_to_its_rounding(kernel: Kernel) -> None:
    a, b, where = normal(40, 8), normal(40, 6, seed=1), pattern(8, 6, 20)
    whole = entry_gradient(a, b, where, "dense")
    low = entry_gradient(a.bfloat16(), b.float(), where, kernel)
    torch.testing.assert_close(low.double(), whole, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("tokens", [1, 64, 65, 200])
def test_tokens_are_sampled_in_parts(tokens: int) -> None:
    a, b, where = normal(tokens, 8), normal(tokens, 6, seed=1), pattern(8, 6, 20)
    before = where.csr(torch.float64).values().clone()
    for _ in range(2):  # a pattern's zeros stay zeros
        whole = entry_gradient(a, b, where, "dense")
        torch.testing.assert_close(entry_gradient(a, b, where, "sampled"), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(where.csr(torch.float64).values(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "m", "n"), [(1, 1, 1), (1, 7, 1), (9, 1, 5), (70, 16, 33), (130, 60, 64)])
def test_rows_are_sampled_however_they_lie_in_memory(tokens: int, m: int, n: int, dtype: torch.dtype) -> None:
    a, b, where = normal(tokens, m, dtype=dtype), normal(tokens, n, dtype=dtype, seed=1), pattern(m, n, m * n // 2 + 1)
    known = entry_gradient(a, b, where, "sampled")
    whole = (a.double().t() @ b.double()).flatten()[where.indices.long()]
    torch.testing.assert_close(known.double(), whole, rtol=1e-5, atol=1e-4)
    columns_first, strided = a.t().contiguous().t(), torch.stack([b, b], dim=2)[..., 0]
    later = torch.cat([a.new_zeros(3, m), a])[3:]
    for left, right in ((columns_first, b), (a, strided), (later, b)):
        assert torch.equal(entry_gradient(left, right, where, "sampled"), known)
    alike = a[:1].expand(tokens, m)  # as a sum's gradient is
    assert torch.equal(entry_gradient(alike, b, where, "sampled"), entry_gradient(alike.clone(), b, where, "sampled"))


def test_the_kernel_follows_device_dtype_density_tokens_and_size() -> None:
    cpu, cuda, square = torch.device("cpu"), torch.device("cuda"), (768, 768)
    assert choose_kernel(cpu, torch.float32, square, 0.01, 512) == "sampled"
    assert choose_kernel(cpu, torch.float32, square, 0.08, 512) == "sampled"
    assert choose_kernel(cpu, torch.float32, square, 0.08, 2048) == "dense"
    assert choose_kernel(cpu, torch.bfloat16, square, 0.01, 512) == "dense"
    assert choose_kernel(cuda, torch.float32, square, 0.01, 512) == "dense"
    assert choose_kernel(cuda, torch.bfloat16, (11008, 4096), 0.01, 512) == "chunked"


@pytest.mark.parametrize(("m", "share"), [(768, 3), (3072, 12)])
def test_property_11_the_chunked_kernel_never_has_the_whole_product(m: int, share: int) -> None:
    """As far as it is the kernel's: that no base weight has a gradient is the adapter's."""
    n, tokens = 768, 4
    k = m * n // 100
    a, b, where = normal(tokens, m, dtype=torch.float32), normal(tokens, n, dtype=torch.float32), pattern(m, n, k)
    entry_gradient(a, b, where, "chunked")

    def largest(kernel: Kernel) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            entry_gradient(a, b, where, kernel)
        return int(max(event.self_cpu_memory_usage for event in seen.events()))

    assert largest("dense") >= m * n * 4
    assert largest("chunked") <= m * n * 4 / share


def test_a_kernel_in_parts_that_is_chosen_has_larger_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "CAP", 4096 * 8 * 8)  # of a weight that is twice as large, and too dense to sample
    where = pattern(8192, 8, 8192)
    a, b = normal(3, 8192), normal(3, 8)
    assert torch.equal(entry_gradient(a, b, where), entry_gradient(a, b, where, "chunked"))
    assert list(where._bounds) == [1024, 256]  # rows of a quarter of the cap, and as many as are asked for


def entries(m: int, n: int, k: int, blocks: int = 0, **more: object) -> Entries:
    delta = normal(blocks, k // blocks) if blocks else normal(k)
    value = normal(blocks or k, seed=2)
    return Entries(delta.requires_grad_(), value.requires_grad_(), pattern(m, n, k), **more)  # type: ignore[arg-type]


def with_entries(weight: Tensor, e: Entries) -> Tensor:
    update = (e.delta * (e.value if e.delta.dim() == 1 else e.value[:, None])).flatten()
    return weight.flatten().index_add(0, e.pattern.indices.long(), update).view(weight.shape)


@pytest.mark.parametrize("blocks", [0, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_property_3_gradients_are_those_of_the_whole_weight(
    batch: tuple[int, ...], transposed: bool, blocks: int
) -> None:
    m, n = (4, 7) if transposed else (7, 4)
    e = entries(m, n, 9, blocks, transposed=transposed)
    weight, bias, x = normal(m, n), normal(7), normal(*batch, 4).requires_grad_()
    merged = with_entries(weight, e).detach()
    y = torch.nn.functional.linear(x, merged.t() if transposed else merged, bias)
    ours = linear_entries(y, x, e)
    theirs = with_entries(weight, e)
    theirs = torch.nn.functional.linear(x, theirs.t() if transposed else theirs, bias)
    assert torch.equal(ours.detach(), theirs.detach())
    inputs = (x, e.delta, e.value)
    for one, other in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    ours.mul_(2)  # what follows may change it in place


@pytest.mark.parametrize("padding", [None, 2])
def test_embeddings_have_the_gradient_of_the_whole_weight(padding: int | None) -> None:
    e, weight = entries(6, 4, 12), normal(6, 4)
    ids = torch.tensor([[0, 2, 2], [5, 0, 2]])
    ours = embedding_entries(torch.nn.functional.embedding(ids, with_entries(weight, e).detach()), ids, e, padding)
    theirs = torch.nn.functional.embedding(ids, with_entries(weight, e), padding)
    assert torch.equal(ours.detach(), theirs.detach())
    for one, other in zip(gradients(ours, (e.delta,)), gradients(theirs, (e.delta,)), strict=True):
        torch.testing.assert_close(one, other)
    nobody = torch.zeros(0, dtype=torch.int64)
    empty = embedding_entries(torch.zeros(0, 4, dtype=torch.float64), nobody, e, padding)
    assert not gradients(empty, (e.delta,))[0].any()
    assert torch.equal(embedding_entry_gradient(normal(2, 4), ids[0, :2], pattern(6, 4, 0)), torch.zeros(0))


def test_a_weight_that_is_read_has_the_gradient_of_the_whole_weight() -> None:
    e, weight = entries(5, 3, 6), normal(5, 3)
    merged = with_entries(weight, e).detach()
    ours, theirs = weight_entries(merged, e), with_entries(weight, e)
    assert ours.data_ptr() == merged.data_ptr()
    for one, other in zip(gradients(ours, (e.delta, e.value)), gradients(theirs, (e.delta, e.value)), strict=True):
        torch.testing.assert_close(one, other)


def gradients(y: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scale = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * scale + y.square()).sum(), inputs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_property_3_gradcheck(kernel: Kernel) -> None:
    def layer(x: Tensor, delta: Tensor, value: Tensor) -> Tensor:
        e = Entries(delta, value, where, kernel)
        merged = with_entries(weight, e).detach()
        return linear_entries(torch.nn.functional.linear(x, merged), x, e)

    where, weight = pattern(4, 3, 5), normal(4, 3)
    inputs: list[Callable[[], Tensor] | Tensor] = [normal(2, 3), normal(5), normal(5, seed=1)]
    assert torch.autograd.gradcheck(layer, [x.requires_grad_() for x in inputs])  # type: ignore[union-attr]
