from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from callbacks.noise_hosts import CLASSES, TextCNN, assert_close, assert_same, fit, rows, weights
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

from lightning_peft import DEM, AdapterInjection, AdversarialNoise, LoRA, Regularization
from lightning_peft.functional.embedding_noise import uniform_start
from lightning_peft.regularizers.counted import told_by

FGM: dict[str, Any] = {"step": 0.8}
FREELB: dict[str, Any] = {"step": 0.3, "passes": 3, "start": 0.5, "radius": 0.6, "reduction": "mean"}
every_form = pytest.mark.parametrize("form", [FGM, FREELB], ids=["fgm", "freelb"])


def by_hand(form: dict[str, Any]) -> TextCNN:
    """As the papers write it, on the gradient of a separate backward."""
    module, every = TextCNN(), rows()
    optimizer = module.configure_optimizers()
    passes, radius = form.get("passes", 2), form.get("radius", float("inf"))
    for i in range(6):
        batch = default_collate(every[4 * i : 4 * i + 4])
        mask = batch["attention_mask"][..., None]
        delta = torch.zeros(4, 6, 8)
        if form.get("start"):
            text = f"lightning_peft/embedding_noise/v1|AdversarialNoise|0|0|{i}|0|0"
            numbers = [told_by(f"{text}|{row}", "cpu") for row in range(4)]
            delta = uniform_start(delta, form["start"], mask=batch["attention_mask"], generator=numbers)
        optimizer.zero_grad()
        for _ in range(passes):
            delta = delta.detach().requires_grad_()
            E = module.embed(batch["input_ids"]) + delta * mask
            logits = module.head(module.body(E.transpose(1, 2)).amax(2))
            loss = nn.functional.cross_entropy(logits, batch["labels"])
            (loss / passes if form.get("reduction") == "mean" else loss).backward()
            assert delta.grad is not None
            moved = delta.detach() + form["step"] * nn.functional.normalize(delta.grad.flatten(1)).view_as(delta)
            size = moved.flatten(1).norm(dim=1).view(4, 1, 1)
            delta = torch.where(size > radius, moved * radius / size, moved)
        optimizer.step()
    return module


@every_form
@pytest.mark.parametrize("execution", ["apart", "together"])
def test_it_is_what_the_papers_write(form: dict[str, Any], execution: Any) -> None:
    module = TextCNN()
    run = fit(module, AdversarialNoise(**form, execution=execution))
    reference = by_hand(form)
    assert_close(weights(module), weights(reference))
    assert not torch.allclose(reference.embed.weight, by_hand({**form, "step": 1e-9}).embed.weight, atol=1e-3)
    assert run.callback_metrics["loss/adversarial"] > 0


def test_one_step_raises_the_loss_of_every_example() -> None:
    losses: list[Tensor] = []

    class Notes(TextCNN):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            losses.append(nn.functional.cross_entropy(self(batch["input_ids"]), batch["labels"], reduction="none"))
            return losses[-1].mean()

    fit(Notes(), AdversarialNoise(step=0.1), max_steps=3)
    for clean, moved in zip(losses[::2], losses[1::2], strict=True):
        assert (moved > clean).all()


def test_padding_and_protected_tokens_stay() -> None:
    class Notes(TextCNN):
        def forward(self, ids: Tensor) -> Tensor:
            seen.append(self.embed(ids).detach())
            return super().forward(ids)

    seen: list[Tensor] = []
    module = Notes()
    table, batch = module.embed.weight.detach().clone(), default_collate(rows()[:4])
    protected = int(batch["input_ids"][0, 1])
    fit(module, AdversarialNoise(step=0.5, start=0.5, protect_ids=[protected]), max_steps=1)
    free = batch["attention_mask"].bool() & (batch["input_ids"] != protected)
    assert len(seen) == 2
    for E in seen:
        changed = (table[batch["input_ids"]] != E).any(-1)
        assert torch.equal(changed, free)


@pytest.mark.parametrize("execution", ["apart", "together"])
def test_what_is_computed_again_has_the_same_perturbation(execution: Any) -> None:
    class Checkpointed(TextCNN):
        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = checkpoint(super().forward, ids, use_reentrant=False)  # type: ignore[assignment]
            return logits

    states = []
    for kind in (TextCNN, Checkpointed):
        module = kind()
        fit(module, AdversarialNoise(**FREELB, execution=execution))
        states.append(weights(module))
    assert_same(*states)


@pytest.mark.parametrize("execution", ["apart", "together"])
def test_frozen_embeddings_terms_and_scaled_gradients(execution: Any) -> None:
    states = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]):
        torch.manual_seed(1)
        module = TextCNN(frozen=True)
        fit(
            module, AdapterInjection(partial(LoRA, rank=2), ["head"], ["body"]), Regularization({"dem": DEM(0.5)}),
            AdversarialNoise(**FGM, execution=execution), plugins=plugins, accumulate_grad_batches=2, max_steps=1,
        )  # fmt: skip
        assert module.embed.weight.grad is None
        states.append(weights(module))
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-3), name


def test_a_text_of_another_length_in_the_next_pass_is_told() -> None:
    class Shrinks(TextCNN):
        calls = 0

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            self.calls += 1
            logits = self(batch["input_ids"][:, self.calls :])
            return nn.functional.cross_entropy(logits, batch["labels"])

    with pytest.raises(RuntimeError, match=r"gives \(4, 4, 8\) in one pass and \(4, 5, 8\) in another, so a perturbat"):
        fit(Shrinks(), AdversarialNoise())


def test_two_towers_have_a_perturbation_each() -> None:
    class Towers(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = TextCNN(), TextCNN()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            ids = batch["input_ids"]
            logits = self.left(ids) + self.right(ids.flip(1))
            return nn.functional.cross_entropy(logits, batch["labels"] % CLASSES)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Towers()
    fit(module, AdversarialNoise(step=0.5, embedding=[r"left\.embed", r"right\.embed"]), max_steps=1)
    for tower in (module.left, module.right):
        clean, moved = tower.embedded
        torch.testing.assert_close((moved - clean).flatten(1).norm(dim=1), torch.full((4,), 0.5))
