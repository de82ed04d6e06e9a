"""A compression that was stopped goes on where it stood, to the same bits; nothing half-written meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_peft import cli
from lightning_peft.archive import AdapterFileError
from lightning_peft.compression import job
from lightning_peft.compression.job import compress
from lightning_peft.compression.report import Report
from lightning_peft.compression.task import Source
from lightning_peft.modules import TextClassifier

pytestmark = pytest.mark.usefixtures("in_this_process")

LEFT = Path("out.unfinished")


class Stopped(Exception):
    """The plug was pulled."""


@pytest.fixture
def encoder(models: SimpleNamespace, tmp_path: Path) -> str:
    """The trained encoder, with dropout: what it draws must go on, too."""
    folder = Path(shutil.copytree(models.encoder, tmp_path / "encoder"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.1}))
    return str(folder)


def run(encoder: str, csv: str, out: str = "out", **options: Any) -> Report:
    return compress(
        encoder, Source(csv, test=csv, batch_size=16), out, progress=False, calibration=2, save_every=0.0, **options
    )


class Steps:
    """Counts calls of `training_step`, of calibration and training alike, and pulls the plug at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.stop = 0, 0
        original: Callable[..., Any] = TextClassifier.training_step

        def step(module: TextClassifier, batch: Any, batch_idx: int) -> Any:
            self.count += 1
            if self.count == self.stop:
                raise Stopped
            return original(module, batch, batch_idx)

        monkeypatch.setattr(TextClassifier, "training_step", step)

    def until(self, stop: int) -> None:
        self.count, self.stop = 0, stop


def same(one: str, two: str) -> bool:
    first, second = (load_file(f"{out}/model.safetensors") for out in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:masks have learned to keep")  # too few steps to learn much: not the point here
@pytest.mark.parametrize(
    ("options", "stop", "again"),
    [
        pytest.param({"method": "fwsvd"}, 2, 2, id="calibration of an SVD"),
        pytest.param({"method": "ars", "steps": 6}, 2, 8, id="calibration of ARS"),
        pytest.param({"method": "ars", "steps": 6}, 3, 6, id="statistics are there, and no step is"),
        pytest.param({"method": "ars", "steps": 6}, 7, 2, id="training of ARS"),
        pytest.param({"method": "rankdyna", "steps": 20}, 17, 4, id="training of RankDyna, after cuts"),
        pytest.param({"method": "svd", "fine_tuning": 8, "distill": 0.5}, 6, 3, id="fine-tuning"),
        pytest.param({"method": "ars", "steps": 6, "fine_tuning": 4}, 10, 3, id="fine-tuning after ARS"),
        pytest.param({"method": "rankdyna", "steps": 20, "fine_tuning": 4}, 22, 3, id="fine-tuning after RankDyna"),
    ],
)
def test_it_goes_on_to_the_same_bits(
    models: SimpleNamespace,
    encoder: str,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    stop: int,
    again: int,
) -> None:
    steps = Steps(monkeypatch)
    whole = run(encoder, models.csv, "whole", **options)
    steps.until(stop)
    with pytest.raises(Stopped):
        run(encoder, models.csv, **options)
    assert not Path("out").exists()
    assert LEFT.is_dir()
    steps.until(0)
    torch.rand(3)  # what the caller draws in between is no matter
    report = run(encoder, models.csv, **options)
    assert steps.count == again
    assert same("out", "whole")
    for figure in ("ranks", "ratio", "dense", "quality_before", "quality_compressed", "quality_after", "steps"):
        assert getattr(report, figure) == getattr(whole, figure), figure
    assert sorted(path.name for path in Path().iterdir() if "out" in path.name) == ["out"]


@pytest.mark.filterwarnings("ignore:masks have learned to keep")
def test_it_goes_on_where_the_dense_model_has_no_quality_to_measure(
    models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head is new, so that the first thing that is kept is a checkpoint."""
    steps = Steps(monkeypatch)
    options: dict[str, Any] = {"task": "classification", "method": "rankdyna", "steps": 20}
    run(models.headless, models.csv, "whole", **options)
    steps.until(17)
    with pytest.raises(Stopped):
        run(models.headless, models.csv, **options)
    with pytest.raises(FileExistsError, match=r"steps was 20 and is 30\."):
        run(models.headless, models.csv, **(options | {"steps": 30}))
    steps.until(0)
    run(models.headless, models.csv, **options)
    assert steps.count == 4
    assert same("out", "whole")
    assert not LEFT.exists()


def test_a_full_disk_at_the_end_costs_the_writing_alone(
    models: SimpleNamespace, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    options: dict[str, Any] = {"method": "fwsvd", "fine_tuning": 4}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as short, pytest.raises(OSError, match="No space left"):
        short.setattr(job, "save_compressed", full)
        run(encoder, models.csv, **options)
    assert not Path("out").exists()
    steps.until(0)
    report = run(encoder, models.csv, **options)
    assert steps.count == 0
    run(encoder, models.csv, "whole", **options)
    assert same("out", "whole")
    assert report.seconds["compression"] > 0
    assert report.seconds["fine-tuning"] > 0
    assert not LEFT.exists()


def test_time_counts_over_the_runs(models: SimpleNamespace, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.until(4)
    with pytest.raises(Stopped):
        run(encoder, models.csv, method="svd", fine_tuning=5)
    file = LEFT / "fine-tuning.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["callbacks"]["Saving"]["seconds"] += 1000.0
    torch.save(checkpoint, file)
    found = json.loads((LEFT / "job.json").read_text())
    found["stages"]["the dense model"]["seconds"] += 500.0
    (LEFT / "job.json").write_text(json.dumps(found))
    steps.until(0)
    seconds = run(encoder, models.csv, method="svd", fine_tuning=5).seconds
    assert 1000 < seconds["fine-tuning"] < 1500
    assert 500 < seconds["evaluation"] < 1000


@pytest.mark.parametrize("other", [{"lr": 1e-3}, {"fine_tuning": 3}, {"fine_tuning": 0, "distill": 0.0}])
def test_other_arguments_of_fine_tuning_cost_fine_tuning_alone(
    models: SimpleNamespace, encoder: str, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    steps = Steps(monkeypatch)
    options: dict[str, Any] = {"method": "fwsvd", "fine_tuning": 4, "distill": 0.5}
    steps.until(2 + 3)  # two batches of calibration
    with pytest.raises(Stopped):
        run(encoder, models.csv, **options)
    options |= other
    steps.until(0)
    run(encoder, models.csv, **options)
    assert steps.count == options["fine_tuning"]
    run(encoder, models.csv, "whole", **options)
    assert same("out", "whole")
    assert not LEFT.exists()


def test_another_rate_begins_rankdyna_anew(
    models: SimpleNamespace, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    steps.until(3)
    with pytest.raises(Stopped):
        run(encoder, models.csv, method="rankdyna", steps=6)
    with pytest.raises(FileExistsError, match=r"lr was 0\.0001 and is 0\.001\."):
        run(encoder, models.csv, method="rankdyna", steps=6, lr=1e-3)


@pytest.mark.filterwarnings("ignore:training has diverged")  # RankDyna's own word, as it goes on
@pytest.mark.parametrize(
    ("options", "sentence", "left"),
    [
        (
            {"method": "fwsvd", "fine_tuning": 4},
            r"fine-tuning has diverged: \d+ parameters are not finite, 'model\.",
            True,
        ),
        (
            {"method": "rankdyna", "steps": 6},
            r"compression has diverged: .* 1e\+38: give a smaller one, such as lr=",
            False,
        ),
    ],
)
def test_what_diverges_is_told_and_not_gone_on_from(
    models: SimpleNamespace,
    encoder: str,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    sentence: str,
    left: bool,
) -> None:
    with pytest.raises(FloatingPointError, match=sentence):
        run(encoder, models.csv, lr=1e38, **options)
    assert not Path("out").exists()
    assert LEFT.exists() == left
    steps = Steps(monkeypatch)
    run(encoder, models.csv, lr=1e-3, **options)
    assert steps.count == (options["fine_tuning"] if left else 6)
    run(encoder, models.csv, "whole", lr=1e-3, **options)
    assert same("out", "whole")


@pytest.fixture
def stopped(models: SimpleNamespace, encoder: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A job that was stopped while it calibrated, and its options."""
    steps = Steps(monkeypatch)
    steps.until(2)
    options: dict[str, Any] = {"method": "fwsvd", "ratio": 0.5, "targets": ["query", "value"]}
    with pytest.raises(Stopped):
        run(encoder, models.csv, **options)
    steps.until(0)
    return options


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"ratio": 0.4}, r"out\.unfinished .* other arguments has done: ratio was 0\.5 and is 0\.4\. .* delete"),
        ({"method": "svd", "ratio": 0.4}, r"method was 'fwsvd' and is 'svd'; ratio was 0\.5 and is 0\.4\."),
        ({"targets": None}, r"targets was \['query', 'value'\] and is None\."),
        ({"method": "rankdyna"}, r"method was 'fwsvd' and is 'rankdyna'\."),
    ],
)
def test_a_job_with_other_arguments_is_refused(
    models: SimpleNamespace, encoder: str, stopped: dict[str, Any], other: dict[str, Any], sentence: str
) -> None:
    before = {path.name: path.read_bytes() for path in LEFT.iterdir()}
    with pytest.raises(FileExistsError, match=sentence):
        run(encoder, models.csv, **(stopped | other))
    assert {path.name: path.read_bytes() for path in LEFT.iterdir()} == before
    assert not Path("out").exists()


def test_other_texts_another_model_and_another_version_are_other_arguments(
    models: SimpleNamespace, encoder: str, stopped: dict[str, Any]
) -> None:
    copied = shutil.copy(models.csv, "texts.csv")
    with pytest.raises(FileExistsError, match=r"data was '.*' and is 'texts\.csv'; test was '.*' and is 'texts\.csv'"):
        run(encoder, copied, **stopped)
    source = Source(models.csv, test=models.csv, batch_size=8)
    with pytest.raises(FileExistsError, match=r"batch_size was 16 and is 8\."):
        compress(encoder, source, "out", progress=False, calibration=2, **stopped)
    config = Path(encoder, "config.json")
    config.write_text(config.read_text() + " ")
    with pytest.raises(FileExistsError, match=r"the contents of model were [0-9a-f]{12} and are [0-9a-f]{12}\."):
        run(encoder, models.csv, **stopped)
    config.write_text(config.read_text()[:-1])
    found = json.loads((LEFT / "job.json").read_text())
    found["arguments"]["torch"] = "1.13.0"
    (LEFT / "job.json").write_text(json.dumps(found))
    with pytest.raises(FileExistsError, match=r"torch was '1\.13\.0' and is '2\."):
        run(encoder, models.csv, **stopped)


def test_what_does_not_change_the_result_may_change(
    models: SimpleNamespace, encoder: str, stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(models.csv, test=models.csv, batch_size=16)
    compress(encoder, source, "out", progress=True, calibration=2, save_every=60.0, **stopped)
    assert Path("out/report.json").is_file()
    assert not LEFT.exists()


def test_folders_that_are_no_jobs(models: SimpleNamespace, encoder: str, stopped: dict[str, Any]) -> None:
    content = (LEFT / "job.json").read_text()
    (LEFT / "job.json").write_text(content[:40])
    with pytest.raises(AdapterFileError, match=r"job\.json cannot be read: .* Delete out\.unfinished to begin anew"):
        run(encoder, models.csv, **stopped)
    (LEFT / "job.json").unlink()
    (LEFT / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.unfinished holds no compression that was stopped \(notes\.txt\)"):
        run(encoder, models.csv, **stopped)
    assert (LEFT / "notes.txt").read_text() == "mine"


def test_what_a_killed_process_leaves_is_cleared(models: SimpleNamespace, encoder: str) -> None:
    """Killed in its very first write, and killed while it cleared away."""
    LEFT.mkdir()
    (LEFT / ".0123.part").write_bytes(b"half")
    run(encoder, models.csv, method="svd")
    assert not LEFT.exists()


@pytest.mark.parametrize("whole", [True, False])
def test_texts_may_be_named_by_a_path(models: SimpleNamespace, encoder: str, whole: bool) -> None:
    csv = Path(models.csv)
    compress(encoder, Source(csv, test=csv) if whole else csv, "out", progress=False, method="svd")
    assert Path("out/report.json").is_file()


def test_a_job_that_cannot_begin_leaves_nothing(models: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"has no weights for classifier"):
        compress(models.headless, models.csv, "out", task="classification", method="svd", progress=False)
    assert not LEFT.exists()


def test_the_command_goes_on_too(
    models: SimpleNamespace, encoder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    steps = Steps(monkeypatch)
    options = ["compress", encoder, "out", "--data", models.csv, "--test", models.csv, "--batch-size", "16"]
    options += ["--method", "svd", "--fine-tuning", "6", "--save-every", "0"]
    steps.until(5)
    with pytest.raises(Stopped):
        cli.main(options)
    steps.until(0)
    assert cli.main([*options, "--ratio", "0.4"]) == 2
    assert "ratio was 0.5 and is 0.4" in capsys.readouterr().err
    assert cli.main(options) == 0
    assert steps.count == 2
    assert "Going on with what out.unfinished holds." in [record.getMessage() for record in caplog.records]


def test_how_often_it_is_kept_is_a_number_of_minutes() -> None:
    with pytest.raises(ValueError, match=r"save_every=-1: it is a number of minutes, 0 for after every step"):
        job.Compression(save_every=-1)
