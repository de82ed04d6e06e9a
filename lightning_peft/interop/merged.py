"""A transformers model with its adapters merged, as a folder that loads without this package and without PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft.export import merge, own_random
from lightning_peft.head_modules import refuse_head_modules
from lightning_peft.heads import hub_models
from lightning_peft.interop.folder import Export, public_name, refuse_to_overwrite, whole_folder, write_card
from lightning_peft.interop.host import below, find_host, plain_copy, trained_beside
from lightning_peft.interop.targets import idle
from lightning_peft.interop.verify import compare_outputs, made_up_inputs
from lightning_peft.rank.budget import RankBudget


def save_merged(module: nn.Module, folder: str | Path, *, inputs: Any = None, overwrite: bool = False) -> Export:
    """Write the whole model, adapters merged, by transformers' `save_pretrained`; load it again and compare.

    The module is not changed: a copy is merged, so memory for two more models is needed. The head is a part of the
    model and goes with it. The tokenizer is not: save it into the same folder yourself. Embeddings that were tied to
    the output layer and are not after merging are both written, and the config says so.

    Args:
        module: a transformers model, or a LightningModule that holds one; with adapters inside.
        folder: config, safetensors and a model card README.md are written here, all or none.
        inputs: see :func:`lightning_peft.interop.hf_peft.to_hf_peft`.
        overwrite: write into a folder that holds other things than an earlier export, which are kept.

    Returns:
        What was written and how it was checked; print it.

    Raises:
        ValueError: no adapter, no transformers model, or something trained is outside it.
        TypeError: an adapter cannot be merged.
        FileExistsError: the folder holds something else.
        RuntimeError: the check failed. No folder is left.
    """
    folder = Path(folder)
    name, host = find_host(module, "save_merged")
    if not hub_models(host):
        raise ValueError(
            f"save_merged writes a transformers model, and {type(host).__name__} is none. For other modules call "
            "lightning_peft.merge(module) and save module.state_dict()."
        )
    outside = [n for n in trained_beside(module) if not below(n, name)]
    if outside:
        raise ValueError(
            f"trained beside the adapters, but outside the transformers model {name!r}: "
            f"{', '.join(map(repr, outside[:3]))}. They would be lost: save them yourself, and call "
            f"save_merged(module.{name}, ...)."
        )
    refuse_head_modules(host, "save_merged", "Call merge(module) and save module.state_dict().")
    refuse_to_overwrite(folder, overwrite)
    merged: Any = plain_copy(host)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that weights are no longer tied: it is dealt with below
        untied = merge(merged).untied
    if untied:
        merged.config.get_text_config().tie_word_embeddings = False
        merged.config.tie_word_embeddings = False
    with whole_folder(folder, overwrite) as new:
        merged.save_pretrained(new)
        base = public_name(getattr(host.config, "_name_or_path", None))
        text = [f"# {type(merged).__name__}, adapters merged", ""]
        text += [f"No longer one weight: {', '.join(names)}." for names in untied]
        write_card(new, "transformers", base, text)
        with own_random(host):
            loaded = type(merged).from_pretrained(new)
        _same(loaded.state_dict(), merged.state_dict())
        difference, how = 0.0, "loaded with transformers, every tensor equal to the merged model's"
        if not any(p.is_floating_point() and p.element_size() < 4 for p in host.parameters()):
            samples = [inputs] if inputs is not None else made_up_inputs(host)
            found = compare_outputs(host, loaded.to(next(host.parameters()).device), samples, given=inputs is not None)
            if found is not None:
                difference, how = found, f"{how}; outputs compared with the adapted model's"
        size = sum(file.stat().st_size for file in new.glob("*.safetensors"))
    ranks = RankBudget.of(host).ranks()
    return Export(folder, "merged", ranks, (), size, difference, how, left_out=idle(host, ranks))


def _same(loaded: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    # Cast, because some versions of transformers load in float32 what was saved in less: nothing is lost that way.
    wrong = [n for n in wanted if n not in loaded or not torch.equal(loaded[n].to(wanted[n]), wanted[n])]
    if wrong:
        raise RuntimeError(
            f"the merged model was checked and is not right: {', '.join(wrong[:3])} "
            f"{'is' if len(wrong) == 1 else 'are'} not what was saved. Nothing was written."
        )
