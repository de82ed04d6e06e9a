"""One notion of rank: whatever the method, the same monitor, checkpoint, resume, merge and export serve it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from presets.every import NAMES, adapts_models, has_head_module, injection_of, releases_base, small
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft import RankBudget, RankPolicy, RankPruning, load, merge, presets, to_hf_peft
from lightning_peft.rank.policy import Policy
from lightning_peft.testing.case import close, same

pytestmark = pytest.mark.filterwarnings("ignore:masks have learned to keep")  # runs are short

every_preset = pytest.mark.parametrize("name", NAMES)


class Classifier(L.LightningModule):
    """A user's module: it computes its own loss and knows nothing of adapters."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.model = BertForSequenceClassification(config)
        self.logged: list[dict[str, float]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)


def tokens() -> Tensor:
    return torch.randint(40, (64, 6), generator=torch.Generator().manual_seed(0))


def loader() -> DataLoader[Any]:
    rows = [(row, (row[0] > 19).long()) for row in tokens()]
    return DataLoader(rows, batch_size=8, shuffle=True)  # type: ignore[arg-type]  # a list is a dataset


class StopAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise SystemExit


def fit(
    method: str | Sequence[L.Callback], *extra: L.Callback, ckpt_path: Path | None = None, logger: Any = False
) -> tuple[Classifier, Any]:
    """One run of a preset, by name, or of its callbacks; the same seed for all."""
    torch.manual_seed(5)
    net = Classifier()
    callbacks = small(method) if isinstance(method, str) else method
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1, callbacks=[*callbacks, *extra],
    )  # fmt: skip
    trainer.fit(net, loader(), ckpt_path=ckpt_path)
    return net, trainer


def state(net: Classifier, trainer: L.Trainer) -> dict[str, Any]:
    """All that a run leaves: weights, masks, optimizer state, and what the callbacks would save."""
    found: dict[str, Any] = dict(net.state_dict())
    for i, entry in trainer.optimizers[0].state_dict()["state"].items():
        found |= {f"optimizer.{i}.{key}": torch.as_tensor(value) for key, value in entry.items()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RankPruning):
            found |= flat("policy", callback.state_dict())
    return found


def flat(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(f"{prefix}.{key}", part).items()}
    return {prefix: value}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every preset's finished run, made once."""
    runs: dict[str, tuple[Classifier, Any, Path]] = {}

    def run(name: str) -> tuple[Classifier, Any, Path]:
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            net, trainer = fit(name, logger=CSVLogger(folder))
            trainer.save_checkpoint(folder / "end.ckpt")
            runs[name] = net, trainer, folder
        return runs[name]

    return run


@every_preset
def test_ranks_are_logged(name: str, trained: Any) -> None:
    net, _, folder = trained(name)
    (file,) = folder.rglob("metrics.csv")
    header, *rows = file.read_text().splitlines()
    columns = header.split(",")
    last = {column: [row.split(",")[i] for row in rows if row.split(",")[i]][-1] for i, column in enumerate(columns)}
    budget = RankBudget.of(net)
    assert {f"rank/{layer}": float(rank) for layer, rank in budget.ranks().items()} == {
        key: float(value) for key, value in last.items() if key.removeprefix("rank/") in budget.extents
    }
    assert float(last["rank/open"]) == budget.spent > 0


# warm-up, between events, an event, the step after it, the tail
@every_preset
@pytest.mark.parametrize("stop", [1, 7, 10, 11, 21])
def test_interrupted_is_uninterrupted(name: str, stop: int, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(name, StopAt(stop, tmp_path / "stop.ckpt"))
    resumed = state(*fit(name, ckpt_path=tmp_path / "stop.ckpt"))
    assert not differences(resumed, state(*trained(name)[:2]))


def differences(resumed: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    assert resumed.keys() == whole.keys()
    return [
        key
        for key, value in whole.items()
        if not (torch.equal(value, resumed[key]) if isinstance(value, Tensor) else value == resumed[key])
    ]


@every_preset
def test_checkpoint_holds_no_base_and_loads_in_a_bare_script(name: str, trained: Any) -> None:
    net, _, folder = trained(name)
    saved = torch.load(folder / "end.ckpt", weights_only=True)["state_dict"]
    everything = injection_of(name).train == (".*",)  # the base is trained too: what is frozen is not there
    own = {key for key, p in net.named_parameters() if p.requires_grad and everything}
    own |= {key for key in saved if key.startswith("model.base.classifier.")}  # trained, below what adapts the model
    assert not [key for key in saved if (".base." in key or "embeddings" in key) and key not in own]
    same(load(Classifier(), folder / "end.ckpt").eval()(tokens()), net.eval()(tokens()), "loaded and trained outputs")


@every_preset
def test_merged_model_is_the_trained_one(name: str, trained: Any) -> None:
    net = copy.deepcopy(trained(name)[0]).eval()
    before = net(tokens())
    if adapts_models(name):
        with pytest.raises(TypeError, match="merge cannot write these adapters into a weight"):
            merge(net)
        same(net(tokens()), before, "outputs before and after a refusal")
        return
    merge(net)
    assert not RankBudget.of(net)
    close(net(tokens()), before, "merged and trained outputs", rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if not (releases_base(name) or has_head_module(name))])
def test_stock_peft_loads_the_export(name: str, trained: Any, tmp_path: Path) -> None:
    net = copy.deepcopy(trained(name)[0]).eval()
    if name == "dept":
        with pytest.raises(TypeError, match="adds offsets to the text's embeddings, for which PEFT has no place"):
            to_hf_peft(net, tmp_path / "adapter")
        return
    report = to_hf_peft(net, tmp_path / "adapter", check="peft", inputs={"input_ids": tokens()})
    assert report.max_difference < 1e-5
    assert report.ranks == RankBudget.of(net if adapts_models(name) else net.model).ranks()


def cuts() -> list[tuple[str, str | int]]:
    """Every way to cut closed components out that a preset takes, and every second event with its policy made hard."""
    found: list[tuple[str, str | int]] = []
    for name in NAMES:
        function = getattr(presets, name)
        if "compact" in inspect.signature(function).parameters:
            hint = get_type_hints(function)["compact"]
            choices = [choice for part in (hint, *get_args(hint)) for choice in get_args(part)]
            found += [(name, cut) for cut in choices if isinstance(cut, str) and cut != "never"]
        found += [(name, 2) for each in small(name) if isinstance(each, RankPruning) if hard(each.policy)]
    return found


def hard(policy: Policy) -> RankPolicy | None:
    """The same policy with closed components that stay closed, where components are closed to a budget."""
    if not isinstance(policy, RankPolicy):
        return None
    if policy.returning is None:
        return policy
    return RankPolicy(policy.schedule, policy.importance, policy.final, policy.interval, minimum=policy.minimum)


def cutting(name: str, cut: str | int, **also: Any) -> list[L.Callback]:
    """The preset that cuts; with a tail, and without dropout, of which an adapter that has gone would draw none."""
    also = {"tail": 0.5, "dropout": 0.0, **also}
    if isinstance(cut, str):
        return list(small(name, compact=cut, **also))
    callbacks: list[L.Callback] = []
    for each in small(name, **also):
        policy = hard(each.policy) if isinstance(each, RankPruning) else None
        callbacks.append(each if policy is None else RankPruning(policy, cut))
    return callbacks


every_cut = pytest.mark.parametrize(("name", "cut"), cuts())


@pytest.fixture(scope="module")
def cut_runs() -> Any:
    """The finished run of every cut, made once."""
    runs: dict[tuple[str, str | int], tuple[Classifier, Any]] = {}

    def run(name: str, cut: str | int) -> tuple[Classifier, Any]:
        if (name, cut) not in runs:
            runs[name, cut] = fit(cutting(name, cut))
        return runs[name, cut]

    return run


def test_there_are_cuts_of_all_kinds() -> None:
    assert {cut for _, cut in cuts()} == {"final", "at_once", 2}


@every_cut
def test_what_is_cut_is_what_the_mask_had_closed(name: str, cut: str | int, cut_runs: Any) -> None:
    net, _ = cut_runs(name, cut)
    budget = RankBudget.of(net)
    left = sum(len(site.gate) for site in budget.values())
    assert left == budget.spent < budget.capacity
    if isinstance(cut, str):  # in between, a mask may open again what a cut has taken away
        # Orthogonality looks at closed components as long as they are there.
        net, masked = (fit(cutting(name, when, orthogonality=0.0))[0] for when in (cut, "never"))
        assert RankBudget.of(net).ranks() == RankBudget.of(masked).ranks()
        # the same sums in another order, for half of the run or all of it
        close(net.eval()(tokens()), masked.eval()(tokens()), "cut and masked outputs", rtol=1e-3, atol=1e-4)


@every_preset
def test_no_preset_is_cut_where_a_component_may_return(name: str) -> None:
    for each in small(name):
        if isinstance(each, RankPruning) and each.policy.returning is None:
            assert RankPruning(each.policy, 2).compact == 2
        elif isinstance(each, RankPruning):
            with pytest.raises(ValueError, match=r"compact=2 would cut at events before the last, and .*'final'"):
                RankPruning(each.policy, 2)


# between the first cut at an event and the last event; the step after the last event
@every_cut
@pytest.mark.parametrize("stop", [11, 13])
def test_a_run_that_cuts_can_be_interrupted(
    name: str, cut: str | int, stop: int, cut_runs: Any, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        fit(cutting(name, cut), StopAt(stop, tmp_path / "stop.ckpt"))
    resumed = state(*fit(cutting(name, cut), ckpt_path=tmp_path / "stop.ckpt"))
    assert not differences(resumed, state(*cut_runs(name, cut)))
