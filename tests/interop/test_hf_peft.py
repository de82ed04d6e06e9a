"""Stock PEFT and transformers load what to_hf_peft writes, with equal outputs; what they could not load is refused."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
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

from lightning_peft.adapters import DynamicDoRA, LoRA
from lightning_peft.interop import hf_peft
from lightning_peft.interop.hf_peft import to_hf_peft
from lightning_peft.rank.budget import RankBudget
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


class Encoder(nn.Module):
    """torch's own attention, which is read and never called, with a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x).mean(1))
        return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("targets", [None, ["in_proj", "linear1"]])
def test_attention_of_unequal_ranks(factory: Any, mode: hf_peft.Mode, targets: list[str] | None) -> None:
    module = Encoder().eval()
    base = copy.deepcopy(module)
    nn.init.normal_(base.head.weight)
    inject(module, factory, targets)
    # An attention with out_proj of rank 0 or not adapted, one with both of rank 0, another one like the first.
    ranks = itertools.cycle((3, 2, 4, 0, 1) if targets is None else (3, 1, 0, 2, 4))
    fill(module, *[0 if name.endswith("out_proj") else next(ranks) for name in RankBudget.of(module)])
    x = torch.randn(64, 5, 16)
    report = to_hf_peft(module, "out", mode, inputs=x)
    assert report.max_difference <= 1e-5
    assert report.check.endswith("outputs compared on 1 input")
    assert report.head == ("head",)
    loaded = peft.PeftModel.from_pretrained(base, "out").eval()
    with torch.no_grad():
        wanted = module(x)
        fast = loaded(x)
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            assert (loaded(x) - wanted).abs().max() <= 1e-5
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    # What the report's note is for: in torch's fast path stock PEFT leaves its adapters out.
    assert (fast - wanted).abs().max() > 1e-3
    assert "note: in evaluation mode TransformerEncoderLayer has a fast path" in str(report)
    assert "set_fastpath_enabled(False)" in Path("out/README.md").read_text()


def test_an_adapter_on_out_proj_is_not_written_for_a_peft_that_adds_it_twice(tmp_path: Path) -> None:
    module = Encoder().eval()
    base = copy.deepcopy(module)
    inject(module, DORA, ["self_attn"])
    fill(module, 0, 0, 2, 3, 0, 4)
    with pytest.raises(
        RuntimeError, match=r"layer 'encoder\.layers\.1\.self_attn\.out_proj': the installed PEFT .* twice"
    ):
        to_hf_peft(module, "out")
    assert list(tmp_path.iterdir()) == []
    # The files themselves are right: PEFT reads the very updates, padded to the rank that an attention has in common.
    to_hf_peft(module, "out", "compact", check="files")
    loaded = peft.PeftModel.from_pretrained(base, "out").base_model.model
    for name, site in RankBudget.of(module).items():
        attention = loaded.get_submodule(name.rpartition(".")[0])
        if name.startswith("encoder.layers.0."):
            assert type(attention) is nn.MultiheadAttention
            continue
        layer = attention.base_layer.out_proj if name.endswith("out_proj") else attention
        assert layer.r["default"] == (3 if "layers.1" in name else 4)
        torch.testing.assert_close(layer.get_delta_weight("default"), site.adapter.update(), rtol=0, atol=1e-6)


def test_without_inputs_updates_are_compared() -> None:
    module = Encoder()
    inject(module, DORA, ["in_proj", "linear1"])
    fill(module)
    report = to_hf_peft(module, "out")
    assert report.check == "loaded with stock PEFT on a copy of the base; updates of every layer compared, outputs not"


def test_a_plain_lightning_module_is_exported_as_it_is() -> None:
    class Job(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Encoder()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

    module = Job()
    inject(module, DORA, ["in_proj", "linear2"])
    fill(module)
    report = to_hf_peft(module, "out", inputs=(torch.randn(2, 3, 16),))
    assert report.head == ("net.head",)
    assert report.check.endswith("outputs compared on 1 input")


class Deep(nn.Module):
    """Names that PEFT's patterns confuse: ends of each other, and full stops that match a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({name: nn.ModuleDict({"x": nn.Linear(6, 6)}) for name in ("1", "11", "2")})
        self.block = nn.ModuleDict({"layer": nn.ModuleDict({"1": nn.ModuleDict({"x": nn.Linear(6, 6)})})})
        self.l = nn.ModuleDict({"1": nn.ModuleDict({"1": nn.Linear(6, 6)}), "111": nn.Linear(6, 6)})
        self.l1 = nn.ModuleDict({"1": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        for module in self.modules():
            if isinstance(module, nn.Linear) or hasattr(module, "effective_weight"):
                x = module(x).tanh() + x
        return x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("open_", ["all", "first"])
def test_names_that_are_ends_of_other_names(mode: hf_peft.Mode, open_: str) -> None:
    module = Deep()
    base = copy.deepcopy(module)
    inject(module, LORA, [".*"], train=[])
    names = list(RankBudget.of(module))
    # With the rest of rank 0, "layer.1.x" must not be taken for "block.layer.1.x".
    fill(module, *([1, 2, 3, 4, 1, 2, 3] if open_ == "all" else [3, 0, 2, 0, 1, 0, 4]))
    assert names.index("layer.1.x") == 0
    assert names.index("block.layer.1.x") == 3
    to_hf_peft(module, "out", mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peft.PeftModel.from_pretrained(base, "out").base_model.model
    for name, site in RankBudget.of(module).items():
        layer = loaded.get_submodule(name)
        rank = int(site.gate.open().sum())
        if not rank:
            assert type(layer) is nn.Linear
            continue
        assert layer.r["default"] == (RANK if mode == "padded" else rank)
        torch.testing.assert_close(layer.get_delta_weight("default"), site.adapter.update(), rtol=0, atol=1e-6)


# Refusals ------------------------------------------------------------------------------------------------------------


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
    from lightning_peft.adapters import Adapter

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
