"""A merged model loads by transformers alone, with equal outputs."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as hf
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft.adapters import DynamicDoRA, LoRA
from lightning_peft.interop import merged as merged_module
from lightning_peft.interop import save_merged, to_hf_peft
from lightning_peft.rank.budget import RankBudget
from lightning_peft.surgery import inject

IDS = torch.arange(1, 13)[None]


def bert() -> nn.Module:
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=128, num_labels=3
    )
    return hf.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    words = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=32, **words))


def adapt(module: nn.Module, *targets: str) -> dict[str, int]:
    inject(module, partial(DynamicDoRA, rank=4), targets or None)
    for i, site in enumerate(RankBudget.of(module).values()):
        assert site.gate.gain is not None
        nn.init.normal_(site.gate.gain)
        site.gate.keep(torch.randperm(4) < (i + 2) % 5)
    return RankBudget.of(module).ranks()


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = module.eval()(input_ids=IDS).logits
    return out


class Job(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def test_a_merged_model_loads_by_transformers_alone() -> None:
    module = Job(bert())
    ranks = adapt(module.net)
    wanted, state = logits(module.net), copy.deepcopy(module.state_dict())
    module.train()
    report = save_merged(module, "out")
    assert (report.mode, report.ranks) == ("merged", ranks)
    assert report.max_difference <= 1e-5
    assert report.bytes == Path("out/model.safetensors").stat().st_size
    assert "loaded with transformers, every tensor equal to the merged model's; outputs compared" in report.check
    assert "head" not in str(report)
    assert sorted(path.name for path in Path("out").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = hf.AutoModelForSequenceClassification.from_pretrained("out")
    assert (logits(loaded) - wanted).abs().max() <= 1e-5
    # The module is as it was.
    assert RankBudget.of(module.net).ranks() == ranks
    assert module.net.training
    assert list(module.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_an_adapted_embedding_is_saved_apart_from_the_output_layer() -> None:
    module = gpt2()
    adapt(module, "wte", "c_attn")
    wanted = logits(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that weights are no longer tied needs no warning here: it is taken care of
        assert save_merged(module, "out").max_difference <= 1e-5
    assert module.config.tie_word_embeddings
    loaded = hf.AutoModelForCausalLM.from_pretrained("out")
    assert not loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is not loaded.transformer.wte.weight
    assert (logits(loaded) - wanted).abs().max() <= 1e-5
    assert "No longer one weight: transformer.wte.weight, lm_head.weight." in Path("out/README.md").read_text()


def test_tied_embeddings_that_are_not_adapted_stay_tied() -> None:
    module = gpt2()
    adapt(module, "c_attn")
    save_merged(module, "out")
    loaded = hf.AutoModelForCausalLM.from_pretrained("out")
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_model_in_bfloat16_is_saved_in_bfloat16() -> None:
    module = bert().bfloat16()
    adapt(module)
    report = save_merged(module, "out")
    assert report.check == "loaded with transformers, every tensor equal to the merged model's"
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} == {torch.bfloat16}


def test_one_kind_of_export_replaces_the_other() -> None:
    module = bert()
    adapt(module)
    to_hf_peft(module, "out", check="files")
    save_merged(module, "out")
    assert not Path("out/adapter_config.json").exists()
    to_hf_peft(module, "out", check="files")
    assert not Path("out/config.json").exists()


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_merged found no adapter in BertForSequenceClassification"):
        save_merged(bert(), "out")
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapt(plain, "0")
    with pytest.raises(
        ValueError, match=r"and Sequential is none\. For other modules call lightning_peft\.merge\(module\)"
    ):
        save_merged(plain, "out")
    module = nn.ModuleDict({"backbone": bert().bert, "decision": nn.Linear(32, 2)})
    inject(module, partial(LoRA, rank=2), ["query"], train=["decision"])
    with pytest.raises(
        ValueError,
        match=r"outside the transformers model 'backbone': 'decision\.weight', .* save_merged\(module\.backbone",
    ):
        save_merged(module, "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    model = bert()
    adapt(model)
    with pytest.raises(FileExistsError, match=r"holds files that are no earlier export \(notes\.txt\)"):
        save_merged(model, "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_wrong_file_is_not_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = bert()
    adapt(model)
    save = hf.BertForSequenceClassification.save_pretrained

    def other(self: nn.Module, *args: object, **how: object) -> None:
        wrong = copy.deepcopy(self)
        wrong.classifier.weight.data.add_(1)
        save(wrong, *args, **how)

    monkeypatch.setattr(hf.BertForSequenceClassification, "save_pretrained", other)
    with pytest.raises(
        RuntimeError, match=r"not right: classifier\.weight is not what was saved\. Nothing was written"
    ):
        save_merged(model, "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_merge_is_not_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = bert()
    adapt(model)

    def other(module: nn.Module) -> object:
        RankBudget.of(module)["bert.pooler.dense"].adapter.B.data.add_(1)
        return merge(module)

    merge = merged_module.merge
    monkeypatch.setattr(merged_module, "merge", other)
    with pytest.raises(RuntimeError, match=r"the output differs by .* Nothing was written"):
        save_merged(model, "out")
    assert list(tmp_path.iterdir()) == []
