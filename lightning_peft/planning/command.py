"""`lightning-peft plan`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

from torch import nn

from lightning_peft import presets
from lightning_peft.callbacks import AdapterInjection, RankPruning, Regularization
from lightning_peft.planning.estimate import plan
from lightning_peft.planning.figures import Optimizer, Precision, Strategy
from lightning_peft.planning.skeleton import DTYPES, skeleton
from lightning_peft.rank.policy import Policy
from lightning_peft.regularizers import Regularizer
from lightning_peft.surgery.choice import adapter_kind
from lightning_peft.surgery.injection import inject

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
        "--method", choices=tuple(_methods()), default="lora", help="preset that adapts the layers (%(default)s)"
    )
    method.add_argument(
        "--rank", type=int, metavar="R", help="rank of every layer, at the start if it falls (the preset's default)"
    )
    method.add_argument(
        "--final-rank", type=float, metavar="R", help="where rank falls: its average at the end (the preset's default)"
    )
    method.add_argument(
        "--sparsity", type=float, metavar="S", help="share of the base's parameters that stay, for sparse methods"
    )
    method.add_argument(
        "--density", type=float, metavar="Q", help="share of every adapted weight that is trained, for sparse methods"
    )
    method.add_argument(
        "--parameters", type=int, metavar="K", help="scalars that are trained in all layers, for sparse methods"
    )
    method.add_argument("--targets", nargs="+", metavar="PATTERN", help="layers to adapt (what the preset adapts)")
    method.add_argument("--train", nargs="*", metavar="PATTERN", help="what trains beside them (the preset's default)")

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
    injection, policy, terms = _method(options)
    model = module = skeleton(options.model, options.architecture, options.dtype)
    kind = adapter_kind(injection.adapter)
    if kind is not None and kind.adapts == "model":
        module = nn.Sequential(model)  # what stands in a whole model's place needs one that it stands in
    for term in terms.values():
        term.before_adapters(module)
    targets = injection.targets if options.targets is None else options.targets
    inject(module, injection.adapter, targets, injection.train if options.train is None else options.train)
    for term in terms.values():
        term.attach(module)
    if terms:
        module.add_module("peft_terms", nn.ModuleDict(terms))  # as the callback does: what they own is trained, too
    found = plan(
        module,
        options.world_size,
        nodes=options.nodes,
        strategy=options.strategy,
        precision=options.precision,
        optimizer=options.optimizer,
        final=policy.final_budget if policy else None,  # ``None``: planned as if all components stayed
        importance=policy.importance if policy else None,
        accumulate=options.accumulate,
    )
    found = replace(found, model=type(model).__name__)
    return json.dumps(found.as_dict(), indent=2) if options.json else str(found)


def _methods() -> dict[str, Callable[..., presets.Preset]]:
    """The presets that need nothing but ranks, by their names on the command line."""
    found = {name.replace("_", "-"): getattr(presets, name) for name in presets.__all__ if name != "Preset"}
    return {name: make for name, make in found.items() if all(p.default is not p.empty for p in _parameters(make))}


def _method(options: argparse.Namespace) -> tuple[AdapterInjection, Policy | None, dict[str, Regularizer]]:
    """What the chosen preset injects, what drives its ranks while it trains, if anything does, and its terms."""
    methods = _methods()
    names = {name: {p.name for p in _parameters(make)} for name, make in methods.items()}
    takes, given = names[options.method], dict[str, Any]()
    if options.rank is not None:
        ranked = next((name for name in ("initial_rank", "rank") if name in takes), None)
        if ranked is None:
            raise ValueError(f"--method {options.method} has no rank; leave --rank out.")
        given[ranked] = options.rank
    for option in ("sparsity", "density", "parameters"):
        value = getattr(options, option)
        if value is not None and option not in takes:
            others = ", ".join(name for name, known in names.items() if option in known)
            raise ValueError(f"--method {options.method} takes no --{option}; it is for {others}.")
        if value is not None:
            given[option] = value
    if options.final_rank is not None:
        if "final_rank" not in takes:
            others = ", ".join(name for name, known in names.items() if "final_rank" in known)
            raise ValueError(
                f"--method {options.method} keeps the rank that --rank gives it; --final-rank is for {others}."
            )
        given["final_rank"] = options.final_rank
    callbacks = methods[options.method](**given)
    (injection,) = (each for each in callbacks if isinstance(each, AdapterInjection))
    policy = next((each.policy for each in callbacks if isinstance(each, RankPruning)), None)
    terms = (dict(each.terms.items()) for each in callbacks if isinstance(each, Regularization))
    return injection, policy, next(terms, {})  # type: ignore[arg-type]  # a ModuleDict's values are modules


def _parameters(make: Callable[..., object]) -> list[inspect.Parameter]:
    return list(inspect.signature(make).parameters.values())
