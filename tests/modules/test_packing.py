"""Packed documents: which share a row, and that each is what it is alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_models import WORDS, save_decoder, save_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RobertaConfig,
)

from lightning_peft.modules import CausalLM
from lightning_peft.modules.documents import Document, Documents
from lightning_peft.modules.language_rows import PadRight, stack_packed
from lightning_peft.modules.packing import Packed, attention_within, best_fit, require_packable, why_mixed

SIZE = 16


def test_best_fit_fills_rows_and_repeats() -> None:
    lengths = random.Random(0).choices(range(1, 17), k=300)
    rows = best_fit(lengths, SIZE)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert all(sum(lengths[i] for i in row) <= SIZE for row in rows)
    assert len(rows) <= 1.05 * sum(lengths) / SIZE  # 5 % of padding at most
    assert best_fit(torch.tensor(lengths), SIZE) == rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("models")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS), bos_token_id=2, eos_token_id=3, initializer_range=0.3, **sizes, **still)
    ).save_pretrained(place / "gpt2")
    save_tokenizer(place / "gpt2", classifies=False)
    return {"llama": save_decoder(place / "llama"), "gpt2": str(place / "gpt2")}


@pytest.fixture
def documents() -> Documents:
    """Twelve documents of 2 to 9 tokens, half of them with prompts that are not learned."""
    draw = random.Random(1)
    found = []
    for i in range(12):
        ids = draw.choices(range(3, len(WORDS)), k=2 + draw.randrange(8))
        read = 0 if i % 2 else len(ids) // 2
        found.append(Document(ids, [*[-100] * read, *ids[read:]]))
    return Documents(found)


def losses(module: CausalLM, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of the losses, and how many tokens were predicted."""
    count = (batch["labels"][:, 1:] != -100).sum()
    return module(batch).loss * count, count  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_packed_document_is_what_it_is_alone(
    kind: str, attention: str, models: dict[str, str], documents: Documents
) -> None:
    """Loss and gradients, against rows that are padded and against each document by itself."""
    module = CausalLM(models[kind])
    module.model.set_attn_implementation(attention)
    packed = Packed(documents, SIZE, 0)
    alone = PadRight(0)([documents[i] for i in range(len(documents))])
    assert len(packed) < len(documents) / 2
    found = {}
    for name, batches in {
        "packed": [stack_packed([packed[i] for i in range(len(packed))])],
        "padded": [alone],
        "one by one": [PadRight(0)([documents[i]]) for i in range(len(documents))],
    }.items():
        module.zero_grad()
        parts: Any = [losses(module, batch) for batch in batches]  # type: ignore[arg-type]
        total = torch.stack([loss for loss, _ in parts]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        grads = torch.cat([p.grad.flatten() for p in module.model.parameters() if p.grad is not None])
        found[name] = (total.detach(), grads, sum(int(count) for _, count in parts))
    total, grads, count = found["one by one"]
    for name in ("packed", "padded"):
        assert found[name][2] == count
        torch.testing.assert_close(found[name][0], total, rtol=1e-6, atol=0)
        torch.testing.assert_close(found[name][1], grads, rtol=0, atol=float(grads.abs().max()) * 1e-6)


def test_without_borders_the_loss_is_another(models: dict[str, str], documents: Documents) -> None:
    """The same rows with one mask for all: what the test above would see if documents were not kept apart."""
    module = CausalLM(models["llama"])
    packed = Packed(documents, SIZE, 0)
    batch = stack_packed([packed[i] for i in range(len(packed))])
    joined = {name: batch[name] for name in ("input_ids", "labels")}  # type: ignore[literal-required]
    assert (module(batch).loss - module(joined).loss).abs() > 1e-3


def test_padding_reaches_nothing_and_is_no_nan(models: dict[str, str], documents: Documents) -> None:
    module = CausalLM(models["llama"]).eval()
    packed = Packed(documents, SIZE, 0)
    batch = stack_packed([packed[i] for i in range(len(packed))])
    padding = batch["document_ids"] == 0
    assert padding.any()
    first = module(batch).logits
    batch["input_ids"] = batch["input_ids"].masked_fill(padding, 5)
    second = module(batch).logits
    assert torch.equal(first[~padding], second[~padding])
    assert second.isfinite().all()


def test_the_mask_is_causal_and_within_documents() -> None:
    mask = attention_within(torch.tensor([[1, 1, 2, 0, 0]]), torch.bfloat16)
    assert mask.shape == (1, 1, 5, 5)
    assert mask.dtype == torch.bfloat16
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip


def test_models_that_would_mix_documents_are_refused(tmp_path: Path) -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=12, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(MisconfigurationException, match=r"and a bloom model takes none\. Use packing='none'"):
        require_packable(bloom.config, why_mixed(bloom), 8)
    config = SimpleNamespace(model_type="mistral", _attn_implementation="flash_attention_2", sliding_window=4)
    with pytest.raises(MisconfigurationException, match=r"attn_implementation='flash_attention_2'\. Load"):
        require_packable(config, None, 8)
    config._attn_implementation = "sdpa"
    with pytest.raises(MisconfigurationException, match=r"within a window of 4 tokens.*Use block_size=4 or less"):
        require_packable(config, None, 8)
    require_packable(config, None, 4)
    config.use_sliding_window = False  # as Qwen2 has it
    require_packable(config, None, 8)
    config.attention_chunk_size = 4  # as Llama 4 has it
    with pytest.raises(MisconfigurationException, match="within a window of 4 tokens"):
        require_packable(config, None, 8)


SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 1}
GPT: dict[str, Any] = {
    "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
FALCON: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS: dict[str, Any] = {f"linear_{of}": 2 for of in ("num_key_heads", "num_value_heads")}
HEADS |= {f"linear_{of}": 8 for of in ("key_head_dim", "value_head_dim")}
EXPERTS: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
STATE: dict[str, Any] = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4}
DECODERS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "llama": (lambda: LlamaConfig(**GROUPED), None),
    "mistral": (lambda: MistralConfig(**GROUPED), None),
    "qwen3": (lambda: Qwen3Config(**GROUPED, head_dim=8), None),
    "gemma 2": (lambda: Gemma2Config(**GROUPED, head_dim=8), None),
    "phi": (lambda: PhiConfig(**SMALL), None),
    "neox": (lambda: GPTNeoXConfig(**SMALL), None),
    "gpt-j": (lambda: GPTJConfig(**GPT, rotary_dim=4), None),
    "opt": (lambda: OPTConfig(**FALCON, ffn_dim=32, max_position_embeddings=64, word_embed_proj_dim=16), None),
    "bert": (lambda: BertConfig(**SMALL, is_decoder=True), None),
    "falcon": (lambda: FalconConfig(**FALCON), None),
    "falcon with ALiBi": (lambda: FalconConfig(**FALCON, alibi=True, multi_query=False), "ALiBi"),
    "lfm2": (lambda: Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]), "layers that carry"),
    "qwen3-next": (
        lambda: Qwen3NextConfig(
            **GROUPED, **HEADS, **EXPERTS, head_dim=8, layer_types=["linear_attention", "full_attention"],
            shared_expert_intermediate_size=8,
        ),
        "layers that carry",
    ),
    "falcon-h1": (lambda: FalconH1Config(**GROUPED, **STATE), "layers that carry"),
    "recurrent gemma": (
        lambda: RecurrentGemmaConfig(
            **FALCON | {"num_hidden_layers": 3}, intermediate_size=32, lru_width=16, num_key_value_heads=1, head_dim=8,
            attention_window_size=16,
        ),
        "layers that carry",
    ),
    "roberta": (lambda: RobertaConfig(**SMALL, is_decoder=True), "from its padding token on"),
    "gpt": (lambda: OpenAIGPTConfig(**GPT), "no mask for pairs"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DECODERS)
def test_packed_documents_are_apart_in_every_model_that_is_not_refused(kind: str) -> None:
    config, says = DECODERS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config()).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    ids, numbers = torch.randint(3, 32, (1, 12)), torch.tensor([[1] * 5 + [2] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])

    def logits(ids: Tensor, **more: Any) -> Tensor:
        found: Tensor = model(ids, use_cache=False, **more).logits
        return found

    with torch.no_grad():
        alone = torch.cat([logits(ids[:, :5]), logits(ids[:, 5:])], 1)
        try:
            packed = logits(ids, position_ids=positions, attention_mask=attention_within(numbers, model.dtype))
            apart = torch.allclose(packed, alone, rtol=1e-3, atol=1e-4)
        except (ValueError, RuntimeError):  # so a refusal is the better sentence
            apart = False
    said = why_mixed(model)
    assert (said is None) == apart
    assert (says is None) == (said is None)
    assert says is None or says in str(said)
