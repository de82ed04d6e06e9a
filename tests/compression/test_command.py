"""`lightning-peft compress` in this process, once with everything real."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_peft import cli
from lightning_peft.compression.command import add_arguments
from lightning_peft.compression.job import Compression
from lightning_peft.compression.methods import METHODS, WEIGHTINGS
from lightning_peft.compression.task import TASKS, Source


def test_it_writes_a_model_that_loads_elsewhere(
    models: SimpleNamespace, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The check in a process of its own is real here."""
    options = [
        "--data",
        models.csv,
        "--method",
        "fwsvd",
        "--ratio",
        "0.4",
        "--fine-tuning",
        "4",
        "--targets",
        "encoder.*",
    ]
    assert cli.main(["compress", models.encoder, "small", *options, "--calibration", "2"]) == 0
    shown = capsys.readouterr()
    assert "FWSVD, uniform ranks: 12 layers at ratio 0.3" in shown.out
    assert re.search(r"^accuracy before fine-tuning +\d\.\d{4}$", shown.out, re.MULTILINE)
    assert shown.out.endswith("Wrote small: the model, its tokenizer, report.md, report.json, ranks.png.\n")
    progress = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert [text for text in progress if text.startswith("Quality of")] == [
        f"Quality of the {kind} model" for kind in ("dense", "compressed", "fine-tuned")
    ]
    assert not [text for text in progress if "GPU available" in text]
    config = json.loads(Path("small/config.json").read_text())
    assert config["auto_map"]["AutoModelForSequenceClassification"].startswith("modeling_compressed.")
    assert {"report.md", "report.json", "ranks.png", "tokenizer.json"} <= {
        path.name for path in Path("small").iterdir()
    }


@pytest.mark.usefixtures("in_this_process")
def test_quiet_prints_the_report_alone(models: SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    source = ["--data", models.txt, "--test", models.txt, "--length", "8", "--batch-size", "8"]
    options = ["--method", "svd", "--ratio", "0.5", "--quiet"]
    assert cli.main(["compress", models.decoder, "small", *source, *options]) == 0
    shown = capfd.readouterr()
    assert shown.out.startswith("decoder, plain SVD, uniform ranks: 14 layers at ratio")
    assert shown.err == ""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["nowhere", "out", "--data", "t.csv"], "there is no config.json at 'nowhere'"),
        (["{encoder}", "out", "--data", "t.csv"], "there is no file 't.csv'"),
        (["{encoder}", "out", "--data", "{csv}", "--ratio", "0.01"], "ratio=0.01 cannot be reached"),
        (["{encoder}", "full", "--data", "{csv}"], "full holds files that are no earlier export (notes.txt)"),
        (["{headless}", "out", "--data", "{csv}"], "which has no loss that a compression could go by"),
        (["{encoder}", "out", "--data", "{csv}", "--method", "svd", "--steps", "3"], "steps=3: svd takes none"),
    ],
)
def test_mistakes_get_one_sentence(
    models: SimpleNamespace, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    assert cli.main(["compress", *(option.format(**vars(models)) for option in options)]) == 2
    assert re.fullmatch(rf"lightning-peft: .*{re.escape(sentence)}.*\n", capsys.readouterr().err.splitlines(True)[-1])
    assert not Path("out").exists()


def test_no_data_and_unknown_methods_are_told(models: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    for options, sentence in (([], "--data"), (["--data", models.csv, "--method", "pca"], "invalid choice: 'pca'")):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["compress", models.encoder, "out", *options])
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err


def test_the_help_says_what_the_job_does() -> None:
    """The command knows defaults and names without importing what takes seconds; here they are held together."""
    parser = argparse.ArgumentParser("compress")
    add_arguments(parser)
    shown = " ".join(parser.format_help().split())
    job, source = Compression(), Source("t.csv")
    for option, default in (
        ("method", job.method), ("ratio", job.ratio), ("calibration", job.calibration), ("seed", job.seed),
        ("lr", f"{job.lr:.0e}".replace("e-0", "e-")), ("precision", job.precision),
    ):  # fmt: skip
        assert re.search(rf"--{option} [^(]*(\([^)]*\) [^(]*)?\({re.escape(str(default))}\)", shown), option
    assert (job.fine_tuning, job.distill, job.steps, source.length) == (0, 0.0, None, None)
    assert {found.steps for found in METHODS.values() if found.trains} == {1000}
    (weighting,) = {found.weighting for found in METHODS.values() if found.weighting}
    choices = {action.dest: action.choices for action in parser._actions}
    assert choices["method"] == tuple(METHODS)
    assert choices["weighting"] == WEIGHTINGS
    assert weighting in WEIGHTINGS
    assert choices["task"] == tuple(TASKS)
