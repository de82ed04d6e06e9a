"""Sparse adapters as files and in plain models: read again bit for bit, the authors' layout, several in turn."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import AdapterFileError
from lightning_peft.functional.sparse_arithmetic import SparseDelta
from lightning_peft.interop.sparse import SparseAdapter
from lightning_peft.interop.sparse_reader import read_sparse
from lightning_peft.interop.sparse_switch import SparseSwitch


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def adapter(seed: int, head: bool = False) -> SparseAdapter:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(30, generator=generator)[:8].sort().values
    delta = SparseDelta(indices, torch.randn(8, generator=generator), (5, 6))
    bias = SparseDelta(torch.tensor([seed % 5]), torch.randn(1, generator=generator), (5,))
    kept = {"2.weight": torch.randn(2, 5, generator=generator)} if head else {}
    return SparseAdapter({"0.weight": delta, "0.bias": bias}, kept, {"seed": seed})


def equal(one: SparseAdapter, other: SparseAdapter) -> bool:
    tensors = [(one[n].indices, other[n].indices) for n in one] + [(one[n].delta, other[n].delta) for n in one]
    tensors += [(one.head[n], other.head[n]) for n in one.head]
    return one.keys() == other.keys() and one.head.keys() == other.head.keys() and all(
        torch.equal(a, b) for a, b in tensors
    )  # fmt: skip


def test_our_own_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    written = adapter(1, head=True)
    assert written.save(path) == path.stat().st_size
    for read in (read_sparse(path), read_sparse(path, model())):
        assert equal(read, written)
        assert read.about == {"seed": 1}
    stored = load_file(path)
    assert stored["0.weight.indices"].dtype == torch.int32  # 8 bytes a scalar
    assert stored["0.weight.delta"].dtype == torch.float32
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_property_15_adapters_added_commute_in_a_model() -> None:
    outputs = []
    for both in (adapter(1) + adapter(2) * 0.5, 0.5 * adapter(2) + adapter(1)):
        net = model()
        SparseSwitch(net).to(both)
        outputs.append(net(torch.ones(3, 6)))
    assert torch.equal(*outputs)
    with pytest.raises(ValueError, match=r"heads of two tasks cannot be added.*a \+ b\.without_head\(\)"):
        adapter(1, head=True) + adapter(2, head=True)
    assert (adapter(1, head=True) + adapter(2, head=True).without_head()).head.keys() == {"2.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_leaves_no_trace(dtype: torch.dtype) -> None:
    net = model(dtype)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    switch = SparseSwitch(net)
    seen = []
    for _ in range(20):
        for each in (adapter(1, head=True), adapter(2), None):
            switch.to(each)
            state = {name: p.detach().clone() for name, p in net.named_parameters()}
            seen.append(state)
            for name, tensor in state.items():
                wanted = before[name].clone()
                if each is not None and name in each:
                    each[name].write(wanted)
                if each is not None and name in each.head:
                    wanted = each.head[name].to(dtype)
                assert torch.equal(tensor, wanted)
    assert not torch.equal(seen[0]["0.weight"], before["0.weight"])


@pytest.mark.parametrize("change", ["wide", "narrow", "copy"])
def test_switching_back_after_a_cast_or_in_a_copy(change: str) -> None:
    net, dtype = model(torch.float32), {"wide": torch.float64, "narrow": torch.bfloat16}.get(change, torch.float32)
    before = {name: p.detach().clone().to(dtype) for name, p in net.named_parameters()}
    switch = SparseSwitch(net)
    switch.to(adapter(1, head=True))
    if change == "copy":
        switch = copy.deepcopy(switch)
    else:
        net.to(dtype)
    for each in (None, adapter(2), None):
        switch.to(each)
        same = [torch.equal(p, before[name]) for name, p in switch.model.named_parameters()]
        assert all(same) == (each is None)


def test_switch_refuses_another_models_adapter_and_stays() -> None:
    net = model()
    switch = SparseSwitch(net)
    switch.to(adapter(1))
    state = net[0].weight.clone()  # type: ignore[index]
    other = SparseAdapter({"0.weight": SparseDelta(torch.tensor([0]), torch.ones(1), (6, 5))})
    with pytest.raises(AdapterFileError, match=r"'0\.weight' of shape \(6, 5\), which is of shape \(5, 6\) in this"):
        switch.to(other)
    with pytest.raises(AdapterFileError, match=r"'model\.w' of shape \(2,\), which is missing in this model"):
        switch.to(SparseAdapter({"model.w": SparseDelta(torch.tensor([0]), torch.ones(1), (2,))}))
    assert torch.equal(net[0].weight, state)  # type: ignore[index]


def authors_file(path: Path, **changes: Tensor) -> Path:
    """As the authors' newer package lays it out: rows and columns in int32, in any order, and float32 deltas."""
    tensors = {
        "indices.0.weight": torch.tensor([[4, 5], [0, 1], [2, 0]], dtype=torch.int32),
        "deltas.0.weight": torch.tensor([3.0, 1.0, 2.0]),
        "indices.0.bias": torch.tensor([[3]], dtype=torch.int32),
        "deltas.0.bias": torch.tensor([4.0]),
        "2.weight": torch.ones(2, 5),
        **changes,
    }
    save_file({key: tensor for key, tensor in tensors.items() if len(tensor)}, path)
    return path


def test_property_12_the_authors_file_is_read(tmp_path: Path) -> None:
    read = read_sparse(authors_file(tmp_path / "theirs.safetensors"), model())
    assert read["0.weight"].indices.tolist() == [1, 12, 29]
    assert read["0.weight"].delta.tolist() == [1.0, 2.0, 3.0]
    assert (read["0.bias"].indices.tolist(), read["0.bias"].delta.tolist()) == ([3], [4.0])
    net = model()
    SparseSwitch(net).to(read)
    change = net[0].weight - model()[0].weight  # type: ignore[index]
    assert change.nonzero().tolist() == [[0, 1], [2, 0], [4, 5]]
    assert torch.equal(net[2].weight, torch.ones(2, 5))  # type: ignore[index]


NONE: Any = torch.zeros(0)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"indices.0.weight": torch.tensor([[5, 5]] * 3, dtype=torch.int32)}, r"that its shape \(5, 6\) does not have"),
        ({"indices.0.weight": torch.tensor([[-1, 5], [0, 0], [1, 1]], dtype=torch.int32)}, "negative positions"),
        ({"indices.0.weight": torch.tensor([[1], [2], [3]], dtype=torch.int32)}, "does not have"),
        ({"indices.0.weight": torch.tensor([[1, 1]] * 3, dtype=torch.int32)}, "ascending, distinct"),
        ({"deltas.0.weight": torch.ones(4)}, r"3 positions and \(4,\) deltas"),
        ({"deltas.0.weight": torch.ones(2)}, r"3 positions and \(2,\) deltas"),
        ({"indices.0.weight": torch.zeros(3, 2)}, "positions of torch.float32"),
        ({"indices.0.weight": NONE}, "'0.weight', and does not say which entries"),
        ({"deltas.other": torch.ones(1)}, "'other', which this model does not have"),
        (
            {"deltas.0.weight": torch.tensor([1.0, float("nan"), 2.0])},
            r"'deltas\.0\.weight' holds numbers that are not",
        ),
        ({"deltas.0.bias": torch.tensor([float("inf")])}, r"'deltas\.0\.bias' holds numbers that are not finite; use"),
        ({"2.weight": torch.full((2, 5), float("nan"))}, r"'2\.weight' holds numbers that are not finite"),
        ({"strange": torch.ones(3)}, "belong to no entry and no parameter: strange"),
    ],
)
def test_a_wrong_file_of_the_authors_layout(changes: dict[str, Tensor], error: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=error):
        read_sparse(authors_file(tmp_path / "theirs.safetensors", **changes), model())


@pytest.mark.parametrize("name", ["0.weight.delta", "0.bias.delta", "head.2.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e5m2])
def test_numbers_that_are_not_finite_are_not_read(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    adapter(1, head=True).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name] = torch.full(tensors[name].shape, float("inf")).to(dtype)
    save_file(tensors, path, metadata)
    for of in (None, model()):
        with pytest.raises(AdapterFileError, match=f"'{name}' holds numbers that are not finite; use another copy"):
            read_sparse(path, of)


def test_a_head_that_is_not_finite_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"the head's '2\.weight' is not finite: the run that it is from diverged\. Take"
    ):
        SparseAdapter({}, {"2.weight": torch.tensor([1.0, float("nan")])})
    SparseAdapter({}, {"2.counts": torch.tensor([1]), "2.large": torch.tensor([1e300], dtype=torch.float64)})


def test_what_is_no_sparse_adapter(tmp_path: Path) -> None:
    path = authors_file(tmp_path / "theirs.safetensors")
    with pytest.raises(ValueError, match=r"says no shapes .* give the model"):
        read_sparse(path)
    save_file({"weight": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(AdapterFileError, match="holds no sparse adapter"):
        read_sparse(tmp_path / "plain.safetensors")
    adapter(1).save(tmp_path / "ours.safetensors")
    data = (tmp_path / "ours.safetensors").read_bytes()
    for cut in (10, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:cut])
        with pytest.raises(AdapterFileError, match="cannot be read"):
            read_sparse(tmp_path / "cut.safetensors")
    with pytest.raises(AdapterFileError, match=r"which is missing in this model"):
        read_sparse(tmp_path / "ours.safetensors", nn.Linear(2, 2))


def test_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_text("something else")
    with pytest.raises(FileExistsError, match="no sparse adapter"):
        adapter(1).save(path)
    adapter(1).save(path, overwrite=True)
    adapter(2).save(path)  # one of ours

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="Free space there"):
        adapter(3).save(path)
    monkeypatch.undo()
    assert equal(read_sparse(path), adapter(2))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
