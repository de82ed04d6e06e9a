"""A prompt as a PEFT folder: one tensor of virtual tokens, whatever it is made of here."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft.adapters.prompts.base import Prompt
from lightning_peft.export import require_whole
from lightning_peft.head_modules import refuse_head_modules
from lightning_peft.interop.folder import Export, public_name, refuse_to_overwrite, whole_folder, write_card
from lightning_peft.interop.host import below, plain_copy, some, trained_beside, whole_modules
from lightning_peft.interop.layout import modules_to_save, task_type
from lightning_peft.interop.verify import CONFIG, WEIGHTS, load_with_peft, made_up_inputs, require_close
from lightning_peft.rank.budget import RankBudget, clean_name
from lightning_peft.surgery.layers import adapters

# A prompt's model stands in PEFT's as it is, an adapted one is a level further down.
PREFIX = "base_model."
TENSOR = "prompt_embeddings"


def is_prompted(module: nn.Module) -> bool:
    """Whether what is adapted in a module are whole models."""
    return any(adapter.adapts == "model" for adapter in adapters(module).values())


def write_prompt(
    module: nn.Module,
    folder: Path,
    mode: str,
    head: bool,
    check: Literal["peft", "files"],
    inputs: Any,
    base: str | None,
    overwrite: bool,
) -> Export:
    """What :func:`lightning_peft.to_hf_peft` does with a prompt: PEFT's prompt tuning, of the prompt as it is now.

    Raises:
        ValueError: there is more than one adapter; something trained beside it is not expressed; PEFT has no prompts
            for the model's task; or a mode is given.
        TypeError: the prompt is more than tokens in front of the text.
        RuntimeError: the check failed, or the model is split over processes. No folder is left.
    """
    if mode != "padded":
        raise ValueError(f"mode={mode!r} is how LoRA's tensors are laid out, and a prompt is one tensor. Leave it out.")
    name, prompt = _only(module)
    _require_expressible(name, prompt)
    require_whole(module, "to_hf_peft")
    host = prompt.base
    path = clean_name(next(path for path, child in module.named_modules() if child is host))
    kept: dict[str, dict[str, Tensor]] = {}
    if head:
        refuse_head_modules(host, "to_hf_peft", "Give head=False, and save the layers of fold_heads(module) yourself.")
        kept = _kept(module, path, host)
    task = _task(host, kept)
    refuse_to_overwrite(folder, overwrite)
    base = base or getattr(host.config, "_name_or_path", None) or None
    tensor = prompt.prompt().detach().float().cpu().contiguous().clone()
    text = host.config.get_text_config()  # type: ignore[operator, union-attr]
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": task,
        "base_model_name_or_path": base,
        "num_virtual_tokens": prompt.length,
        "token_dim": prompt.width,
        "num_transformer_submodules": 1,
        "num_attention_heads": text.num_attention_heads,
        "num_layers": text.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",
        "modules_to_save": modules_to_save(host, kept, ()) or None,
        "inference_mode": True,
    }
    tensors = {TENSOR: tensor} | {
        f"{PREFIX}{owner}.{key}": value for owner, state in kept.items() for key, value in state.items()
    }
    ranks = RankBudget.of(module).ranks() or {name: prompt.length}
    with whole_folder(folder, overwrite) as new:
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_card(new, "peft", public_name(base), _card(prompt, host, public_name(base)))
        if check == "peft":
            difference, how = _with_peft(new, prompt, kept, inputs)
        else:
            difference, how = _by_reading(new, tensors)
        size = (new / WEIGHTS).stat().st_size
    return Export(folder, "prompt", ranks, tuple(kept), size, difference, how)


def _only(module: nn.Module) -> tuple[str, Prompt]:
    found = adapters(module)
    name, prompt = next((n, a) for n, a in found.items() if isinstance(a, Prompt))
    if len(found) > 1:
        raise ValueError(
            f"a PEFT folder holds one prompt and nothing else, and {type(module).__name__} has adapters at "
            f"{some(list(found))}. Export each model by itself; adapters of layers that are under a prompt cannot be "
            "exported."
        )
    return name, prompt


def _require_expressible(name: str, prompt: Prompt) -> None:
    kind = type(prompt).__name__
    nowhere = torch.zeros(1, 1, dtype=torch.long, device=next(prompt.parameters()).device)
    if prompt.offsets(nowhere) is not None:
        raise TypeError(
            f"{kind} at {name!r} adds offsets to the text's embeddings, for which PEFT has no place: without them it "
            "is another model. Keep it with save_prompt(module, path); on a model with learned positions, such as "
            "BERT, fold_offsets(module) turns it into a prompt and changed positions."
        )
    if prompt.prompt_position != "start":
        raise TypeError(
            f"{kind} at {name!r} stands after the first token (prompt_position={prompt.prompt_position!r}), and PEFT "
            "puts prompts in front. Train with prompt_position='start' for PEFT, or keep it with save_prompt."
        )


def _kept(module: nn.Module, path: str, host: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Copies of what was trained beside the prompt, whole modules by their names in the model."""
    outside = [n for n in trained_beside(module) if not below(n, path)]
    if outside:
        raise ValueError(
            f"trained beside the prompt, but outside the transformers model {path!r}: {some(outside)}. A PEFT folder "
            "describes that model alone: give head=False and save them yourself."
        )
    whole, rest = whole_modules(host, trained_beside(host))
    if rest:
        raise ValueError(
            f"trained beside the prompt, but not a whole module: {some(rest)}. PEFT keeps whole modules only: train "
            "all parameters of the module, or give head=False and save them yourself."
        )
    return {
        owner: {clean_name(key): value.detach().cpu().clone() for key, value in child.state_dict().items()}
        for owner, child in whole.items()
    }


def _task(host: nn.Module, head: Collection[str]) -> str:
    """PEFT's name of the task: for a model without one it would leave the prompt out, and say nothing."""
    kind = type(host).__name__
    if getattr(host.config, "is_encoder_decoder", False) and kind.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    task = task_type(host, head)
    if task is None or getattr(host.config, "is_encoder_decoder", False):
        raise ValueError(
            f"PEFT puts prompts in front of models of a task that it knows, and for this {kind} it knows none, or asks "
            "for a head that is not written. Train the head and give head=True, or keep the prompt with save_prompt."
        )
    return task


def _with_peft(
    folder: Path, prompt: Prompt, head: Mapping[str, Mapping[str, Tensor]], inputs: Any
) -> tuple[float, str]:
    """Load the folder with stock PEFT on a copy of the base, its head changed first; compare head and logits."""
    ours: Any = plain_copy(prompt)
    base = plain_copy(prompt.base)
    if any(p.is_floating_point() and p.element_size() < 4 for p in prompt.parameters()):
        ours, base = ours.float(), base.float()
    theirs = load_with_peft(folder, base, head)
    worst = require_close(theirs.prompt_encoder["default"].embedding.weight, ours.prompt().detach(), TENSOR)
    for name, kept in head.items():
        got = theirs.base_model.get_submodule(name).modules_to_save["default"].state_dict()
        for key, tensor in kept.items():
            worst = max(worst, require_close(got[key], tensor, f"{name}.{key}"))
    samples: Sequence[Any] = [inputs] if inputs is not None else made_up_inputs(ours.base)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        for sample in samples:
            wanted, found = ours(**sample), theirs(**sample)
            for name in ("logits", "start_logits", "end_logits"):
                if name not in wanted:
                    continue
                rows, own = found[name], wanted[name]
                if rows.dim() == 3 or name != "logits":  # PEFT leaves the prompt's rows in
                    rows = rows[:, rows.shape[1] - own.shape[1] :]
                worst = max(worst, require_close(rows, own, "the output"))
    return worst, f"loaded with stock PEFT on a copy of the base; prompt and outputs compared on {len(samples)} inputs"


def _by_reading(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[float, str]:
    """Read the file again and compare every tensor."""
    read = load_file(folder / WEIGHTS)
    if read.keys() != tensors.keys():
        raise RuntimeError(f"the export was checked and is not right: {WEIGHTS} has other tensors than were written.")
    worst = max(require_close(read[key], tensor, key) for key, tensor in tensors.items())
    return worst, "file read again and every tensor compared; PEFT did not load it"


def _card(prompt: Prompt, host: nn.Module, base: str | None) -> list[str]:
    kind = type(host).__name__
    return [
        f"# Prompt for {base or kind}",
        "",
        f"{prompt.length} virtual tokens of width {prompt.width}, trained as {type(prompt).__name__}.",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f"base = {kind}.from_pretrained({base or '...'!r})",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        "```",
        "",
        "PEFT counts positions over padding, too: with texts padded on the left it is another model than the one that "
        "was trained. Pad on the right, or not at all.",
    ]
