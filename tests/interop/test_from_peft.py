"""Adapters that stock PEFT has written, as ours, and back: outputs stay equal."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import (
    AdaLoRA,
    AdapterFileError,
    LoRA,
    RankBudget,
    RLoRA,
    WeightDecomposed,
    from_hf_peft,
    inject,
    to_hf_peft,
)

peft = pytest.importorskip("peft", reason="lightning-peft[hf] is not installed")


def bert(labels: int = 3) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=128, num_labels=labels, **sizes))


def gpt2(tied: bool = True) -> nn.Module:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 128}
    return hf.GPT2LMHeadModel(hf.GPT2Config(tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, **sizes))


# What PEFT says of the AdaLoRA folders that it writes itself: it takes lists of triplets for ranks of LoRA, and layers
# of rank 0 for shards.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.* LoRA tensor.s. have invalid shape"),
]

IDS = torch.arange(40).view(4, 10)


def base(model: Callable[[], nn.Module] = bert) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model().eval()


def outputs(model: Any) -> Tensor:
    """In float64, so that nothing but the tensors and scales that were read can differ."""
    with torch.no_grad():
        logits: Tensor = copy.deepcopy(model).double().eval()(input_ids=IDS).logits
    return logits


def written(config: Any, folder: Path, model: Callable[[], nn.Module] = bert) -> Tensor:
    """A folder by PEFT's own `save_pretrained`, of adapters moved off their start; and their outputs, loaded again."""
    torch.manual_seed(1)
    theirs: Any = peft.get_peft_model(base(model), config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p).abs() if "magnitude" in name else 0.2 * torch.randn_like(p))
    theirs.save_pretrained(str(folder))
    return outputs(peft.PeftModel.from_pretrained(base(model), str(folder)))


LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "dense"], "lora_dropout": 0.1}
CONFIGS = {
    "plain": LORA,
    "patterns": LORA | {"rank_pattern": {"query": 2, r".*0\.output\.dense": 5}, "alpha_pattern": {"query": 9}},
    "rank-stabilised": LORA | {"use_rslora": True, "rank_pattern": {"query": 2}},
    "with a head": LORA | {"task_type": "SEQ_CLS"},
    "weight-decomposed": LORA | {"use_dora": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_lora_folder_computes_what_it_does_in_peft(name: str, tmp_path: Path) -> None:
    expected = written(peft.LoraConfig(**CONFIGS[name]), tmp_path)
    ours = from_hf_peft(base(), tmp_path)
    torch.testing.assert_close(outputs(ours), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(outputs(base()), expected, atol=1e-2)
    kind = WeightDecomposed if name == "weight-decomposed" else LoRA
    sites = RankBudget.of(ours)
    assert all(type(site.adapter) is kind and site.adapter.dropout == 0.1 for site in sites.values())
    assert len(sites) == 9  # the pooler's dense layer among them
    trained = {n for n, p in ours.named_parameters() if p.requires_grad and "classifier" in n}
    assert trained == ({"classifier.weight", "classifier.bias"} if name == "with a head" else set())


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_rank_beyond_what_a_layer_can_use_is_read_at_what_it_can(decomposed: bool, tmp_path: Path) -> None:
    """Wide, tall and square layers; `r` and both patterns scale what they say of the file, not of the rank here."""
    config = LORA | {"r": 40, "target_modules": ["query", "dense"], "alpha_pattern": {"query": 9}}
    expected = written(peft.LoraConfig(**config, use_dora=decomposed), tmp_path)
    ours = from_hf_peft(base(), tmp_path)
    torch.testing.assert_close(outputs(ours), expected, rtol=0, atol=1e-5)
    assert {len(site.gate) for site in RankBudget.of(ours).values()} == {32}
    assert not torch.allclose(outputs(base()), expected, atol=1e-2)


def test_a_rank_beyond_an_embedding_and_a_transposed_layer(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=40, lora_alpha=6, target_modules=["wte", "c_attn"], fan_in_fan_out=True)
    model = partial(gpt2, tied=False)
    expected = written(config, tmp_path, model)
    torch.testing.assert_close(outputs(from_hf_peft(base(model), tmp_path)), expected, rtol=0, atol=1e-5)


def test_an_exported_rlora_comes_back(tmp_path: Path) -> None:
    """Its rank may be beyond the layer's smaller side, as VeRA's 1024 on 768; stock PEFT loads what is written."""
    ours = base()
    inject(ours, partial(RLoRA, rank=40), targets=["query", "dense"])
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.requires_grad and name.endswith(".b"):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    to_hf_peft(ours, tmp_path / "adapter")
    expected = outputs(ours)
    assert not torch.allclose(outputs(base()), expected, atol=1e-2)
    theirs = outputs(peft.PeftModel.from_pretrained(base(), str(tmp_path / "adapter")))
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5)
    again = from_hf_peft(base(), tmp_path / "adapter")
    torch.testing.assert_close(outputs(again), expected, rtol=0, atol=1e-5)
    assert {type(site.adapter) for site in RankBudget.of(again).values()} == {LoRA}


def test_on_transposed_layers_and_embeddings(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["wte", "c_attn"], fan_in_fan_out=True)
    model = partial(gpt2, tied=False)
    expected = written(config, tmp_path, model)
    torch.testing.assert_close(outputs(from_hf_peft(base(model), tmp_path)), expected, rtol=0, atol=1e-6)


def allocated(folder: Path, total: int = 12, **options: Any) -> Tensor:
    """PEFT's AdaLoRA trained by its documented loop past its final mask, saved; its outputs when loaded again."""
    torch.manual_seed(2)
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS", init_r=4, target_r=1, total_step=total, tfinal=3, target_modules=["query", "dense"],
        lora_alpha=16, **options
    )  # fmt: skip
    theirs: Any = peft.get_peft_model(base(), config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, total + 1):
        theirs(input_ids=IDS, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.save_pretrained(str(folder))
    loaded = outputs(peft.PeftModel.from_pretrained(base(), str(folder)))
    torch.testing.assert_close(loaded, outputs(theirs), rtol=0, atol=1e-6)
    return loaded


def test_an_adalora_folder_goes_to_ours_and_back(tmp_path: Path) -> None:
    """Sliced tensors, layers of rank 0, the scale of init_r: into ours, and out again in each format of PEFT."""
    expected = allocated(tmp_path / "theirs")
    pattern = json.loads((tmp_path / "theirs/adapter_config.json").read_text())["rank_pattern"]
    ranks = {name.removesuffix(".lora_E"): sum(kept) for name, kept in pattern.items()}
    assert 0 in ranks.values()
    assert max(ranks.values()) > 1
    ours = from_hf_peft(base(), tmp_path / "theirs")
    torch.testing.assert_close(outputs(ours), expected, rtol=0, atol=1e-6)
    assert RankBudget.of(ours).ranks() == {name: rank for name, rank in ranks.items() if rank}
    assert all(type(site.adapter) is AdaLoRA for site in RankBudget.of(ours).values())
    for mode in ("adalora", "padded", "compact"):
        report = to_hf_peft(ours, tmp_path / mode, mode, check="peft", inputs={"input_ids": IDS})  # type: ignore[arg-type]
        assert report.max_difference < 1e-5
        loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path / mode))
        assert loaded.peft_config["default"].peft_type == ("ADALORA" if mode == "adalora" else "LORA")
        torch.testing.assert_close(outputs(loaded), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(outputs(from_hf_peft(base(), tmp_path / mode)), expected, rtol=0, atol=1e-6)


def pruned(model: nn.Module) -> nn.Module:
    """Our AdaLoRA with 0, 1, 2, ... open triplets, not the first ones."""
    torch.manual_seed(3)
    inject(model, partial(AdaLoRA, rank=4, alpha=10.0))
    for i, site in enumerate(RankBudget.of(model).values()):
        for _, p in site.adapter.own_parameters():
            nn.init.normal_(p, std=0.3)
        site.gate.keep(torch.arange(4) >= 4 - i % 5)
    return model.eval()


@pytest.mark.parametrize("model", [bert, gpt2])
@pytest.mark.parametrize("check", ["peft", "files"])
def test_ours_is_written_as_adalora_and_read_again(model: Any, check: Any, tmp_path: Path) -> None:
    ours = pruned(base(model))
    expected = outputs(ours)
    report = to_hf_peft(ours, tmp_path / "new", "adalora", check=check)
    assert report.max_difference < 1e-5
    tensors = load_file(tmp_path / "new/adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in tensors if "lora" in key} == {"lora_A", "lora_E", "lora_B"}
    torch.testing.assert_close(outputs(from_hf_peft(base(model), tmp_path / "new")), expected, rtol=0, atol=1e-6)
    loaded = peft.PeftModel.from_pretrained(base(model), str(tmp_path / "new"))
    torch.testing.assert_close(outputs(loaded), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs(loaded.merge_and_unload()), expected, rtol=0, atol=1e-6)


def test_the_check_without_peft_sees_a_changed_tensor(tmp_path: Path) -> None:
    from lightning_peft.interop.targets import find_targets
    from lightning_peft.interop.triplets import read_triplets

    ours = pruned(base())
    to_hf_peft(ours, tmp_path / "new", "adalora", check="files", head=False)
    file = tmp_path / "new/adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("lora_E"))
    save_file(tensors | {key: tensors[key] * 1.01}, file)
    with pytest.raises(RuntimeError, match="differs by"):
        read_triplets(tmp_path / "new", find_targets(ours), {})


def test_what_pefts_adalora_has_not_is_refused_by_name(tmp_path: Path) -> None:
    embedded = base(partial(gpt2, tied=False))
    inject(embedded, partial(AdaLoRA, rank=2), ["wte"], [])
    nn.init.ones_(RankBudget.of(embedded)["transformer.wte"].gate.gain)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layer 'transformer.wte': Embedding is no layer that PEFT's AdaLoRA adapts"):
        to_hf_peft(embedded, tmp_path / "a", "adalora")
    decomposed = base()
    inject(decomposed, partial(WeightDecomposed, rank=2), ["query"], [])
    for site in RankBudget.of(decomposed).values():
        nn.init.ones_(site.adapter.B)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="WeightDecomposed trains the lengths of a weight's rows"):
        to_hf_peft(decomposed, tmp_path / "b", "adalora")


class Wrapped(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = base()
        self.probe = nn.Linear(2, 2)


def test_into_a_lightning_module_that_holds_the_model(tmp_path: Path) -> None:
    expected = written(peft.LoraConfig(**CONFIGS["with a head"]), tmp_path)
    ours = from_hf_peft(Wrapped(), tmp_path)
    torch.testing.assert_close(outputs(ours.model), expected, rtol=0, atol=1e-6)


def edited(folder: Path, **options: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type='IA3' cannot be read; LORA, ADALORA and PROMPT_TUNING can."),
    "biases": ({"bias": "all"}, "the option bias='all' cannot be expressed here. Merge the adapter with PEFT"),
    "a start that changed the base": ({"init_lora_weights": "pissa"}, "the option init_lora_weights='pissa'"),
    "an option of the future": ({"use_magic": 3}, "the option use_magic=3 cannot be expressed"),
    "token indices": ({"trainable_token_indices": [1]}, r"the option trainable_token_indices=\[1\]"),
    "a rank that is not there": ({"r": 5}, "is of rank 4, and adapter_config.json says 5."),
    "no scale": ({"lora_alpha": 0}, "lora_alpha=0 is no positive number."),
    "a general expression": ({"alpha_pattern": {"(a+)+": 2}}, r"alpha_pattern has the general expression '\(a\+\)\+'"),
    "an escape that is none": ({"rank_pattern": {r"a\9": 2}}, r"rank_pattern has the general expression 'a"),
    "patterns that are none": ({"rank_pattern": ["query"]}, r"rank_pattern=\['query'\] is no dict."),
    "a scale that is none": ({"alpha_pattern": 3}, "alpha_pattern=3 is no dict."),
    "a dropout that is none": ({"lora_dropout": "x"}, r"lora_dropout='x' is no probability in \[0, 1\)."),
    "a dropout of 2": ({"lora_dropout": 2}, r"lora_dropout=2 is no probability in \[0, 1\)."),
    "a head that is none": ({"modules_to_save": 3}, "modules_to_save=3 is no list."),
    "a head that is not there": ({"modules_to_save": ["classifier"]}, "modules_to_save asks for 'classifier.weight'"),
    "AdaLoRA with DoRA": ({"peft_type": "ADALORA", "init_r": 4, "use_dora": True}, "AdaLoRA with use_dora=True"),
    "DoRA without lengths": ({"use_dora": True}, "has A, B, and needs A, B, magnitude."),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    written(peft.LoraConfig(**LORA), folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_and_nothing_is_changed(name: str, plain: Path, tmp_path: Path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((plain / file).read_bytes())
    options, message = REFUSED[name]
    edited(tmp_path, **options)
    model = base()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterFileError, match=message):
        from_hf_peft(model, tmp_path)
    assert not RankBudget.of(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no B": (lambda t: {k: v for k, v in t.items() if k != A.replace("_A", "_B")}, "has A, and needs A, B."),
    "not finite": (lambda t: t | {A: t[A] / 0}, "lora_A.weight' holds numbers that are not finite; use another copy."),
    "kernels": (lambda t: t | {A: t[A].view(4, 4, 8)}, r"has A \(4, 4, 8\) and B \(32, 4\), which does not fit"),
    "twice": (lambda t: t | {A.removesuffix(".weight"): t[A]}, "is there twice, under another name as well."),
    "a way out": (lambda t: {k.replace("bert.", "../../bert."): v for k, v in t.items()}, "has no layer '../../bert"),
    "what belongs nowhere": (lambda t: t | {"base_model.model.x": t[A]}, "has no layer 'x'"),
    "the base of a layer": (
        lambda t: t | {A.replace("lora_A.weight", "weight"): torch.ones(32, 32)}, "has no layer '.*adapted",
    ),
    "another type": (
        lambda t: t | {"base_model.model.classifier.bias": torch.zeros(3, dtype=torch.int64)},
        "'classifier.bias' is of dtype torch.int64, and in this model of torch.float32.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_tensors_are_refused_and_nothing_is_changed(name: str, plain: Path, tmp_path: Path) -> None:
    change, message = DAMAGED[name]
    (tmp_path / "adapter_config.json").write_bytes((plain / "adapter_config.json").read_bytes())
    tensors = change(load_file(plain / "adapter_model.safetensors"))
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
    model = base()
    before, wanted = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterFileError, match=message):
        from_hf_peft(model, tmp_path)
    assert not RankBudget.of(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, pad_token_id=0, **sizes))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_an_adapted_embedding_whose_weight_peft_writes_too(tmp_path: Path) -> None:
    """Frozen there, so frozen here: only what `modules_to_save` names is trained."""
    expected = written(peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), tmp_path, llama)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys
    ours = from_hf_peft(base(llama), tmp_path)
    torch.testing.assert_close(outputs(ours), expected, rtol=0, atol=1e-6)
    own = {id(p) for site in RankBudget.of(ours).values() for _, p in site.adapter.own_parameters()}
    assert all(id(p) in own for p in ours.parameters() if p.requires_grad)


def test_folders_and_models_that_do_not_fit_are_told(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="holds no adapter_config.json"):
        from_hf_peft(base(), tmp_path)
    with pytest.raises(AdapterFileError, match="GPT2LMHeadModel has no layer 'bert.encoder.layer.0"):
        from_hf_peft(base(gpt2), plain)
    (tmp_path / "adapter_config.json").write_bytes((plain / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(AdapterFileError, match="adapter_model.bin is a pickle, which can run code"):
        from_hf_peft(base(), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes((plain / "adapter_model.safetensors").read_bytes()[:500])
    with pytest.raises(AdapterFileError, match="cannot be read: it is cut short, damaged"):
        from_hf_peft(base(), tmp_path)
    adapted = base()
    inject(adapted, partial(LoRA, rank=2))
    with pytest.raises(ValueError, match="has adapters already: give from_hf_peft the plain model"):
        from_hf_peft(adapted, plain)


def test_a_head_of_another_size_is_told(tmp_path: Path) -> None:
    written(peft.LoraConfig(**CONFIGS["with a head"]), tmp_path)
    with pytest.raises(AdapterFileError, match=r"'classifier.bias' is of shape \(3,\), and in this model of \(5,\)"):
        from_hf_peft(base(partial(bert, labels=5)), tmp_path)
