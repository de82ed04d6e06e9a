from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lightning_peft import EVA, DynamicDoRA, LoRA, RankBudget, inject
from lightning_peft.listening import heard, positions
from lightning_peft.rank.eva import explained_ranks
from lightning_peft.rank.probe import Alone

TARGETS = ["query", "key", "value", "dense"]


def bert() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = BertConfig(
            vocab_size=60,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            initializer_range=0.4,
        )
        return BertModel(config, add_pooling_layer=False).eval()


def batches(count: int = 40) -> list[dict[str, Tensor]]:
    """Padded text in which few words are common."""
    generator = torch.Generator().manual_seed(0)
    shares = 0.9 ** torch.arange(60).float()
    rows = []
    for _ in range(count):
        tokens = torch.multinomial(shares, 8 * 12, replacement=True, generator=generator).view(8, 12)
        lengths = torch.randint(4, 13, (8, 1), generator=generator)
        rows.append({"input_ids": tokens, "attention_mask": (torch.arange(12) < lengths).long()})
    return rows


def calibrated(model: nn.Module, data: list[Any], eva: EVA) -> tuple[RankBudget, int]:
    """The budget after the probe has acted, and how many batches it wanted."""
    budget, taken = RankBudget.of(model), 0
    eva.begin(budget, Alone())
    for batch in data:
        if not eva.wanted():
            break
        with torch.no_grad(), heard(eva, budget, shown=positions(batch)):
            model(**batch) if isinstance(batch, dict) else model(batch)
        eva.fold()
        taken += 1
    budget.keep(eva.act())
    return budget, taken


def by_input(ranks: dict[str, int]) -> dict[str, list[int]]:
    """Query, key and value have one input, hence equal shares, and PEFT breaks such ties by an unstable sort."""
    groups: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        groups.setdefault(name.rpartition(".self.")[0] or name, []).append(rank)
    return {name: sorted(group) for name, group in groups.items()}


@pytest.mark.parametrize("rho", [1, 2])
def test_ranks_and_directions_are_pefts(rho: int) -> None:
    r = 3
    config = LoraConfig(r=r, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=rho, tau=0.99))
    theirs = get_eva_state_dict(bert(), batches(), peft_config=config, show_progress_bar=False)
    ours = bert()
    inject(ours, partial(LoRA, rank=rho * r), TARGETS, train=[])
    budget, taken = calibrated(ours, batches(), EVA(rank=r, tau=0.99))
    assert taken < 40  # it has converged
    ranks = budget.ranks()
    assert by_input(ranks) == by_input({name: len(V) for name, V in theirs.items()})
    assert sum(ranks.values()) == r * len(ranks)
    assert (max(ranks.values()) - min(ranks.values()) > 1) == (rho > 1)
    for name, V in theirs.items():
        A = budget[name].adapter.A[: len(V)]
        # Singular values of A V^T are the cosines between the two subspaces: theirs is a randomised SVD.
        assert not len(V) or torch.linalg.svdvals(A @ V.T.float()).min() > 0.99, name


def test_padding_is_not_looked_at() -> None:
    """What stands in padded positions of the first layer's input makes no difference; without a mask it does."""
    rows = batches(3)
    others = [{**row, "input_ids": row["input_ids"].where(row["attention_mask"] == 1, 59)} for row in rows]
    assert not torch.equal(rows[0]["input_ids"], others[0]["input_ids"])
    found = []
    for data in (rows, others):
        model = bert()
        inject(model, partial(LoRA, rank=3), ["layer.0.attention.self.query"], train=[])
        budget, _ = calibrated(model, data, EVA(rank=3))
        found += [site.adapter.A for site in budget.values()]
    torch.testing.assert_close(found[0], found[1])
    bare = bert()
    inject(bare, partial(LoRA, rank=3), ["layer.0.attention.self.query"], train=[])
    budget, _ = calibrated(bare, [row["input_ids"] for row in others], EVA(rank=3))
    assert (next(iter(budget.values())).adapter.A - found[0]).abs().max() > 0.01


@pytest.mark.parametrize("labels", [None, torch.tensor([[5, -100, 2], [-100, 1, 1]]), torch.tensor([1, 0])])
def test_positions(labels: Tensor | None) -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"attention_mask": mask} | ({} if labels is None else {"labels": labels})
    expected = mask.bool()
    if labels is not None and labels.dim() == 2:
        expected = torch.tensor([[True, False, True], [False, True, False]])
    for given in (batch, (batch, labels), [torch.ones(2), batch]):
        found = positions(given)
        assert found is not None
        assert torch.equal(found, expected)
    assert positions(torch.ones(2, 3)) is None
    assert positions({"attention_mask": torch.ones(2, 1, 3, 3)}) is None


class Shares(nn.Module):
    """Two layers that share an input, one with an input of its own, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 6), nn.Linear(8, 5), nn.Linear(6, 7)
        self.idle, self.words = nn.Linear(8, 8), nn.Embedding(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        return torch.cat([self.third(self.first(x)), self.second(x)], -1)


def tokens(count: int = 6) -> list[Tensor]:
    return [torch.randint(10, (4, 5)) for _ in range(count)]


def test_layers_with_one_input_share_their_directions() -> None:
    model = Shares()
    inject(model, partial(LoRA, rank=4), ["first", "second", "third"], train=[])
    eva = EVA(rank=2)
    budget, _ = calibrated(model, tokens(), eva)
    assert eva._leader == {"first": "first", "second": "first", "third": "third"}
    assert torch.equal(budget["first"].adapter.A, budget["second"].adapter.A)
    assert not torch.equal(budget["first"].adapter.A[:, :6], budget["third"].adapter.A)


def test_a_tensor_in_another_ones_place_is_another_input() -> None:
    """A freed tensor's identity can be given out again within a forward."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x + 0)
            return x

    model = Chain()
    inject(model, partial(LoRA, rank=2), ["layers.*"], train=[])
    eva = EVA(rank=1)
    calibrated(model, [torch.randn(9, 6)], eva)
    assert all(name == leader for name, leader in eva._leader.items())


def test_what_is_not_seen_keeps_its_start_and_the_average() -> None:
    model = Shares()
    inject(model, partial(LoRA, rank=4), ["first", "second", "third", "idle", "words"], train=[])
    before = {name: site.adapter.A.clone() for name, site in RankBudget.of(model).items()}
    eva = EVA(rank=2)
    budget, _ = calibrated(model, tokens(), eva)
    assert eva.unseen() == ["idle", "words"]
    ranks = budget.ranks()
    assert (ranks["idle"], ranks["words"], sum(ranks.values())) == (2, 2, 10)
    assert all(torch.equal(before[name], budget[name].adapter.A) for name in ("idle", "words"))


def test_the_model_still_starts_as_its_base() -> None:
    for adapter in (LoRA, partial(DynamicDoRA, dropout=0.0)):
        model = Shares()
        x = tokens(1)[0]
        before = model(x)
        inject(model, partial(adapter, rank=4), ["first", "second", "third"], train=[])
        calibrated(model, tokens(), EVA(rank=2))
        assert torch.equal(model(x), before)


def test_fewer_positions_than_components_are_enough() -> None:
    model = Shares()
    inject(model, partial(LoRA, rank=4), ["first"], train=[])
    budget, _ = calibrated(model, [torch.tensor([[1, 2]]), torch.tensor([[3, 2]])], EVA(rank=3))
    A = budget["first"].adapter.A[:3]
    torch.testing.assert_close(A[:2] @ A[:2].T, torch.eye(2), rtol=1e-5, atol=1e-5)


def test_trained_adapters_are_refused() -> None:
    model = Shares()
    inject(model, partial(LoRA, rank=4), ["first"], train=[])
    with torch.no_grad():
        RankBudget.of(model)["first"].adapter.B[0, 0] = 1.0
    with pytest.raises(RuntimeError, match="the adapter at 'first' has been trained: its update is not zero"):
        EVA().begin(RankBudget.of(model), Alone())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"rank": 0}, "above 0. Got 0"), ({"tau": 1.5}, r"a cosine, in \[0, 1\]. Got 1.5")],
)
def test_arguments_are_checked(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EVA(**arguments)


def test_ranks_go_to_the_highest_shares_and_ties_to_earlier_layers() -> None:
    shares = {"a": torch.tensor([0.5, 0.2, 0.1]), "b": torch.tensor([0.5, 0.2, 0.1]), "c": torch.tensor([0.9, 0.05])}
    masks = explained_ranks(shares, {"a": 3, "b": 2, "c": 3}, rank=4 / 3)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [True, True, False],
        "b": [True, False],
        "c": [True, False, False],
    }
