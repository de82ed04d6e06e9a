"""Risk certificates of MiniLM-L6 on Reuters R8 and R52: with a prior that no data chose, and one from half of them.

    python benchmarks/certificate.py run --data r8 --prior split --seed 0 [--steps N] [options of a run]
    python benchmarks/certificate.py plan --data r8 [--seeds 0,1,2]
    python benchmarks/certificate.py table [--out docs/real-certificates.md]

The head is in Q. With the prior "none", Q starts from the adapter's and the head's initial values, which are the
prior's means, and all training examples certify. With "split", adapters and head are first trained on a random half S_0
in the ordinary way; these values are the prior's means; Q is then trained on all examples, and those outside S_0
certify.

The test set is looked at once, after the certificate: by the mean of Q, and by networks drawn from Q, of which the
certificate speaks. Settings were fixed before a bound set was looked at, or were tried on one, and then `--tried` says
how many, by which both failure probabilities are divided. One thread; a run is a line of `results/certificate.jsonl`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "reuters")]  # this checkout is what is measured

import runs  # noqa: E402
import torch  # noqa: E402
from certificate_table import table  # noqa: E402
from inputs import minilm_folder, reuters  # noqa: E402
from lightning.pytorch import Callback, Trainer, seed_everything  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import Subset  # noqa: E402

from lightning_peft import AdapterInjection, LoRA, PACBayes, Regularization, RiskCertificate, RLoRA  # noqa: E402
from lightning_peft.certification.bound_set import BoundSet, root  # noqa: E402
from lightning_peft.certification.counting import count, read_logits, total  # noqa: E402
from lightning_peft.modules import TextClassifier, TextData  # noqa: E402
from lightning_peft.modules.batching import LengthGrouped, PlannedLoader  # noqa: E402

RESULTS = runs.RESULTS / "certificate.jsonl"
PROTOCOL = {"backbone": "MiniLM-L6", "max_length": 64, "batch_size": 32, "warmup": 0.06, "clip": 1.0, "dropout": 0.0}
METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "rlora-diag": partial(RLoRA, rank=32),
    "rlora-io": partial(RLoRA, rank=32, mode="io"),
    "lora": partial(LoRA, rank=2, alpha=8.0),
}
TARGETS = {"all": r"encoder\.layer\..*", "last": r"encoder\.layer\.5\..*", "attention": "(query|value)"}
DELTAS = {"delta": 0.025, "delta_prime": 0.01}  # a confidence of 0.965


@dataclass(frozen=True)
class Run:
    """What is run; two runs with equal fields are the same run.

    Attributes:
        data: "r8" or "r52".
        prior: "none" or "split".
        seed: of the split, the order of batches, the head's start and the draws.
        method: a name in METHODS.
        targets: a name in TARGETS.
        lr: peak learning rate of adapters in Q; of the head, see `head_lr`.
        head_lr: peak learning rate of the head.
        speed: of log sigma, in units of the head's rate.
        prior_sigma: lambda of adapters.
        head_sigma: lambda of the head.
        shrink: sigma starts at this share of lambda.
        objective: of PACBayes.
        prior_lr: peak learning rate of adapters before the split prior is taken.
        prior_epochs: epochs over S_0.
        epochs: epochs of Q.
        passes: of the certificate.
        unit: what shares a draw of the noise, in training and in the certificate.
        tried: settings that were compared on a bound set.
    """

    data: str = "r8"
    prior: str = "split"
    seed: int = 0
    method: str = "rlora-diag"
    targets: str = "all"
    lr: float = 2e-3
    head_lr: float = 2e-3
    speed: float = 5.0
    prior_sigma: float = 0.01
    head_sigma: float = 0.01
    shrink: float = 1.0
    objective: str = "f_quad"
    prior_lr: float = 1e-2
    prior_epochs: int = 2
    epochs: int = 1
    passes: int = 3
    unit: str = "example"
    tried: int = 1


SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("r8", "split"): {},
    ("r8", "none"): {"prior_sigma": 0.1, "head_sigma": 0.1, "lr": 1e-2, "head_lr": 5e-3, "epochs": 2},
    ("r52", "split"): {"prior_epochs": 4},
    ("r52", "none"): {"prior_sigma": 0.1, "head_sigma": 0.1, "lr": 1e-2, "head_lr": 5e-3, "epochs": 2},
}


def fit(classifier: TextClassifier, loader: Any, callbacks: list[Callback], epochs: int, steps: int) -> float:
    """Train; wall seconds."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs if steps < 0 else -1,
        max_steps=steps,
        gradient_clip_val=PROTOCOL["clip"],
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    started = time.perf_counter()
    trainer.fit(classifier, loader)
    return time.perf_counter() - started


def execute(run: Run, steps: int = -1, most: int = -1) -> dict[str, Any]:
    """Train, certify and test once; the result is one line of the results file.

    Args:
        run: what to do.
        steps: optimizer steps of each training; below 0 for its epochs.
        most: examples of the bound set and of the test set, for a short trial; below 0 for all.
    """
    started = time.perf_counter()
    train, test = reuters(run.data)
    seed_everything(run.seed, verbose=False)
    data = TextData(
        train,
        tokenizer=minilm_folder(),
        test=test,
        val_share=0.0,
        max_length=PROTOCOL["max_length"],
        batch_size=PROTOCOL["batch_size"],
        seed=run.seed,
    )
    data.setup("fit")
    data.setup("test")
    rows, _ = root(BoundSet(data.train_dataloader()).dataset)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(run.seed)).tolist()
    half = Subset(rows, sorted(order[: len(rows) // 2]))

    def loader(places: list[int]) -> PlannedLoader:
        plan = LengthGrouped(rows.lengths[places], PROTOCOL["batch_size"], run.seed)
        return PlannedLoader(Subset(rows, places), plan, data.collate())

    classifier = TextClassifier(
        minilm_folder(), data.num_labels, lr=run.prior_lr, head_lr=5e-3, weight_decay=0.0, warmup=0.06,
        calibration_bins=15,
    )  # fmt: skip
    for child in classifier.modules():
        if isinstance(child, nn.Dropout):
            child.p = PROTOCOL["dropout"]
    injection = AdapterInjection(METHODS[run.method], targets=[TARGETS[run.targets]], train=["classifier"])
    seconds = {}
    if run.prior == "split":
        seconds["prior"] = fit(classifier, loader(list(half.indices)), [injection], run.prior_epochs, steps)
    classifier.lr, classifier.head_lr = run.lr, run.head_lr

    def scale(share: float, name: str, value: Tensor) -> float:
        return share * (run.head_sigma if "classifier" in name else run.prior_sigma)

    term = PACBayes(
        run.objective, unit=run.unit, prior_sigma=partial(scale, 1.0), sigma=partial(scale, run.shrink),
        speed=run.speed, complete=True, seed=run.seed,
    )  # fmt: skip
    bound_set = None
    if most > 0:
        taken = set(half.indices) if run.prior == "split" else set()
        bound_set = Subset(rows, [i for i in range(len(rows)) if i not in taken][:most])
    with tempfile.TemporaryDirectory() as folder:
        certificate = RiskCertificate(
            None if bound_set is None else PlannedLoader(bound_set, LengthGrouped([0] * most, 32), data.collate()),
            run.passes,
            run.unit,
            tried=run.tried,
            seed=run.seed,
            prior_data=half if run.prior == "split" else None,
            path=Path(folder) / "certificate.json",
            **DELTAS,
        )
        clock = Clock()
        callbacks = [injection, Regularization({"pac": term}), clock, certificate]
        fit(classifier, loader(list(range(len(rows)))), callbacks, run.epochs, steps)
    found = certificate.certificate
    assert found is not None
    seconds |= {"posterior": clock.trained, "certificate": time.perf_counter() - clock.ended}
    tests = data.test_dataloader()
    (mean,) = Trainer(
        limit_test_batches=1.0 if most < 0 else -(-most // 32),
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    ).test(classifier, tests, verbose=False)  # fmt: skip
    return {
        **asdict(run),
        "settings": PROTOCOL | DELTAS,
        "versions": runs.versions("torch", "lightning", "transformers", "torchmetrics"),
        "certificate": found.bound,
        "confidence": found.confidence,
        "kl": found.kl,
        "gibbs": found.risk,
        "monte_carlo": found.monte_carlo,
        "cross_entropy": found.cross_entropy,
        "examples": found.examples,
        "draws": found.units,
        "parameters": found.parameters,
        "test_gibbs": gibbs(classifier, term, data, run, most),
        "test_mean": 1 - mean["test/accuracy"],
        "test_ece": mean["test/ece"],
        "test_nll": mean["test/nll"],
        "test_examples": len(tests.dataset) if most < 0 else most,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(time.perf_counter() - started, 1),
    }


class Clock(Callback):
    """When training began and ended, before the certificate."""

    trained = ended = 0.0

    def on_train_start(self, *args: Any) -> None:
        """Start."""
        self._began = time.perf_counter()

    def on_train_end(self, *args: Any) -> None:
        """Stop."""
        self.ended = time.perf_counter()
        self.trained = self.ended - self._began


def gibbs(classifier: TextClassifier, term: PACBayes, data: TextData, run: Run, most: int) -> float:
    """The error of networks drawn from Q on the test set, one draw for each example or batch."""
    rows = BoundSet(data.test_dataloader())
    if most > 0:
        rows.keep(list(range(most)))
    assert term.posterior is not None
    classifier.eval()
    counts = count(
        lambda batch: read_logits(classifier, batch), term.posterior, classifier, rows,
        passes=1, unit=run.unit, seed=run.seed + 1, p_min=1e-4,
    )  # fmt: skip
    return total(list(counts))[0] / len(rows)


def planned(data: str, prior: str, seed: int) -> Run:
    """The run of a table's row."""
    return replace(Run(data=data, prior=prior, seed=seed), **SETTINGS[data, prior])


def load(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Finished runs whose settings are today's, of methods and targets that there are."""
    rows = [row for row in runs.read(path) if row["settings"] == PROTOCOL | DELTAS]
    return [row for row in rows if row["method"] in METHODS and row["targets"] in TARGETS]


def finished(run: Run) -> bool:
    """Whether the results file has this run."""
    return any(runs.same(run, row) for row in load())


def _arguments(run: Run) -> list[object]:
    return [part for name, value in asdict(run).items() for part in (f"--{name.replace('_', '-')}", value)]


def _summary(result: dict[str, Any]) -> str:
    figures = ("certificate", "kl", "gibbs", "monte_carlo", "test_gibbs", "test_mean", "test_ece", "test_nll")
    shown = " ".join(f"{name}={result[name]:.4f}" for name in figures)
    return f"  {shown} parameters={result['parameters']} seconds={result['seconds']} of {result['total_seconds']}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one run; what is not given is as planned for its data and prior")
    for field in fields(Run):
        kind = type(field.default)
        one.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS)
    one.add_argument("--steps", type=int, default=-1, help="a short trial; its result is printed and not kept")
    missing = commands.add_parser("plan", help="all runs that are missing")
    missing.add_argument("--data", choices=("r8", "r52"), default="r8")
    missing.add_argument("--seeds", default="0,1,2")
    show = commands.add_parser("table", help="Markdown table of the finished runs")
    show.add_argument("--out", type=Path, help="file to write; default: standard output")
    args = parser.parse_args()
    if args.command == "table":
        text = table(load(), runs.read(runs.RESULTS / "certificate_time.jsonl"))
        if args.out:
            args.out.write_text(text, encoding="utf-8")
        else:
            print(text)
        return
    runs.one_quiet_thread()
    if args.command == "plan":
        seeds = map(int, args.seeds.split(","))
        rows = [planned(args.data, prior, seed) for seed in seeds for prior in ("split", "none")]
        runs.carry_out([rows], runs.alone(__file__, _arguments), finished)
        return
    given = {field.name: getattr(args, field.name) for field in fields(Run) if hasattr(args, field.name)}
    run = replace(planned(given.get("data", "r8"), given.get("prior", "split"), given.get("seed", 0)), **given)
    if args.steps > 0:
        print(_summary(execute(run, args.steps, most=64)))
    elif finished(run):
        print(f"there already: {run}", flush=True)
    else:
        print(_summary(runs.announced(run, lambda: execute(run), RESULTS)), flush=True)


if __name__ == "__main__":
    main()
