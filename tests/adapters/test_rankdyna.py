"""RankDyna's properties, by the numbers of its card: what a group is worth, which stay, and what that leaves to train.

Those of the layer alone (1, 2, 6, 7, 8) are with the layer's own tests; here they are seen through the policy.
"""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    Factorized,
    GroupImportance,
    LoRA,
    RankBudget,
    RankPolicy,
    RankPruning,
    inject,
    merge,
    presets,
)
from lightning_peft.adapters import rankdyna
from lightning_peft.adapters.rankdyna import Aggregation

AGGREGATIONS: list[Aggregation] = ["group", "taylor_sq", "elementwise_sum", "elementwise_mean"]


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 2))


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = (self.net(batch) - batch[:, :2].sin()).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


BATCHES, EPOCHS = 10, 2
DENSE = 6 * 12 + 12 * 8
MOST = 12 + 8  # what the dearest group costs
START = 6 * 18 + 8 * 20


def data(rows: int = 4) -> DataLoader[Tensor]:
    x = torch.randn(BATCHES * 4, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(x, batch_size=rows)  # type: ignore[arg-type]


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": EPOCHS,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def callbacks(compact: Any = "never", **options: Any) -> list[Callback]:
    return [*presets.rankdyna(**{"ratio": 0.5, "interval": 2, "compact": compact, **options})]


def pruning(found: list[Callback]) -> RankPruning:
    return next(c for c in found if isinstance(c, RankPruning))


class Diary(Callback):
    """What was spent, allowed and closed after every step."""

    def __init__(self, prune: RankPruning) -> None:
        self.prune = prune
        self.rows: list[tuple[int, int, int]] = []
        self.masks: list[Tensor] = []
        self.steps: list[int] = []
        self.scores: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.steps and self.steps[-1] == trainer.global_step:
            return
        budget = RankBudget.of(pl_module)
        self.steps.append(trainer.global_step)
        self.rows.append((budget.spent_parameters, self.prune.budget_at_event(), self.prune.event_step))
        self.masks.append(torch.cat([site.gate.mask.detach().clone() for site in budget.values()]))
        self.scores.append({name: row.clone() for name, row in self.prune.policy.importance.scores().items()})


def same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key


def layers(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Factorised linear layers whose factors are nobody's singular vectors any more."""
    net = nn.Sequential(*[nn.Linear(n, m, dtype=dtype) for n, m in shapes])
    inject(net, Factorized, targets=[str(i) for i in range(len(shapes))], train=[])
    with torch.no_grad():
        for adapter in net:
            adapter.U.add_(torch.randn_like(adapter.U) * 0.3)  # type: ignore[union-attr, operator]
            adapter.Vh.add_(torch.randn_like(adapter.Vh) * 0.3)  # type: ignore[union-attr, operator]
    return net


def worth(net: nn.Module, x: Tensor, importance: GroupImportance) -> dict[str, Tensor]:
    """Importance from one gradient, without a running average."""
    importance.track(RankBudget.of(net))
    net.zero_grad()
    net(x).sin().square().mean().backward()
    importance.update()
    importance.release()
    return {name: row.clone() / (1 - importance.beta) for name, row in importance.scores().items()}


def test_property_2_the_masks_gradient_is_that_of_the_whole_triplet_thrice() -> None:
    """And so the joint importance of a group needs one number of its layer's backward, not its vectors' gradients."""
    net, x = layers((6, 9), (9, 5)), torch.randn(7, 6, dtype=torch.float64)
    found = worth(net, x, GroupImportance())
    for name, row in found.items():
        adapter: Any = net[int(name)]
        parts = [
            (adapter.U * adapter.U.grad).sum(0),
            adapter.gate.gain * adapter.gate.gain.grad,
            (adapter.Vh * adapter.Vh.grad).sum(1),
        ]
        for part in parts:
            torch.testing.assert_close(row.double(), part.detach().abs(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_aggregation_is_what_its_equation_says(aggregation: Aggregation) -> None:
    net, x = layers((6, 9), (9, 5), (5, 5)), torch.randn(7, 6, dtype=torch.float64)
    found = worth(net, x, GroupImportance(aggregation))
    for name, row in found.items():
        adapter: Any = net[int(name)]
        for k in range(len(adapter.gate)):
            s = adapter.gate.gain[k] * adapter.gate.gain.grad[k]
            u = (adapter.U[:, k] * adapter.U.grad[:, k]).abs()
            v = (adapter.Vh[k] * adapter.Vh.grad[k]).abs()
            wanted = {
                "group": s.abs(),
                "taylor_sq": s**2,
                "elementwise_sum": s.abs() + u.sum() + v.sum(),
                "elementwise_mean": s.abs() + u.mean() + v.mean(),
            }[aggregation]
            assert row[k].item() == pytest.approx(wanted.item(), rel=1e-5)


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])


def test_property_3_it_tracks_what_removing_a_group_does_to_the_loss() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 20, dtype=torch.float64))
    inject(net, Factorized, targets=["0"], train=[])
    adapter: Any = net[0]
    with torch.no_grad():
        adapter.gate.gain.mul_(torch.logspace(0, -3, 20, dtype=torch.float64))
    x = torch.randn(50, 24, dtype=torch.float64)

    def loss() -> Tensor:
        value: Tensor = net(x).sin().square().mean()
        return value

    found = worth(net, x, GroupImportance())["0"].double()
    removed = []
    with torch.no_grad():
        for k in range(20):
            adapter.gate.mask[k] = 0
            before = loss()
            adapter.gate.mask[k] = 1
            removed.append(float((before - loss()).abs()))
    small = adapter.gate.gain.detach().argsort()[:10]
    assert spearman(found[small], torch.tensor(removed)[small]) > 0.9


def test_property_3_it_is_the_groups_and_not_their_forms() -> None:
    net, x = layers((6, 9), (9, 5)), torch.randn(7, 6, dtype=torch.float64)
    before = worth(net, x, GroupImportance())
    with torch.no_grad():
        for adapter in net:
            factors: Any = adapter
            scale = torch.randn(factors.U.shape[1], dtype=torch.float64).exp() * torch.tensor(-1.0)
            factors.U.mul_(scale)
            factors.Vh.div_(scale[:, None])
    for name, row in worth(net, x, GroupImportance()).items():
        torch.testing.assert_close(row, before[name], rtol=1e-5, atol=1e-8)


def test_property_4_a_group_of_zero_is_worth_least_and_one_of_two_halves_half() -> None:
    net, x = layers((6, 9), (9, 5)), torch.randn(7, 6, dtype=torch.float64)
    twin: Any = net[0]
    with torch.no_grad():
        twin.gate.gain[2] = 0
        twin.U[:, 4], twin.Vh[4], twin.gate.gain[4] = 0, 0, 0
    before = worth(net, x, GroupImportance())
    assert before["0"].argmin().item() in (2, 4)
    assert before["0"][2].item() == 0.0
    with torch.no_grad():  # group 1 in two, at places 1 and 4
        twin.U[:, 4], twin.Vh[4] = twin.U[:, 1], twin.Vh[1]
        twin.gate.gain[1] /= 2
        twin.gate.gain[4] = twin.gate.gain[1]
    after = worth(net, x, GroupImportance())
    torch.testing.assert_close(after["0"][1], before["0"][1] / 2, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(after["0"][4], before["0"][1] / 2, rtol=1e-5, atol=1e-9)


def test_property_4_a_planted_zero_is_removed_at_the_first_cut() -> None:
    class Planted(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.net[2].gate.gain[3] = 0
                pl_module.net[2].U[:, 3] = 0

    found = callbacks()
    diary = Diary(pruning(found))
    trainer(*found, Planted(), diary).fit(Module(), data())
    first = next(mask for mask in diary.masks if not bool(mask.all()))
    assert first[6 + 3] == 0  # behind the six groups of the first layer


@pytest.mark.parametrize("score", ["worth", "per_cost"])
@pytest.mark.parametrize("compact", ["never", 2])
def test_property_5_after_every_event_what_is_left_is_what_the_budget_pays_for(compact: Any, score: str) -> None:
    found = callbacks(score=score)
    prune = pruning(found)
    diary = Diary(prune)
    trainer(*found, diary).fit(Module(), data())
    policy, total = prune.policy, BATCHES * EPOCHS
    start, last = policy.schedule.window(total)
    assert policy.budget_at(start, total) == START
    assert policy.budget_at(last, total) == DENSE // 2
    allowed = [policy.budget_at(step, total) for step in range(total + 1)]
    assert allowed == sorted(allowed, reverse=True)
    events = 0
    for spent, budget, event in diary.rows:
        if event:
            events += 1
            assert budget - MOST < spent <= budget
    assert events > 10
    for before, after in zip(diary.masks, diary.masks[1:], strict=False):
        assert not bool(((before == 0) & (after != 0)).any())
    assert diary.rows[-1][0] <= DENSE // 2


def test_what_is_removed_does_not_return_though_its_score_would() -> None:
    """With a policy that closes hard and not for good it does: the test could fail."""
    revived = []
    for irreversible in (False, True):
        net = layers((6, 9), (9, 5))
        budget = RankBudget.of(net)
        template = rankdyna.policy(Budget(dense_share=0.5), interval=1)
        policy = RankPolicy(
            template.schedule, GroupImportance(), Budget(dense_share=0.5), 1, minimum=1, irreversible=irreversible
        )
        policy.track(budget)
        back = False
        for step in range(1, 41):
            for i, row in enumerate(policy.importance.scores().values()):
                row.copy_(torch.rand(len(row), generator=torch.Generator().manual_seed(100 * step + i)))
            if policy.is_event(step, 40):
                before = {name: site.gate.mask.clone() for name, site in budget.items()}
                policy.apply(policy.decide(step, 40), step, 40)
                assert budget.spent_parameters <= policy.budget_at(step, 40)
                back |= any(bool(((before[n] == 0) & (s.gate.mask != 0)).any()) for n, s in budget.items())
        revived.append(back)
        if irreversible:
            for site in budget.values():
                assert site.gate.gain is not None
                assert not bool(site.gate.gain.detach()[site.gate.mask == 0].any())
                assert int(site.gate.mask.sum()) >= 1
    assert revived == [True, False]


def test_property_6_removed_groups_have_no_gradient_and_no_voice() -> None:
    net, x = layers((6, 9), (9, 5)), torch.randn(7, 6, dtype=torch.float64)
    policy = rankdyna.policy(Budget(dense_share=0.5))
    policy.track(RankBudget.of(net))
    net(x).square().mean().backward()
    policy.importance.update()
    policy.apply(policy.decide(10, 10), 10, 10)
    policy.importance.release()
    net.zero_grad()
    y = net(x)
    y.square().mean().backward()
    for site in policy.budget.values():
        dead, adapter = site.gate.mask == 0, site.adapter
        assert bool(dead.any())
        for gradient in (adapter.U.grad[:, dead], adapter.Vh.grad[dead], adapter.gate.gain.grad[dead]):
            assert not bool(gradient.any())
        with torch.no_grad():
            adapter.U[:, dead] = 1e6
            adapter.gate.gain[dead] = 7.0
    assert torch.equal(net(x), y)


@pytest.mark.parametrize("every", [1, 3, "final"])
def test_property_7_cut_out_on_the_way_it_trains_as_with_the_mask(every: Any) -> None:
    found, sizes = [], []
    for compact in ("never", every):
        module = Module()
        run = trainer(*callbacks(compact))
        run.fit(module, data())
        merge(module)
        found.append(module)
        held = run.optimizers[0].param_groups[0]["params"]
        sizes.append(sum(p.numel() for p in held))
        assert all(p.shape == run.optimizers[0].state[p]["exp_avg"].shape for p in held)
    for one, other in zip(found[0].net.parameters(), found[1].net.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert sizes[1] < sizes[0]


def test_property_8_what_leaves_is_what_the_budget_says() -> None:
    module = Module()
    trainer(*callbacks()).fit(module, data())
    x = torch.randn(9, 6)
    wanted = module.eval().net(x)
    spent = RankBudget.of(module).spent_parameters
    thin = nn.Sequential(*[child.thin() if isinstance(child, Factorized) else child for child in module.net])
    torch.testing.assert_close(thin(x), wanted, rtol=1e-5, atol=1e-6)
    rest = 12 + 8 + 2 * 8 + 2
    assert sum(p.numel() for p in thin.parameters()) <= spent + rest <= DENSE // 2 + rest
    merge(module)
    torch.testing.assert_close(module.net(x), wanted, rtol=1e-5, atol=1e-6)


class Planted(LightningModule):
    """A layer whose task is of rank 2 beside one whose task is of full rank, each with its own input and output."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.low, self.full = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        with torch.no_grad():
            self.low.weight.copy_(draw(16, 16) / 4)
            self.full.weight.copy_(draw(16, 16) / 4)
        self.goals = draw(16, 2) @ draw(2, 16) / 4, draw(16, 16)

    def loss(self, batch: Tensor) -> Tensor:
        x, z = batch[:, :16], batch[:, 16:]
        errors = self.low(x) - x @ self.goals[0].T, self.full(z) - z @ self.goals[1].T
        total: Tensor = errors[0].square().mean() + errors[1].square().mean()
        return total

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_property_9_ranks_go_where_the_task_has_them(seed: int) -> None:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(100 + seed))
    loader: DataLoader[Tensor] = DataLoader(x, batch_size=32)  # type: ignore[arg-type]
    losses = []
    for uniform in (False, True):
        module = Planted(seed)
        share = 9 * 32 * 2 / 512  # nine groups per layer on average
        if uniform:
            found: list[Callback] = [AdapterInjection(partial(Factorized, rank=9), ["low", "full"], [], verbose=False)]
        else:
            found = [*presets.rankdyna(share, interval=5, targets=["low", "full"], train=[])]
        trainer(*found, max_epochs=40).fit(module, loader)
        with torch.no_grad():
            losses.append(module.loss(x).item())
        ranks = RankBudget.of(module).ranks()
        assert sum(ranks.values()) == 18
        if not uniform:
            assert ranks["low"] < ranks["full"]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("aggregation", ["group", "elementwise_sum"])
def test_property_10_accumulated_it_is_the_same(aggregation: Aggregation) -> None:
    diaries = []
    for accumulate, rows in ((1, 4), (2, 2)):
        found = callbacks(aggregation=aggregation, uncertainty=True)
        diary = Diary(pruning(found))
        trainer(*found, diary, accumulate_grad_batches=accumulate).fit(Module(), data(rows))
        diaries.append(diary)
    one, other = diaries
    assert one.steps[-1] == other.steps[-1] == BATCHES * EPOCHS
    final = dict(zip(other.steps, zip(other.masks, other.rows, other.scores, strict=True), strict=True))
    for step, mask, row, scores in zip(one.steps, one.masks, one.rows, one.scores, strict=True):
        assert final[step][1] == row
        assert torch.equal(final[step][0], mask)
        for name, score in scores.items():
            torch.testing.assert_close(final[step][2][name], score, rtol=1e-3, atol=1e-7)


class Save(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("options", [{}, {"aggregation": "elementwise_mean", "uncertainty": True, "score": "per_cost"}])
@pytest.mark.parametrize("compact", ["never", 2])
def test_property_10_resumed_in_any_phase_it_is_the_same_bit_for_bit(
    tmp_path: Path, compact: Any, options: dict[str, Any]
) -> None:
    whole, found = Module(), callbacks(compact, **options)
    trainer(*found, Save(tmp_path)).fit(whole, data())
    events = pruning(found).policy.state_dict()
    for step in (1, 2, 3, 7, 8, 13, 14, 17):  # warm-up, at and between events, last event, tail
        again, other = Module(), callbacks(compact, **options)
        trainer(*other).fit(again, data(), ckpt_path=str(tmp_path / f"{step}.ckpt"), weights_only=True)
        same(whole, again)
        resumed = pruning(other).policy.state_dict()
        assert resumed["lost"] == events["lost"]
        for key, rows in events["importance"].items():
            for name, row in rows.items():
                assert torch.equal(resumed["importance"][key][name], row)


@pytest.mark.parametrize("ratio", [1.6, 5.0])
def test_property_11_a_budget_above_the_start_prunes_nothing(ratio: float) -> None:
    runs = []
    for found in (
        callbacks(ratio=ratio),
        [AdapterInjection(Factorized, train=[".*"], verbose=False), AdapterCheckpoint()],
    ):
        module = Module()
        trainer(*found).fit(module, data())
        assert RankBudget.of(module).spent_parameters == START
        runs.append(module)
    same(*runs)


@cache
def scored(scale: float | None, aggregation: Aggregation) -> dict[str, Tensor]:
    found = callbacks(aggregation=aggregation, warmup=0.5)
    diary = Diary(pruning(found))
    options: dict[str, Any] = {}
    if scale is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    trainer(*found, diary, max_steps=4, **options).fit(Module(), data())
    return diary.scores[-1]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_property_12_float16_ranks_as_float32_does(aggregation: Aggregation) -> None:
    plain, scaled = scored(None, aggregation), scored(2.0**14, aggregation)
    for name, row in plain.items():
        assert spearman(row.double(), scaled[name].double()) > 0.9
        torch.testing.assert_close(scaled[name], row, rtol=0.1, atol=0.05 * row.max().item())


def test_uncertainty_is_the_running_deviation_from_the_running_worth() -> None:
    net = layers((6, 9))
    budget = RankBudget.of(net)
    importance = GroupImportance(beta=0.7, uncertainty=True)
    importance.track(budget)
    drawn = torch.rand(5, 1, 6)
    mean, deviation = torch.zeros(6), torch.zeros(6)
    for now in drawn:
        importance.fold([now])
        mean = 0.7 * mean + 0.3 * now[0]
        deviation = 0.7 * deviation + 0.3 * (now[0] - mean).abs()
    torch.testing.assert_close(importance.scores()["0"], mean * deviation)
    before = importance.state_dict()
    importance.fold([torch.tensor([[torch.inf] * 6])], expect_overflow=True)
    importance.fold([torch.rand(1, 6)], skipped=torch.ones(()))
    for key, rows in before.items():
        assert torch.equal(importance.state_dict()[key]["0"], rows["0"])


def test_a_layer_may_be_left_with_its_bias_alone() -> None:
    class Zeros(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.net[0].gate.gain.zero_()
                pl_module.net[0].U.zero_()

    for compact in ("never", 1):
        module = Module()
        trainer(*callbacks(compact, minimum=0, ratio=0.6), Zeros()).fit(module, data())
        assert RankBudget.of(module).ranks()["net.0"] == 0
        assert bool(torch.isfinite(module.net(torch.randn(2, 6))).all())


def test_everything_is_trained() -> None:
    module = Module()
    inject(module, Factorized, train=[".*"])
    assert all(p.requires_grad for p in module.parameters())
    start = copy.deepcopy(module.state_dict())
    trainer(*callbacks()).fit(module, data())
    for key, value in module.state_dict().items():
        if not key.endswith("mask"):
            assert not torch.equal(value, start[key]), key


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GroupImportance("sum"), "aggregation='sum': choose 'group', 'taylor_sq', 'elementwise_sum', 'elem"),  # type: ignore[arg-type]
        (lambda: rankdyna.policy(Budget(rank=2), score="cost"), "score='cost': choose 'worth' or 'per_cost'"),  # type: ignore[arg-type]
        (lambda: presets.rankdyna(0.5, budget=Budget(rank=2)), "give ratio or budget, not both. Got ratio=0.5"),
        (lambda: presets.rankdyna(0.0), "a budget's dense_share must be positive and finite. Got 0.0"),
        (lambda: presets.rankdyna(budget=Budget(rank=2), score="per_cost"), "compare='worth_per_cost' weighs"),
        (
            lambda: RankPolicy(
                rankdyna.policy(Budget(rank=2)).schedule,
                GroupImportance(),
                Budget(rank=2),
                soft=True,
                irreversible=True,
            ),
            "soft=True lets components return, and irreversible=True does not",
        ),
    ],
)
def test_mistakes_are_told(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_elementwise_reads_the_factors_of_a_factorised_layer() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    inject(net, partial(LoRA, rank=2), targets=["0"], train=[])
    with pytest.raises(TypeError, match="aggregation='elementwise_sum' reads the factors of Factorized, and .*LoRA"):
        GroupImportance("elementwise_sum").track(RankBudget.of(net))


def test_elementwise_needs_whole_factors() -> None:
    net = layers((6, 9))
    net[0].U._fsdp_flattened = True  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="which FSDP1 has in flat slices. Use 'group', which needs a gate only"):
        GroupImportance("elementwise_mean").track(RankBudget.of(net))
