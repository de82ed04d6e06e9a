"""What PEFT could not load as trained is refused in a sentence, broken files are noticed, nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft.adapters import Adapter, DynamicDoRA, LoRA
from lightning_peft.interop import hf_peft
from lightning_peft.interop.hf_peft import to_hf_peft
from lightning_peft.rank.budget import RankBudget
from lightning_peft.surgery import inject

peft = pytest.importorskip("peft", reason="lightning-peft[hf] is not installed")

RANK = 4
LORA = partial(LoRA, rank=RANK, alpha=6.0)
DORA = partial(DynamicDoRA, rank=RANK)
MODES: list[hf_peft.Mode] = ["padded", "compact", "folded"]


def bert(labels: int = 3) -> nn.Module:
    return hf.BertForSequenceClassification(
        hf.BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            vocab_size=128,
            num_labels=labels,
        )
    )


def fill(module: nn.Module, *ranks: int) -> dict[str, int]:
    """Give the adapters values, as training would, and close components: without `ranks`, 0, 1, 2, ... stay open."""
    kept = {}
    for i, (name, site) in enumerate(RankBudget.of(module).items()):
        nn.init.normal_(site.adapter.B, std=0.1)
        if site.gate.gain is not None:
            nn.init.normal_(site.gate.gain)
        kept[name] = ranks[i] if ranks else i % (RANK + 1)
        site.gate.keep(torch.randperm(RANK) < kept[name])
    return kept


def config_of(folder: str | Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text())
    return config


def prepared(build: Callable[[], nn.Module] = bert, factory: Any = LORA, **how: Any) -> nn.Module:
    module = build()
    inject(module, factory, **how)
    fill(module)
    return module


def all_closed() -> nn.Module:
    module = bert()
    inject(module, DORA)
    return module


def bias_trained() -> nn.Module:
    return prepared(train=["LayerNorm.bias"])


def shared_layer() -> nn.Module:
    layer = nn.Linear(6, 6)
    module = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})
    inject(module, LORA, ["a.0"], train=[])
    fill(module, 2)
    return module


def separate_projections() -> nn.Module:
    module = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=4, vdim=4), "x": nn.Linear(8, 8)})
    inject(module, LORA, ["out_proj"], train=[])
    fill(module, 2)
    return module


def another_method() -> nn.Module:
    class Scaled(Adapter):
        def effective_weight(self) -> Tensor:
            weight: Tensor = self.base.weight  # type: ignore[assignment]
            return 2 * weight

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.effective_weight())

    module = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    inject(module, Scaled, ["first"])
    return module


def ambiguous_head() -> nn.Module:
    module = nn.ModuleDict({"my_head": nn.Linear(6, 6), "x": nn.Linear(6, 6), "head": nn.Linear(6, 6)})
    inject(module, LORA, ["x"], train=["head"])
    fill(module, 2)
    return module


def adapter_in_head() -> nn.Module:
    module = nn.ModuleDict({"a": nn.ModuleDict({"head": nn.Linear(6, 6)}), "head": nn.Linear(6, 6)})
    inject(module, LORA, ["a.head"], train=["head"])
    fill(module, 2)
    return module


def head_outside() -> nn.Module:
    module = nn.ModuleDict({"backbone": bert().bert, "decision": nn.Linear(32, 2)})
    inject(module, LORA, ["query"], train=["decision"])
    fill(module, 1, 2)
    return module


def two_models() -> nn.Module:
    module = nn.ModuleDict({"query": bert(), "document": bert()})
    inject(module, LORA, ["self.key"])
    fill(module, 1, 2, 1, 2)
    return module


def adapters_outside() -> nn.Module:
    module = nn.ModuleDict({"backbone": bert(), "extra": nn.Linear(8, 8), "last": nn.Linear(8, 8)})
    inject(module, LORA, ["self.key", "extra"])
    fill(module, 1, 2, 1)
    return module


REFUSALS: list[tuple[Callable[[], nn.Module], type[Exception], str]] = [
    (bert, ValueError, r"to_hf_peft found no adapter in BertForSequenceClassification; inject puts them in\."),
    (all_closed, ValueError, r"all 13 adapted layers are of rank 0, so there is no adapter to write: .* Train before"),
    (another_method, TypeError, r"layer 'first': Scaled cannot be expressed in PEFT's LoRA format.* Export the merged"),
    (
        shared_layer,
        TypeError,
        r"layer 'a\.0' is shared by several parents \(a\.0, b\.0\), and PEFT would adapt it in only",
    ),
    (
        separate_projections,
        TypeError,
        r"layer 'attention\.out_proj': PEFT adapts a MultiheadAttention only as a part of",
    ),
    (
        bias_trained,
        ValueError,
        r"not a whole module: 'bert\.embeddings\.LayerNorm\.bias', .* and 2 more\. PEFT keeps whole",
    ),
    (
        ambiguous_head,
        ValueError,
        r"trained module 'head' cannot be kept: .* would also take 'my_head'\. Give head=False",
    ),
    (adapter_in_head, ValueError, r"trained module 'head' cannot be kept: .* would also take 'a\.head'"),
    (
        head_outside,
        ValueError,
        r"outside the transformers model 'backbone': 'decision\.weight', 'decision\.bias'\. A PEFT",
    ),
    (
        two_models,
        ValueError,
        r"has more than one of them\. Export each part by itself: module\.query, module\.document",
    ),
    (adapters_outside, ValueError, r"ModuleDict has adapters outside it \('extra'\)\. Export each part by itself"),
]


@pytest.mark.parametrize(("build", "kind", "sentence"), REFUSALS, ids=[case[0].__name__ for case in REFUSALS])
def test_what_cannot_be_expressed_is_refused(build: Any, kind: type[Exception], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=sentence):
        to_hf_peft(build(), "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("build", [bias_trained, head_outside, ambiguous_head])
def test_without_the_head_it_can_be_expressed(build: Any) -> None:
    assert to_hf_peft(build(), "out", head=False).head == ()


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    module = prepared()
    with pytest.raises(ValueError, match="mode='tight': choose 'padded', 'compact', 'folded'"):
        to_hf_peft(module, "out", "tight")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="check='no': choose 'auto', 'peft' or 'files'"):
        to_hf_peft(module, "out", check="no")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_without_peft_the_files_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_peft, "find_spec", lambda name: None)
    module = prepared()
    for mode in MODES:
        report = to_hf_peft(module, "out", mode)
        assert report.check == "files read again and every tensor compared; PEFT did not load them"
        assert report.max_difference <= 1e-6
    with pytest.raises(ModuleNotFoundError, match=r"not installed: run `pip install 'lightning-peft\[hf\]'`, or give"):
        to_hf_peft(module, "out", check="peft")


# A wrong or broken file is noticed, and nothing is left ---------------------------------------------------------------


def truncated(tensors: dict[str, Tensor], path: Path, **how: Any) -> None:
    save_file(tensors, path, **how)
    path.write_bytes(path.read_bytes()[:-100])


def tampered(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[..., None]:
    return lambda tensors, path, **how: save_file(change(dict(tensors)), path, **how)


def lose(part: str) -> Callable[..., None]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors.pop(next(name for name in tensors if part in name))
        return tensors

    return tampered(change)


def alter(part: str) -> Callable[..., None]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = next(name for name in tensors if part in name)
        return tensors | {name: tensors[name] + 0.01}

    return tampered(change)


BROKEN = {
    "truncated": truncated,
    "without prefix": tampered(lambda tensors: {k.removeprefix("base_model.model."): t for k, t in tensors.items()}),
    "with prefix": tampered(lambda tensors: {k.replace(".model.", ".model.net."): t for k, t in tensors.items()}),
    "lost A": lose("lora_A"),
    "lost head": lose("classifier.weight"),
    "wrong B": alter("lora_B"),
    "wrong head": alter("classifier.bias"),
}


@pytest.mark.parametrize("check", ["peft", "files"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_not_accepted(
    how: str, check: hf_peft.Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hf_peft, "save_file", BROKEN[how])
    with pytest.raises(RuntimeError, match="the export was checked and is not right: "):
        to_hf_peft(prepared(), "out", check=check)
    assert list(tmp_path.iterdir()) == []


class ReadingPooler(nn.Module):
    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden[:, 0], self.dense.weight, self.dense.bias)  # type: ignore[arg-type]


def test_wrong_outputs_are_not_accepted(tmp_path: Path) -> None:
    """A layer that is read and never called: PEFT loads its tensors, and only the outputs tell that they do nothing."""
    module = bert()
    module.bert.pooler = ReadingPooler(module.bert.pooler.dense)
    inject(module, LORA, ["pooler.dense", "query"])
    fill(module, 1, 2, 3)
    with pytest.raises(RuntimeError, match=r"the output differs by .* \(tolerance 1e-05\)\. Nothing was written"):
        to_hf_peft(module, "out")
    assert list(tmp_path.iterdir()) == []


# Folders -------------------------------------------------------------------------------------------------------------


def test_an_earlier_export_is_replaced() -> None:
    module = prepared()
    to_hf_peft(module, "out", "padded")
    to_hf_peft(module, "out", "compact")
    assert config_of("out")["rank_pattern"]


def test_what_is_no_export_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = prepared()
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("mine too")
    with pytest.raises(
        FileExistsError, match=r"holds files that are no earlier export \(README\.md, notes\.txt\)\. Give"
    ):
        to_hf_peft(module, folder)
    with monkeypatch.context() as patch:
        patch.setattr(hf_peft, "save_file", truncated)
        with pytest.raises(RuntimeError, match="not right"):
            to_hf_peft(module, folder, overwrite=True)
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"notes.txt": "mine", "README.md": "mine too"}
    to_hf_peft(module, folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "notes.txt"
    ]  # fmt: skip
    assert (folder / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file is a file; an export is a folder"):
        to_hf_peft(module, tmp_path / "file", overwrite=True)
