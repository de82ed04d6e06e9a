"""Posterior collapse on real text: what keeps the latent space of a sentence VAE in use, and what it costs.

    python benchmarks/text_vae.py run --method mi --seed 0 [--weight W] [--search] [--trial N]
    python benchmarks/text_vae.py plan [--methods vae,mi] [--quick --results FILE]
    python benchmarks/text_vae.py table [--out docs/posterior-collapse.md]

Reuters R52, whose texts are in lower case and have no punctuation, cut into pieces of 20 words; a vocabulary of 10,000.
LSTM encoder and decoder, 64 wide embeddings, 128 wide states, a latent space of 32 units; 1,500 steps of 32 pieces,
AdamW with a constant rate, gradient norms clipped at 5. Everything but the way against collapse is the same for every
row, start values and the order of batches too. One optimizer step is one batch, also where it is the encoder's alone
(lagging). The sizes are smaller than in the papers, so that the whole table takes less than 90 minutes on two cores.

`plan` runs what is missing: first MI-VAE's weight, searched among three on held-out pieces of a seed of its own; then
all rows with three seeds, each looked at once on 1,024 pieces of the test set, drawn from all of it, the same for all.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "reuters")]  # this checkout is what is measured

import runs  # noqa: E402
import torch  # noqa: E402
from inputs import reuters  # noqa: E402
from lightning.pytorch import Trainer, seed_everything  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

from lightning_peft.modules import (  # noqa: E402
    FreeBits,
    GaussianCritic,
    Lagging,
    LatentInformation,
    LinearAnnealing,
    LSTMDecoder,
    LSTMEncoder,
    Pieces,
    SentenceData,
    TextVAE,
)

RESULTS = runs.RESULTS / "text_vae.jsonl"
SEEDS, SEARCH_SEED = (0, 1, 2), 1000
WEIGHTS = (0.1, 0.5, 1.0)
FULL: dict[str, Any] = {
    "data": "reuters-r52", "words": 20, "vocabulary": 10_000, "batch": 32, "steps": 1500, "lr": 2e-3, "clip": 5.0,
    "embedding": 64, "hidden": 128, "latent": 32, "dropout": 0.3, "start": 0.1, "spread": 1.0, "samples": 20,
    "scored": 1024, "drawn": 0, "validations": 10, "val_share": 0.05,
}  # fmt: skip
QUICK = {
    **FULL, "vocabulary": 200, "steps": 6, "embedding": 8, "hidden": 8, "latent": 4, "samples": 2, "scored": 64,
    "validations": 2, "most": 600,
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        title: what the table calls it.
        parts: makes what is given to TextVAE, new for each run; of the run's weight, where it has one.
        settings: what a reader must know to repeat it.
    """

    title: str
    parts: Callable[[float], dict[str, Any]]
    settings: Mapping[str, Any]


INFORMATION = {"estimator": "dv", "critic": "GaussianCritic", "critic_lr": 1e-3, "critic_steps": 4, "warmup": 0.0}


def information(weight: float) -> dict[str, Any]:
    """MI-VAE's term."""
    return {"information": LatentInformation(weight, "dv", GaussianCritic, warmup=0.0, lr=1e-3, critic_steps=4)}


METHODS = {
    "vae": Method("VAE", lambda weight: {}, {}),
    "annealing": Method(
        "VAE + annealing",
        lambda weight: {"kl_weight": LinearAnnealing(0.1, share=0.5)},
        {"from": 0.1, "to": 1, "share": 0.5},
    ),
    "beta-0.4": Method("beta-VAE, 0.4", lambda weight: {"kl_weight": 0.4}, {"beta": 0.4}),
    "beta-0.2": Method("beta-VAE, 0.2", lambda weight: {"kl_weight": 0.2}, {"beta": 0.2}),
    "free-bits": Method(
        "free bits, 0.1 nats a unit", lambda weight: {"free_bits": FreeBits(0.1)}, {"nats": 0.1, "over": "unit"}
    ),
    "lagging": Method("lagging", lambda weight: {"lagging": Lagging(inner=10, every=5)}, {"inner": 10, "every": 5}),
    "mi": Method("MI-VAE", information, INFORMATION),
}


@dataclass(frozen=True)
class Run:
    """What is run; two runs with equal fields are the same run."""

    method: str
    seed: int
    weight: float
    search: bool


class Drawn(Dataset[Any]):
    """Some pieces of a file, in its order: the first ones would all be of its first texts.

    Args:
        rows: all of them.
        count: how many are drawn.
        seed: of the draw.
    """

    def __init__(self, rows: Any, count: int, seed: int) -> None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        self.places = order[:count].sort().values.tolist()
        self.rows, self.lengths = rows, rows.lengths[self.places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.rows[self.places[index]]


class Bench:
    """Sizes, and the file that its runs are kept in.

    Args:
        sizes: FULL or QUICK.
        results: the file.
    """

    def __init__(self, sizes: Mapping[str, Any] = FULL, results: Path = RESULTS) -> None:
        self.sizes, self.results = dict(sizes), results

    def data(self, seed: int) -> SentenceData:
        """Pieces of the corpus; held-out texts and vocabulary are those of seed 0, the order is the run's."""
        train, test = reuters("r52")
        data = SentenceData(
            train,
            test=test,
            cut=Pieces(self.sizes["words"]),
            vocabulary_size=self.sizes["vocabulary"],
            batch_size=self.sizes["batch"],
            val_share=self.sizes["val_share"],
            most=self.sizes.get("most"),
        )
        data.setup("fit")
        data.setup("test")
        for split in ("val", "test"):
            data._splits[split] = Drawn(data._split(split), self.sizes["scored"], self.sizes["drawn"])
        data.seed = seed
        return data

    def model(self, run: Run) -> TextVAE:
        """The model of a run."""
        sizes = self.sizes
        both = {"embedding": sizes["embedding"], "hidden": sizes["hidden"], "start": sizes["start"]}
        return TextVAE(
            sizes["vocabulary"],
            sizes["latent"],
            partial(LSTMEncoder, **both),
            partial(LSTMDecoder, **both, dropout=sizes["dropout"]),
            **METHODS[run.method].parts(run.weight),
            lr=sizes["lr"],
            samples=sizes["samples"],
            spread=sizes["spread"],
            seed=run.seed,
        )

    def execute(self, run: Run, trial: int = 0) -> dict[str, Any]:
        """Train and look once; the result is one line of the results file.

        Args:
            run: what to do.
            trial: steps, for a short one; 0 for all.
        """
        sizes, started, cpu = self.sizes, time.perf_counter(), time.process_time()
        data = self.data(run.seed)
        seed_everything(run.seed, verbose=False)
        vae = self.model(run)
        steps = trial or sizes["steps"]
        batches = math.ceil(sizes["scored"] / sizes["batch"])
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            max_steps=steps,
            check_val_every_n_epoch=None,
            val_check_interval=max(1, steps // sizes["validations"]),
            limit_val_batches=batches,
            limit_test_batches=batches,
            gradient_clip_val=sizes["clip"],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(vae, datamodule=data)
        trained = time.process_time() - cpu
        critic = {name: trainer.callback_metrics.get(f"mi/{name}") for name in ("estimate", "n")}  # before a test's own
        loader = data.val_dataloader() if run.search else data.test_dataloader()
        (found,) = trainer.test(vae, loader, verbose=False)
        figures = {name.removeprefix("test/"): round(value, 5) for name, value in found.items()}
        return {
            **asdict(run),
            "settings": self.settings(run),
            "versions": runs.versions("torch", "lightning", "torchmetrics"),
            "scored_on": f"{figures['n']:.0f} {'held-out' if run.search else 'test'} pieces",
            **{name: figures[name] for name in ("nll", "ppl", "reconstruction", "kl", "mi", "au", "n", "words")},
            "critic_estimate": None if critic["estimate"] is None else round(float(critic["estimate"]), 5),
            "critic_n": None if critic["n"] is None else int(critic["n"]),
            "trained_pieces": len(data._split("train")),
            "vocabulary_found": len(data.vocabulary),
            "parameters": sum(p.numel() for p in vae.model.parameters()),
            "training_cpu_seconds": round(trained, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "seconds": round(time.perf_counter() - started, 1),
        }

    def settings(self, run: Run) -> dict[str, Any]:
        """All that a run depends on beside its own fields."""
        return {**self.sizes, **METHODS[run.method].settings}

    def load(self) -> list[dict[str, Any]]:
        """Finished runs whose settings are today's."""
        rows = runs.read(self.results)
        return [row for row in rows if row["method"] in METHODS and row["settings"] == self.settings(_run_of(row))]

    def finished(self, run: Run) -> bool:
        """Whether the results file has this run."""
        return any(runs.same(run, row) for row in self.load())

    def record(self, run: Run) -> None:
        """Do a run and keep its line."""
        print(runs.announced(run, partial(self.execute, run), self.results), flush=True)

    def searched(self) -> list[dict[str, Any]]:
        """MI-VAE's weights that were tried, from small to large."""
        return sorted((row for row in self.load() if row["search"]), key=lambda row: row["weight"])

    @property
    def search_finished(self) -> bool:
        """Whether all weights were tried."""
        return {row["weight"] for row in self.searched()} >= set(WEIGHTS)

    def best_weight(self) -> float:
        """The weight of the least held-out NLL among those with an active unit and MI above 1; of all, if none has."""
        found = self.searched()
        if not self.search_finished:
            raise ValueError(f"{len(found)} of {len(WEIGHTS)} search runs of MI-VAE are there; run `plan` first.")
        used = [row for row in found if row["au"] > 0 and row["mi"] > 1]
        return float(min(used or found, key=lambda row: row["nll"])["weight"])

    def planned(self, methods: Sequence[str]) -> Iterator[list[Run]]:
        """The runs of the plan in stages, whether they are there or not."""
        if "mi" in methods:
            yield [Run("mi", SEARCH_SEED, weight, search=True) for weight in WEIGHTS]
        weights = {name: self.best_weight() if name == "mi" else 0.0 for name in methods}
        yield [Run(name, seed, weights[name], search=False) for seed in SEEDS for name in methods]

    def table(self) -> str:
        """The page: a row per method, mean ± standard deviation over seeds."""
        head = ["method", "NLL", "PPL", "KL", "MI", "AU", "n", "critic's Î (its n)", "NLL − VAE's", "CPU min."]
        rows = self.load()
        weights = self.searched()
        best = self.best_weight() if self.search_finished else None
        text = (__doc__ or "").split("\n\n")
        parts = [
            "# Posterior collapse",
            "",
            "Generated by `python benchmarks/text_vae.py table` from `benchmarks/results/text_vae.jsonl`. "
            + " ".join(text[2].split())
            + " "
            + " ".join(text[3].replace("`plan` runs what is missing: first", "First").split()),
            "",
            "How to use each of these is in [sentence VAE](text-vae.md). NLL is importance weighted, with "
            f"{self.sizes['samples']} draws, in nats per piece; PPL counts the end of a piece and not its start; KL, "
            "E KL(q(z|x) ‖ N(0, I)), is in nats; MI is I(x; z) by the aggregate posterior over all n pieces, which "
            f"cannot be above ln n; AU counts those of {self.sizes['latent']} units whose posterior mean varies by "
            "0.01 or more; Î is the critic's last estimate in training, of a batch. Mean ± standard deviation over the "
            "seeds; NLL − VAE's is of the same seeds. Minutes are of processor time, of training.",
            "",
            f"| {' | '.join(head)} |",
            "|" + "---|" * len(head),
        ]
        for name, method in METHODS.items():
            own = [row for row in rows if row["method"] == name and not row["search"]]
            if name == "mi":
                own = [row for row in own if row["weight"] == best]
            title = method.title
            if name == "mi":
                title += f" (search: {len(weights)} of {len(WEIGHTS)} weights)" if best is None else f", w = {best:g}"
            parts.append(f"| {' | '.join([title, *_cells(own, rows)])} |")
        if weights:
            parts += ["", "## MI-VAE's weight", ""]
            parts += [
                f"On {weights[0]['scored_on']}, seed {SEARCH_SEED}, {weights[0]['settings']['steps']:,} steps.",
                "",
            ]
            parts += ["| w | NLL | PPL | KL | MI | AU |", "|---|---|---|---|---|---|"]
            parts += [
                f"| {row['weight']:g} | {row['nll']:.2f} | {row['ppl']:.1f} | {row['kl']:.2f} | {row['mi']:.2f} | "
                f"{row['au']:.0f} |"
                for row in weights
            ]
        parts += ["", *self._verdict(rows)]
        if rows:
            total = sum(row["cpu_seconds"] for row in rows) / 60
            planned = len(WEIGHTS) + len(SEEDS) * len(METHODS)
            parts += [
                "",
                f"{len(rows)} of {planned} runs, {total:.0f} minutes of processor time in all, tests included.",
            ]
        return "\n".join(parts) + "\n"

    def _verdict(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Whether MI-VAE does what was hoped for, from the numbers."""
        plain = {row["seed"]: row for row in rows if row["method"] == "vae"}
        best = self.best_weight() if self.search_finished else None
        mi = {row["seed"]: row for row in rows if row["method"] == "mi" and not row["search"] and row["weight"] == best}
        both = sorted(plain.keys() & mi.keys())
        if not both:
            return ["VAE and MI-VAE have no seed in common yet."]
        gaps = [mi[seed]["nll"] - plain[seed]["nll"] for seed in both]
        used = all(mi[seed]["au"] > 0 and mi[seed]["mi"] > 1 for seed in both)
        lost = max(plain[seed]["au"] for seed in both)
        return [
            f"The plain VAE uses at most {lost:.0f} units. MI-VAE, without annealing, "
            f"{'keeps AU > 0 and MI > 1' if used else 'does not keep AU > 0 and MI > 1'} with every seed; its NLL is "
            f"{statistics.mean(gaps):+.2f} nats from the VAE's on average, {max(gaps):+.2f} at most: "
            f"{'within' if max(gaps) <= 1 else 'not within'} one nat.",
            "",
            "E KL = I(x; z) + KL(q(z) ‖ p): with weight w the objective pays for a share w of the divergence, and at "
            "w = 1 for all of it but KL(q(z) ‖ p). So KL is the price of what z says, and only the NLL tells whether "
            "the decoder has use for it.",
        ]


def _run_of(row: Mapping[str, Any]) -> Run:
    return Run(**{field: row[field] for field in Run.__dataclass_fields__})


def _cells(own: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not own:
        return ["–"] * 9
    plain = {row["seed"]: row["nll"] for row in rows if row["method"] == "vae"}
    gaps = [row["nll"] - plain[row["seed"]] for row in own if row["seed"] in plain]
    cells = [_spread([row[name] for row in own], digits) for name, digits in (("nll", 2), ("ppl", 1), ("kl", 2))]
    cells += [_spread([row["mi"] for row in own], 2), _spread([row["au"] for row in own], 1), f"{own[0]['n']:.0f}"]
    estimates = [row["critic_estimate"] for row in own if row["critic_estimate"] is not None]
    cells.append(f"{_spread(estimates, 2)} ({own[0]['critic_n']})" if estimates else "–")
    cells.append(_spread(gaps, 2) if gaps else "–")
    cells.append(f"{statistics.mean(row['training_cpu_seconds'] for row in own) / 60:.1f}")
    if len(own) < len(SEEDS):
        cells[0] += f" ({len(own)} of {len(SEEDS)} seeds)"
    return cells


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    common.add_argument("--results", type=Path, default=RESULTS, help="file of finished runs")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="one run", parents=[common])
    run.add_argument("--method", choices=METHODS, required=True)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--weight", type=float, default=0.0, help="of MI-VAE")
    run.add_argument("--search", action="store_true", help="look at held-out pieces of the training set")
    run.add_argument("--trial", type=int, default=0, metavar="N", help="N steps only; the result is printed, not kept")
    missing = commands.add_parser("plan", help="all runs that are missing", parents=[common])
    missing.add_argument("--methods", default=",".join(METHODS), help="comma-separated; default: all")
    show = commands.add_parser("table", help="Markdown page of the finished runs", parents=[common])
    show.add_argument("--out", type=Path, help="file to write; default: standard output")
    args = parser.parse_args()
    bench = Bench(QUICK if args.quick else FULL, args.results)

    if args.command == "table":
        if args.out:
            args.out.write_text(bench.table(), encoding="utf-8")
        else:
            print(bench.table())
        return
    runs.one_quiet_thread()
    if args.command == "plan":
        runs.carry_out(bench.planned(args.methods.split(",")), bench.record, bench.finished)
        return
    one = Run(args.method, args.seed, args.weight, args.search)
    if args.trial:
        print(bench.execute(one, args.trial), flush=True)
    elif bench.finished(one):
        print(f"there already: {one}", flush=True)
    else:
        bench.record(one)


if __name__ == "__main__":
    main()
