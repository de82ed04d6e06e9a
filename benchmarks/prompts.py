"""Prompts: accuracy on Reuters R8 with MiniLM-L6, the same topics as answers of SmolLM2, and what length costs.

    python benchmarks/prompts.py plan [--jobs r8,smollm2,speed]
    python benchmarks/prompts.py run --job r8 --method dpt --lr 1e-2 --seed 0 [--search] [--max-steps N]
    python benchmarks/prompts.py speed [--rounds 9]
    python benchmarks/prompts.py table [--out docs/prompts.md]

`plan` runs what is missing, which takes some five hours of one thread. On R8 that is a search over three
learning rates in 60 steps on a held-out tenth of the training set (one seed, the test set untouched), and over the one
beyond where the best is at an end of them, then one epoch at the best rate on the whole of it, two seeds; LoRA of rank
8 with one. The best rate is that of the lowest loss: after 60 steps many rows still answer the commonest topic, and
their accuracies are the same. With SmolLM2 it is one run of 60 steps for each of three rates, on the same texts as
prompts whose answer is the topic: the rate is chosen by the perplexity of held-out answers, and test answers are looked
at once a run.

Speed is a step of DePT beside a step of a prompt of 100 tokens, in turns in one process, whose ratio within a round is
compared with that of the lengths. One thread. Every run is a process of its own, whose peak memory is then its own, and
one line of `results/prompts.jsonl`; what is there is not run again, and a trial of a few steps (`--max-steps`) is
printed and not kept.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / "examples" / name) for name in ("reuters", "compress"))]  # this checkout

import runs  # noqa: E402
import torch  # noqa: E402
from accuracy import PROTOCOL, StepClock  # noqa: E402
from inputs import minilm_folder, reuters  # noqa: E402
from lightning.pytorch import Trainer, seed_everything  # noqa: E402
from prompts_table import table  # noqa: E402
from smollm import smollm_folder  # noqa: E402
from torch import nn  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM  # noqa: E402

from lightning_peft import AdapterInjection, DePT, SoftPrompt, inject, presets  # noqa: E402
from lightning_peft.modules import CausalLM, LanguageData, TextClassifier, TextData  # noqa: E402
from lightning_peft.modules.text_files import read_file  # noqa: E402
from lightning_peft.surgery import adapters  # noqa: E402

RESULTS = runs.RESULTS / "prompts.jsonl"
CACHE = ROOT / "runs" / "prompts"
JobName = Literal["r8", "smollm2"]
LENGTHS: dict[JobName, int] = {"r8": 48, "smollm2": 64}
"""Tokens of a text at most."""
SHORT, PLAIN = 60, 100
"""Tokens of DePT's prompt; of a plain one and of DPT's."""
SEARCH_STEPS, EPOCHS = 60, 1
"""On R8."""
LINEARS, PROJECTIONS = r"encoder\.layer\..*", ("query", "value", "q_proj", "v_proj")
ANSWERS: dict[str, Any] = {
    "batch_size": 8, "steps": 60, "test_rows": 160, "train_rows": 1000, "warmup": 0.06, "clip": 1.0,
    "precision": "32-true",
}  # fmt: skip
"""What the job with SmolLM2 is, beside its rates. In float32: where bf16 is emulated, a run of ten minutes takes more
than an hour."""


@dataclass(frozen=True)
class Method:
    """A row of a table: what it is called, the callbacks that make it, and the rates that are tried per job."""

    title: str
    preset: Callable[[JobName], list[Any]]
    rates: Mapping[JobName, tuple[float, ...]]


def _prompt(job: JobName, **sizes: Any) -> dict[str, Any]:
    """Sizes, and what stays trainable: a classifier's head."""
    return sizes | {"train": ["classifier"] if job == "r8" else []}


def _lora(rank: int, everywhere: bool, job: JobName) -> list[Any]:
    """As many components in the projections of all attentions, or in all linear layers of the encoder."""
    if everywhere and job == "r8":
        return list(presets.lora(rank=rank, alpha=2 * rank, targets=[LINEARS]))
    parts = [p for p in PROJECTIONS if p.endswith("proj") == (job == "smollm2")]
    train = ["classifier"] if job == "r8" else []
    return list(presets.lora(rank=rank, alpha=2 * rank, targets=parts, train=train))


_PROMPT_RATES: Mapping[JobName, tuple[float, ...]] = {"r8": (3e-3, 1e-2, 3e-2), "smollm2": (3e-3, 1e-2, 3e-2)}
_LORA_RATES: Mapping[JobName, tuple[float, ...]] = {"r8": (1e-3, 2e-3, 4e-3), "smollm2": (1e-3, 3e-3, 1e-2)}
METHODS: dict[str, Method] = {
    "prompt": Method(
        "prompt tuning, 100 tokens",
        lambda job: list(presets.prompt_tuning(**_prompt(job, length=PLAIN))),
        _PROMPT_RATES,
    ),
    "dpt": Method(
        "DPT, 100 tokens of rank 10", lambda job: list(presets.dpt(**_prompt(job, length=PLAIN))), _PROMPT_RATES
    ),
    "dept": Method(
        "DePT, 60 tokens and offsets of as many numbers as 40",
        lambda job: list(
            presets.dept(**_prompt(job, length=SHORT, parameters=PLAIN * WIDTHS[job], reach=LENGTHS[job]))
        ),
        _PROMPT_RATES,
    ),
    "lora": Method(
        "LoRA, query and value, of about as many numbers", lambda job: _lora(EQUAL[job], False, job), _LORA_RATES
    ),
    "lora-8": Method("LoRA r=8, all linear layers of the encoder", lambda job: _lora(8, True, job), _LORA_RATES),
}
JOBS: dict[JobName, tuple[str, ...]] = {"r8": tuple(METHODS), "smollm2": ("prompt", "dpt", "dept", "lora")}
WIDTHS: dict[JobName, int] = {"r8": 384, "smollm2": 576}
EQUAL: dict[JobName, int] = {"r8": 4, "smollm2": 1}
"""Rank of LoRA with about as many numbers as a plain prompt has: 36,864 of 38,400, and exactly 57,600."""
SEEDS = {"prompt": (0, 1), "dpt": (0, 1), "dept": (0, 1), "lora": (0, 1), "lora-8": (0,)}
"""Of the final runs on R8."""


@dataclass(frozen=True)
class Run:
    """What is run; two runs with equal fields are the same run."""

    job: JobName
    method: str
    lr: float
    seed: int
    search: bool


def execute(run: Run, max_steps: int = -1) -> dict[str, Any]:
    """Train and evaluate once; the result is one line of the results file."""
    started = time.perf_counter()
    seed_everything(run.seed, verbose=False)
    callbacks = METHODS[run.method].preset(run.job)
    for each in callbacks:
        if isinstance(each, AdapterInjection):
            each.verbose = False
    work = _r8 if run.job == "r8" else _smollm2
    clock = StepClock()
    figures, module, steps = work(run, [clock, *callbacks], max_steps)
    own = [p for adapter in adapters(module).values() for _, p in adapter.own_parameters() if p.requires_grad]
    return {
        **asdict(run),
        "settings": settings(run),
        "precision": precision(run.job),
        "versions": runs.versions("torch", "lightning", "transformers"),
        "steps": steps,
        **figures,
        "adapter_parameters": sum(p.numel() for p in own),
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": round(time.perf_counter() - started, 1),
        **clock.milliseconds(),
    }


def precision(job: JobName) -> Any:
    """In which a job is computed: on R8 that of its first run."""
    return runs.precision(row for row in load() if row["job"] == "r8") if job == "r8" else ANSWERS["precision"]


def _trainer(job: JobName, callbacks: list[Any], clip: float, **limits: int) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, precision=precision(job), gradient_clip_val=clip, callbacks=callbacks,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, check_val_every_n_epoch=1_000_000, **limits,
    )  # fmt: skip


def _r8(run: Run, callbacks: list[Any], max_steps: int) -> tuple[dict[str, Any], nn.Module, int]:
    """Classification by a new head, as in `accuracy.py`: accuracy on held-out or test texts."""
    train, test = reuters("r8")
    data = TextData(
        train,
        tokenizer=minilm_folder(),
        test=None if run.search else test,
        val_share=0.1 if run.search else 0.0,
        max_length=LENGTHS["r8"],
        batch_size=PROTOCOL["batch_size"],
        seed=run.seed,
    )
    data.setup("fit")
    rates = {name: PROTOCOL[name] for name in ("head_lr", "weight_decay", "warmup")}
    classifier = TextClassifier(minilm_folder(), data.num_labels, lr=run.lr, **rates)
    few = {"max_epochs": -1, "max_steps": max_steps, "limit_val_batches": 2, "limit_test_batches": 2}
    whole = {"max_epochs": -1, "max_steps": SEARCH_STEPS} if run.search else {"max_epochs": EPOCHS}
    limits = whole if max_steps < 0 else few
    trainer = _trainer("r8", callbacks, PROTOCOL["clip"], **limits)
    trainer.fit(classifier, datamodule=data)
    steps, stage = trainer.global_step, "val" if run.search else "test"
    evaluate = trainer.validate if run.search else trainer.test
    found = evaluate(classifier, datamodule=data, verbose=False)[0]
    return (
        {"accuracy": round(found[f"{stage}/accuracy"], 6), "loss": round(found[f"{stage}/loss"], 6)},
        classifier,
        steps,
    )


def _smollm2(run: Run, callbacks: list[Any], max_steps: int) -> tuple[dict[str, Any], nn.Module, int]:
    """The topic as an answer behind the text: perplexity of answers, and how many greedy decoding gets right."""
    folder, (train, test) = smollm_folder(CACHE), _as_answers()
    data = LanguageData(
        train,
        tokenizer=folder,
        test=test,
        prompt="prompt",
        answer="answer",
        block_size=LENGTHS["smollm2"],
        batch_size=ANSWERS["batch_size"],
        val_share=0.1,
        seed=run.seed,
    )
    model = CausalLM(folder, lr=run.lr, weight_decay=0.0, warmup=ANSWERS["warmup"])
    model.float()
    limit = ANSWERS["steps"] if max_steps < 0 else max_steps
    trainer = _trainer("smollm2", callbacks, ANSWERS["clip"], max_steps=int(limit), max_epochs=-1)
    trainer.fit(model, datamodule=data)
    steps, figures = trainer.global_step, {}
    quick = {} if max_steps < 0 else {"limit_val_batches": 1, "limit_test_batches": 1}
    judge = _trainer("smollm2", [], 1.0, **quick)
    figures["val_perplexity"] = round(judge.validate(model, datamodule=data, verbose=False)[0]["val/perplexity"], 4)
    figures["test_perplexity"] = round(judge.test(model, datamodule=data, verbose=False)[0]["test/perplexity"], 4)
    figures["accuracy"] = _greedy(model.eval(), data, 1 if max_steps > 0 else None)
    return figures, model, steps


@torch.no_grad()
def _greedy(model: CausalLM, data: LanguageData, most: int | None) -> float:
    """Share of test answers that greedy decoding would write: every token of the answer is the likeliest one."""
    right: list[bool] = []
    for batch in list(data.test_dataloader())[:most]:
        likeliest, labels = model(batch).logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
        right += ((likeliest == labels) | (labels == -100)).all(1).tolist()
    return round(statistics.mean(right), 6)


def _as_answers() -> tuple[str, str]:
    """R8 as prompts and answers, in csv files: the first words of a text, and its topic."""
    import csv

    paths = []
    CACHE.mkdir(parents=True, exist_ok=True)
    for source, rows, part in zip(
        reuters("r8"), (ANSWERS["train_rows"], ANSWERS["test_rows"]), ("train", "test"), strict=True
    ):
        texts = [row for row in read_file(source) if row.label]
        chosen = random.Random(0).sample(texts, int(rows))
        path = CACHE / f"r8-answers-{part}-{rows}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            lines = ((f"{' '.join(row.text.split()[:30])}\nTopic:", f" {row.label}") for row in chosen)
            csv.writer(file).writerows([("prompt", "answer"), *lines])
        paths.append(str(path))
    return paths[0], paths[1]


def settings(run: Run) -> dict[str, Any]:
    """All that a run depends on beside its own fields."""
    much = {"steps": SEARCH_STEPS} if run.search else {"epochs": EPOCHS}
    shared = {**PROTOCOL, **much} if run.job == "r8" else ANSWERS
    return {**shared, "length": LENGTHS[run.job], "title": METHODS[run.method].title}


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "MiniLM, 6 layers of 384": lambda: BertForSequenceClassification(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=8)
    ),
    "SmolLM2's, 6 layers of 576": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=576, num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
            vocab_size=8192,
        )
    ),
}  # fmt: skip


def speed(rounds: int, batch: int = 8) -> list[dict[str, Any]]:
    """A step of DePT with 60 and with 40 tokens beside one of a plain prompt of 100, by the length of the text."""
    found = []
    for shape, build in SHAPES.items():
        for length in (64, 128, 256):
            steps = {m: _step(build, m, length, batch) for m in (PLAIN, 60, 40)}
            times: dict[int, list[float]] = {m: [] for m in steps}
            order = list(steps)
            for number in range(rounds + 1):
                random.Random(number).shuffle(order)
                for m in order:
                    start = time.process_time()
                    steps[m]()
                    if number:  # the first round warms up
                        times[m].append(time.process_time() - start)
            for m in (60, 40):
                ratios = [mine / plain for mine, plain in zip(times[m], times[PLAIN], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                found.append(
                    {
                        "job": "speed", "shape": shape, "text": length, "batch": batch, "prompt": m, "rounds": rounds,
                        "plain_ms": round(1e3 * statistics.median(times[PLAIN]), 1),
                        "ratio": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)],
                        "lengths": round((m + length) / (PLAIN + length), 4),
                        "attention": round(((m + length) / (PLAIN + length)) ** 2, 4),
                        "versions": runs.versions("torch", "transformers"),
                    }
                )  # fmt: skip
                print(found[-1], flush=True)
    return found


def _step(build: Callable[[], nn.Module], length: int, text: int, batch: int) -> Callable[[], None]:
    """Forward, backward and AdamW of one batch without padding; as many trained numbers for every length."""
    torch.manual_seed(0)
    host = nn.ModuleDict({"model": build().train()})
    factory = partial(SoftPrompt, length=length)
    if length != PLAIN:
        width = host["model"].config.hidden_size
        factory = partial(DePT.within, parameters=PLAIN * width, reach=text, length=length)  # type: ignore[assignment]
    inject(host, factory, train=[])
    model: Any = host["model"]
    trained = [p for p in host.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    ids = torch.randint(1000, 8000, (batch, text), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def step() -> None:
        model(**inputs).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def load(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Finished runs whose settings are today's, and all measurements of speed."""
    rows = runs.read(path)
    return [row for row in rows if row["job"] == "speed" or row["settings"] == settings(_run_of(row))]


def _run_of(row: Mapping[str, Any]) -> Run:
    return Run(**{field: row[field] for field in Run.__dataclass_fields__})


def finished(run: Run) -> bool:
    """Whether the results file has this run."""
    return any(row["job"] != "speed" and runs.same(run, row) for row in load())


def searched(method: str) -> list[dict[str, Any]]:
    """What was tried on R8, by rate."""
    rows = [row for row in load() if row["job"] == "r8" and row["method"] == method and row["search"]]
    return sorted(rows, key=lambda row: float(row["lr"]))


def best_rate(method: str) -> float:
    """The rate of R8 with the lowest held-out loss."""
    return float(min(searched(method), key=lambda row: float(row["loss"]))["lr"])


def beyond(method: str) -> float | None:
    """The rate beyond the end of those of the plan at which the best one stands; none where it stands elsewhere."""
    tried, best = METHODS[method].rates["r8"], best_rate(method)
    factor = tried[1] / tried[0]
    return {tried[0]: round(best / factor, 9), tried[-1]: round(best * factor, 9)}.get(best)


def rates() -> dict[tuple[str, str], tuple[float, ...]]:
    """The rates that are tried, by job and method."""
    return {(job, name): METHODS[name].rates[job] for job, names in JOBS.items() for name in names}


def plan(jobs: list[str]) -> Iterator[list[Run]]:
    """The runs in stages: searches, then seed by seed, so that an unfinished table compares like with like."""
    if "r8" in jobs:
        yield [Run("r8", name, lr, 0, search=True) for name in JOBS["r8"] for lr in METHODS[name].rates["r8"]]
        further = [(name, beyond(name)) for name in JOBS["r8"]]
        yield [Run("r8", name, lr, 0, search=True) for name, lr in further if lr is not None]
        best = {name: best_rate(name) for name in JOBS["r8"]}
        every = sorted({seed for seeds in SEEDS.values() for seed in seeds})
        final = [(name, seed) for seed in every for name in JOBS["r8"] if seed in SEEDS[name]]
        yield [Run("r8", name, best[name], seed, search=False) for name, seed in final]
    if "smollm2" in jobs:
        # Rate by rate, so that an unfinished table compares like with like.
        places = range(max(len(METHODS[name].rates["smollm2"]) for name in JOBS["smollm2"]))
        tried = [(name, METHODS[name].rates["smollm2"][place:][:1]) for place in places for name in JOBS["smollm2"]]
        yield [Run("smollm2", name, lr, 0, search=False) for name, found in tried for lr in found]


def _arguments(run: Run) -> list[object]:
    options = ["--job", run.job, "--method", run.method, "--lr", run.lr, "--seed", run.seed]
    return [*options, *(["--search"] if run.search else [])]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one run")
    one.add_argument("--job", choices=JOBS, required=True)
    one.add_argument("--method", choices=METHODS, required=True)
    one.add_argument("--lr", type=float, default=1e-2)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--search", action="store_true", help="train on nine tenths, evaluate on the held-out tenth")
    one.add_argument("--max-steps", type=int, default=-1, help="a short trial; its result is printed and not kept")
    missing = commands.add_parser("plan", help="all runs that are missing")
    missing.add_argument("--jobs", default="r8,smollm2,speed", help="comma-separated; default: all")
    quick = commands.add_parser("speed", help="the measurement of speed, printed and not kept")
    for each in (missing, quick):
        each.add_argument("--rounds", type=int, default=9, help="rounds of the measurement of speed; at least 2")
    show = commands.add_parser("table", help="Markdown page of the finished runs")
    show.add_argument("--out", type=Path, help="file to write; default: standard output")
    args = parser.parse_args()
    if args.command == "table":
        text = table(load(), {name: method.title for name, method in METHODS.items()}, JOBS, SEEDS, rates())
        args.out.write_text(text, encoding="utf-8") if args.out else print(text)
        return
    if "rounds" in args and args.rounds < 2:
        parser.error(f"--rounds must be at least 2 to have quartiles. Got {args.rounds}.")
    runs.one_quiet_thread()
    if args.command == "speed":
        speed(args.rounds)
    elif args.command == "plan":
        jobs = args.jobs.split(",")
        if unknown := [name for name in jobs if name not in (*JOBS, "speed")]:
            parser.error(f"unknown jobs {unknown}; known: {', '.join((*JOBS, 'speed'))}")
        runs.carry_out(plan(jobs), runs.alone(__file__, _arguments), finished)
        if "speed" in jobs and not any(row["job"] == "speed" for row in load()):
            for row in speed(args.rounds):
                runs.append(row, RESULTS)
    else:
        run = Run(args.job, args.method, args.lr, args.seed, args.search)
        if args.max_steps > 0:
            print(execute(run, args.max_steps))
        elif finished(run):
            print(f"there already: {run}", flush=True)
        else:
            print(runs.announced(run, lambda: execute(run), RESULTS), flush=True)


if __name__ == "__main__":
    main()
