"""Prompts in PEFT's format and back, in files of their own, and folded into a model's positions."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import pytest
import torch
from prompted import batch, padded, plain, prompted
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    DPT,
    AdapterFileError,
    DePT,
    LoRA,
    SoftPrompt,
    fold_offsets,
    from_hf_peft,
    init_prompt_from,
    inject,
    load_prompt,
    presets,
    save_prompt,
    to_hf_peft,
)

peft = pytest.importorskip("peft", reason="lightning-peft[hf] is not installed")

SOFT, PRODUCT = partial(SoftPrompt, length=5), partial(DPT, length=6, rank=3)
RELU: Any = partial(DPT, length=6, rank=3, form="relu")
OFFSETS: Any = partial(DePT, length=4, rank=3, reach=12)
WAYS = {"soft": SOFT, "dpt": PRODUCT, "dpt relu": RELU, "dept": OFFSETS}


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("way", ["soft", "dpt", "dpt relu"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "t5"])
def test_property_stock_peft_loads_it_to_the_same_logits(kind: str, way: str, tmp_path: Path) -> None:
    """With padding on the right; on the left PEFT counts it among the positions."""
    host, prompt = prompted(kind, WAYS[way])
    prompt.gate.keep(torch.arange(len(prompt.gate)) != 1)
    host.model.requires_grad_(False)  # trained, and frozen for use
    if kind in ("bert", "roberta"):
        host.model.base.classifier.requires_grad_(True)  # type: ignore[union-attr, operator]
    report = to_hf_peft(host, tmp_path / "prompt", check="peft")
    assert report.max_difference == 0.0
    assert "outputs compared on 4 inputs" in report.check
    theirs = peft.PeftModel.from_pretrained(plain(kind).model, str(tmp_path / "prompt")).eval()
    inputs = padded(batch(kind), left=0, right=2)
    wanted, found = logits_of(host, inputs), logits_of(theirs, inputs)
    if kind == "llama":  # PEFT leaves the prompt's rows in; what is said of padding does not count
        found, wanted = found[:, prompt.length : -2], wanted[:, :-2]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        theirs.prompt_encoder["default"].embedding.weight, prompt.prompt().detach(), rtol=0, atol=0
    )


def test_starts_and_ends_of_answers_are_compared_too(tmp_path: Path) -> None:
    host, _ = prompted("bert answers", SOFT)
    host.model.requires_grad_(False)
    host.model.base.qa_outputs.requires_grad_(True)  # type: ignore[union-attr, operator]
    report = to_hf_peft(host, tmp_path / "prompt", check="peft")
    assert report.max_difference < 1e-6


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_what_is_exported_comes_back(kind: str, tmp_path: Path) -> None:
    host, prompt = prompted(kind, PRODUCT)
    if kind == "bert":
        with torch.no_grad():
            host.model.base.classifier.weight.mul_(2.0).requires_grad_(True)  # type: ignore[union-attr, operator]
        host.model.base.classifier.requires_grad_(True)  # type: ignore[union-attr, operator]
    to_hf_peft(host, tmp_path / "prompt", check="files")
    back = from_hf_peft(plain(kind), tmp_path / "prompt")
    assert torch.equal(logits_of(back, batch(kind)), logits_of(host, batch(kind)))
    assert torch.equal(back.model.P, prompt.prompt())
    trained = {name for name, p in back.named_parameters() if p.requires_grad}
    head = {"model.base.classifier.weight", "model.base.classifier.bias"}
    assert trained == {"model.P"} | (head if kind == "bert" else set())


def test_a_prompt_that_peft_has_trained_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(plain("gpt2").model, config).eval()
    theirs.save_pretrained(tmp_path)
    ours = from_hf_peft(plain("gpt2"), tmp_path)
    assert isinstance(ours.model, SoftPrompt)
    wanted = logits_of(theirs, batch("gpt2"))[:, 4:]
    torch.testing.assert_close(logits_of(ours, batch("gpt2")), wanted, rtol=0, atol=1e-6)


def changed(folder: Path, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "for the decoder": ({"num_transformer_submodules": 2}, "has a prompt for the decoder as well"),
    "for the decoder, unsaid": (
        {"num_transformer_submodules": None, "task_type": "SEQ_2_SEQ_LM"},
        "for SEQ_2_SEQ_LM PEFT takes 2",
    ),
    "an option": ({"encoder_hidden_size": 4}, "the option encoder_hidden_size=4 cannot be expressed here"),
    "another length": ({"num_virtual_tokens": 9}, "has 5 rows, and the config says num_virtual_tokens=9"),
}


@pytest.mark.parametrize(("options", "sentence"), WRONG.values(), ids=WRONG.keys())
def test_a_folder_that_is_not_understood_is_refused(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    to_hf_peft(prompted("llama", SOFT)[0], tmp_path / "prompt", check="files")
    changed(tmp_path / "prompt", **options)
    host = plain("llama")
    with pytest.raises(AdapterFileError, match=sentence):
        from_hf_peft(host, tmp_path / "prompt")
    assert type(host.model).__name__ == "LlamaForCausalLM"


def test_a_folder_for_another_model_is_refused(tmp_path: Path) -> None:
    to_hf_peft(prompted("llama", SOFT)[0], tmp_path / "prompt", check="files")
    weights = tmp_path / "prompt" / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.zeros(5, 17)}, weights)
    with pytest.raises(AdapterFileError, match="the prompt is of width 17, and this model's embeddings of 16"):
        from_hf_peft(plain("llama"), tmp_path / "prompt")
    save_file({"other": torch.zeros(5, 16)}, weights)
    with pytest.raises(AdapterFileError, match="holds no 'prompt_embeddings', a matrix of virtual tokens"):
        from_hf_peft(plain("llama"), tmp_path / "prompt")
    save_file({"prompt_embeddings": torch.full((5, 16), torch.inf)}, weights)
    with pytest.raises(AdapterFileError, match="'prompt_embeddings' holds numbers that are not finite"):
        from_hf_peft(plain("llama"), tmp_path / "prompt")
    with pytest.raises(AdapterFileError, match="There is the module itself: give a module that holds one"):
        save_file({"prompt_embeddings": torch.zeros(5, 16)}, weights)
        from_hf_peft(plain("llama").model, tmp_path / "prompt")


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="DePT at 'model' adds offsets to the text's embeddings, for which PEFT has no"):
        to_hf_peft(prompted("llama", OFFSETS)[0], tmp_path / "prompt")
    with pytest.raises(TypeError, match="stands after the first token .*, and PEFT puts prompts in front"):
        to_hf_peft(prompted("bert", partial(SOFT, prompt_position="after_cls"))[0], tmp_path / "prompt")
    with pytest.raises(ValueError, match="mode='compact' is how LoRA's tensors are laid out"):
        to_hf_peft(prompted("llama", SOFT)[0], tmp_path / "prompt", mode="compact")
    with pytest.raises(ValueError, match="for this BertForSequenceClassification it knows none, or asks for a head"):
        to_hf_peft(prompted("bert", SOFT)[0], tmp_path / "prompt", head=False)
    host, prompt = prompted("llama", SOFT)
    inject(prompt.base.model, partial(LoRA, rank=2), targets=["q_proj"])
    with pytest.raises(ValueError, match="a PEFT folder holds one prompt and nothing else"):
        to_hf_peft(host, tmp_path / "prompt")
    assert not list(tmp_path.iterdir())


def test_dept_without_offsets_is_a_prompt_for_peft(tmp_path: Path) -> None:
    report = to_hf_peft(prompted("llama", partial(OFFSETS, rank=0))[0], tmp_path / "prompt", check="peft")
    assert report.max_difference == 0.0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("closed", [False, True])
def test_a_file_of_its_own_comes_back(way: str, closed: bool, tmp_path: Path) -> None:
    host, prompt = prompted("gpt2", WAYS[way])
    if closed:
        prompt.gate.keep(torch.arange(len(prompt.gate)) != 1)
    path = save_prompt(host, tmp_path / "prompt.safetensors")
    back = load_prompt(plain("gpt2"), path)
    torch.testing.assert_close(logits_of(back, batch("gpt2")), logits_of(host, batch("gpt2")))
    tensors = load_file(path)
    assert torch.equal(tensors["prompt_embeddings"], prompt.prompt())
    assert "A" not in tensors or tensors["A"].shape[1] == (2 if closed else 3)


@pytest.mark.parametrize("reach", [12, 20])
def test_property_offsets_as_a_table_are_the_same(reach: int, tmp_path: Path) -> None:
    """Shorter and longer than the embeddings are wide: 16."""
    host, prompt = prompted("llama", partial(OFFSETS, reach=reach))
    prompt.gate.keep(torch.tensor([0, 1, 1]))
    path = save_prompt(host, tmp_path / "prompt.safetensors", folded=True)
    tensors = load_file(path)
    assert set(tensors) == {"prompt_embeddings", "offsets"}
    torch.testing.assert_close(tensors["offsets"], prompt.scaling * prompt.A[:, 1:] @ prompt.B[1:])
    back = load_prompt(plain("llama"), path)
    assert back.model.rank == min(reach, 16)
    torch.testing.assert_close(logits_of(back, batch("llama")), logits_of(host, batch("llama")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "first"), [("roberta", 2), ("bert", 0), ("gpt2", 0)])
@pytest.mark.parametrize("position", ["start", "after_cls"])
def test_property_offsets_fold_into_learned_positions(kind: str, first: int, position: Any) -> None:
    host, prompt = prompted(kind, partial(OFFSETS, prompt_position=position), torch.float64)
    inputs = padded(batch(kind), left=0, right=2)
    before, table = logits_of(host, inputs), prompt.table().detach()
    alone, _ = prompted(kind, partial(SoftPrompt, length=4, prompt_position=position), torch.float64)
    with torch.no_grad():
        alone.model.P.copy_(prompt.P)  # type: ignore[union-attr, operator]
    assert not torch.allclose(logits_of(alone, inputs), before, atol=1e-3)  # the offsets are felt
    host.requires_grad_(False)
    trained = next(p for n, p in host.named_parameters() if "mlp" in n or "dense" in n).requires_grad_(True)
    fold_offsets(host)
    assert isinstance(host.model, SoftPrompt)
    assert trained.requires_grad  # such as a head's
    real = (slice(None), slice(0, 7)) if kind == "gpt2" else (slice(None),)
    torch.testing.assert_close(logits_of(host, inputs)[real], before[real], rtol=0, atol=1e-9)
    name = "wpe" if kind == "gpt2" else "position_embeddings"
    changed, was = (
        next(p for n, p in each.named_parameters() if n.endswith(f"{name}.weight"))
        for each in (host, plain(kind, torch.float64))
    )
    rows = [first + i + (4 if i or position == "start" else 0) for i in range(12)]
    torch.testing.assert_close(changed[rows] - was[rows], table, rtol=1e-9, atol=1e-12)
    others = [i for i in range(len(was)) if i not in rows]
    assert torch.equal(changed[others], was[others])


def test_what_cannot_be_folded_is_said() -> None:
    with pytest.raises(TypeError, match="fold_offsets needs a table of learned positions .*, and LlamaForCausalLM has"):
        fold_offsets(prompted("llama", OFFSETS)[0])
    with pytest.raises(TypeError, match="fold_offsets is for DePT, and at 'model' is a SoftPrompt"):
        fold_offsets(prompted("bert", SOFT)[0])
    with pytest.raises(ValueError, match="this DePT goes by columns"):
        fold_offsets(prompted("bert", partial(OFFSETS, align="absolute"))[0])
    with pytest.raises(ValueError, match="fold_offsets is for a module with one prompt, and Host has 0"):
        fold_offsets(plain("bert"))
    with pytest.raises(ValueError, match="folded=True is for DePT's offsets, and the DPT at 'model' has none"):
        save_prompt(prompted("bert", PRODUCT)[0], "never", folded=True)


def test_a_file_that_is_damaged_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = save_prompt(prompted("llama", OFFSETS)[0], tmp_path / "prompt.safetensors")
    whole, about = load_file(path), {"format": "lightning_peft/prompt/v1", "kind": "DePT", "prompt_position": "start"}
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AdapterFileError, match="cut short, damaged"):
        load_prompt(plain("llama"), path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_prompt(plain("llama"), tmp_path / "none")
    for tensors, metadata, sentence in (
        (whole, {}, "is no prompt that save_prompt has written"),
        ({"A": whole["A"]}, about, "holds A, which is no whole prompt"),
        (whole, about, "does not say its offsets' gamma and reach"),
        (whole, about | {"gamma": "nan", "reach": "12"}, "gamma=nan and reach=12 must be positive"),
        (whole | {"B": torch.zeros(4, 16)}, about, "tensors that do not go together"),
        (whole | {"B": torch.full((3, 16), torch.nan)}, about, "holds numbers that are not finite"),
    ):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(AdapterFileError, match=sentence):
            load_prompt(plain("llama"), path)
    save_prompt(prompted("llama", SOFT)[0], path)
    with pytest.raises(ValueError, match="Host has adapters already"):
        load_prompt(prompted("llama", SOFT)[0], path)
    with pytest.raises(ValueError, match="LlamaForCausalLM is one itself"):
        load_prompt(plain("llama").model, path)


class Module(L.LightningModule):
    """A classifier that a prompt is trained for; `labels` is the head's own, which another task has otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.model = plain("bert").model.train()

    def training_step(self, rows: Tensor, batch_idx: int) -> Tensor:
        logits = self.model(input_ids=rows).logits
        return nn.functional.cross_entropy(logits, rows[:, 0] % 3)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def fit(module: Module, callbacks: list[L.Callback], **arguments: Any) -> L.Trainer:
    rows = batch("bert", rows=16)["input_ids"]
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=8), **arguments)  # type: ignore[arg-type]
    return trainer


@pytest.mark.parametrize("kind", ["checkpoint", "file"])
def test_a_second_task_starts_from_the_firsts_prompt(kind: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"length": 4, "rank": 3, "reach": 12}
    first = Module()
    trainer = fit(first, [*presets.dept(**small)])
    path = tmp_path / ("first.ckpt" if kind == "checkpoint" else "first.safetensors")
    trainer.save_checkpoint(path) if kind == "checkpoint" else save_prompt(first, path)
    seen = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            seen.append({name: p.detach().clone() for name, p in pl_module.model.own_parameters()})

    second = Module()
    fit(second, [*presets.dept(**small, init_from=str(path)), Look()])
    fit(second, [*presets.dept(**small, init_from=str(path)), Look()])
    start, again = seen
    for name, value in start.items():
        torch.testing.assert_close(value, dict(first.model.own_parameters())[name])  # type: ignore[operator]
    assert not torch.equal(again["P"], start["P"])  # a second fit goes on


def test_a_start_of_another_class_or_size_is_refused(tmp_path: Path) -> None:
    path = save_prompt(prompted("llama", PRODUCT)[0], tmp_path / "prompt.safetensors")
    with pytest.raises(AdapterFileError, match="holds a DPT, and at 'model' is a SoftPrompt"):
        init_prompt_from(prompted("llama", SOFT)[0], path)
    with pytest.raises(AdapterFileError, match=r"'A' is of shape \(6, 3\), here \(6, 2\)"):
        init_prompt_from(prompted("llama", partial(PRODUCT, rank=2))[0], path)
    path = save_prompt(prompted("llama", OFFSETS)[0], path)
    with pytest.raises(AdapterFileError, match="'A' is in one of them alone"):
        init_prompt_from(prompted("llama", partial(OFFSETS, rank=0))[0], path)
    there = "trained with align='tokens', and at 'model' is one with 'absolute'. Give the same."
    with pytest.raises(AdapterFileError, match=re.escape(there)):
        init_prompt_from(prompted("llama", partial(OFFSETS, align="absolute"))[0], path)
    with pytest.raises(AdapterFileError, match="with prompt_position='start', and at 'model' is one with 'after_cls'"):
        init_prompt_from(prompted("llama", partial(OFFSETS, prompt_position="after_cls"))[0], path)


@pytest.mark.parametrize("kind", ["file", "folded file", "checkpoint"])
def test_offsets_are_what_they_were_where_a_prompt_of_another_scale_starts(kind: str, tmp_path: Path) -> None:
    first, path = Module(), tmp_path / ("first.ckpt" if kind == "checkpoint" else "first.safetensors")
    small: dict[str, Any] = {"length": 4, "rank": 12, "reach": 12}
    trainer = fit(first, [*presets.dept(**small)])
    if kind == "checkpoint":
        trainer.save_checkpoint(path)
    else:
        save_prompt(first, path, folded=kind == "folded file")
    second = Module()
    inject(second, partial(DePT, **small, alpha=2.0), train=[])
    init_prompt_from(second, path)
    there, here = cast(DePT, first.model), cast(DePT, second.model)
    assert there.scaling == 4 * here.scaling
    assert there.table().any()
    torch.testing.assert_close(here.table(), there.table())
    assert torch.equal(here.P, there.P)
