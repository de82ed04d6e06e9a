from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_peft import LoRA, inject
from lightning_peft.heads import find_head

BERT = BertConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40, num_labels=3
)
GPT2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)
VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
)
T5 = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=40)

BERT_LINEAR = {
    "encoder.layer.0.attention.self.query",
    "encoder.layer.0.attention.self.key",
    "encoder.layer.0.attention.self.value",
    "encoder.layer.0.attention.output.dense",
    "encoder.layer.0.intermediate.dense",
    "encoder.layer.0.output.dense",
}


VIT_LAYERS = {
    name
    for name, layer in ViTForImageClassification(VIT).vit.named_modules(prefix="vit")
    if isinstance(layer, (nn.Linear, nn.Conv2d))
}


def under(prefix: str, names: set[str]) -> set[str]:
    return {f"{prefix}.{name}" for name in names}


class OwnHead(LightningModule):
    """A hub's encoder with a head of one's own, of several layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        self.scale = nn.Parameter(torch.ones(()))
        self.encoder = BertModel(BERT, add_pooling_layer=False)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.norm = nn.LayerNorm(3)


def labels_every_pixel() -> nn.Module:
    down, up = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.ConvTranspose2d(8, 8, 2)
    return nn.ModuleDict({"down": down, "up": up, "out": nn.Conv2d(8, 4, 1)})


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3, groups=2), nn.Conv1d(8, 8, 3), nn.Linear(8, 2))


def transformer() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("build", "adapted", "trained"),
    [
        (
            lambda: BertForSequenceClassification(BERT),
            under("bert", BERT_LINEAR | {"pooler.dense"}),
            {"classifier.weight", "classifier.bias"},
        ),
        (lambda: BertForMaskedLM(BERT), under("bert", BERT_LINEAR), set()),
        (lambda: BertModel(BERT, add_pooling_layer=False), BERT_LINEAR, set()),
        (
            lambda: GPT2ForSequenceClassification(GPT2),
            {f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
            {"score.weight"},
        ),
        (
            lambda: GPT2LMHeadModel(GPT2),
            {f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
            set(),
        ),
        (
            OwnHead,
            under("encoder", BERT_LINEAR),
            {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias", "head.3.weight", "head.3.bias", "scale"},
        ),
        (MLP, {"body.0", "body.2"}, {"head.weight", "head.bias"}),
        (lambda: nn.Sequential(nn.Linear(8, 8)), {"0"}, set()),
        (convolutions, {"0", "2"}, {"3.weight", "3.bias"}),
        (labels_every_pixel, {"down.0"}, {"out.weight", "out.bias"}),
        (lambda: nn.Sequential(nn.Conv3d(4, 8, 2)), {"0"}, set()),
        (lambda: ViTForImageClassification(VIT), VIT_LAYERS, {"classifier.weight", "classifier.bias"}),
        (
            transformer,
            {"0.self_attn.in_proj", "0.self_attn.out_proj", "0.linear1", "0.linear2"},
            {"1.weight", "1.bias"},
        ),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)), {"0", "1.in_proj", "1.out_proj"}, set()),
    ],
    ids=[
        "bert",
        "bert_mlm",
        "bert_bare",
        "gpt2",
        "gpt2_lm",
        "own_head",
        "mlp",
        "one_layer",
        "convolutions",
        "labels_every_pixel",
        "one_convolution",
        "vit",
        "transformer",
        "attention_last",
    ],
)
def test_what_is_adapted_and_what_is_trained_when_nobody_says(
    build: Callable[[], nn.Module], adapted: set[str], trained: set[str]
) -> None:
    module = build()
    done = inject(module, partial(LoRA, rank=2))
    assert set(done.adapted) == adapted
    assert set(done.trained) == trained
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trainable == trained | {f"{name}.{factor}" for name in adapted for factor in "AB"}


def test_an_output_layer_inside_the_backbone_is_left_alone() -> None:
    """T5 has no `transformer` inside: the model is its own base, and its lm_head is still a language model's output."""
    module = T5ForConditionalGeneration(T5)
    done = inject(module, partial(LoRA, rank=2))
    assert "lm_head" not in done.adapted
    assert "decoder.block.0.layer.2.DenseReluDense.wo" in done.adapted
    assert done.trained == ()


def test_tied_weights_stay_tied_and_frozen() -> None:
    module = GPT2LMHeadModel(GPT2)
    inject(module, partial(LoRA, rank=2))
    assert module.lm_head.weight is module.transformer.wte.weight
    assert not module.lm_head.weight.requires_grad


def test_two_models_side_by_side_have_a_head_in_common() -> None:
    module = nn.ModuleDict(
        {"query": BertModel(BERT, add_pooling_layer=False), "doc": BertModel(BERT, add_pooling_layer=False)}
    )
    module["joint"] = nn.Linear(32, 2)
    done = inject(module, partial(LoRA, rank=2))
    assert set(done.adapted) == under("query", BERT_LINEAR) | under("doc", BERT_LINEAR)
    assert set(done.trained) == {"joint.weight", "joint.bias"}


def test_what_its_owner_froze_in_a_head_stays_frozen() -> None:
    module = MLP()
    module.head.bias.requires_grad_(False)
    assert inject(module, partial(LoRA, rank=2)).trained == ("head.weight",)
    assert not module.head.bias.requires_grad


def test_a_head_holds_what_is_in_it() -> None:
    head = find_head(OwnHead())
    assert head.holds("head")
    assert head.holds("head.3")
    assert not head.holds("header")
    assert not head.holds("encoder.encoder.layer.0.output.dense")


def test_it_sees_no_more_than_it_is_asked() -> None:
    x: Tensor = torch.randn(1, 8)
    module = MLP()
    before = module.head(module.body(x))
    find_head(module)
    assert torch.equal(module.head(module.body(x)), before)
    assert all(p.requires_grad for p in module.parameters())
