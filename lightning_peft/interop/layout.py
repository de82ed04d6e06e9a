"""How adapters are laid out in PEFT's LoRA format: the names of its tensors, its ranks and scales, and its config.

PEFT finds a layer by the end of its name, takes its rank and scale from the first of several regular expressions that
matches, and says nothing when a tensor has no place. So every name here is written out in full and checked against the
way in which PEFT would read it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.layers import is_transformers_conv1d
from lightning_peft.interop.targets import Target, has_lengths
from lightning_peft.rank.budget import clean_name

Mode = Literal["padded", "compact", "folded", "adalora"]


def lay_out(targets: list[Target], mode: Mode) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the part of the config that says their ranks and scales.

        padded    one rank R for all, zeros behind; scale s = lora_alpha / R
        compact   true ranks r, scale s = alpha r / r from alpha_pattern
        folded    true ranks r, scale lora_alpha / r, and B times r / R to make up for it

    Where one layer has lengths of its own (PEFT's `use_dora`), every layer gets a vector of lengths, and one of rank 0
    that has some is written with rank 1, of zeros.

    Raises:
        ValueError: mode is none of these.
        TypeError: a row's length is zero.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}: choose {', '.join(map(repr, get_args(Mode)))}.")
    widest, decomposed = max(target.rank for target in targets), has_lengths(targets)
    s = next(part.adapter.scaling for target in targets for part in target.parts if part.adapter is not None)
    alpha = s * widest
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target in targets:
        rank = widest if mode == "padded" else target.rank
        own = s * rank if mode == "compact" else alpha
        if rank != widest:
            ranks[target.path] = rank
        if own != alpha:
            alphas[target.path] = own
        for part in target.parts:
            name_a, name_b = part.names()
            tensors[name_a], tensors[name_b] = part.factors(rank, own / rank)
            if decomposed:
                tensors[part.lengths_name] = part.lengths()
    paths = [target.path for target in targets]
    config = {
        "r": widest,
        "lora_alpha": _number(alpha),
        "rank_pattern": _patterns(ranks, paths),
        "alpha_pattern": _patterns({path: _number(own) for path, own in alphas.items()}, paths),
        "use_dora": decomposed,
        "fan_in_fan_out": any(
            part.adapter and is_transformers_conv1d(part.adapter.base) for target in targets for part in target.parts
        ),
    }
    return tensors, config


def target_modules(host: nn.Module, paths: Collection[str]) -> list[str] | str:
    """The paths as they are, or as one regular expression where PEFT would take another layer for one of them."""
    layers = _layer_names(host)
    if any(name not in paths and name.endswith(tuple("." + path for path in paths)) for name in layers):
        return "|".join(re.escape(path) for path in paths)
    return list(paths)


def modules_to_save(host: nn.Module, head: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The head's modules, if PEFT would find exactly these.

    Raises:
        ValueError: PEFT would also find other modules by these names, or leave adapters out.
    """
    names = list(head)
    for path in paths:
        for name in names:
            if re.match(rf"(^|.*\.){name}($|\..*)", path):
                raise ValueError(_ambiguous(name, path))
    for other in _layer_names(host):
        for name in names:
            if other.endswith(name) and other not in names:
                raise ValueError(_ambiguous(name, other))
    return names


# PEFT's model classes for these tasks keep the modules of these names whatever the config says.
_TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
}


def task_type(host: nn.Module, head: Collection[str]) -> str | None:
    """PEFT's name of the model's task; ``None`` if it has none, or if it would ask for a head that is left out."""
    for ending, (task, kept) in _TASKS.items():
        if type(host).__name__.endswith(ending):
            asked = [name for name in _layer_names(host) if kept and name.endswith(kept)]
            return task if all(name in head for name in asked) and (asked or not kept) else None
    return None


def _ambiguous(name: str, other: str) -> str:
    return (
        f"the trained module {name!r} cannot be kept: PEFT finds such modules by the end of their name and would also "
        f"take {other!r}. Give head=False to leave it out and save it yourself, rename it, or export the merged model."
    )


def _layer_names(host: nn.Module) -> list[str]:
    """Names of all modules as they are without adapters and wrappers."""
    inside = tuple(f"{path}." for path, child in host.named_modules() if isinstance(child, Adapter))
    return [clean_name(path) for path, _ in host.named_modules(remove_duplicate=False) if not path.startswith(inside)]


def _patterns(values: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """A PEFT pattern per layer: its plain name, or anchored and escaped where that would match another layer too."""
    if all(re.fullmatch(r"[\w.]+", path) for path in values):
        compiled = {path: re.compile(rf"(.*\.)?({path})$") for path in values}
        if not any(pattern.match(path) for key, pattern in compiled.items() for path in paths if key != path):
            return dict(values)
    return {f"^{re.escape(path)}": value for path, value in values.items()}


def _number(value: float) -> int | float:
    """Whole numbers as such: some readers take nothing else for lora_alpha."""
    return int(value) if value == int(value) else value
