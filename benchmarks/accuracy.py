"""Accuracy of adapter methods on Reuters R8 and R52 with MiniLM-L6: one data order, optimizer and search for all.

    python benchmarks/accuracy.py run --method lora --data r8 --rank 8 --seed 0 --lr 2e-3 [--search] [--max-steps N]
    python benchmarks/accuracy.py plan --data r52 --rank 2 [--methods lora,hf-lora]
    python benchmarks/accuracy.py table [--out docs/accuracy.md]
    python benchmarks/accuracy.py plan --data r52 --rank 2 --page sparse
    python benchmarks/accuracy.py table --page sparse --out docs/sparse-accuracy.md

`plan` runs what is missing: for each method a search over three learning rates on a held-out tenth of the training set
(one seed, the test set untouched; on R52 over half the epochs, and over a fourth rate where the best is at an end of
the three), then its seeds at the best rate on the whole training set, each looking at the test set once. R8 at rank 2
and R52 at rank 8 are one seed at the rate that was found on R52 at rank 2.

The sparse page is shorter, some six hours of one thread: texts of 48 tokens, R52 seen twice and R8 once,
two rates searched over one epoch and a third beyond the better one; three seeds on R52 at rank 2, one elsewhere.
What is the same at every rank, and one ablation, are left out of a data set's second table.

Every run is a process of its own, whose peak memory is then its own, and one line of `results/accuracy.jsonl`; runs
that are there are skipped: a plan can be stopped, continued, and shared by processes that run different methods. One
thread; more processes use more cores.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "reuters")]  # this checkout is what is measured

import accuracy_methods  # noqa: E402
import runs  # noqa: E402
from accuracy_methods import RATES  # noqa: E402
from accuracy_table import WORDS, best_rate, table  # noqa: E402
from inputs import minilm_folder, reuters  # noqa: E402
from lightning.pytorch import Callback, Trainer, seed_everything  # noqa: E402
from sparse_methods import SHOWN, SPARSE  # noqa: E402

from lightning_peft.modules import TextClassifier, TextData  # noqa: E402

DATA = ("r8", "r52")
PageName = Literal["accuracy", "sparse"]
METHODS = accuracy_methods.METHODS | SPARSE
_ACCURACY = {("r8", 8): ("r8", 8), ("r52", 2): ("r52", 2), ("r8", 2): ("r52", 2), ("r52", 8): ("r52", 2)}
_SPARSE = {("r52", 2): ("r52", 2), ("r52", 14): ("r52", 2), ("r8", 2): ("r52", 2)}


@dataclass(frozen=True)
class Page:
    """What is compared on a page, and how long its rows train.

    Attributes:
        methods: its rows.
        tables: its tables, data and rank, and the one that each takes its learning rates from.
        epochs: of final runs, by data.
        search_epochs: of searches.
        once: rows of a data set's first table alone.
        changes: of the protocol.
    """

    methods: Mapping[str, accuracy_methods.Method]
    tables: Mapping[tuple[str, int], tuple[str, int]]
    epochs: Mapping[str, int]
    search_epochs: Mapping[str, int]
    once: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)


PAGES: dict[PageName, Page] = {
    "accuracy": Page(accuracy_methods.METHODS, _ACCURACY, {"r8": 2, "r52": 4}, {"r8": 2, "r52": 2}),
    "sparse": Page(
        SHOWN,
        _SPARSE,
        {"r8": 1, "r52": 2},
        {"r8": 1, "r52": 1},
        ("frozen", "full", "sparta-value-output"),
        {"max_length": 48},
    ),
}
"""On the sparse page rank stands for LoRA's parameters: 83 and 581 thousand."""
SEARCHED_ON = _ACCURACY | _SPARSE
"""Where each table, data and rank, takes its learning rates from; one that has no search of its own is one seed."""
PROTOCOL = {
    "backbone": "MiniLM-L6",
    "max_length": 64,
    "batch_size": 32,
    "head_lr": 5e-3,
    "weight_decay": 0.01,
    "warmup": 0.06,
    "clip": 1.0,
}
RESULTS = runs.RESULTS / "accuracy.jsonl"


@dataclass(frozen=True)
class Run:
    """What is run; two runs with equal fields are the same run."""

    method: str
    data: str
    rank: int
    seed: int
    lr: float
    search: bool
    page: PageName = "accuracy"

    @property
    def epochs(self) -> int:
        """How often the training set is seen."""
        page = PAGES[self.page]
        return (page.search_epochs if self.search else page.epochs)[self.data]


class StepClock(Callback):
    """Wall and processor time from the start of one batch to the start of the next."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Take both clocks."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def milliseconds(self) -> dict[str, float]:
        """Median over the steps; processor time is the steadier one when the machine is shared."""
        return {
            f"{name}_ms_per_step": round(1e3 * statistics.median(b - a for a, b in pairwise(t)), 1)
            for name, t in (("wall", self.wall), ("cpu", self.cpu))
        }


def execute(run: Run, max_steps: int = -1) -> dict[str, Any]:
    """Train and evaluate once; the result is one line of the results file."""
    started = time.perf_counter()
    method, (train, test) = METHODS[run.method], reuters(run.data)
    seed_everything(run.seed, verbose=False)
    data = TextData(
        train,
        tokenizer=minilm_folder(),
        test=None if run.search else test,
        val_share=0.1 if run.search else 0.0,
        max_length=settings(run)["max_length"],
        batch_size=PROTOCOL["batch_size"],
        seed=run.seed,
    )
    data.setup("fit")
    steps = len(data.train_dataloader()) * run.epochs if max_steps < 0 else max_steps
    classifier = TextClassifier(
        minilm_folder(),
        data.num_labels,
        lr=run.lr,
        head_lr=PROTOCOL["head_lr"],
        weight_decay=PROTOCOL["weight_decay"],
        warmup=PROTOCOL["warmup"],
    )
    prepared, clock, precision = method.build(classifier, steps, run.rank), StepClock(), runs.precision(load())
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=run.epochs if max_steps < 0 else -1,
        max_steps=max_steps,
        gradient_clip_val=PROTOCOL["clip"],
        callbacks=[clock, *prepared.callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=1_000_000,  # evaluation once, after training
    )
    before = _resident()
    trainer.fit(classifier, datamodule=data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stage = "val" if run.search else "test"
    evaluate = trainer.validate if run.search else trainer.test
    metrics = evaluate(classifier, datamodule=data, verbose=False)[0]
    rows = len(data.val_dataloader().dataset if run.search else data.test_dataloader().dataset)
    ranks = dict(prepared.ranks())
    return {
        **asdict(run),
        "settings": settings(run),
        "precision": precision,
        "versions": runs.versions("torch", "lightning", "transformers", "peft", "torchmetrics"),
        "cpu": platform.processor() or platform.machine(),
        "steps": trainer.global_step,
        "evaluated_on": f"{rows} {'held-out' if run.search else 'test'} rows",
        "accuracy": round(metrics[f"{stage}/accuracy"], 6),
        "macro_f1": round(metrics[f"{stage}/macro_f1"], 6),
        "errors": round((1 - metrics[f"{stage}/accuracy"]) * rows),
        "trainable_parameters": sum(p.numel() for p in classifier.parameters() if p.requires_grad),
        "adapter_bytes": prepared.adapter_bytes() if prepared.adapter_bytes else None,
        "ranks": {
            "layers": len(ranks),
            "total": sum(ranks.values()),
            "min": min(ranks.values(), default=0),
            "max": max(ranks.values(), default=0),
        },
        "ranks_by_layer": ranks,
        "memory": {"before_fit": before, "peak": peak},
        "seconds": round(time.perf_counter() - started, 1),
        **clock.milliseconds(),
    }


def settings(run: Run) -> dict[str, Any]:
    """All that a run depends on beside its own fields."""
    return {**PROTOCOL, **PAGES[run.page].changes, "epochs": run.epochs, **METHODS[run.method].settings(run.rank)}


def load(page: PageName | None = None, path: Path = RESULTS) -> list[dict[str, Any]]:
    """Finished runs whose settings are today's, of one page or of all."""
    known = [row for row in runs.read(path) if row["method"] in METHODS and row["settings"] == settings(_run_of(row))]
    return [row for row in known if page in (None, _run_of(row).page)]


def _run_of(row: dict[str, Any]) -> Run:
    return Run(**{name: row[name] for name in Run.__dataclass_fields__ if name in row})  # the page came later


def _resident() -> int:
    """Bytes of memory that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def finished(run: Run) -> bool:
    """Whether the results file has this run."""
    return any(_run_of(row) == run for row in load(run.page))


def plan(data: str, rank: int, chosen: Sequence[str], page: PageName = "accuracy") -> Iterator[list[Run]]:
    """The runs in stages: searches, then the rows seed by seed: an unfinished table compares like with like.

    A search is the method's learning rates, and on R52 one beyond them where the best is the lowest or the highest.
    """
    at, methods = SEARCHED_ON[data, rank], METHODS | dict(PAGES[page].methods)
    first = next(table for table in PAGES[page].tables if table[0] == data)
    names = [name for name in chosen if first == (data, rank) or name not in PAGES[page].once]
    searched = [name for name in names if methods[name].searched]

    def best(name: str) -> float:
        return best_rate(load(page), name, *at)

    if at == (data, rank):
        yield [Run(name, data, rank, 0, lr, True, page) for name in searched for lr in methods[name].rates]
        if data == "r52":
            beyond = [(name, _beyond(methods[name].rates, best(name))) for name in searched]
            yield [Run(name, data, rank, 0, lr, True, page) for name, lr in beyond if lr is not None]
    rates = {name: best(name) if methods[name].searched else RATES[0] for name in names}
    yield [
        Run(name, data, rank, seed, rates[name], False, page)
        for seed in range(max((len(methods[name].seeds) for name in names), default=0))
        for name in names
        if seed in seeds(name, data, rank)
    ]


def _beyond(rates: Sequence[float], best: float) -> float | None:
    """The rate beyond the end at which the best one stands; none where it stands between, or was beyond already."""
    return {rates[0]: best / 2, rates[-1]: best * 2}.get(best)


def seeds(method: str, data: str, rank: int) -> tuple[int, ...]:
    """Seeds of a method's final runs: one where the learning rate was searched elsewhere."""
    return METHODS[method].seeds if SEARCHED_ON[data, rank] == (data, rank) else METHODS[method].seeds[:1]


def _arguments(run: Run) -> list[object]:
    options = ["--method", run.method, "--data", run.data, "--rank", run.rank, "--seed", run.seed, "--lr", run.lr]
    return [*options, "--page", run.page, *(["--search"] if run.search else [])]


def _run_once(run: Run) -> None:
    if finished(run):
        print(f"there already: {run}", flush=True)
        return
    print(_summary(runs.announced(run, lambda: execute(run), RESULTS)), flush=True)


def _summary(result: dict[str, Any]) -> str:
    keys = ("accuracy", "macro_f1", "errors", "trainable_parameters", "adapter_bytes", "ranks", "seconds")
    return "  " + " ".join(f"{key}={result[key]}" for key in (*keys, "wall_ms_per_step", "cpu_ms_per_step"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="one run")
    run.add_argument("--method", choices=METHODS, required=True)
    run.add_argument("--data", choices=DATA, default="r8")
    run.add_argument("--rank", type=int, default=8, help="average rank per layer at the end")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--lr", type=float, default=2e-3)
    run.add_argument("--search", action="store_true", help="train on nine tenths, evaluate on the held-out tenth")
    run.add_argument("--max-steps", type=int, default=-1, help="a short trial; its result is printed and not kept")
    missing = commands.add_parser("plan", help="all runs that are missing")
    missing.add_argument("--data", choices=DATA, default="r8")
    missing.add_argument("--rank", type=int, default=8, help="average rank per layer at the end")
    missing.add_argument("--methods", help="comma-separated; default: those of the page")
    show = commands.add_parser("table", help="Markdown table of the finished runs")
    for command in (run, missing, show):
        command.add_argument("--page", choices=PAGES, default="accuracy", help="rows, tables, and how long rows train")
    show.add_argument("--out", type=Path, help="file to write; default: standard output")
    args = parser.parse_args()

    page = PAGES[args.page]
    if args.command != "table" and (args.data, args.rank) not in page.tables:
        parser.error(f"no table of {args.data} at rank {args.rank}; there are {', '.join(map(str, page.tables))}")
    if args.command == "table":
        rows = [row for row in load(args.page) if row["method"] in page.methods]
        text = table(rows, page.methods, page.tables, seeds, WORDS[args.page])
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(text, encoding="utf-8")
        else:
            print(text)
        return
    runs.one_quiet_thread()
    print(f"precision {runs.precision(load())}, one thread", flush=True)
    if args.command == "plan":
        chosen = args.methods.split(",") if args.methods else list(page.methods)
        if unknown := [name for name in chosen if name not in METHODS]:
            parser.error(f"unknown methods {unknown}; known: {', '.join(METHODS)}")
        runs.carry_out(plan(args.data, args.rank, chosen, args.page), runs.alone(__file__, _arguments), finished)
        return
    one = Run(args.method, args.data, args.rank, args.seed, args.lr, args.search, args.page)
    if args.max_steps > 0:
        print(_summary(execute(one, args.max_steps)))
    else:
        _run_once(one)


if __name__ == "__main__":
    main()
