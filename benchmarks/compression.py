"""Compression methods on Reuters R8 with MiniLM-L6: accuracy without and with fine-tuning, size, time.

    python benchmarks/compression.py run --method fwsvd --ratio 0.33 --seed 0 --lr 1e-4 [--search] [--trial N]
    python benchmarks/compression.py plan [--methods svd,ars-fisher] [--ratios 0.48,0.33] [--seeds 0,1]
    python benchmarks/compression.py table [--out docs/results.md]

Every run is `lightning-peft compress` as a user has it. Two-round methods start from the same dense model, which was
fine-tuned for 344 steps; then all have 688 steps: the uniform ones to fine-tune, ARS 344 for its masks and 344 to
fine-tune. RankDyna starts from the pretrained model and has all 1032 in its one round.

`plan` runs what is missing. It first searches learning rates, three each on a held-out tenth of the training set with
one seed, the test set untouched: of the dense model, of fine-tuning after compression (found with FWSVD at the smaller
ratio and used for all two-round rows), and of RankDyna. Then the rows, seed by seed, each looking at the test set once
before fine-tuning and once after. Every run is a process of its own and one line of `results/compression.jsonl`; runs
that are there are skipped, so a plan can be stopped, continued, and shared by processes. One thread each.

A control, `plan --methods ars-activation-more --ratios 0.48`, gives ARS on ASVD as much fine-tuning as uniform ASVD.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "reuters")]  # this checkout is what is measured

import runs  # noqa: E402
from compression_table import write_table  # noqa: E402
from inputs import minilm_folder, reuters  # noqa: E402
from job import balanced  # noqa: E402
from lightning.pytorch import Trainer, seed_everything  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from lightning_peft.compression.job import Compression, Source  # noqa: E402
from lightning_peft.modules import TextClassifier, TextData  # noqa: E402

EPOCH = 172  # steps: 5,485 texts in batches of 32
DENSE, AFTER = 2 * EPOCH, 4 * EPOCH
RATIOS = (0.48, 0.33)
SEEDS = (0, 1)
TARGETS = [r"encoder\.layer\..*"]
RATES = dict.fromkeys(("dense", "fwsvd", "rankdyna"), (3e-5, 1e-4, 3e-4))
"""What is searched; the rate of "fwsvd" is that of all methods of two rounds."""
RESULTS = runs.RESULTS / "compression.jsonl"
TIMES = runs.RESULTS / "compression_time.jsonl"  # of compression_time.py
MODELS = Path(tempfile.gettempdir()) / "lightning-peft-compression"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        title: what the table calls it.
        options: of :class:`lightning_peft.compression.job.Compression`.
        rounds: of training: 2 with a dense model first, or 1.
    """

    title: str
    options: dict[str, Any]
    rounds: int = 2


def _ars(weighting: str) -> dict[str, Any]:
    return {"method": "ars", "weighting": weighting, "steps": AFTER // 2, "fine_tuning": AFTER // 2}


ROWS: dict[str, Row] = {
    "svd": Row("SVD, uniform", {"method": "svd", "fine_tuning": AFTER}),
    "fwsvd": Row("FWSVD, uniform", {"method": "fwsvd", "fine_tuning": AFTER}),
    "asvd": Row("ASVD, uniform", {"method": "asvd", "fine_tuning": AFTER}),
    "svd-llm": Row("SVD-LLM, uniform", {"method": "svd-llm", "fine_tuning": AFTER}),
    "ars-none": Row("ARS on plain SVD", _ars("none")),
    "ars-fisher": Row("ARS on FWSVD", _ars("fisher")),
    "ars-activation": Row("ARS on ASVD", _ars("activation")),
    "ars-whiten": Row("ARS on SVD-LLM", _ars("whiten")),  # of no paper: what the ranks add to the best weighting
    "rankdyna": Row("RankDyna", {"method": "rankdyna", "steps": DENSE + AFTER}, rounds=1),
}
CONTROLS: dict[str, Row] = {
    "ars-activation-more": Row("ARS on ASVD, fine-tuned as long", _ars("activation") | {"fine_tuning": AFTER})
}
"""No rows of the table: what tells why one of its orderings is a tie."""
EVERY = ROWS | CONTROLS


@dataclass(frozen=True)
class Run:
    """What is run; two runs with equal fields are the same run."""

    method: str
    ratio: float
    seed: int
    lr: float
    search: bool


def settings(run: Run) -> dict[str, Any]:
    """All that a run depends on beside its own fields."""
    own = {"steps": DENSE} if run.method == "dense" else EVERY[run.method].options
    return {"backbone": "MiniLM-L6", "data": "r8", "max_length": 64, "batch_size": 32, "targets": TARGETS, **own}


def load(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Finished runs whose settings are today's."""
    known = {"dense", *EVERY}
    return [row for row in runs.read(path) if row["method"] in known and row["settings"] == settings(_run_of(row))]


def _run_of(row: dict[str, Any]) -> Run:
    return Run(**{field: row[field] for field in Run.__dataclass_fields__})


def finished(run: Run) -> bool:
    """Whether the results file has this run."""
    return any(runs.same(run, row) for row in load())


def best_rate(method: str) -> float:
    """The rate with the best held-out accuracy; macro-F1, then the smaller rate, break ties."""
    found = [row for row in load() if row["search"] and row["method"] == method]
    if not found:
        raise ValueError(f"no search run of {method} is in the results file; run `plan` first.")
    return float(max(found, key=lambda row: (row["accuracy"], row["macro_f1"], -row["lr"]))["lr"])


def execute(run: Run, trial: int = 0) -> dict[str, Any]:
    """Compress, or train the dense model, once; the result is one line of the results file."""
    started = time.perf_counter()
    found = _dense(run, trial) if run.method == "dense" else _compressed(run, trial)
    return {
        **asdict(run),
        "settings": settings(run),
        "precision": _precision(run),
        "versions": runs.versions("torch", "lightning", "transformers"),
        "seconds": round(time.perf_counter() - started, 1),
        **found,
    }


def _precision(run: Run) -> runs.Precision:
    """One for the searches, and one for what the table compares."""
    return runs.precision(row for row in load() if row["search"] == run.search)


def _dense(run: Run, trial: int) -> dict[str, Any]:
    """Fine-tune the whole model; what is not a search is kept in a folder for the methods of two rounds."""
    train, test = texts(trial)
    seed_everything(run.seed, verbose=False)
    share = 0.1 if run.search else 0.0
    data = TextData(train, minilm_folder(), test=test, val_share=share, seed=run.seed)
    data.setup("fit")
    classifier = TextClassifier(minilm_folder(), data.num_labels, lr=run.lr, head_lr=5e-3)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision=_precision(run),
        max_epochs=-1,
        max_steps=trial or DENSE,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=10**9,
    )
    trainer.fit(classifier, datamodule=data)
    evaluate = trainer.validate if run.search else trainer.test
    metrics = {name.rpartition("/")[2]: value for name, value in evaluate(classifier, datamodule=data)[0].items()}
    folder = dense_folder(run, trial)
    classifier.model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder)
    return {"accuracy": metrics["accuracy"], "macro_f1": metrics["macro_f1"]}


def texts(trial: int) -> tuple[str, str]:
    """Training and test file of Reuters R8; for a trial a few texts of each label."""
    train, test = reuters("r8")
    if not trial:
        return train, test
    MODELS.mkdir(exist_ok=True)
    return balanced(train, MODELS / "train.csv", 64, 0), balanced(test, MODELS / "test.csv", 64, 0)


def dense_folder(run: Run, trial: int = 0) -> Path:
    """Where the dense model of a seed and a rate is; one that is searched for has seen nine tenths of the texts."""
    return MODELS / f"dense-{run.seed}-{run.lr:g}{'-search' * run.search}{'-trial' * bool(trial)}"


def _compressed(run: Run, trial: int) -> dict[str, Any]:
    row = EVERY[run.method]
    options = dict(row.options)
    for name in ("steps", "fine_tuning"):
        if trial and options.get(name):
            options[name] = trial
    if trial:
        options["calibration"] = 2
    train, test = texts(trial)
    model = minilm_folder()
    if row.rounds == 2:
        dense = Run("dense", 1.0, run.seed, RATES["dense"][0] if trial else best_rate("dense"), run.search)
        folder = dense_folder(dense, trial)
        if not (folder / "config.json").is_file():
            _dense(dense, trial)  # of the same bits as the run that is in the results file, on the same machine
        model = str(folder)
    source = Source(train, None if run.search else test, length=16 if trial else 64, seed=run.seed)
    job = Compression(
        ratio=run.ratio, lr=run.lr, seed=run.seed, precision=_precision(run), task="classification", targets=TARGETS,
        progress=bool(trial), **options,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        report = job.run(model, source, Path(place) / "out")
    print(report, flush=True)
    return {
        "accuracy": report.quality_after["accuracy"],
        "macro_f1": report.quality_after["macro_f1"],
        "accuracy_before_fine_tuning": report.quality_compressed["accuracy"] if row.rounds == 2 else None,
        "accuracy_dense": report.quality_before.get("accuracy"),
        "reached": report.ratio,
        "parameters": report.after.parameters,
        "dense_parameters": report.before.parameters,
        "linear_parameters": report.after.linear_parameters,
        "bytes": report.after.bytes,
        "dense_bytes": report.before.bytes,
        "ms": report.milliseconds[1],
        "dense_ms": report.milliseconds[0],
        "timed_on": report.timed_on,
        "ranks": dict(report.ranks),
        "stages": dict(report.seconds),
        "peak_bytes": report.peak_bytes,
    }


def plan(methods: list[str], ratios: list[float], seeds: list[int]) -> Iterator[list[Run]]:
    """The runs in stages: the searches, fine-tuning's after the dense model's; the dense models; the rows."""
    yield [Run("dense", 1.0, 0, lr, search=True) for lr in RATES["dense"]]
    searched = sorted({_searched(method) for method in methods})
    yield [Run(name, min(RATIOS), 0, lr, search=True) for name in searched for lr in RATES[name]]
    yield [Run("dense", 1.0, seed, best_rate("dense"), search=False) for seed in seeds]
    rates = {name: best_rate(_searched(name)) for name in methods}
    yield [Run(name, ratio, seed, rates[name], search=False) for seed in seeds for ratio in ratios for name in methods]


def _searched(method: str) -> str:
    """The method whose search gives this one its learning rate."""
    return "fwsvd" if EVERY[method].rounds == 2 else method


def _arguments(run: Run) -> list[object]:
    options = ["--method", run.method, "--ratio", run.ratio, "--seed", run.seed, "--lr", run.lr]
    return [*options, *(["--search"] if run.search else [])]


def _run_once(run: Run, trial: int) -> None:
    if trial:
        result = execute(run, trial)
    elif finished(run):
        print(f"there already: {run}", flush=True)
        return
    else:
        result = runs.announced(run, lambda: execute(run), RESULTS)
    print({key: result[key] for key in result if key not in ("ranks", "settings", "versions")}, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="one run")
    run.add_argument("--method", choices=("dense", *EVERY), required=True)
    run.add_argument("--ratio", type=float, default=RATIOS[0])
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--lr", type=float, default=1e-4)
    run.add_argument("--search", action="store_true", help="train on nine tenths, evaluate on the held-out tenth")
    run.add_argument("--trial", type=int, default=0, metavar="N", help="N steps only; the result is printed, not kept")
    missing = commands.add_parser("plan", help="all runs that are missing")
    missing.add_argument("--methods", default=",".join(ROWS), help="comma-separated; default: all")
    missing.add_argument("--ratios", default=",".join(map(str, RATIOS)))
    missing.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    show = commands.add_parser("table", help="Markdown table of the finished runs")
    show.add_argument("--out", type=Path, help="page to write it into; default: standard output")
    args = parser.parse_args()

    if args.command == "table":
        titles, controls = ({name: row.title for name, row in rows.items()} for rows in (ROWS, CONTROLS))
        write_table(load(), runs.read(TIMES), titles, RATIOS, args.out, controls)
        return
    runs.one_quiet_thread()
    if args.command == "plan":
        methods = args.methods.split(",")
        if unknown := [name for name in methods if name not in EVERY]:
            parser.error(f"unknown methods {unknown}; known: {', '.join(EVERY)}")
        ratios = [float(ratio) for ratio in args.ratios.split(",")]
        seeds = [int(seed) for seed in args.seeds.split(",")]
        runs.carry_out(plan(methods, ratios, seeds), runs.alone(__file__, _arguments), finished)
        return
    ratio = 1.0 if args.method == "dense" else args.ratio
    _run_once(Run(args.method, ratio, args.seed, args.lr, args.search), args.trial)


if __name__ == "__main__":
    main()
