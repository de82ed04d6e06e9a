from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft.functional import embedding_noise as noise
from lightning_peft.functional.embedding_noise import (
    gaussian_noise,
    neftune_noise,
    noisy_tokens,
    random_position_noise,
    salt_and_pepper,
    token_cutoff,
)

SCOPES: list[dict[str, Any]] = [
    {"scope": "batch"},
    {"scope": "batch", "sources": "permutation"},
    {"scope": "sample"},
    {"scope": "sample", "causal": True},
    {"scope": "token"},
    {"scope": "dim"},
    {"scope": "dim", "causal": True},
]
every_scope = pytest.mark.parametrize("options", SCOPES, ids=lambda options: "-".join(map(str, options.values())))
EVERY: list[Callable[..., Tensor]] = [
    random_position_noise, gaussian_noise, neftune_noise, salt_and_pepper, token_cutoff,
]  # fmt: skip
every_noise = pytest.mark.parametrize("draw", EVERY, ids=lambda draw: draw.__name__)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(B: int = 4, L: int = 6, d: int = 8) -> Tensor:
    """Every cell has a value of its own, which tells where it is from."""
    return torch.arange(B * L * d, dtype=torch.float64).reshape(B, L, d)


def padded(B: int = 4, L: int = 6) -> Tensor:
    """The first two tokens of one example are padding, and the last ones of the others."""
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, :2] = False
    mask[1, 3:] = False
    mask[2, 1:] = False
    return mask


@every_noise
def test_property_1_without_noise_it_is_the_same_tensor_and_nothing_is_drawn(draw: Callable[..., Tensor]) -> None:
    E, drawn = numbered(), generator()
    before = drawn.get_state(), torch.get_rng_state()
    assert draw(E, 0.0, generator=drawn) is E
    assert torch.equal(drawn.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


@every_scope
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_property_2_every_cell_has_the_value_of_a_cell_that_it_may_have(options: dict[str, Any], p: float) -> None:
    E, mask = numbered(), padded()
    out = random_position_noise(E, p, mask=mask, generator=generator(), **options)
    source = out.long()
    b, t, d = source // 48, source // 8 % 6, source % 8
    own_b, own_t, own_d = (place // n % m for place, n, m in ((E.long(), 48, 4), (E.long(), 8, 6), (E.long(), 1, 8)))
    changed = source != E.long()
    assert changed.any()
    assert mask[b, t][changed].all()
    if options["scope"] != "batch":
        assert torch.equal(b, own_b)
    if options["scope"] == "token":
        assert torch.equal(t, own_t)
    if options["scope"] == "dim":
        assert torch.equal(d, own_d)
        if p == 1:  # another token, wherever there is one that may give
            others = (own_t - 2 * (own_b == 0) > 0) if options.get("causal") else own_b != 2
            assert torch.equal(changed, (others & mask[..., None]))
    if options.get("causal"):
        assert (t <= own_t).all()


@pytest.mark.parametrize("mask", [None, padded()], ids=["all", "padded"])
def test_property_3_a_permutation_of_all_is_one(mask: Tensor | None) -> None:
    E = numbered()
    out = random_position_noise(E, 1.0, mask=mask, scope="batch", sources="permutation", generator=generator())
    assert torch.equal(out.flatten().sort().values, E.flatten())
    assert not torch.equal(out, E)


@every_scope
@pytest.mark.parametrize("p", [0.1, 0.3])
def test_property_4_the_share_of_changed_cells_is_p(options: dict[str, Any], p: float) -> None:
    E = torch.randn(8, 32, 64, dtype=torch.float64, generator=generator(1))
    out = random_position_noise(E, p, generator=generator(), **options)
    changed = (out != E).double().mean()
    # A value that is copied onto itself is no change: one of d, where the token alone gives values. Looking back, the
    # first token has only itself.
    expected = {"token": p * (1 - 1 / 64)}.get(options["scope"], p)
    if options.get("causal"):
        expected = p * (
            1 - 1 / 32 if options["scope"] == "dim" else 1 - sum(1 / (64 * (t + 1)) for t in range(32)) / 32
        )
    assert abs(changed - expected) < 5 * (p * (1 - p) / E.numel()) ** 0.5


@every_noise
def test_property_5_the_mask_is_respected(draw: Callable[..., Tensor]) -> None:
    E, mask = numbered() + 1, padded()
    other = torch.where(mask[..., None], E, -7.0)
    out, again = (draw(x, 0.7, mask=mask, generator=generator()) for x in (E, other))
    assert torch.equal(out[~mask], E[~mask])
    assert torch.equal(out[mask], again[mask])  # padding is not read either
    assert not torch.equal(out[mask], E[mask])


def test_property_5_protected_tokens_are_neither_changed_nor_read() -> None:
    ids = torch.tensor([[2, 5, 6, 3, 0], [2, 7, 3, 0, 0]])
    tokens = noisy_tokens(ids, ids != 0, protect_ids=[2, 3])
    assert tokens is not None
    assert tokens.tolist() == [[False, True, True, False, False], [False, True, False, False, False]]
    assert noisy_tokens(ids, None) is None
    assert noisy_tokens(None, ids, protect_ids=[2]).tolist() == (ids != 0).tolist()  # type: ignore[union-attr]
    E = numbered(2, 5, 4)
    out = random_position_noise(E, 1.0, mask=tokens, generator=generator())
    assert torch.equal(out[~tokens], E[~tokens])
    assert set(out[0, 1:3].flatten().tolist()) <= set(E[0, 1:3].flatten().tolist())


@pytest.mark.parametrize("options", SCOPES[2:], ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("several", [False, True])
def test_property_6_an_example_does_not_depend_on_another(options: dict[str, Any], several: bool) -> None:
    def drawn() -> Any:
        return [generator(i) for i in range(4)] if several else generator()

    E, mask = numbered(), padded()
    other = E.clone()
    other[3] *= -1
    out, again = (random_position_noise(x, 0.5, mask=mask, generator=drawn(), **options) for x in (E, other))
    assert torch.equal(out[:3], again[:3])
    hidden = mask.clone()
    hidden[3, 2:] = False
    assert torch.equal(out[:3], random_position_noise(E, 0.5, mask=hidden, generator=drawn(), **options)[:3])


@every_noise
def test_generators_of_their_own_make_examples_independent_of_the_batch(draw: Callable[..., Tensor]) -> None:
    E = numbered()
    whole = draw(E, 0.5, generator=[generator(i) for i in range(4)])
    part = draw(E[2:], 0.5, generator=[generator(i) for i in (2, 3)])
    assert torch.equal(whole[2:], part)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("scope", ["batch", "sample", "token", "dim"])
def test_property_7_directions_keep_a_share_of_1_minus_p(scope: Any, p: float) -> None:
    E = torch.randn(8, 64, 256, generator=generator(1))
    out = random_position_noise(E, p, scope=scope, generator=generator())
    cosine = torch.cosine_similarity(out, E, dim=-1).mean()
    assert cosine == pytest.approx(1 - p * (255 / 256 if scope == "token" else 1), abs=0.01)
    assert (out.std() / E.std()).item() == pytest.approx(1, abs=0.01)


@every_scope
def test_property_8_no_gradient_is_lost(options: dict[str, Any]) -> None:
    E = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator(), requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)

    def drawn(x: Tensor) -> Tensor:
        return random_position_noise(x, 0.6, mask=mask, generator=generator(), **options)

    out = drawn(E)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=generator(1))
    (gradient,) = torch.autograd.grad((out * weights).sum(), E)
    torch.testing.assert_close(gradient.sum(), weights.sum())
    assert torch.autograd.gradcheck(drawn, E, fast_mode=True)


@pytest.mark.parametrize("options", SCOPES[2:], ids=lambda options: "-".join(map(str, options.values())))
def test_what_is_gathered_whole_is_what_is_gathered_in_part(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On accelerators all cells are gathered, so that nothing waits for the device: here, where it can be run."""
    E, mask = numbered(), padded()
    out = random_position_noise(E, 0.5, mask=mask, generator=generator(), **options)
    monkeypatch.setattr(noise, "_counts_at_once", lambda device: False)
    assert torch.equal(random_position_noise(E, 0.5, mask=mask, generator=generator(), **options), out)


@every_noise
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_property_13_the_dtype_stays(draw: Callable[..., Tensor], dtype: torch.dtype) -> None:
    assert draw(torch.randn(2, 3, 4).to(dtype), 0.5).dtype == dtype


def test_gaussian_noise_has_its_size() -> None:
    E = torch.zeros(4, 64, 128)
    out = gaussian_noise(E, 0.3, generator=generator())
    assert out.std().item() == pytest.approx(0.3, rel=0.01)
    assert out.mean().item() == pytest.approx(0, abs=0.01)


def test_neftune_is_scaled_by_the_length_of_the_text() -> None:
    E, mask = torch.zeros(2, 64, 128), torch.ones(2, 64)
    mask[1, 16:] = 0
    out = neftune_noise(E, 5.0, mask=mask, generator=generator())
    for i, length in enumerate((64, 16)):
        bound = 5 / (length * 128) ** 0.5
        assert bound * 0.99 < out[i].abs().max() <= bound
        assert out[i, :length].std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_salt_and_pepper_in_halves() -> None:
    E = torch.rand(4, 64, 128, generator=generator(1)) + 1
    out = salt_and_pepper(E, 0.4, generator=generator())
    assert (out == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    largest = E.amax((1, 2), keepdim=True)
    assert (out == largest).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert ((out == 0) | (out == largest) | (out == E)).all()


CAUSAL: dict[str, Callable[..., Tensor]] = {
    "copied": partial(random_position_noise, causal=True),
    "copied by dimension": partial(random_position_noise, scope="dim", causal=True),
    "copied within the token": partial(random_position_noise, scope="token"),
    "gaussian": gaussian_noise,
    "neftune": neftune_noise,
    "salt and pepper": partial(salt_and_pepper, causal=True),
    "cutoff": token_cutoff,
}


@pytest.mark.parametrize("hidden", [None, 2], ids=["all shown", "one hidden"])
@pytest.mark.parametrize("draw", CAUSAL.values(), ids=CAUSAL)
def test_no_cell_depends_on_a_later_token_of_a_causal_model(draw: Callable[..., Tensor], hidden: int | None) -> None:
    E, mask = torch.randn(3, 6, 8, generator=generator(1)), torch.ones(3, 6, dtype=torch.bool)
    if hidden is not None:
        mask[:, hidden] = False
    once = draw(E, 0.5, mask=mask, generator=generator())
    for t in range(6):
        later = E.clone()
        later[:, t] += 100
        assert torch.equal(draw(later, 0.5, mask=mask, generator=generator())[:, :t], once[:, :t])


def test_pepper_of_a_causal_model_is_the_largest_value_so_far() -> None:
    E, mask = numbered(), padded()
    E[:, 1] += 1000  # not the last token has the largest
    out = salt_and_pepper(E, 0.9, mask=mask, causal=True, generator=generator())
    for b in range(4):
        for t in range(6):
            seen = E[b, : t + 1][mask[b, : t + 1]]
            allowed = [torch.zeros(1, dtype=E.dtype), E[b, t], *([seen.max()[None]] if mask[b, t] else [])]
            assert torch.isin(out[b, t], torch.cat(allowed)).all()
    assert torch.equal(out[~mask], E[~mask])
    peppered = (out == E[:, :2].amax((1, 2), keepdim=True)) & mask[..., None]
    assert peppered[3, 2:].any()
    assert out.isfinite().all()


def test_cutoff_takes_whole_tokens() -> None:
    E = torch.rand(8, 512, 4, generator=generator(1)) + 1
    out = token_cutoff(E, 0.25, generator=generator())
    cut = (out == 0).all(-1)
    assert torch.equal(out[~cut], E[~cut])
    assert cut.float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda E: random_position_noise(E, 1.5), r"p is the share that noise takes, from 0 to 1. Got 1.5."),
        (lambda E: random_position_noise(E, 0.1, scope="row"), "scope='row': choose 'batch', 'sample', 'token' or"),
        (
            lambda E: random_position_noise(E, 0.1, sources="all"),
            "sources='all': choose 'independent' or 'permutation'",
        ),
        (
            lambda E: random_position_noise(E, 0.1, sources="permutation"),
            "sources='permutation' moves cells over the whole batch, and scope is 'sample'. Use scope='batch', or",
        ),
        (
            lambda E: random_position_noise(E, 0.1, scope="batch", causal=True),
            "scope='batch' copies from later tokens, which a causal model must not see. Use scope='token'",
        ),
        (
            lambda E: random_position_noise(E, 0.1, scope="batch", generator=[generator()] * 4),
            "scope='batch' mixes examples, so it takes one generator",
        ),
        (
            lambda E: gaussian_noise(E, 0.1, generator=[generator()]),
            "there are 1 generators for 4 examples; give one for each.",
        ),
        (lambda E: gaussian_noise(E, -0.1), "sigma is the size of noise, at least 0 and finite. Got -0.1."),
        (lambda E: neftune_noise(E, float("inf")), "alpha is the size of noise, at least 0 and finite. Got inf."),
        (lambda E: token_cutoff(E[0], 0.1), r"for embeddings of shape \(batch, length, d\). Got \(6, 8\)."),
        (
            lambda E: token_cutoff(E, 0.1, mask=torch.ones(4, 5)),
            r"the mask is of shape \(4, 5\), and the embeddings of \(4, 6, 8\).",
        ),
    ],
)
def test_misuse(wrong: Callable[[Tensor], Tensor], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrong(numbered())
