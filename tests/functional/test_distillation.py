from __future__ import annotations

import pytest
import torch

from lightning_peft.functional.distillation import mean_square, softened_kl


def test_the_divergence_is_the_sum_that_the_equation_has() -> None:
    student, teacher = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    wanted = 0.0
    for s, t in zip(student, teacher, strict=True):
        q, p = torch.exp(s / 2) / torch.exp(s / 2).sum(), torch.exp(t / 2) / torch.exp(t / 2).sum()
        wanted += float((p * (p / q).log()).sum()) / 3 * 4
    assert softened_kl(student, teacher, 2.0).item() == pytest.approx(wanted, rel=1e-12)


def test_equal_logits_are_at_no_distance_up_to_a_shift_of_each_row() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    assert softened_kl(logits, logits, 3.0).item() == 0.0
    assert softened_kl(logits + torch.randn(5, 1), logits, 3.0).item() == pytest.approx(0.0, abs=1e-14)


def test_the_gradient_keeps_its_size_at_high_temperatures() -> None:
    """T^2 times the divergence has, as T grows, the gradient of half the mean square of centred logits over classes."""
    teacher = torch.randn(6, 5, dtype=torch.float64)
    student = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(softened_kl(student, teacher, 1e4), student)
    difference = student.detach() - teacher
    wanted = (difference - difference.mean(-1, keepdim=True)) / 5 / 6
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", [softened_kl, mean_square])
def test_rows_that_are_hidden_count_for_nothing(loss: type[softened_kl]) -> None:  # type: ignore[valid-type]
    student, teacher = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    shown = torch.tensor([[True, True, False], [True, False, False]])
    hidden = torch.where(shown[..., None], student, torch.inf)
    value = loss(hidden, torch.where(shown[..., None], teacher, -torch.inf), shown=shown)  # type: ignore[call-arg]
    torch.testing.assert_close(value, loss(student[shown], teacher[shown]))
    assert loss(student, teacher, shown=torch.zeros_like(shown)).item() == 0.0  # type: ignore[call-arg]


@pytest.mark.parametrize("loss", [softened_kl, mean_square])
def test_low_precision_is_compared_in_float32(loss: type[softened_kl]) -> None:  # type: ignore[valid-type]
    student, teacher = torch.randn(4, 3).bfloat16(), torch.randn(4, 3).bfloat16()
    assert torch.equal(loss(student, teacher), loss(student.float(), teacher.float()))
    assert loss(student.double(), teacher.double()).dtype == torch.float64
