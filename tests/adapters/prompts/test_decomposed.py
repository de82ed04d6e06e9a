"""What DPT and DePT share: the properties of any prompt, on each of the two."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from prompted import Host, batch, padded, plain, prompted
from torch import Tensor, nn

from lightning_peft import DPT, DePT, inject

METHODS: dict[str, Any] = {"dpt": partial(DPT, length=5, rank=3), "dept": partial(DePT, length=4, rank=3, reach=30)}
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta"])
def test_property_padding_changes_nothing(method: str, kind: str) -> None:
    host, _ = prompted(kind, METHODS[method])
    bare = host(**batch(kind)).logits
    for left, right in ((3, 0), (0, 3)):
        logits = host(**padded(batch(kind), left, right)).logits
        logits = logits[:, left : left + 7] if logits.dim() == 3 else logits
        torch.testing.assert_close(logits, bare, rtol=1e-4, atol=1e-5)


@every_method
def test_property_generation_is_uncached_greedy(method: str) -> None:
    host, _ = prompted("llama", METHODS[method])
    model: Any = host.model
    inputs = padded(batch("llama", rows=2), left=2, right=0)
    inputs["attention_mask"][1, 2:4] = 0
    found = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(5):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    assert torch.equal(found, ids)
    other = plain("llama").model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)  # type: ignore[operator]
    assert not torch.equal(found, other)


@every_method
def test_property_beams_are_as_good_as_greedy(method: str) -> None:
    """The text that four beams find is no less likely than the greedy one, with the same prompt in front."""
    host, _ = prompted("gpt2", METHODS[method])
    model: Any = host.model
    inputs = {"input_ids": batch("gpt2", rows=1)["input_ids"], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    few = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}

    def likelihood(ids: Tensor) -> float:
        logits = model(input_ids=ids).logits.log_softmax(-1)
        chosen = logits[:, :-1].gather(2, ids[:, 1:, None])
        return float(chosen[:, 6:].sum().detach())

    beams, greedy = model.generate(**inputs, **few, num_beams=4), model.generate(**inputs, **few)
    assert likelihood(beams) >= likelihood(greedy) - 1e-5


@every_method
def test_property_the_loss_leaves_out_the_prompt(method: str) -> None:
    """Mean over the text's own labels: all of them, as the prompt predicts the first one."""
    host, _ = prompted("llama", METHODS[method])
    inputs = batch("llama")
    ids = inputs["input_ids"]
    out = host(**inputs, labels=ids)
    assert out.logits.shape == (3, 7, 40)
    rest = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    first = out.loss * 3 * 7 - rest
    assert 0 < first / 3 < 100
    unlabelled = torch.cat([ids.new_full((3, 1), -100), ids[:, 1:]], 1)
    torch.testing.assert_close(host(**inputs, labels=unlabelled).loss, rest / (3 * 6))


@every_method
def test_property_too_long_a_text_is_told(method: str) -> None:
    host, prompt = prompted("bert", METHODS[method])
    with pytest.raises(ValueError, match=f"a prompt of {prompt.length} need .* positions, and BertForSeq.* has 32"):
        host(**batch("bert", length=30))


WORDS = torch.stack([torch.randperm(34, generator=torch.Generator().manual_seed(i))[:4] + 6 for i in range(8)])


@pytest.fixture(scope="module")
def two_tasks() -> Host:
    """A tiny T5 that knows two tasks on eight texts: behind token 3 it writes the first word, behind 4 the second."""
    host = plain("t5").train()
    optimizer = torch.optim.AdamW(host.parameters(), lr=1e-2)
    for _ in range(120):
        for task in (0, 1):
            text = nn.functional.pad(WORDS, (1, 0), value=3 + task)
            host(input_ids=text, labels=WORDS[:, task, None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return host.eval()


@every_method
def test_property_it_overfits_eight_examples_and_leaves_the_base_alone(method: str, two_tasks: Host) -> None:
    """The prompt finds out what stands for the second task; the frozen weights are the same bits afterwards."""
    host, labels = copy.deepcopy(two_tasks), WORDS[:, 1, None]
    inject(host, METHODS[method], train=[])
    prompt: Any = host.model
    before = copy.deepcopy(prompt.base.state_dict())

    def right() -> float:
        return float((host(input_ids=WORDS, labels=labels).logits.argmax(-1) == labels).float().mean())

    assert right() <= 0.5
    optimizer = torch.optim.AdamW([p for _, p in prompt.own_parameters()], lr=0.05, weight_decay=0.0)
    for _ in range(80):
        loss = host(input_ids=WORDS, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert right() == 1.0
    assert all(torch.equal(value, before[key]) for key, value in prompt.base.state_dict().items())


@every_method
def test_property_a_state_dict_brings_it_back(method: str) -> None:
    host, _ = prompted("t5", METHODS[method])
    twin, _ = prompted("t5", METHODS[method], seed=7)
    twin.load_state_dict(host.state_dict())
    assert torch.equal(twin(**batch("t5")).logits, host(**batch("t5")).logits)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_property_a_narrow_base_has_a_wide_prompt(method: str, dtype: torch.dtype) -> None:
    host, prompt = prompted("llama", METHODS[method], dtype)
    assert {p.dtype for _, p in prompt.own_parameters()} == {torch.float32}
    assert prompt.prompt().dtype == torch.float32
    logits = host(**batch("llama")).logits
    assert logits.dtype == dtype
    logits.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) and p.grad.dtype == torch.float32 for _, p in prompt.own_parameters())
