"""Stock PEFT and transformers load what to_hf_peft writes, with equal outputs."""

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
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft.adapters import DynamicDoRA, LoRA
from lightning_peft.interop import hf_peft
from lightning_peft.interop.hf_peft import to_hf_peft
from lightning_peft.rank import close_lowest
from lightning_peft.rank.budget import Budget, RankBudget
from lightning_peft.surgery import inject

peft = pytest.importorskip("peft", reason="lightning-peft[hf] is not installed")

RANK = 4
LORA = partial(LoRA, rank=RANK, alpha=6.0)
DORA = partial(DynamicDoRA, rank=RANK)
MODES: list[hf_peft.Mode] = ["padded", "compact", "folded"]
WORDS = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}
# What PEFT says about adapters on embeddings whose weight the output layer shares; the outputs are what counts here.
TIED = "ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"


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


def gpt2(tied: bool = True) -> nn.Module:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32}
    return hf.GPT2LMHeadModel(hf.GPT2Config(tie_word_embeddings=tied, **sizes, **WORDS))


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            **WORDS,
        )
    )


# A pattern more than the default's for GPT-2, so that the embedding is adapted too.
MODELS: list[tuple[Callable[[], nn.Module], list[str] | None]] = [
    (bert, None),
    (gpt2, ["wte", "c_attn", "c_fc", "c_proj"]),
    (llama, None),
]


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


def outputs(module: nn.Module, texts: int = 64, length: int = 12) -> Tensor:
    ids = torch.randint(1, 128, (texts, length), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(length) < torch.arange(texts)[:, None] % length + 1
    with torch.no_grad():
        logits = module.eval()(input_ids=ids, attention_mask=mask.long()).logits
    # A decoder's outputs at padding are never read.
    return logits if logits.dim() == 2 else logits[mask]


def other_head(base: nn.Module) -> nn.Module:
    """A fresh base has a new head of its own."""
    if hasattr(base, "classifier"):
        for parameter in base.classifier.parameters():
            nn.init.normal_(parameter)
    return base


def adapted(build: Callable[[], nn.Module], factory: Any, targets: list[str] | None = None, *ranks: int) -> Any:
    """An adapted model, a fresh base for it, and its outputs."""
    model = build()
    base = other_head(copy.deepcopy(model))
    inject(model, factory, targets)
    fill(model, *ranks)
    return model, base


def config_of(folder: str | Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text())
    return config


@pytest.fixture(params=[LORA, DORA], ids=["lora", "dynamic_dora"])
def factory(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("build", "targets"), MODELS)
def test_stock_peft_and_transformers_load_it_with_equal_outputs(
    build: Any, targets: list[str] | None, factory: Any, mode: hf_peft.Mode
) -> None:
    model, base = adapted(build, factory, targets)
    ranks = RankBudget.of(model).ranks()
    assert set(ranks.values()) == {0, 1, 2, 3, 4}
    wanted, plain = outputs(model), outputs(base)
    report = to_hf_peft(model, "out", mode)
    assert report.ranks == ranks
    assert report.max_difference <= 1e-5
    assert report.check == "loaded with stock PEFT on a copy of the base; outputs compared on 4 inputs"
    assert report.head == (("classifier",) if build is bert else ())
    assert report.bytes == Path("out/adapter_model.safetensors").stat().st_size
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip

    loaded = outputs(peft.PeftModel.from_pretrained(copy.deepcopy(base), "out"))
    assert (loaded - wanted).abs().max() <= 1e-5
    assert (loaded - plain).abs().max() > 1e-2
    if build is not bert or Version(hf.__version__) >= Version("5.18"):  # older ones leave the head out
        same = copy.deepcopy(base)
        same.load_adapter("out")  # transformers' own
        assert (outputs(same) - wanted).abs().max() <= 1e-5
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), "out").merge_and_unload()
    torch.testing.assert_close(outputs(merged), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_what_the_three_modes_write(mode: hf_peft.Mode) -> None:
    model, _ = adapted(bert, LORA, ["query", "key"], 0, 4, 1, 3)
    to_hf_peft(model, "out", mode, base_model_name_or_path="org/name")
    config, tensors = config_of("out"), load_file("out/adapter_model.safetensors")
    layers = [
        "bert.encoder.layer.0.attention.self.key",
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.attention.self.key",
    ]
    assert config["target_modules"] == layers
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "SEQ_CLS", "none")
    assert config["base_model_name_or_path"] == "org/name"
    assert config["modules_to_save"] == ["classifier"]
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 6, False)
    ranks = {layers[1]: 1, layers[2]: 3}
    assert config["rank_pattern"] == ({} if mode == "padded" else ranks)
    assert config["alpha_pattern"] == ({layers[1]: 1.5, layers[2]: 4.5} if mode == "compact" else {})
    for layer in layers:
        rank = 4 if mode == "padded" else ranks.get(layer, 4)
        assert tensors[f"base_model.model.{layer}.lora_A.weight"].shape == (rank, 32)
        assert tensors[f"base_model.model.{layer}.lora_B.weight"].shape == (32, rank)
    assert len(tensors) == 2 * len(layers) + 2
    card = Path("out/README.md").read_text()
    assert card.startswith("---\nbase_model: org/name\nlibrary_name: peft\ntags:\n- lightning-peft\n---\n")
    assert "PeftModel.from_pretrained(base" in card
    assert f"| {layers[2]} | 3 |" in card


def test_the_report_reads_well() -> None:
    model, _ = adapted(bert, LORA, ["query", "key"], 0, 4, 1, 3)
    lines = str(to_hf_peft(model, "out")).splitlines()
    assert lines[0].startswith("Wrote out (padded, ")
    assert lines[1] == "  layers: 3 with ranks 1 to 4, 8 components in all; 1 of rank 0 left out"
    assert lines[2] == "  head: classifier"
    assert lines[3].startswith("  checked: loaded with stock PEFT")


def test_the_module_is_not_changed() -> None:
    model, _ = adapted(bert, DORA)
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [child.training for child in model.modules()]
    state, grads = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    to_hf_peft(model, "out")
    assert torch.equal(torch.get_rng_state(), random)
    assert [child.training for child in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


def test_head_left_out() -> None:
    model, base = adapted(bert, DORA)
    base.classifier = copy.deepcopy(model.classifier)
    report = to_hf_peft(model, "out", head=False)
    config = config_of("out")
    assert report.head == ()
    assert "head: left out" in str(report)
    assert (config["task_type"], config["modules_to_save"]) == (None, None)
    assert config["auto_mapping"]["base_model_class"] == "BertForSequenceClassification"
    assert not any("classifier" in name for name in load_file("out/adapter_model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(base, "out")
    assert (outputs(loaded) - outputs(model)).abs().max() <= 1e-5


def test_a_module_frozen_after_training_keeps_its_head() -> None:
    model, base = adapted(bert, DORA)
    model.requires_grad_(False)
    assert to_hf_peft(model, "out").head == ("classifier",)
    assert (outputs(peft.PeftModel.from_pretrained(base, "out")) - outputs(model)).abs().max() <= 1e-5


def test_a_part_of_a_head_that_was_trained_is_kept_alone() -> None:
    model = hf.RobertaForSequenceClassification(
        hf.RobertaConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            vocab_size=128,
            pad_token_id=1,
        )
    )
    base = copy.deepcopy(model)
    nn.init.normal_(base.classifier.out_proj.weight)
    # The rest of the head is adapted: with the task named, PEFT would keep the whole head and drop that adapter.
    inject(model, LORA, ["query", "classifier.dense"], train=["classifier.out_proj"])
    fill(model, 2, 3)
    assert to_hf_peft(model, "out").head == ("classifier.out_proj",)
    assert config_of("out")["task_type"] is None
    assert (outputs(peft.PeftModel.from_pretrained(base, "out")) - outputs(model)).abs().max() <= 1e-5


def test_a_head_of_two_modules() -> None:
    config = hf.DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=48, vocab_size=128)
    model = hf.DistilBertForSequenceClassification(config)
    base = other_head(copy.deepcopy(model))
    nn.init.normal_(base.pre_classifier.weight)
    inject(model, LORA)
    fill(model)
    assert to_hf_peft(model, "out").head == ("pre_classifier", "classifier")
    assert config_of("out")["task_type"] == "SEQ_CLS"
    assert (outputs(peft.PeftModel.from_pretrained(base, "out")) - outputs(model)).abs().max() <= 1e-5


class Classifier(LightningModule):
    """A LightningModule from outside, with the model under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"encoder": bert()})


def test_the_prefix_of_a_lightning_module_is_stripped() -> None:
    module = Classifier()
    base = other_head(copy.deepcopy(module.net["encoder"]))
    inject(module, DORA)
    fill(module)
    report = to_hf_peft(module, "out", "compact")
    assert all(name.startswith("bert.") for name in report.ranks)
    assert report.head == ("classifier",)
    loaded = peft.PeftModel.from_pretrained(base, "out")
    assert (outputs(loaded) - outputs(module.net["encoder"])).abs().max() <= 1e-5


def test_the_names_of_compilation_are_stripped() -> None:
    module = Classifier()
    base = other_head(copy.deepcopy(module.net["encoder"]))
    inject(module, DORA)
    fill(module)
    model = module.net["encoder"]
    wanted = outputs(model)
    model.bert.encoder.layer[1] = torch.compile(model.bert.encoder.layer[1], backend="eager")
    model.classifier = torch.compile(model.classifier, backend="eager")
    module.net["encoder"] = torch.compile(model, backend="eager")
    assert any("_orig_mod" in name for name in model.state_dict())
    # Compared by reading: the compiled model cannot be run here without a warning of the compiler's own.
    report = to_hf_peft(module, "out", check="files")
    assert report.head == ("classifier",)
    assert not any("_orig_mod" in name for name in load_file("out/adapter_model.safetensors"))
    assert (outputs(peft.PeftModel.from_pretrained(base, "out")) - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_model_in_bfloat16_is_compared_in_float32(mode: hf_peft.Mode) -> None:
    model = bert().bfloat16()
    inject(model, DORA)
    fill(model)
    state = copy.deepcopy(model.state_dict())
    assert to_hf_peft(model, "out", mode).max_difference <= 1e-5
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    tensors = load_file("out/adapter_model.safetensors")
    kinds = {name.rpartition(".lora_")[1]: tensor.dtype for name, tensor in tensors.items()}
    assert kinds == {".lora_": torch.float32, "": torch.bfloat16}


@pytest.mark.parametrize("mode", MODES)
def test_adapters_of_unlike_scale(mode: hf_peft.Mode) -> None:
    model = bert()
    base = other_head(copy.deepcopy(model))
    alphas = iter([1.0, 5.0, 16.0, 3.0])
    inject(model, lambda layer: LoRA(layer, rank=RANK, alpha=next(alphas)), ["query", "key"])
    fill(model, 2, 4, 1, 3)
    to_hf_peft(model, "out", mode)
    assert (outputs(peft.PeftModel.from_pretrained(base, "out")) - outputs(model)).abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_conv1d_and_linear_layers_in_one_model() -> None:
    model = gpt2(tied=False)
    base = copy.deepcopy(model)
    inject(model, LORA, ["c_attn", "lm_head", "c_fc"])
    fill(model, 3, 1, 2, 4, 2)
    to_hf_peft(model, "out", "compact")
    assert config_of("out")["fan_in_fan_out"] is True
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), "out")
    assert (outputs(loaded) - outputs(model)).abs().max() <= 1e-5
    torch.testing.assert_close(outputs(loaded.merge_and_unload()), outputs(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["compact", "folded"])
@pytest.mark.parametrize("megabytes", [0.005, 0.012])
def test_a_budget_in_megabytes_is_the_size_of_the_file(mode: hf_peft.Mode, megabytes: float) -> None:
    base = bert()
    inject(base, partial(LoRA, rank=8))
    budget = RankBudget.of(base)
    with torch.no_grad():
        for site in budget.values():
            site.adapter.B.normal_()
    final = Budget(megabytes=megabytes)
    scores = {name: torch.rand(len(site.gate)) for name, site in budget.items()}
    budget.keep(close_lowest(scores, budget.sizes("parameters"), budget.capacity_parameters - final.amount(budget)))
    size = to_hf_peft(base, "adapter", mode=mode, head=False).bytes
    one = 4 * max(site.gate.cost for site in budget.values())
    header = sum(2 * (len(name) + 120) for name in budget)  # an upper bound: layers of rank 0 have none
    assert megabytes * 1e6 - one - header < size <= megabytes * 1e6
