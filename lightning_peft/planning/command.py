"""`lightning-peft plan`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import get_args

from lightning_peft.adapters import dynamic_dora as dora
from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.adapters.dynamic_dora import DynamicDoRA
from lightning_peft.adapters.lora import LoRA
from lightning_peft.planning.estimate import plan
from lightning_peft.planning.figures import Optimizer, Precision, Strategy
from lightning_peft.planning.skeleton import DTYPES, skeleton
from lightning_peft.rank.budget import Budget
from lightning_peft.surgery import inject

HELP = "memory, files and network traffic of a job, before it runs"
_DESCRIPTION = (
    "What fine-tuning a transformers model will take: trained parameters, memory per process, size of the files, and "
    "bytes that each process sends to others. Only config.json is read, and no memory is taken for weights."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.description = _DESCRIPTION
    parser.usage = "%(prog)s MODEL [options]"  # MODEL first: --targets and --train take all that follows them
    parser.add_argument("model", metavar="MODEL", help="a model's folder with its config.json, or that file")
    parser.add_argument("--architecture", metavar="CLASS", help="transformers class (the one that config.json names)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="what the base is loaded in (what config.json names, or float32)"
    )

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method", choices=("lora", "dynamic-dora"), default="lora", help="how the layers are adapted (lora)"
    )
    method.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="rank of every layer (8); for dynamic-dora at the start (1.5 x the final one)",
    )
    method.add_argument("--final-rank", type=float, metavar="R", help="dynamic-dora: average rank at the end (8)")
    method.add_argument(
        "--targets",
        nargs="+",
        metavar="PATTERN",
        help="layers to adapt (all linear and convolution layers but the head)",
    )
    method.add_argument(
        "--train", nargs="*", metavar="PATTERN", help="what trains beside them (the head, where it is new)"
    )

    run = parser.add_argument_group("Trainer")
    run.add_argument("--world-size", type=int, default=1, metavar="N", help="processes in all: num_nodes x devices (1)")
    run.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that they are spread over (1)")
    run.add_argument(
        "--strategy", choices=get_args(Strategy), default="ddp", help="fsdp2 is ModelParallelStrategy (ddp)"
    )
    run.add_argument("--precision", choices=get_args(Precision), default="32-true", help="as in the Trainer (32-true)")
    run.add_argument("--optimizer", choices=get_args(Optimizer), default="adamw", help="Adam is as adamw (adamw)")
    run.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches per optimizer step (1)")
    parser.add_argument("--json", action="store_true", help="print all figures, in bytes, as JSON")


def run(options: argparse.Namespace) -> str:
    """The plan as text, for parsed options.

    Raises:
        FileNotFoundError, ValueError, TypeError: what is wrong with the model's config or an option.
    """
    factory, final = _method(options)
    module = skeleton(options.model, options.architecture, options.dtype)
    inject(module, factory, options.targets, options.train)
    found = plan(
        module,
        options.world_size,
        nodes=options.nodes,
        strategy=options.strategy,
        precision=options.precision,
        optimizer=options.optimizer,
        final=final,
        accumulate=options.accumulate,
    )
    return json.dumps(found.as_dict(), indent=2) if options.json else str(found)


def _method(options: argparse.Namespace) -> tuple[AdapterFactory, Budget | None]:
    if options.method == "lora":
        if options.final_rank is not None:
            raise ValueError("--final-rank is for --method dynamic-dora; LoRA keeps the rank that --rank gives it.")
        return partial(LoRA, rank=8 if options.rank is None else options.rank), None
    final = 8.0 if options.final_rank is None else options.final_rank
    budget = Budget(rank=final)  # first: it refuses a rank that is none
    initial = dora.initial_rank(final) if options.rank is None else options.rank
    return partial(DynamicDoRA, rank=initial), budget
