"""`lightning-peft compress`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lightning_peft.compression.methods import DEFAULT, METHODS, WEIGHTINGS

HELP = "a smaller model of the same quality, as plain layers"
_DESCRIPTION = (
    "Factorise the linear layers of a transformers model, keep the components that matter to its task, and write a "
    "model of plain thin layers, which loads without this library; with a report of what it was and what it is."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.argument_default = argparse.SUPPRESS  # what is not given is the job's own default
    parser.description = _DESCRIPTION
    parser.usage = "%(prog)s MODEL OUT --data FILE [options]"  # MODEL first: --targets takes all that follows it
    parser.add_argument("model", metavar="MODEL", help="folder of a transformers model and its tokenizer")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write, whole or not at all")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds other things")

    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--data", metavar="FILE", required=True, help="csv, tsv, jsonl, tab or (lm) txt file to calibrate and train on"
    )
    texts.add_argument("--test", metavar="FILE", help="file to measure quality on (a held-out tenth of --data)")
    texts.add_argument("--task", choices=("classification", "lm"), help="what the model is for (what its config says)")
    texts.add_argument("--text", metavar="COLUMN", help="column of the text")
    texts.add_argument("--label", metavar="COLUMN", help="column of the label")
    texts.add_argument("--length", type=int, metavar="N", help="tokens per text at most (64), or per block (256)")
    texts.add_argument("--batch-size", type=int, metavar="N", help="texts per batch (32), or blocks (4)")

    how = parser.add_argument_group("compression")
    titles = "; ".join(f"{name}: {found.title}" for name, found in METHODS.items())
    how.add_argument("--method", choices=tuple(METHODS), help=f"{titles} ({DEFAULT})")
    how.add_argument("--ratio", type=float, metavar="P", help="share of the weights to keep (0.5)")
    how.add_argument(
        "--targets", nargs="+", metavar="PATTERN", help="layers to compress (all linear ones but the head)"
    )
    learners = ", ".join(name for name, found in METHODS.items() if found.weighting)
    how.add_argument("--weighting", choices=WEIGHTINGS, help=f"what the decomposition of {learners} goes by (fisher)")
    how.add_argument("--calibration", type=int, metavar="N", help="batches to look at (64)")
    trained = " and ".join(name for name, found in METHODS.items() if found.trains)
    how.add_argument("--steps", type=int, metavar="N", help=f"optimizer steps of {trained} (1000)")
    how.add_argument("--fine-tuning", type=int, metavar="N", help="optimizer steps on the compressed model (none)")
    how.add_argument("--lr", type=float, help="peak learning rate of fine-tuning (1e-4)")
    how.add_argument("--distill", type=float, metavar="W", help="weight of distillation while fine-tuning (none)")
    how.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="as in the Trainer (32-true)")
    how.add_argument("--seed", type=int, help="of everything that is drawn (0)")
    how.add_argument(
        "--save-every", type=float, metavar="MINUTES", help="of training; a job that was stopped goes on from there (5)"
    )
    how.add_argument("--quiet", dest="progress", action="store_false", help="print the report alone")


_TEXTS = ("test", "text", "label", "length", "batch_size", "seed")
_OTHER = ("command", "model", "out", "overwrite", "data", "test", "text", "label", "length", "batch_size")


def run(options: argparse.Namespace) -> str:
    """The report as text, for parsed options.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: what is wrong with the model, the texts, or an option.
    """
    # Here, because it takes transformers, whose import takes seconds, and the other commands do without it.
    from lightning_peft.compression.job import Compression
    from lightning_peft.compression.task import Source

    given = vars(options)
    job = Compression(**{name: value for name, value in given.items() if name not in _OTHER})
    source = Source(options.data, **{name: given[name] for name in _TEXTS if name in given})
    report = job.run(os.fspath(options.model), source, options.out, given.get("overwrite", False))
    return f"{report}\n\nWrote {options.out}: the model, its tokenizer, report.md, report.json, ranks.png."
