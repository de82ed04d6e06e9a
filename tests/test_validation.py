"""What a checkpoint's entry may ask for: its digest is computed again each time, as an attacker would."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import AdapterFileError, DynamicDoRA, LoRA, inject, load
from lightning_peft.adapters.base import Adapter
from lightning_peft.checkpoint import ENTRY, adapter_state_dict, check_entry, dense, describe, digest
from lightning_peft.inspection import report
from lightning_peft.surgery import adapters

Checkpoint = dict[str, Any]


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))


def checkpoint(kind: type[Adapter] = DynamicDoRA) -> Checkpoint:
    net = model()
    inject(net, partial(kind, rank=2), targets=["0", "2"])  # type: ignore[call-arg]
    state = {name: value.clone() for name, value in adapter_state_dict(net).items()}
    return {"state_dict": state, ENTRY: describe(net, state)}


def refused(saved: Checkpoint, path: Path, reading: Callable[[Path], Any] | None = None) -> str:
    """The sentence of a refusal, after which the model is what it was."""
    torch.save(saved, path)
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(AdapterFileError) as caught:
        reading(path) if reading else load(net, path)
    assert not adapters(net)
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    return str(caught.value)


def sealed(saved: Checkpoint) -> Checkpoint:
    saved[ENTRY]["digest"] = digest(saved["state_dict"], saved[ENTRY])
    return saved


def group(saved: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = saved[ENTRY]["recipe"]["adapters"][0]
    return found


def test_the_file_is_good_before_it_is_changed(tmp_path: Path) -> None:
    torch.save(sealed(checkpoint()), tmp_path / "good.ckpt")
    assert list(adapters(load(model(), tmp_path / "good.ckpt"))) == ["0", "2"]


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda s: s[ENTRY].update(recipe=[]), "says that recipe is []; it must be a dictionary"),
    (lambda s: s[ENTRY].pop("recipe"), "says that recipe is None; it must be a dictionary"),
    (lambda s: s[ENTRY]["recipe"].update(adapters=3), "recipe['adapters'] is 3; it must be a list"),
    (lambda s: s[ENTRY]["recipe"].update(adapters=[3]), "an adapter is 3; it must be a dictionary"),
    (lambda s: s[ENTRY]["recipe"].update(trained="3"), "recipe['trained'] is '3'; it must be a list of names"),
    (lambda s: s[ENTRY]["recipe"].update(trained=[3]), "recipe['trained'] is [3]; it must be a list of names"),
    (lambda s: group(s).update({"class": None}), "an adapter's class is None; it must be text, module:class"),
    (lambda s: group(s).update(arguments=None), "an adapter's arguments is None; it must be a dictionary"),
    (lambda s: group(s).update(layers="0"), "an adapter's layers is '0'; it must be a list of names"),
    (lambda s: group(s).update(layers=["0", "0"]), "an adapted layer is '0'; it must be named once"),
    (lambda s: group(s).update(layers=["\x1b[2J"]), "an adapter's layers is ['\\x1b[2J']; it must be a list of names"),
    (lambda s: s[ENTRY].update(ranks=None), "says that ranks is None; it must be a dictionary"),
    (lambda s: s[ENTRY]["ranks"].update({"0": -1}), "ranks['0'] is -1; it must be a whole number from 0"),
    (lambda s: s[ENTRY]["ranks"].update({"0": "2"}), "ranks['0'] is '2'; it must be a whole number from 0"),
    (lambda s: s[ENTRY]["costs"].update({"0": True}), "costs['0'] is True; it must be a whole number from 1"),
    (lambda s: s[ENTRY]["base"].update(x=torch.ones(2, 2)), "base['x'] is torch.Size([2, 2]); it must be a few values"),
])  # fmt: skip
def test_an_entry_of_wrong_structure_is_refused(tmp_path: Path, change: Any, sentence: str) -> None:
    saved = checkpoint()
    change(saved)
    assert sentence in refused(sealed(saved), tmp_path / "odd.ckpt")


@pytest.mark.parametrize(("arguments", "sentence"), [
    ({"rank": 2, "power": 9}, "gives DynamicDoRA the argument 'power', which it does not have; it has rank, alpha"),
    ({"rank": 10**12}, "rank=1000000000000 is not possible on a layer of 6 inputs and 8 outputs"),
    ({"rank": 6}, "'0.A' has shape (2, 6), and (6, 6) in the adapter that it asks for"),
    ({"rank": "2"}, "DynamicDoRA's rank is '2'; it must be of type int"),
    ({"rank": True}, "DynamicDoRA's rank is True; it must be of type int"),
    ({"rank": 2.0}, "DynamicDoRA's rank is 2.0; it must be of type int"),
    ({"rank": [2]}, "DynamicDoRA's rank is [2]; it must be of type int"),
    ({"alpha": float("inf")}, "DynamicDoRA's alpha is inf; it must be a finite number"),
    ({"alpha": float("nan")}, "DynamicDoRA's alpha is nan; it must be a finite number"),
    ({"alpha": None}, "DynamicDoRA's alpha is None; it must be a finite number"),
    ({"alpha": -1.0}, "alpha scales the update and must be positive"),
    ({"dropout": 2.0}, "dropout is a probability in [0, 1)"),
    ({"base": 1}, "the argument 'base', which it does not have"),
])  # fmt: skip
def test_arguments_out_of_bounds_are_refused(tmp_path: Path, arguments: dict[str, Any], sentence: str) -> None:
    saved = checkpoint()
    group(saved)["arguments"].update(arguments)
    assert sentence in refused(sealed(saved), tmp_path / "odd.ckpt")


@pytest.mark.parametrize(("path", "reason"), [
    ("lightning_peft.adapters.low_rank:LowRank", "which is not imported"),  # abstract
    ("torch.nn:Linear", "which is not imported"),
    ("builtins:eval", "which is not imported"),
    ("lightning_peft.adapters.lora:LoRA.__init__", "which is not imported"),
    ("", "which is not imported"),
])  # fmt: skip
def test_only_adapter_classes_are_built(tmp_path: Path, path: str, reason: str) -> None:
    saved = checkpoint()
    group(saved)["class"] = path
    assert reason in refused(sealed(saved), tmp_path / "odd.ckpt")


def test_a_name_of_a_class_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A package may import a part of itself when it is asked for an attribute.
    asked: list[str] = []
    lazy = ModuleType("lazy_thing")
    lazy.__getattr__ = asked.append  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy_thing", lazy)
    saved = checkpoint()
    group(saved)["class"] = "lazy_thing:Adapter"
    assert "not imported" in refused(sealed(saved), tmp_path / "odd.ckpt")
    assert not asked


def test_a_giant_adapter_is_never_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[torch.device] = []
    saved = checkpoint(LoRA)
    group(saved)["arguments"]["rank"] = 6
    with monkeypatch.context() as patch:
        patch.setattr(LoRA, "reset_parameters", lambda self: built.append(self.A.device))
        assert "has shape (2, 6), and (6, 6)" in refused(sealed(saved), tmp_path / "odd.ckpt")
    assert {device.type for device in built} == {"meta"}


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda a: torch.zeros(1).expand(10**12), "is an expanded tensor; a checkpoint of adapters holds plain dense ones"),
    (lambda a: torch.ones(a.shape, dtype=torch.complex64).conj(), "is a lazily conjugated or negated tensor"),
    (lambda a: a.tolist(), "is a list, not a tensor"),
])  # fmt: skip
def test_odd_tensors_are_refused_before_the_digest(tmp_path: Path, make: Any, sentence: str) -> None:
    saved = checkpoint()
    saved["state_dict"]["0.A"] = make(saved["state_dict"]["0.A"])
    assert sentence in refused(saved, tmp_path / "odd.ckpt")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:.*deprecated", "ignore:Sparse")
@pytest.mark.parametrize(("make", "sentence"), [
    (lambda: torch.eye(2).to_sparse(), "is a sparse tensor"),
    (lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), "is a quantized tensor"),
    (lambda: torch.empty(3, device="meta"), "is a meta tensor"),
    (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is a nested tensor"),
])  # fmt: skip
def test_odd_tensors_that_another_reader_let_through_are_refused(make: Any, sentence: str) -> None:
    saved = checkpoint()
    saved["state_dict"]["0.A"] = make()
    with pytest.raises(AdapterFileError, match=sentence):
        check_entry(saved, "this checkpoint")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_tensor_of_another_kind_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = checkpoint()
    saved["state_dict"]["0.A"] = saved["state_dict"]["0.A"].to(dtype)
    assert f"'0.A' is of dtype {dtype}, and torch.float32 in this model" in refused(
        sealed(saved), tmp_path / "odd.ckpt"
    )


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.float8_e4m3fn])
def test_a_fingerprint_of_another_kind_is_of_another_base(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = checkpoint()
    saved[ENTRY]["base"]["0.base.weight"] = (saved[ENTRY]["base"]["0.base.weight"] + 3).to(dtype)
    assert "'0.base.weight' differs" in refused(sealed(saved), tmp_path / "odd.ckpt")


def test_one_tensor_under_very_many_names_is_refused(tmp_path: Path) -> None:
    # Small in the file; its digest would take for ever.
    saved = checkpoint()
    large = torch.zeros(10_000)
    saved["state_dict"].update({f"extra.{i}": large for i in range(100)})
    assert "the tensors' size" in refused(saved, tmp_path / "odd.ckpt")


def test_a_list_that_doubles_is_refused_before_it_is_digested(tmp_path: Path) -> None:
    saved, value = checkpoint(), [1]
    for _ in range(30):
        value = [value, value]  # type: ignore[list-item]  # 2^30 entries, 30 lists in the file
    saved[ENTRY]["recipe"]["trained"] = value
    assert "too long or too deep" in refused(saved, tmp_path / "odd.ckpt")


@pytest.mark.parametrize("value", [10**30, 1j, b"x", {1: 2}, torch.float32])
def test_other_than_plain_values_are_refused(tmp_path: Path, value: Any) -> None:
    saved = checkpoint()
    saved[ENTRY]["more"] = value
    assert "it must be a number, text, a list or a dictionary" in refused(saved, tmp_path / "odd.ckpt")


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda entry: entry["ranks"].update({"0": 3}), "ranks['0'] is 3; it must be at most 2"),
    (lambda entry: entry["ranks"].update({"9": 1}), "a layer with a rank is ['9']"),
    (lambda entry: entry["costs"].pop("0"), "a layer with a rank is ['0']"),
])  # fmt: skip
def test_ranks_that_cannot_be_are_refused_where_they_are_shown(tmp_path: Path, change: Any, sentence: str) -> None:
    saved = checkpoint()
    change(saved[ENTRY])
    assert sentence in refused(sealed(saved), tmp_path / "odd.ckpt")
    assert sentence in refused(saved, tmp_path / "odd.ckpt", report)


@pytest.mark.parametrize("callbacks", [3, {3: 4}, {"RankPruning": 3}, {"RankPruning": {"event_step": "\x1b[2J"}}])
def test_inspection_leaves_out_what_the_digest_does_not_cover(tmp_path: Path, callbacks: Any) -> None:
    torch.save(checkpoint() | {"callbacks": callbacks, "global_step": "\x1b"}, tmp_path / "odd.ckpt")
    text = report(tmp_path / "odd.ckpt")
    assert "Rank schedule" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("rank", [[2], {"a": 2}, None, "2"])
def test_inspection_shows_no_rank_that_is_no_number(tmp_path: Path, rank: Any) -> None:
    # Another class's argument of that name may be anything; it once ended in a TypeError.
    saved = checkpoint()
    group(saved)["arguments"]["rank"] = rank
    torch.save(sealed(saved), tmp_path / "odd.ckpt")
    assert "2 layers" in report(tmp_path / "odd.ckpt")


def test_expanded_and_conjugated_tensors_are_written_out() -> None:
    assert dense(torch.zeros(1).expand(5)).untyped_storage().nbytes() == 20
    assert not dense(torch.ones(2, dtype=torch.complex64).conj()).is_conj()
    part = torch.arange(9)[3:]
    assert dense(part) is not None
    assert dense(part).data_ptr() == part.data_ptr()
