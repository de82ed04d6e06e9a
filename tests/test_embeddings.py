from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from transformers import (
    AutoModel,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertModel,
    BloomConfig,
    CodeGenConfig,
    DebertaV2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MPNetConfig,
    MptConfig,
    OpenAIGPTConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
    XGLMConfig,
    XLNetConfig,
)

from lightning_peft import LoRA, inject
from lightning_peft.embeddings import EmbeddingHook, find_embeddings, is_causal

SMALL: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
}  # fmt: skip
PAIR: dict[str, Any] = {"vocab_size": 20, "d_model": 8, "pad_token_id": 0, "decoder_start_token_id": 0}
BART = PAIR | {f"{part}_layers": 1 for part in ("encoder", "decoder")}
BART |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
BART |= {f"{part}_ffn_dim": 8 for part in ("encoder", "decoder")}


class Holds(LightningModule):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(**SMALL, max_position_embeddings=16))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(**PAIR, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def bart() -> nn.Module:
    return BartForSequenceClassification(BartConfig(**BART, eos_token_id=2))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL))


MODELS: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "roberta": (roberta, "model.roberta.embeddings.word_embeddings", False),
    "t5": (t5, "model.encoder.embed_tokens", False),
    "bart": (bart, "model.model.encoder.embed_tokens", False),
    "llama": (llama, "model.model.embed_tokens", True),
}


@pytest.mark.parametrize("kind", MODELS)
def test_property_11_the_hook_fires_once_on_what_reads_the_tokens(kind: str) -> None:
    build, name, causal = MODELS[kind]
    module = Holds(model=build(), extra=nn.Embedding(3, 2))
    layers = find_embeddings(module)
    assert list(layers) == [name]
    assert is_causal(module) == causal
    hook = EmbeddingHook(lambda E, called: E * 0 if hidden else E)
    hook.attach(layers)
    inputs: dict[str, Any] = {"input_ids": torch.tensor([[4, 5, 6, 2], [7, 8, 9, 2]])}
    if kind == "t5":
        inputs["labels"] = torch.tensor([[4, 5], [6, 2]])
    module.eval()
    hidden = False
    with torch.no_grad():
        before = module.model(**inputs).logits
        with hook.passing(0):
            assert torch.equal(module.model(**inputs).logits, before)
        (called,) = hook.calls(0)
        assert torch.equal(called.ids, inputs["input_ids"])  # older T5 and BART look at them anew
        hidden = True
        assert torch.equal(module.model(**inputs).logits, before)  # no pass is open
        with hook.passing(1):
            assert not torch.equal(module.model(**inputs).logits, before)
        hook.detach()
        assert torch.equal(module.model(**inputs).logits, before)
    assert not any(child._forward_hooks for child in module.modules())


GPT: dict[str, Any] = {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_positions": 16}
KINDS: dict[str, Any] = {
    "bloom": BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2),
    "mpt": MptConfig(vocab_size=20, d_model=8, n_layers=1, n_heads=2, max_seq_len=16),
    "xglm": XGLMConfig(vocab_size=20, d_model=8, num_layers=1, attention_heads=2, ffn_dim=8),
    "codegen": CodeGenConfig(**GPT, n_head=4, rotary_dim=2, bos_token_id=1, eos_token_id=2),
    "gpt": OpenAIGPTConfig(**GPT, n_head=2),
    "mamba": MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4),
    "rwkv": RwkvConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2),
    "bert": BertConfig(**SMALL),
    "bert as a decoder": BertConfig(**SMALL, is_decoder=True),
    "deberta": DebertaV2Config(**SMALL),
    "mpnet": MPNetConfig(**SMALL),
    "xlnet": XLNetConfig(vocab_size=20, d_model=8, n_layer=1, n_head=2, d_inner=8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_causal_if_no_output_depends_on_a_later_token(kind: str) -> None:
    torch.manual_seed(0)
    module = Holds(model=AutoModel.from_config(KINDS[kind]).eval())
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    ids = torch.tensor([[4, 5, 6, 7], [4, 5, 6, 8]])
    with torch.no_grad():
        first, second = module.model(ids)[0][:, :-1]  # type: ignore[operator]
    assert is_causal(module) == torch.allclose(first, second, atol=1e-5)


def test_an_adapted_embedding_is_its_adapter() -> None:
    module = Holds(body=nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)))
    inject(module, partial(LoRA, rank=2), ["body.0"])
    assert find_embeddings(module) == {"body.0": module.body[0]}  # type: ignore[index]
    assert isinstance(module.body[0], LoRA)  # type: ignore[index]


def test_a_model_deep_inside_is_found() -> None:
    module = Holds(parts=nn.ModuleList([nn.Linear(2, 2), nn.ModuleDict({"tower": BertModel(BertConfig(**SMALL))})]))
    assert list(find_embeddings(module)) == ["parts.1.tower.embeddings.word_embeddings"]


def test_several_may_be_named() -> None:
    module = Holds(left=nn.Embedding(5, 4), right=nn.Embedding(5, 4))
    assert list(find_embeddings(module, ["left", "right"])) == ["left", "right"]
    assert list(find_embeddings(module, [".*t"])) == ["left", "right"]


@pytest.mark.parametrize(
    ("module", "patterns", "says"),
    [
        (
            Holds(left=nn.Embedding(5, 4), right=nn.Embedding(5, 4)),
            None,
            r"Holds has 2 embeddings to choose from; its embeddings are 'left', 'right'. Name the one that tokens go "
            r"through: embedding=\['tokens'\].",
        ),
        (Holds(body=nn.Linear(2, 2)), None, "Holds has no embedding that could be found; it has no nn.Embedding. Name"),
        (
            Holds(words=nn.Embedding(5, 4)),
            ["tokens"],
            r"embedding=\['tokens'\] matches nothing in Holds; its embeddings are 'words'.",
        ),
    ],
)
def test_what_cannot_be_told_is_asked(module: LightningModule, patterns: list[str] | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find_embeddings(module, patterns)
