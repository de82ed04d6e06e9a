"""Adapters as a PEFT folder, which PEFT, transformers and most servers of language models load."""

from __future__ import annotations

import json
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft.adapters.sparse import Sparse
from lightning_peft.head_modules import refuse_head_modules
from lightning_peft.interop.adopted_export import lay_out_adopted, load_adopted, read_adopted
from lightning_peft.interop.adoption import adopt as adopt
from lightning_peft.interop.adoption import release as release
from lightning_peft.interop.folder import Export, public_name, refuse_to_overwrite, whole_folder, write_card
from lightning_peft.interop.host import below, find_host, some, trained_beside, whole_modules, with_statistics
from lightning_peft.interop.layout import Mode, lay_out, modules_to_save, target_modules, task_type
from lightning_peft.interop.prompt_export import is_prompted, write_prompt
from lightning_peft.interop.shira import lay_out_sparse, load_shira, read_shira
from lightning_peft.interop.sparse import changes
from lightning_peft.interop.targets import PREFIX, find_targets, idle
from lightning_peft.interop.triplets import lay_out_triplets, read_triplets
from lightning_peft.interop.verify import CONFIG, WEIGHTS, by_reading, with_peft
from lightning_peft.rank.budget import RankBudget, clean_name
from lightning_peft.surgery.layers import adapters

Check = Literal["auto", "peft", "files"]


def to_hf_peft(
    module: nn.Module,
    folder: str | Path,
    mode: Mode = "padded",
    head: bool = True,
    *,
    check: Check = "auto",
    inputs: Any = None,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> Export:
    """Write the adapters as a PEFT LoRA folder, load it again, compare, and only then give it its name.

        PEFT computes y = W x + b + (alpha / r) B A x;  our gain goes into B, our closed components are left out
        with lengths l of the rows (its DoRA):  y = l / |W + (alpha / r) B A|_row * (W + (alpha / r) B A) x + b

    The three modes are equal for PEFT, and not for servers, which do not read per-layer ranks or scales alike: "padded"
    has one rank for all layers, zeros behind, and is right everywhere; "compact" has true ranks and is right for PEFT
    and vLLM; "folded" has true ranks and is right for PEFT and llama.cpp. Layers of rank 0 are left out, unless they
    have lengths of their own. Lengths are for all layers of a PEFT folder or for none: where one layer has some, the
    others get those that change nothing.

    A fourth, "adalora", writes PEFT's AdaLoRA format: A, E and B of the open triplets. PEFT alone reads it.

    Adapters that change single entries of a weight are written in PEFT's SHiRA format, which is "padded": every layer
    has as many entries as one r gives, zeros behind. Its layers are linear ones.

    An adopted PEFT model (:func:`lightning_peft.adopt`) is written with its own config, cut to what is open: LoRA and
    DoRA as above, AdaLoRA in its own format, or as a plain LoRA with "folded".

    A prompt in front of a model (:class:`~lightning_peft.SoftPrompt`, :class:`~lightning_peft.DPT`) is written as
    PEFT's prompt tuning, of the virtual tokens that it comes to.

    The module is not changed. For a check with stock PEFT, memory for one more copy of the model is needed, for two in
    float32 if the model is narrower than that.

    Args:
        module: a transformers model, a LightningModule that holds one, or any module; with adapters inside.
        folder: adapter_config.json, adapter_model.safetensors and a model card README.md are written here, all or none.
        mode: "padded", "compact", "folded" or "adalora".
        head: keep the modules that were trained beside the adapters, such as a new classifier. A loaded base gets them
            with the adapters. Some servers refuse adapters with a head. Layers of the base with running statistics
            (batch norm) are kept likewise, because training changes these though the layer is frozen.
        check: "peft" loads the folder with stock PEFT on a copy of the base, with a changed head, and compares updates,
            head and outputs. "files" reads it without PEFT and compares every tensor. "auto" is "peft" if that is
            installed, else "files". The report says which was made.
        inputs: what the model is called with to compare outputs: a tensor, or arguments as a list or a dictionary.
            ``None`` makes inputs up for a transformers model of text; for others, outputs are not compared.
        base_model_name_or_path: where others find the base. ``None`` is where transformers loaded it from.
        overwrite: write into a folder that holds other things than an earlier export, which are kept.

    Returns:
        What was written and how it was checked; print it.

    Raises:
        ValueError: no adapter or none of a rank above 0; something trained cannot be expressed; a wrong mode or check.
        TypeError: an adapter cannot be expressed in PEFT's LoRA format, or its layer not in the AdaLoRA format.
        FileExistsError: the folder holds something else.
        ModuleNotFoundError: check="peft" without PEFT.
        RuntimeError: the check failed. No folder is left.
    """
    folder = Path(folder)
    if any(adapter.hosted for adapter in adapters(module).values()):
        return _write_adopted(module, folder, mode, head, check, inputs, base_model_name_or_path, overwrite)
    if is_prompted(module):
        return write_prompt(
            module, folder, mode, head, _how_to_check(check), inputs, base_model_name_or_path, overwrite
        )
    if any(isinstance(adapter, Sparse) for adapter in adapters(module).values()):
        return _write_sparse(module, folder, mode, head, check, inputs, base_model_name_or_path, overwrite)
    name, host = find_host(module, "to_hf_peft")
    targets = find_targets(host)
    tensors, config = lay_out_triplets(targets) if mode == "adalora" else lay_out(targets, mode)
    checked = _how_to_check(check)
    refuse_to_overwrite(folder, overwrite)
    paths = [target.path for target in targets]
    if head:
        refuse_head_modules(host, "to_hf_peft", "Give head=False, and save the layers of fold_heads(module) yourself.")
    trained = kept_modules(module, name, host) if head else {}
    statistics = with_statistics(host, trained)
    kept = _states(trained | statistics) if head else {}
    base = base_model_name_or_path or getattr(getattr(host, "config", None), "_name_or_path", None) or None
    config = {"peft_type": "LORA"} | config | _where(host, base, paths, kept)
    config |= {"lora_dropout": 0.0, "bias": "none", "use_rslora": False}
    for kept_name, state in kept.items():
        tensors |= {f"{PREFIX}{kept_name}.{key}": tensor.contiguous() for key, tensor in state.items()}

    notes = _notes(host, config["use_dora"], len(statistics), head)
    ranks = RankBudget.of(host).ranks()
    left_out = idle(host, ranks)
    with whole_folder(folder, overwrite) as new:
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_card(new, "peft", public_name(base), _card(host, public_name(base), mode, ranks, left_out, notes))
        if checked == "peft":
            difference, how = with_peft(new, host, targets, kept, inputs)
        else:
            read = read_triplets if mode == "adalora" else by_reading
            difference, how = read(new, targets, kept)
        size = (new / WEIGHTS).stat().st_size
    return Export(folder, mode, ranks, tuple(trained), size, difference, how, notes, left_out)


def _write_adopted(
    module: nn.Module,
    folder: Path,
    mode: Mode,
    head: bool,
    check: Check,
    inputs: Any,
    base: str | None,
    overwrite: bool,
) -> Export:
    """:func:`to_hf_peft` for a PEFT model that was adopted: its own config and tensors, cut to what is open."""
    layout = lay_out_adopted(module, mode, head)
    checked = _how_to_check(check)
    refuse_to_overwrite(folder, overwrite)
    host = layout.model.get_base_model()
    base = base or getattr(getattr(host, "config", None), "_name_or_path", None) or None
    config = layout.config | {"base_model_name_or_path": base}
    if config["task_type"] is None and hasattr(host, "config"):
        config["auto_mapping"] = {"base_model_class": type(host).__name__, "parent_library": type(host).__module__}
    with whole_folder(folder, overwrite) as new:
        save_file(layout.tensors, new / WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_card(
            new, "peft", public_name(base), _card(host, public_name(base), mode, layout.ranks, layout.left_out, ())
        )
        compare = load_adopted(new, layout, inputs) if checked == "peft" else read_adopted(new, layout)
        size = (new / WEIGHTS).stat().st_size
    return Export(folder, mode, layout.ranks, layout.head, size, *compare, left_out=layout.left_out)


def _write_sparse(
    module: nn.Module,
    folder: Path,
    mode: Mode,
    head: bool,
    check: Check,
    inputs: Any,
    base: str | None,
    overwrite: bool,
) -> Export:
    """:func:`to_hf_peft` for adapters that change single entries of a weight."""
    if mode != "padded":
        raise ValueError(
            f"mode={mode!r}: adapters that change single entries are written in PEFT's SHiRA format, which has one "
            "number of entries for all layers of a shape. Use mode='padded'."
        )
    name, host = find_host(module, "to_hf_peft")
    deltas = changes(host)
    tensors, config = lay_out_sparse(host, deltas)
    checked = _how_to_check(check)
    refuse_to_overwrite(folder, overwrite)
    if head:
        refuse_head_modules(host, "to_hf_peft", "Give head=False, and save the layers of fold_heads(module) yourself.")
    trained = kept_modules(module, name, host) if head else {}
    kept = _states(trained | with_statistics(host, trained)) if head else {}
    paths = [path for path, delta in deltas.items() if len(delta.indices)]
    base = base or getattr(getattr(host, "config", None), "_name_or_path", None) or None
    config |= _where(host, base, paths, kept)
    for kept_name, state in kept.items():
        tensors |= {f"{PREFIX}{kept_name}.{key}": tensor.contiguous() for key, tensor in state.items()}
    ranks = RankBudget.of(host).ranks()
    left_out = tuple(path for path in deltas if path not in paths)
    with whole_folder(folder, overwrite) as new:
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_card(new, "peft", public_name(base), _card(host, public_name(base), mode, ranks, left_out, ()))
        found = load_shira(new, host, deltas, kept, inputs) if checked == "peft" else read_shira(new, deltas, kept)
        difference, how = found
        size = (new / WEIGHTS).stat().st_size
    return Export(folder, mode, ranks, tuple(trained), size, difference, how, left_out=left_out)


def _where(host: nn.Module, base: str | None, paths: list[str], kept: Collection[str]) -> dict[str, Any]:
    """The part of a config that says what it is for."""
    config: dict[str, Any] = {
        "task_type": task_type(host, kept),
        "base_model_name_or_path": base,
        "target_modules": target_modules(host, paths),
        "modules_to_save": modules_to_save(host, kept, paths) or None,
        "inference_mode": True,
    }
    if config["task_type"] is None and hasattr(host, "config"):
        # What PEFT's AutoPeftModel builds the base by, when no task says it.
        config["auto_mapping"] = {"base_model_class": type(host).__name__, "parent_library": type(host).__module__}
    return config


def _how_to_check(check: Check) -> Literal["peft", "files"]:
    if check not in ("auto", "peft", "files"):
        raise ValueError(f"check={check!r}: choose 'auto', 'peft' or 'files'.")
    installed = find_spec("peft") is not None
    if check == "peft" and not installed:
        raise ModuleNotFoundError(
            "check='peft' loads the exported adapter with PEFT, which is not installed: run "
            "`pip install 'lightning-peft[hf]'`, or give check='files' to compare the files without it."
        )
    if check == "auto":
        return "peft" if installed else "files"
    return check


def kept_modules(module: nn.Module, name: str, host: nn.Module) -> dict[str, nn.Module]:
    """The modules that are kept beside the adapters, by name in the host, which is called `name` in the module.

    Raises:
        ValueError: something trained is outside the host, or is not a whole module.
    """
    outside = [n for n in trained_beside(module) if not below(n, name)]
    if outside:
        raise ValueError(
            f"trained beside the adapters, but outside the transformers model {name!r}: {some(outside)}. A PEFT "
            "folder describes that model alone: give head=False and save them yourself."
        )
    whole, rest = whole_modules(host, trained_beside(host))
    if rest:
        raise ValueError(
            f"trained beside the adapters, but not a whole module: {some(rest)}. PEFT keeps whole modules only: train "
            "all parameters of the module, or give head=False and save them yourself."
        )
    return whole


def _states(modules: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Copies of the modules' tensors on the CPU: a file of tensors holds no two that share their memory."""
    return {
        name: {clean_name(key): tensor.detach().cpu().clone() for key, tensor in child.state_dict().items()}
        for name, child in modules.items()
    }


def _notes(host: nn.Module, lengths: bool, statistics: int, head: bool) -> tuple[str, ...]:
    notes: list[str] = []
    if lengths:
        notes.append(
            "the rows' lengths are PEFT's DoRA, which vLLM and llama.cpp refuse: for them write the merged model with "
            "save_merged."
        )
    if any(isinstance(child, nn.TransformerEncoderLayer) for child in host.modules()):
        notes.append(
            "in evaluation mode TransformerEncoderLayer has a fast path that reads weights and calls no layer; there "
            "PEFT's adapters have no effect: call torch.backends.mha.set_fastpath_enabled(False) before you use them."
        )
    if statistics:
        written = "written with the adapters" if head else "not written (head=False), and outputs differ without them"
        notes.append(
            f"training changes the running statistics of normalization layers, frozen ones too; those of {statistics} "
            f"layers are {written}."
        )
    return tuple(notes)


def _card(
    host: nn.Module,
    base: str | None,
    mode: Mode,
    ranks: dict[str, int],
    left_out: tuple[str, ...],
    notes: tuple[str, ...],
) -> list[str]:
    used = {name: rank for name, rank in ranks.items() if name not in left_out}
    kind = type(host).__name__
    hub = hasattr(host, "config") and hasattr(type(host), "from_pretrained")
    start = f"{kind}.from_pretrained({base or '...'!r})" if hub else f"...  # your {kind}"
    return [
        f"# LoRA adapter for {base or kind}",
        "",
        f"{len(used)} layers of {kind}, ranks {min(used.values())} to {max(used.values())}, {sum(used.values())} "
        f"components in all. Layout: {mode}.",
        "",
        "```python",
        "from peft import PeftModel",
        *([f"from transformers import {kind}"] if hub else []),
        "",
        f"base = {start}",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        "```",
        *[f"\nNote: {note}" for note in notes],
        "",
        "| layer | rank |",
        "|---|---|",
        *[f"| {name} | {rank} |" for name, rank in ranks.items()],
    ]
