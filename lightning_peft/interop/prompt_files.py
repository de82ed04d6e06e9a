"""A prompt as one file of tensors that anybody can read, for inference elsewhere and for another task's start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.prompts.base import Prompt
from lightning_peft.adapters.prompts.dept import DePT, scale_of
from lightning_peft.adapters.prompts.dpt import DPT
from lightning_peft.adapters.prompts.soft_prompt import SoftPrompt
from lightning_peft.archive import AdapterFileError, reading
from lightning_peft.atomic import write_whole
from lightning_peft.checkpoint import ENTRY, check_entry, read
from lightning_peft.export import own_random
from lightning_peft.heads import hub_models
from lightning_peft.surgery.injection import install
from lightning_peft.surgery.layers import adapters

Module = TypeVar("Module", bound=nn.Module)
FORMAT = "lightning_peft/prompt/v1"
KINDS: Mapping[str, type[Prompt]] = {kind.__name__: kind for kind in (SoftPrompt, DPT, DePT)}


def save_prompt(module: nn.Module, path: str | Path, folded: bool = False) -> Path:
    """Write a module's prompt into one safetensors file, whole or not at all.

        prompt_embeddings (m, d)            what goes in front of the text
        A (s, r) and B (r, d)               of DePT: gamma A B is added to the text's embeddings by their places
        offsets (s, d)                      the same as one table, in their place, if `folded`
        A (e, b) and B (b, d)               of DPT: what the prompt is the product of, to train on from

    Components that are closed are left out, a gain is folded into A; what an offset's place is (`align`), where the
    prompt stands and gamma are in the file's metadata, as text. A head that was trained beside it is not in the file.

    Args:
        module: with one prompt inside.
        path: of the file.
        folded: write offsets as a table, for inference without this library.

    Returns:
        The path.

    Raises:
        ValueError: there is no prompt, or more than one; or the one that there is has no offsets to fold.
        OSError: it could not be written.
    """
    name, prompt = only_prompt(module, "save_prompt")
    kind = next((kind for kind, cls in KINDS.items() if type(prompt) is cls), None)
    if kind is None:
        raise ValueError(
            f"save_prompt knows {', '.join(KINDS)}, and at {name!r} is a {type(prompt).__name__}. Save a checkpoint "
            "with AdapterCheckpoint, which holds prompts of every class."
        )
    if folded and not (isinstance(prompt, DePT) and prompt.rank):
        raise ValueError(f"folded=True is for DePT's offsets, and the {kind} at {name!r} has none. Leave it out.")
    tensors: dict[str, Tensor] = {"prompt_embeddings": prompt.prompt()}
    about = {"format": FORMAT, "kind": kind, "prompt_position": prompt.prompt_position}
    if isinstance(prompt, DePT):
        about |= {"align": prompt.align, "gamma": repr(1.0 if folded else prompt.scaling), "reach": str(prompt.reach)}
        tensors |= {"offsets": prompt.table()} if folded else _open_factors(prompt)
    if isinstance(prompt, DPT):
        tensors |= _open_factors(prompt)
    path = Path(path)
    plain = {key: value.detach().float().cpu().contiguous().clone() for key, value in tensors.items()}
    write_whole(path, save(plain, metadata=about))
    return path


def load_prompt(module: Module, path: str | Path) -> Module:
    """Put the prompt of a file that :func:`save_prompt` wrote in front of the one transformers model of a module.

    All else is frozen. A table of offsets comes back as DePT with as many components as the table can need.

    Raises:
        AdapterFileError: the file is damaged, is no such file, or does not fit the model.
        FileNotFoundError: there is no such file.
        ValueError: the module has adapters already, or not one transformers model inside.
    """
    if any(isinstance(child, Adapter) for child in module.modules()):
        raise ValueError(f"{type(module).__name__} has adapters already: give load_prompt the plain model.")
    models = hub_models(module)
    if "" in models or len(models) != 1:
        raise ValueError(
            f"load_prompt puts a prompt in the place of the one transformers model inside a module, and "
            f"{type(module).__name__} {'is one itself' if '' in models else f'has {len(models)}'}. Give a module that "
            "holds one."
        )
    tensors, about = read_prompt(path)
    ((name, model),) = models.items()

    def build(base: nn.Module) -> Adapter:
        with own_random(base):  # its start is overwritten at once
            prompt = _empty(base, tensors, about)
        _copy(prompt, tensors, str(path))
        return prompt

    install(module, {name: (model, build)}, lambda _: ())
    return module


def init_prompt_from(module: nn.Module, path: str | Path) -> nn.Module:
    """Have the prompt that a module has start from one that was trained on another task: it alone, no head.

    DePT's offsets stay what they were where this prompt's gamma is another: B is scaled.

    Args:
        module: with one prompt inside, of the same class, sizes and place in the text as the file's.
        path: a file of :func:`save_prompt`, or a checkpoint that AdapterCheckpoint has filtered.

    Returns:
        The module.

    Raises:
        AdapterFileError: the file is damaged, or its prompt is of another class, size or place.
        FileNotFoundError: there is no such file.
        ValueError: there is no prompt, or more than one.
    """
    name, prompt = only_prompt(module, "init_prompt_from")
    source = str(path)
    whole = Path(path).is_file() and Path(path).suffix == ".ckpt"
    tensors, about = _of_checkpoint(path) if whole else read_prompt(path)
    if about["kind"] != type(prompt).__name__:
        raise AdapterFileError(f"{source} holds a {about['kind']}, and at {name!r} is a {type(prompt).__name__}.")
    for option in ("prompt_position", "align"):
        here = getattr(prompt, option)
        if about.get(option, here) != here:
            raise AdapterFileError(
                f"{source} holds a prompt that was trained with {option}={about[option]!r}, and at {name!r} is one "
                f"with {here!r}. Give the same."
            )
    tensors = tensors if whole else _parameters(tensors, about["kind"])
    if isinstance(prompt, DePT) and "B" in tensors:
        tensors["B"] = tensors["B"] * (about["gamma"] / prompt.scaling)
    own = {key: value for key, value in prompt.state_dict(keep_vars=True).items() if not key.startswith("base.")}
    if (odd := _misfit(own, tensors)) is not None:
        raise AdapterFileError(f"{source} does not fit the prompt at {name!r}: {odd}.")
    with torch.no_grad():
        for key, value in tensors.items():
            own[key].copy_(value)
    return module


def only_prompt(module: nn.Module, verb: str) -> tuple[str, Prompt]:
    """A module's prompt and the name of the model that it is for.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = {name: adapter for name, adapter in adapters(module).items() if isinstance(adapter, Prompt)}
    if len(found) != 1:
        raise ValueError(
            f"{verb} is for a module with one prompt, and {type(module).__name__} has {len(found)}. Inject one "
            "(SoftPrompt, DPT, DePT), or give the part that has one."
        )
    return next(iter(found.items()))


def read_prompt(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the checked metadata of a file that :func:`save_prompt` wrote.

    Raises:
        AdapterFileError: it is damaged or no such file.
        FileNotFoundError: there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    with reading(path), safe_open(path, framework="pt") as file:
        about: dict[str, Any] = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    if about.get("format") != FORMAT or about.get("kind") not in KINDS:
        raise AdapterFileError(f"{path} is no prompt that save_prompt has written: its metadata says {about}.")
    wanted = {"prompt_embeddings"}
    if about["kind"] == "DPT" or (about["kind"] == "DePT" and "A" in tensors):
        wanted |= {"A", "B"}
    elif "offsets" in tensors and about["kind"] == "DePT":
        wanted |= {"offsets"}
    odd = next((k for k, t in tensors.items() if t.dim() != 2 or 0 in t.shape or not t.is_floating_point()), None)
    if tensors.keys() != wanted or odd is not None:
        raise AdapterFileError(f"{path} holds {', '.join(sorted(tensors)) or 'nothing'}, which is no whole prompt.")
    if any(not bool(t.isfinite().all()) for t in tensors.values()):
        raise AdapterFileError(f"{path} holds numbers that are not finite; use another copy.")
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    width = shapes["prompt_embeddings"][1]
    fits = shapes.get("offsets", (0, width))[1] == width
    if "A" in shapes:
        fits = shapes["A"][1] == shapes["B"][0] and shapes["B"][1] == width
        fits = fits and (about["kind"] == "DePT" or shapes["A"][0] == shapes["prompt_embeddings"][0])
    if not fits:
        raise AdapterFileError(f"{path} holds tensors that do not go together: {json.dumps(shapes)}.")
    if about["kind"] == "DePT":
        try:
            about["gamma"], about["reach"] = float(about["gamma"]), int(about["reach"])
        except (KeyError, ValueError) as error:
            raise AdapterFileError(f"{path} does not say its offsets' gamma and reach: {error}.") from error
        if not (isfinite(about["gamma"]) and about["gamma"] > 0 and about["reach"] > 0):
            raise AdapterFileError(f"{path}: gamma={about['gamma']} and reach={about['reach']} must be positive.")
    return tensors, about


def _open_factors(prompt: DPT | DePT) -> dict[str, Tensor]:
    """A and B of the components that are open, a gain folded into A; none if none is."""
    if prompt.gate is None:
        return {}
    keep = prompt.kept(prompt.gate.open())
    return {"A": (prompt.A * prompt.gate.value().to(prompt.A.dtype))[:, keep], "B": prompt.B[keep]}


def _empty(base: nn.Module, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Prompt:
    """The adapter of a file, not yet filled."""
    length, place = len(tensors["prompt_embeddings"]), about["prompt_position"]
    if about["kind"] == "SoftPrompt":
        return SoftPrompt(base, length, init="random", prompt_position=place)
    if about["kind"] == "DPT":
        return DPT(base, length, tensors["A"].shape[1], half_width=1.0, prompt_position=place)
    reach, rank, alpha = about["reach"], 0, None
    if "offsets" in tensors:
        reach, rank = len(tensors["offsets"]), min(tensors["offsets"].shape)
    elif "A" in tensors:
        reach, rank = tensors["A"].shape
        alpha = about["gamma"] * rank**0.5
    return DePT(base, length, rank, reach, alpha, init="random", align=about["align"], prompt_position=place)


def _copy(prompt: Prompt, tensors: Mapping[str, Tensor], source: str) -> None:
    width = tensors["prompt_embeddings"].shape[1]
    if width != prompt.width:
        raise AdapterFileError(f"{source} is for embeddings of width {width}, and this model's are of {prompt.width}.")
    own = dict(prompt.own_parameters())
    with torch.no_grad():
        for key, value in _parameters(tensors, type(prompt).__name__).items():
            own[key].copy_(value)


def _parameters(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A file's tensors by the names of the adapter's parameters."""
    if kind == "DPT":
        return {key: tensors[key] for key in ("A", "B")}
    found = {"P": tensors["prompt_embeddings"]}
    if "offsets" not in tensors:
        return found | {key: tensors[key] for key in ("A", "B") if key in tensors}
    table = tensors["offsets"]
    eye = torch.eye(min(table.shape), dtype=table.dtype)
    # A table of s x d is itself times the identity of its smaller side.
    return found | ({"A": eye, "B": table} if len(table) <= table.shape[1] else {"A": table, "B": eye})


def _misfit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    missing = {key for key in own if key in ("P", "A", "B")} - tensors.keys()
    if missing or (extra := tensors.keys() - own.keys()):
        return f"{sorted(missing or extra)[0]!r} is in one of them alone"
    odd = next((key for key, value in tensors.items() if own[key].shape != value.shape), None)
    return None if odd is None else f"{odd!r} is of shape {tuple(tensors[odd].shape)}, here {tuple(own[odd].shape)}"


def _of_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's one prompt: its tensors by the names of the adapter's own, and what a file's metadata say."""
    checkpoint = read(path)
    check_entry(checkpoint, str(path))
    groups = checkpoint[ENTRY]["recipe"]["adapters"]
    kinds = [group["class"].rpartition(":")[2] for group in groups]
    if len(groups) != 1 or len(groups[0]["layers"]) != 1 or kinds[0] not in KINDS:
        raise AdapterFileError(f"{path} holds {', '.join(kinds) or 'no adapter'}, and not one prompt.")
    prefix, state = f"{groups[0]['layers'][0]}.", checkpoint["state_dict"]
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    arguments = groups[0]["arguments"]
    about = {"kind": kinds[0]} | {key: arguments[key] for key in ("prompt_position", "align") if key in arguments}
    if kinds[0] == "DePT":
        about["gamma"] = scale_of(arguments["alpha"], arguments["rank"])
    return {key: value for key, value in own.items() if not key.startswith("base.")}, about
