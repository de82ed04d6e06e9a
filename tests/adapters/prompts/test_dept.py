from __future__ import annotations

import re
import warnings
from functools import partial
from math import sqrt
from typing import Any

import pytest
import torch
from prompted import batch, padded, plain, prompted

from lightning_peft import DePT, RankBudget, SoftPrompt, compact, inject
from lightning_peft.functional.prompts import dept_parameters

SMALL: Any = partial(DePT, length=4, rank=3, reach=12)


@pytest.mark.parametrize("kind", ["roberta", "t5"])
@pytest.mark.parametrize("rank", [0, 3])
def test_property_at_its_start_it_is_the_prompt_of_m_tokens_alone(kind: str, rank: int) -> None:
    host, prompt = prompted(kind, partial(SMALL, rank=rank), start=True)
    other, vanilla = prompted(kind, partial(SoftPrompt, length=4))
    with torch.no_grad():
        vanilla.P.copy_(prompt.P)
    assert torch.equal(host(**batch(kind)).logits, other(**batch(kind)).logits)
    names = {name for name, _ in prompt.own_parameters()}
    assert names == ({"P", "A", "B"} if rank else {"P"})


def test_property_offsets_touch_only_tokens_within_reach() -> None:
    """What the first layer gets, beside what it gets without offsets."""
    host, prompt = prompted("llama", partial(SMALL, reach=3))
    inputs = padded(batch("llama", length=5), left=2, right=1)
    seen = []
    first = prompt.base.model.layers[0]
    handle = first.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with pytest.warns(UserWarning, match="offsets reach 3"):
        host(**inputs)
    table = prompt.table()
    with torch.no_grad():
        prompt.B.zero_()
    host(**inputs)
    handle.remove()
    offset = (seen[0] - seen[1]).detach()
    assert offset.shape == (3, 4 + 8, 16)
    torch.testing.assert_close(offset[:, 6:9], table.expand(3, -1, -1).detach(), rtol=1e-4, atol=1e-5)
    offset[:, 6:9] = 0
    assert offset.eq(0).all()


@pytest.mark.parametrize(("align", "same"), [("tokens", True), ("absolute", False)])
def test_places_are_counted_with_or_without_padding(align: str, same: bool) -> None:
    host, _ = prompted("llama", partial(SMALL, align=align))
    bare = host(**batch("llama")).logits
    left = host(**padded(batch("llama"), left=3, right=0)).logits[:, 3:]
    right = host(**padded(batch("llama"), left=0, right=3)).logits[:, :-3]
    torch.testing.assert_close(right, bare)
    assert torch.allclose(left, bare, atol=1e-5) == same


def test_the_scale_is_the_authors_or_none() -> None:
    _, prompt = prompted("bert", SMALL)
    assert prompt.scaling == pytest.approx(8 / sqrt(3))
    torch.testing.assert_close(prompt.table(), 8 / sqrt(3) * prompt.A @ prompt.B)
    _, prompt = prompted("bert", partial(SMALL, alpha=None))
    torch.testing.assert_close(prompt.table(), prompt.A @ prompt.B)


def test_start_of_the_factors() -> None:
    _, prompt = prompted("bert", partial(SMALL, reach=60), start=True)
    assert 0.9 / sqrt(3) < prompt.A.abs().max() <= 1 / sqrt(3)
    assert prompt.B.eq(0).all()


@pytest.mark.parametrize("init", ["vocabulary", "text", "random"])
def test_start_of_the_prompt(init: str) -> None:
    ids = [7, 3] if init == "text" else None
    _, prompt = prompted("bert", partial(SMALL, init=init, text_ids=ids), start=True)
    table = plain("bert").model.get_input_embeddings().weight  # type: ignore[operator]
    nearest = (prompt.P[:, None] - table).norm(dim=2).min(1)
    assert (nearest.values.max() < 1e-6) == (init != "random")
    assert init != "text" or nearest.indices.tolist() == [7, 3, 7, 3]


def test_two_rates_for_an_encoder_with_a_decoder_one_elsewhere() -> None:
    rates = {kind: prompted(kind, SMALL)[1].rates() for kind in ("t5", "llama", "bert")}
    assert rates["t5"] == {"A": pytest.approx(5e-4 / 0.3), "B": pytest.approx(5e-4 / 0.3)}
    assert rates["llama"] == rates["bert"] == {}
    assert prompted("llama", partial(SMALL, rate=0.1))[1].rates() == {"A": 0.1, "B": 0.1}
    assert prompted("t5", partial(SMALL, rate=1.0))[1].rates() == {}
    assert prompted("t5", partial(SMALL, rank=0))[1].rates() == {}


@pytest.mark.parametrize("parameters", [160, 200, 333])
def test_property_a_budget_is_never_exceeded(parameters: int) -> None:
    _, prompt = prompted("llama", partial(DePT.within, parameters=parameters, reach=12))
    count = sum(p.numel() for _, p in prompt.own_parameters())
    assert count == dept_parameters(prompt.length, 16, prompt.rank, 12)
    assert parameters - (16 + 12) < count <= parameters


def test_property_rows_of_a_batch_are_independent() -> None:
    host, _ = prompted("t5", SMALL)
    inputs = padded(batch("t5"), left=0, right=2)
    inputs["attention_mask"][1, 4:] = 0
    order = torch.tensor([2, 0, 1])
    shuffled = {key: value[order] for key, value in inputs.items()}
    torch.testing.assert_close(host(**shuffled).logits, host(**inputs).logits[order])


def test_a_text_beyond_the_reach_is_told_once() -> None:
    host, _ = prompted("llama", partial(SMALL, reach=5))
    with pytest.warns(
        UserWarning, match=r"a text has 7 tokens, and DePT's offsets reach 5: tokens from place 5 on have "
    ):
        host(**batch("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host(**batch("llama"))


def test_padding_beyond_the_reach_is_no_text() -> None:
    host, prompt = prompted("llama", partial(SMALL, reach=7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host(**padded(batch("llama"), left=3, right=2))
    prompt.align = "absolute"
    with pytest.warns(UserWarning, match=r"a text has 10 columns, and DePT's offsets reach 7: tokens from place 7 on "):
        host(**padded(batch("llama"), left=3, right=2))


def test_components_are_cut_and_the_scale_stays() -> None:
    host, prompt = prompted("gpt2", SMALL)
    assert RankBudget.of(host).capacity_parameters == 3 * (12 + 16)
    prompt.gate.keep(torch.tensor([1, 0, 1]))
    before, gamma = host(**batch("gpt2")).logits, prompt.scaling
    assert compact(host) == {"model": 2}
    small: Any = host.model
    assert small.rank == 2
    assert small.scaling == pytest.approx(gamma)
    torch.testing.assert_close(host(**batch("gpt2")).logits, before)


def test_without_an_open_component_it_is_the_prompt_alone() -> None:
    host, prompt = prompted("roberta", SMALL)
    prompt.gate.keep(torch.zeros(3))
    other, vanilla = prompted("roberta", partial(SoftPrompt, length=4))
    with torch.no_grad():
        vanilla.P.copy_(prompt.P)
    assert torch.equal(host(**batch("roberta")).logits, other(**batch("roberta")).logits)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 13}, "rank=13 is not possible for offsets of 12 places and width 16: give a rank from 0 to 12."),
    "reach": ({"reach": 0}, "reach is how many places of a text have an offset, at least 1. Got 0."),
    "alpha": ({"alpha": -8}, "alpha multiplies and must be positive. Got -8."),
    "rate": ({"rate": 0.0}, "rate multiplies and must be positive. Got 0.0."),
    "init": ({"init": "svd"}, "init must be 'vocabulary', 'text' or 'random'. Got 'svd'."),
    "text": ({"init": "text"}, "text_ids are the token ids of a text to start with, for init='text' alone."),
    "align": ({"align": "real"}, "align must be 'tokens' or 'absolute'. Got 'real'."),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        inject(plain("bert"), partial(SMALL, **arguments))
