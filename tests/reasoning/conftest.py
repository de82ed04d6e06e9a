"""A model whose every text is scripted, a tiny real one, and a tokenizer of bytes for both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import byte_tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class ScriptedLM(nn.Module):
    """Writes what a table says for a prompt; of several texts for one prompt the next each time."""

    def __init__(self, tokenizer: Any, script: dict[str, str | Sequence[str]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.inner = nn.Dropout()
        self.tokenizer = tokenizer
        self.script = {prompt: [texts] if isinstance(texts, str) else list(texts) for prompt, texts in script.items()}
        self.config = SimpleNamespace(max_position_embeddings=4096)
        self.prompts: list[str] = []
        self.batches: list[int] = []
        self.modes: list[bool] = []
        self.seeds: list[int | None] = []
        self._given: defaultdict[str, int] = defaultdict(int)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **how: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        assert how["do_sample"] is False
        self.modes.append(self.training)
        (sampling,) = how["logits_processor"]
        self.seeds += [None if each is None else each.initial_seed() for each in sampling._generators]
        self.batches.append(len(input_ids))
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert (mask.diff() >= 0).all()  # padded on the left
            prompt = self.tokenizer.decode(ids[mask.bool()])
            self.prompts.append(prompt)
            texts = self.script[prompt]
            text = texts[self._given[prompt] % len(texts)]
            self._given[prompt] += 1
            rows.append(self.tokenizer(text)["input_ids"][:max_new_tokens])
        longest = max(map(len, rows))
        new = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64)
        return torch.cat([input_ids, new], 1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def scripted(tokenizer: Any) -> Callable[[dict[str, str | Sequence[str]]], ScriptedLM]:
    return lambda script: ScriptedLM(tokenizer, script)


@pytest.fixture(scope="session")
def tiny(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Any]:
    """A real decoder of one layer; what it writes is noise."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), intermediate_size=32, max_position_embeddings=1024, initializer_range=0.5,
            pad_token_id=0, bos_token_id=None, eos_token_id=1, **sizes,
        )  # fmt: skip
        return LlamaForCausalLM(config), tokenizer
