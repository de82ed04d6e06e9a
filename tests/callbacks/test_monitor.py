from __future__ import annotations

import csv
import logging
import re
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import AdapterInjection, Budget, DynamicDoRA, LoRA, RankBudget, RankMonitor, RankPruning, presets
from lightning_peft.callbacks import monitor as monitor_file
from lightning_peft.heat_map import HeatMap

STEPS, WIDTH, RANK, FINAL = 20, 8, 4, 2


class Net(LightningModule):
    """Two blocks of two kinds of layer, and a head."""

    def __init__(self, lr: float = 0.01, remember: bool = False) -> None:
        super().__init__()
        if remember:
            self.save_hyperparameters()
        self.lr = lr
        blocks = [nn.ModuleDict({"query": nn.Linear(WIDTH, WIDTH), "dense": nn.Linear(WIDTH, 12)}) for _ in range(2)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(blocks)})
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 12)
        for block in self.encoder["layer"]:
            x = x + block["query"](x).tanh()
            out = out + block["dense"](x)
        return self.head(out)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Validated(Net):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/score", self(batch[0]).mean())
        self.log("val/loss", self(batch[0]).square().mean())


class Witness(Callback):
    """What the ranks really are: at the start, after each event, and at the end."""

    def __init__(self) -> None:
        self.ranks: dict[int, dict[str, int]] = {}
        self.scores: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pruning = next(c for c in trainer.callbacks if isinstance(c, RankPruning))
        if 0 < pruning.event_step == trainer.global_step:
            self.ranks[trainer.global_step] = RankBudget.of(pl_module).ranks()
            self.scores[trainer.global_step] = {n: s.clone() for n, s in pruning.policy.importance.scores().items()}


def data(batches: int = STEPS) -> DataLoader:
    x = torch.randn(batches * 4, WIDTH, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size=4)


def preset(**changes: Any) -> list[Callback]:
    settings = {"final_rank": FINAL, "initial_rank": RANK, "interval": 3, "targets": ["query", "dense"]} | changes
    return presets.dynamic_dora(**settings)


def trainer_of(callbacks: list[Callback], **changes: Any) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "log_every_n_steps": 7,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    return Trainer(callbacks=callbacks, **(settings | changes))


def events_of(logger: TensorBoardLogger) -> EventAccumulator:
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0, "tensors": 0}).Reload()


def curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    points = [(point.step, point.value) for point in events.Scalars(tag)]
    assert len(dict(points)) == len(points), f"{tag} was written twice at a step"
    return dict(points)


def row(events: EventAccumulator) -> tuple[dict[str, Any], list[str]]:
    """The run's record in HPARAMS: settings and names of metrics. The accumulator keeps the first, as the tab does."""
    start = metadata.parse_session_start_info_plugin_data(
        events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    )
    experiment = metadata.parse_experiment_plugin_data(
        events.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    )
    params = {k: v.string_value or v.number_value for k, v in start.hparams.items()}
    return params, [info.name.tag for info in experiment.metric_infos]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    """One fit, that the tests which only read look at."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logger = TensorBoardLogger(tmp_path_factory.mktemp("run"))
        *ours, checkpoint = preset()
        witness, module = Witness(), Validated(remember=True)
        trainer = trainer_of([*ours, witness, checkpoint], logger=logger)
        trainer.fit(module, data(), data(2))
        yield Namespace(events=events_of(logger), witness=witness, module=module, logger=logger)


LAYERS = [f"encoder.layer.{i}.{kind}" for i in (0, 1) for kind in ("query", "dense")]


def test_scalars_are_the_ranks_at_the_start_at_events_and_at_the_end(run: Namespace) -> None:
    assert sorted(run.witness.ranks) == [3, 6, 9, 10]
    ranks = {0: dict.fromkeys(LAYERS, RANK), **run.witness.ranks, STEPS: run.witness.ranks[10]}
    spent = curve(run.events, "rank/spent")
    assert {step: spent[step] for step in ranks} == {step: sum(rank.values()) for step, rank in ranks.items()}
    assert spent[0] == len(LAYERS) * RANK
    assert spent[STEPS] == len(LAYERS) * FINAL
    assert curve(run.events, "rank/budget") == curve(run.events, "rank/open") == spent
    for layer in LAYERS:
        points = curve(run.events, f"rank/{layer}")
        assert {step: points[step] for step in ranks} == {step: rank[layer] for step, rank in ranks.items()}


def test_between_events_the_last_one_is_written_again_every_log_step(run: Namespace) -> None:
    spent = curve(run.events, "rank/spent")
    assert sorted(spent) == [0, 3, 6, 7, 9, 10, 14, STEPS]
    assert spent[7] == spent[6] > spent[10] == spent[14]


def test_every_term_of_the_loss_arrives(run: Namespace) -> None:
    assert set(curve(run.events, "loss/task")) == {6, 13}
    assert 6 in curve(run.events, "loss/dem")


def test_one_heat_map_per_event_shows_the_ranks(run: Namespace) -> None:
    ranks = {0: dict.fromkeys(LAYERS, RANK), **run.witness.ranks}
    picture = HeatMap(LAYERS, RANK)
    images = run.events.Images("rank/heatmap")
    assert [image.step for image in images] == sorted(ranks)
    for image in images:
        with Image.open(BytesIO(image.encoded_image_string)) as decoded:
            assert decoded.format == "PNG"
            assert decoded.size == (350, 103)
            assert np.array_equal(np.asarray(decoded), picture.draw(ranks[image.step]))


def test_importance_histograms_count_every_component(run: Namespace) -> None:
    kinds = {"all": LAYERS, "query": LAYERS[::2], "dense": LAYERS[1::2]}
    assert {f"importance/{kind}" for kind in kinds} == set(run.events.Tags()["histograms"])
    for kind, layers in kinds.items():
        points = {point.step: point.histogram_value for point in run.events.Histograms(f"importance/{kind}")}
        assert sorted(points) == sorted(run.witness.scores)
        for step, histogram in points.items():
            scores = torch.cat([run.witness.scores[step][layer] for layer in layers])
            assert histogram.num == len(scores) == len(layers) * RANK
            assert histogram.sum == pytest.approx(scores.sum().item(), rel=1e-5)


def test_charts_hold_the_scalars_that_they_name(run: Namespace) -> None:
    layout = Layout.FromString(run.events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag for category in layout.category for chart in category.chart}
    tags = run.events.Tags()["scalars"]
    held = {title: {t for t in tags if any(re.match(p, t) for p in patterns)} for title, patterns in charts.items()}
    assert held == {
        "budget and spent": {"rank/budget", "rank/spent"},
        "rank per layer": {f"rank/{layer}" for layer in LAYERS},
        "losses": {"loss/task", "loss/dem", "val/loss"},
    }


def test_charts_hold_them_under_a_loggers_own_prefix() -> None:
    logger = TensorBoardLogger(".", prefix="first")
    trainer_of(preset(), logger=logger).fit(Net(), data())
    events = events_of(logger)
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    patterns = layout.category[0].chart[0].multiline.tag
    tags = {tag for tag in events.Tags()["scalars"] if any(re.match(pattern, tag) for pattern in patterns)}
    assert tags == {"first-rank/budget", "first-rank/spent"}


def test_hparams_has_the_modules_settings_ours_and_metrics_that_have_values(run: Namespace) -> None:
    params, metrics = row(run.events)
    assert params == {
        "lr": 0.01,
        "remember": 1.0,
        "adapter": "DynamicDoRA",
        "adapter/rank": RANK,
        "adapter/alpha": 8.0,
        "adapter/dropout": pytest.approx(0.1),
        "budget": "Budget(rank=2)",
        "schedule": "SlowCubic(warmup=0.15, tail=0.5)",
    }
    assert metrics[:4] == ["val/score", "rank/spent", "rank/budget", "rank/open"]
    assert {"val/loss", "loss/task"} <= set(metrics)
    assert set(metrics) <= set(run.events.Tags()["scalars"]), "the tab takes the values from the scalars"
    assert (Path(run.logger.log_dir) / "hparams.yaml").read_text() == "lr: 0.01\nremember: true\n"
    assert run.logger._default_hp_metric, "the logger is left as it was"


def test_hparams_without_any_of_the_module_and_without_pruning() -> None:
    logger = TensorBoardLogger(".")
    trainer_of(presets.lora(rank=3, targets=["query", "dense"]), logger=logger).fit(Net(), data())
    events = events_of(logger)
    params, metrics = row(events)
    assert params["adapter"] == "LoRA"
    assert params["adapter/rank"] == 3
    assert (params["budget"], params["schedule"]) == ("all", "none")
    assert metrics == ["rank/spent", "rank/budget", "rank/open"]
    assert curve(events, "rank/spent") == curve(events, "rank/budget") == {0: 12.0, STEPS: 12.0}
    assert [image.step for image in events.Images("rank/heatmap")] == [0], "ranks that stay are drawn once"


class OwnRecord(Net):
    def on_train_start(self) -> None:
        self.loggers[0].log_hyperparams({"mine": 3}, {"my/score": 0.0})


def test_a_record_that_the_module_writes_itself_stays() -> None:
    logger = TensorBoardLogger(".", default_hp_metric=False)
    trainer_of(preset(), logger=logger).fit(OwnRecord(), data())
    assert row(events_of(logger)) == ({"mine": 3.0}, ["my/score"])
    assert not logger._default_hp_metric


class Breaks(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 5:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


def test_a_run_that_breaks_has_its_row_and_frees_the_logger() -> None:
    logger = TensorBoardLogger(".")
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer_of(preset(), logger=logger).fit(Breaks(remember=True), data())
    params, metrics = row(events_of(logger))
    assert (params["lr"], params["adapter"]) == (0.01, "DynamicDoRA")
    assert metrics == ["rank/spent", "rank/budget", "rank/open"]
    assert logger._default_hp_metric


def test_spent_and_budget_are_in_parameters_if_the_budget_is() -> None:
    logger, module = TensorBoardLogger("."), Net()
    trainer_of(preset(final_rank=None, budget=Budget(parameters=120)), logger=logger).fit(module, data())
    events, capacity = events_of(logger), 2 * RANK * (16 + 20)
    spent, budget, opened = (curve(events, f"rank/{name}") for name in ("spent", "budget", "open"))
    assert (spent[0], budget[0], opened[0]) == (capacity, capacity, 4 * RANK)
    assert budget[STEPS] == 120
    assert spent[STEPS] == RankBudget.of(module).spent_parameters <= 120
    assert opened[STEPS] == RankBudget.of(module).spent


def test_steps_are_optimizer_steps_under_accumulation() -> None:
    logger, witness = TensorBoardLogger("."), Witness()
    *ours, checkpoint = preset()
    trainer = trainer_of([*ours, witness, checkpoint], logger=logger, accumulate_grad_batches=2)
    trainer.fit(Net(), data())
    assert sorted(witness.ranks) == [1, 4, 5]
    assert sorted(curve(events_of(logger), "rank/spent")) == [0, 1, 4, 5, 7, 10]


def test_long_runs_get_every_scalar_and_fewer_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_file, "_PICTURES", 5)
    logger = TensorBoardLogger(".")
    trainer_of(preset(interval=1), logger=logger).fit(Net(), data())
    events = events_of(logger)
    assert set(range(3, 11)) < set(curve(events, "rank/spent"))
    assert [image.step for image in events.Images("rank/heatmap")] == [0, 4, 8, 10]
    assert [point.step for point in events.Histograms("importance/all")] == [4, 8, 10]


def test_components_that_came_back_are_shown_at_the_end() -> None:
    logger, module = TensorBoardLogger("."), Net()
    with pytest.warns(UserWarning, match="before the rank schedule's last cut"):
        trainer_of([*preset(warmup=0.0, tail=0.1), StopAt(13)], logger=logger).fit(module, data())
    events = events_of(logger)
    spent = curve(events, "rank/spent")
    assert spent[12] < spent[13] == RankBudget.of(module).spent == 16, "removal was soft"
    assert [image.step for image in events.Images("rank/heatmap")] == [0, 3, 6, 9, 12, 13]


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


class SaveAt(Callback):
    def __init__(self, step: int, path: str) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_goes_on_from_the_last_event() -> None:
    def fit(name: str, checkpoint: str | None = None) -> EventAccumulator:
        torch.manual_seed(1)
        logger = TensorBoardLogger(".", name)
        callbacks = [*preset(warmup=0.0, tail=0.1, dropout=0.0), SaveAt(14, f"{name}.ckpt")]
        trainer_of(callbacks, logger=logger).fit(Net(), data(), ckpt_path=checkpoint)
        return events_of(logger)

    before = fit("whole")
    after = fit("resumed", "whole.ckpt")
    assert curve(before, "rank/spent")[12] < 16
    for tag in ("rank/spent", "rank/budget", *(f"rank/{layer}" for layer in LAYERS)):
        first, second = curve(before, tag), curve(after, tag)
        assert min(second) == 14
        assert second[14] == first[12], "soft removal has components back by step 14: what step 12 decided still holds"
        assert {step: value for step, value in second.items() if step > 14} == {
            s: v for s, v in first.items() if s > 14
        }


def test_a_second_fit_starts_from_what_is_there() -> None:
    module, first, second = Net(), TensorBoardLogger(".", "first"), TensorBoardLogger(".", "second")
    callbacks = preset()
    trainer_of(callbacks, logger=first).fit(module, data())
    ranks = RankBudget.of(module).ranks()
    trainer_of(callbacks, logger=second).fit(module, data())
    events = events_of(second)
    assert {layer: curve(events, f"rank/{layer}")[0] for layer in LAYERS} == ranks
    assert curve(events, "rank/budget")[STEPS] == len(LAYERS) * FINAL


def test_any_logger_gets_the_scalars() -> None:
    board, other, table = TensorBoardLogger(".", "one"), TensorBoardLogger(".", "two"), CSVLogger(".", "csv")
    trainer_of(preset(), logger=[board, table, other]).fit(Net(), data())
    with (Path(table.log_dir) / "metrics.csv").open() as file:
        spent = {int(line["step"]): float(line["rank/spent"]) for line in csv.DictReader(file) if line["rank/spent"]}
    assert spent == curve(events_of(board), "rank/spent") == curve(events_of(other), "rank/spent")
    assert len(events_of(other).Images("rank/heatmap")) == 5


@pytest.mark.parametrize("changes", [{"logger": False}, {"fast_dev_run": True}], ids=["no logger", "fast_dev_run"])
def test_runs_that_log_nothing_run(changes: dict[str, Any]) -> None:
    trainer, module = trainer_of(preset(), **changes), Net()
    trainer.fit(module, data())
    assert trainer.state.finished
    assert RankBudget.of(module).spent == len(LAYERS) * FINAL


def test_a_fit_without_a_batch_ends_well() -> None:
    logger = TensorBoardLogger(".")
    trainer_of(presets.lora(rank=3, targets=["query"]), logger=logger, limit_train_batches=0).fit(Net(), data())
    assert logger._default_hp_metric


def test_validation_alone_shows_nothing() -> None:
    logger = TensorBoardLogger(".")
    trainer_of(preset(), logger=logger).validate(Validated(), data(2), verbose=False)
    events = events_of(logger)
    assert "val/loss" in events.Tags()["scalars"]
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("rank")]
    assert events.Tags()["images"] == []


class Reads(Callback):
    """What the progress bar would show after each batch."""

    def __init__(self, bar: TQDMProgressBar | RichProgressBar) -> None:
        self.bar = bar
        self.shown: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.shown[trainer.global_step] = self.bar.get_metrics(trainer, pl_module)["rank"]


@pytest.mark.parametrize("bar", [TQDMProgressBar(), RichProgressBar()], ids=["tqdm", "rich"])
def test_progress_bar_shows_spent_over_the_final_budget(
    bar: TQDMProgressBar | RichProgressBar, capsys: pytest.CaptureFixture[str]
) -> None:
    reads = Reads(bar)
    trainer_of([*preset(), reads, bar], enable_progress_bar=True).fit(Validated(), data(), data(1))
    assert [reads.shown[step] for step in (1, 8, 9, 10, STEPS)] == ["16/8", "16/8", "11/8", "8/8", "8/8"]
    assert re.search(r"rank(=|:\s+)8/8", "".join(capsys.readouterr()))


class Amounts(Witness):
    """Also the ranks at the start, and what the bar shows."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # by the masks: gains that start at zero have not had a chance
        self.ranks[0] = {name: int(site.gate.mask.sum()) for name, site in RankBudget.of(pl_module).items()}
        self.shown = {0: trainer.progress_bar_metrics["rank"]}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        super().on_train_batch_end(trainer, pl_module)
        self.shown[trainer.global_step] = trainer.progress_bar_metrics["rank"]


GROWS = partial(presets.increlora, 2, max_rank=RANK, interval=3, targets=["query", "dense"])
SHRINKS = partial(presets.sora, 0.06, rank=RANK, interval=3, tail=0.3, targets=["query", "dense"])


@pytest.mark.parametrize(
    ("callbacks", "setting", "last"),
    [(GROWS, "Budget(rank=2)", 8), (SHRINKS, "soft threshold 0.06", 16)],
    ids=["a budget that grows", "no budget at all"],
)
def test_ranks_that_grow_and_ranks_without_a_budget_are_shown(callbacks: Any, setting: str, last: int) -> None:
    torch.manual_seed(0)
    logger, seen = TensorBoardLogger("."), Amounts()
    *ours, checkpoint = callbacks()
    trainer_of([*ours, seen, checkpoint], logger=logger).fit(Net(), data())
    events, pruning = events_of(logger), next(each for each in ours if isinstance(each, RankPruning))
    total = {step: sum(ranks.values()) for step, ranks in seen.ranks.items()}
    assert len(total) > 3
    assert len(set(total.values())) > 2
    assert (sorted(total.values()) == list(total.values())) == (callbacks is GROWS)
    spent, budget = curve(events, "rank/spent"), curve(events, "rank/budget")
    assert {step: spent[step] for step in total} == total
    assert {step: budget[step] for step in total} == {step: pruning.policy.budget_at(step, STEPS) for step in total}
    assert budget[STEPS] == last
    for layer in LAYERS:
        points = curve(events, f"rank/{layer}")
        assert {step: points[step] for step in total} == {step: ranks[layer] for step, ranks in seen.ranks.items()}
    assert {step: seen.shown[step] for step in total} == {step: f"{rank}/{last}" for step, rank in total.items()}
    params, metrics = row(events)
    assert params["budget"] == setting
    assert metrics[:3] == ["rank/spent", "rank/budget", "rank/open"]
    picture = HeatMap(LAYERS, RANK)  # colours from none to all that there is room for
    images = {image.step: image.encoded_image_string for image in events.Images("rank/heatmap")}
    assert sorted(images) == sorted(total)
    for step, image in images.items():
        with Image.open(BytesIO(image)) as decoded:
            assert np.array_equal(np.asarray(decoded), picture.draw(seen.ranks[step]))


@pytest.mark.parametrize(("amount", "text"), [(412, "412"), (98_304, "98.3k"), (1_327_104, "1.33M"), (0, "0")])
def test_large_budgets_are_short_in_the_bar(amount: int, text: str) -> None:
    assert monitor_file._short(amount) == text


def test_a_table_of_ranks_is_printed_when_fit_ends(caplog: pytest.LogCaptureFixture) -> None:
    module, printed = Net(), logging.getLogger("lightning.pytorch.utilities.rank_zero")
    printed.addHandler(caplog.handler)
    try:
        trainer_of(preset()).fit(module, data())
    finally:
        printed.removeHandler(caplog.handler)
    table = f"Ranks after {STEPS} steps\n{RankBudget.of(module).table()}"
    assert {record.message for record in caplog.records if record.message.startswith("Ranks")} == {table}
    assert "8/16" in table


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Counted(RankMonitor):
    """The monitor, with the tensor operations that it causes after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[int, int] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        with Calls() as calls:
            super().on_train_batch_end(trainer, pl_module, *rest)
        self.calls[trainer.global_step] = calls.count


def test_no_tensor_is_touched_between_events() -> None:
    counted = Counted()
    callbacks = [counted if isinstance(callback, RankMonitor) else callback for callback in preset()]
    trainer_of(callbacks, logger=TensorBoardLogger(".")).fit(Net(), data())
    assert {step for step, count in counted.calls.items() if count} == {3, 6, 9, 10}


def test_pruning_after_the_monitor_is_refused() -> None:
    injection, pruning, *_ = preset()
    with pytest.raises(
        MisconfigurationException, match="RankMonitor comes before RankPruning .* put RankPruning first"
    ):
        trainer_of([injection, RankMonitor(), pruning]).fit(Net(), data())


def test_nothing_to_watch_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="found no adapter to watch. Put AdapterInjection before it"):
        trainer_of([RankMonitor()]).fit(Net(), data())


def test_mixed_adapters_are_all_named() -> None:
    logger = TensorBoardLogger(".")

    def either(layer: nn.Module) -> Any:
        kind = LoRA if isinstance(layer, nn.Linear) and layer.out_features == WIDTH else DynamicDoRA
        return kind(layer, rank=3)

    trainer_of([AdapterInjection(either, ["query", "dense"]), RankMonitor()], logger=logger).fit(Net(), data())
    params, _ = row(events_of(logger))
    assert (params["adapter"], params["adapter/rank"], params["adapter/alpha"]) == (
        "LoRA, DynamicDoRA",
        3.0,
        "16.0, 8.0",
    )
