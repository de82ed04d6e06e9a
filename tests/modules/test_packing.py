"""Packed documents: which share a row, and that each is what it is alone."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_models import WORDS, save_decoder, save_tokenizer
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_peft.modules import CausalLM
from lightning_peft.modules.documents import Document, Documents
from lightning_peft.modules.language_rows import PadRight, stack_packed
from lightning_peft.modules.packing import Packed, attention_within, best_fit, require_packable, takes_positions

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
        require_packable(bloom.config, takes_positions(bloom), 8)
    config = SimpleNamespace(model_type="mistral", _attn_implementation="flash_attention_2", sliding_window=4)
    with pytest.raises(MisconfigurationException, match=r"attn_implementation='flash_attention_2'\. Load"):
        require_packable(config, True, 8)
    config._attn_implementation = "sdpa"
    with pytest.raises(MisconfigurationException, match=r"within a window of 4 tokens.*Use block_size=4 or less"):
        require_packable(config, True, 8)
    require_packable(config, True, 4)
    config.use_sliding_window = False  # as Qwen2 has it
    require_packable(config, True, 8)
