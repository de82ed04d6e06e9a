"""Constants drawn from names: golden values, and the same ones everywhere."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch

from lightning_peft.functional.draws import choice, digest, order, signs


def test_property_9_golden_signs_and_indices() -> None:
    first = signs(0, "layer", "sign_in", 16)
    assert first.tolist() == [-1, 1, 1, -1, 1, -1, -1, 1, -1, -1, -1, 1, -1, 1, -1, 1]
    assert hashlib.shake_256(b"lightning_peft/rlora/v1|0|layer|sign_in").hexdigest(2) == "6957"
    assert order(0, "layer", "index", 8).tolist() == [2, 7, 4, 3, 1, 5, 0, 6]


def test_an_order_is_that_of_pythons_own_whole_numbers() -> None:
    raw = hashlib.shake_256(b"lightning_peft/rlora/v1|7|a.b|index_in").digest(8 * 200)
    words = [int.from_bytes(raw[8 * i : 8 * i + 8], "little") for i in range(200)]
    assert order(7, "a.b", "index_in", 200).tolist() == sorted(range(200), key=lambda i: (words[i], i))


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    assert torch.equal(signs(3, "x", "sign_out", 1000)[:37], signs(3, "x", "sign_out", 37))


def test_a_choice_is_ascending_and_without_repetition() -> None:
    found = choice(1, "x", "index_in", 100, 30)
    assert found.tolist() == sorted(set(found.tolist()))
    assert len(found) == 30
    assert set(found.tolist()) < set(choice(1, "x", "index_in", 100, 31).tolist())
    assert choice(1, "x", "index_in", 100, 100).tolist() == list(range(100))


@pytest.mark.parametrize("other", [(1, "x", "sign_in"), (0, "y", "sign_in"), (0, "x", "sign_out")])
def test_seed_key_and_role_each_make_another_draw(other: tuple[int, str, str]) -> None:
    agree = (signs(0, "x", "sign_in", 4096) == signs(*other, 4096)).float().mean()
    assert abs(agree - 0.5) < 0.04  # five standard deviations
    assert abs(signs(*other, 4096).float().mean()) < 0.08


def test_a_digest_tells_order_value_and_place_apart() -> None:
    tensors = [torch.tensor([1, 2]), torch.tensor([3])]
    found = digest(*tensors)
    assert len(found) == 16
    assert found == digest(*(t.to(torch.int16) for t in tensors))
    others = [[[2, 1], [3]], [[1, 2], [4]], [[1], [2, 3]], [[1, 2, 3]], [[1, 2 + 2**40], [3]]]
    assert len({found, *(digest(*map(torch.tensor, other)) for other in others)}) == 6


def test_no_generator_is_touched() -> None:
    before = torch.get_rng_state()
    signs(0, "x", "sign_in", 100), order(0, "x", "index_in", 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_property_9_another_process_draws_the_same() -> None:
    code = (
        "import torch; torch.set_default_dtype(torch.float64)\n"
        "from lightning_peft.functional.draws import *\n"
        "print(digest(signs(5, 'x', 'sign_in', 777), choice(5, 'x', 'index_in', 777, 99)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.strip() == digest(signs(5, "x", "sign_in", 777), choice(5, "x", "index_in", 777, 99))
