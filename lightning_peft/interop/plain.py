"""A compressed module as plain layers, and as a folder that loads without this package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft.adapters.thin import ThinLinear, is_thin_convolution
from lightning_peft.export import merge, require_whole
from lightning_peft.head_modules import fold_heads, refuse_head_modules
from lightning_peft.heads import hub_models
from lightning_peft.interop import plain_loader
from lightning_peft.interop.folder import Export, public_name, refuse_to_overwrite, whole_folder, write_card
from lightning_peft.interop.fresh import Fresh
from lightning_peft.interop.host import below, plain_copy
from lightning_peft.interop.transformers_loader import AutoClasses, auto_classes, auto_map, loader_source
from lightning_peft.interop.verify import compare_outputs, made_up_inputs
from lightning_peft.regularizers.base import BESIDE_MODEL
from lightning_peft.surgery.layers import adapters, is_read
from lightning_peft.surgery.removal import refuse_hosted, replace, take_out

LOADER = "load_compressed.py"
MODELING = "modeling_compressed.py"
RANKS = "thin_layers"
"""Entry of a config: layer -> rank, for the layers that are two thin ones."""
_WEIGHTS = "model.safetensors"


def to_plain(module: nn.Module) -> dict[str, int]:
    """Put plain layers in the place of all adapters, in place: two thin ones where they are smaller, else a dense one.

    Which parameters require a gradient is as before injection; those of the new layers all do. Build the optimizer anew
    afterwards. What callbacks have given a LightningModule for the training (terms, what draws masks) is taken out too.
    A layer whose weight is read and which is never called (those of MultiheadAttention) is always dense.

    Args:
        module: has adapters inside; is not itself one.

    Returns:
        The rank of every layer that is thin now.

    Raises:
        ValueError: there is no adapter.
        TypeError: an adapter is more than a change of its layer's weight.
        RuntimeError: the model is split over processes.
    """
    found = adapters(module)
    if not found or id(module) in map(id, found.values()):
        raise ValueError(f"to_plain found no adapter inside {type(module).__name__}; inject puts them in.")
    refuse_hosted(module, "to_plain")
    require_whole(module, "to_plain")
    thin = {
        id(adapter): layer
        for adapter in found.values()
        if not is_read(module, adapter) and (layer := adapter.thin()) is not None
    }
    replace(module, thin)
    for child in BESIDE_MODEL:
        module._modules.pop(child, None)
    if len(thin) < len(found):
        merge(module)
    else:
        take_out(module, {})
        fold_heads(module)
    return thin_layers(module)


def thin_layers(module: nn.Module) -> dict[str, int]:
    """The layers of a module that are two thin ones, and their ranks: number of `down`'s outputs."""
    return {
        name: len(child.down.weight)
        for name, child in module.named_modules()
        if isinstance(child, ThinLinear) or is_thin_convolution(child)
    }


def save_compressed(
    module: nn.Module,
    folder: str | Path,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    beside: Callable[[Path], object] | None = None,
) -> Export:
    """Write a compressed model as a folder that loads without this package; load it again and compare.

    For a transformers model: config, safetensors and one small file of code, which `AutoModel...from_pretrained(folder,
    trust_remote_code=True)` runs. Without that argument transformers refuses the folder, instead of filling thin layers
    with random numbers. For any other module: safetensors, the ranks, and one small file of code that needs torch and
    safetensors only; `load(module, folder)` in it takes the module as it was built before.

    The module is not changed: a copy is, so memory for two more models is needed.

    Args:
        module: a transformers model, a LightningModule that holds one, or any module; with factorised layers inside,
            or plain already (:func:`to_plain`).
        folder: all files are written here, or none.
        inputs: what the model is called with when outputs are compared, by the names of its arguments. Without them a
            transformers model of text is called with made-up tokens, and of any other module tensors are compared.
        overwrite: write into a folder that holds other things than an earlier export, which are kept.
        beside: writes more files into the folder, such as the tokenizer's, before the folder gets its name.

    Returns:
        What was written and how it was checked; print it.

    Raises:
        ValueError: no layer is thin, or there are several transformers models, or something is outside it.
        FileExistsError: the folder holds something else.
        RuntimeError: the check failed. No folder is left.
    """
    folder = Path(folder)
    refuse_to_overwrite(folder, overwrite)
    require_whole(module, "save_compressed")
    refuse_head_modules(module, "save_compressed", "Call to_plain(module) and save module.state_dict().")
    name, host = _host(module)
    plain: Any = plain_copy(host)
    if adapters(plain):
        to_plain(plain)
    ranks = thin_layers(plain)
    if not ranks:
        raise ValueError(
            f"{type(host).__name__} has no factorised layer that is smaller than a dense one, so there is nothing to "
            "save in thin layers. Compress it to a smaller ratio; merge(model) makes a dense model of it."
        )
    classes = auto_classes(host)
    with whole_folder(folder, overwrite) as new:
        if classes is None:
            _write_any(plain, ranks, new)
        else:
            _write_transformers(plain, ranks, classes, new)
        if beside is not None:
            beside(new)
        _same_tensors(new, plain)
        narrow = any(p.is_floating_point() and p.element_size() < 4 for p in plain.parameters())
        ours = plain.float() if narrow else host
        samples = made_up_inputs(host) if inputs is None else [dict(inputs)]
        if classes is None:
            found = compare_outputs(ours, plain_loader.load(_dense_again(plain), new), samples, inputs is not None)
            how = "loaded by the folder's own file, every tensor equal"
        else:
            theirs = Fresh(new, classes.main, samples)
            found = compare_outputs(ours, theirs, samples, inputs is not None)
            theirs.load()
            how = f"loaded with {classes.main} in a process without this package, every tensor equal"
        size = sum(file.stat().st_size for file in new.glob("*.safetensors"))
    how += "; outputs compared" if found is not None else "; outputs not compared"
    shown = {f"{name}.{layer}" if name else layer: rank for layer, rank in ranks.items()}
    return Export(folder, "compressed", shown, (), size, found or 0.0, how)


def _host(module: nn.Module) -> tuple[str, nn.Module]:
    """The transformers model inside, and its name; the module itself if there is none."""
    hosts = hub_models(module)
    if not hosts:
        return "", module
    outside = [n for n in (*adapters(module), *thin_layers(module)) if not any(below(n, host) for host in hosts)]
    if len(hosts) > 1 or outside:
        what = f"layers outside it ({outside[0]!r})" if outside else "more than one of them"
        raise ValueError(
            f"save_compressed writes one transformers model, and {type(module).__name__} has {what}. Save each part by "
            f"itself: {', '.join(f'module.{host}' for host in hosts)}."
        )
    return next(iter(hosts.items()))


def _write_any(plain: nn.Module, ranks: dict[str, int], new: Path) -> None:
    names: dict[tuple[int, tuple[int, ...]], str] = {}
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for key, tensor in plain.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in names:
            same[key] = names[place]
        else:
            names[place] = key
            tensors[key] = tensor.detach().contiguous().clone()
    save_file(tensors, new / _WEIGHTS)
    _write_json(new / "config.json", {RANKS: ranks, "same": same})
    (new / LOADER).write_text(loader_source(), encoding="utf-8")
    text = [f"# {type(plain).__name__}, compressed", "", f"`from {Path(LOADER).stem} import load; load(model, folder)`"]
    write_card(new, "pytorch", None, text)


def _write_transformers(plain: Any, ranks: dict[str, int], classes: AutoClasses, new: Path) -> None:
    output = plain.get_output_embeddings()
    if any(child is output for n, child in plain.named_modules() if n in ranks):
        # transformers would tie the dense embedding to it again.
        plain.config.get_text_config().tie_word_embeddings = False
        plain.config.tie_word_embeddings = False
    base = public_name(getattr(plain.config, "_name_or_path", None))
    plain.save_pretrained(new)
    config = json.loads((new / "config.json").read_text(encoding="utf-8"))
    config |= {
        "architectures": [classes.architecture],
        "auto_map": auto_map(classes, Path(MODELING).stem),
        "model_type": classes.model_type,
        RANKS: ranks,
    }
    _write_json(new / "config.json", config)
    (new / MODELING).write_text(loader_source(classes), encoding="utf-8")
    call = f"{classes.main}.from_pretrained(folder, trust_remote_code=True)"
    text = [f"# {type(plain).__name__}, compressed", "", f"`{call}` loads it. {MODELING} is the code that it runs."]
    write_card(new, "transformers", base, text)


def _same_tensors(new: Path, plain: nn.Module) -> None:
    """Check that what was written holds every tensor of the model, bit for bit, or one that is tied to it."""
    written: dict[str, Tensor] = {}
    for file in new.glob("model*.safetensors"):
        written |= load_file(file)
    state = plain.state_dict()
    places = {state[key].data_ptr() for key in written if key in state}
    wrong = [
        key
        for key, tensor in state.items()
        if not (torch.equal(written[key], tensor.cpu()) if key in written else tensor.data_ptr() in places)
    ]
    if wrong:
        raise RuntimeError(
            f"the compressed model was checked and is not right: {', '.join(wrong[:3])} "
            f"{'is' if len(wrong) == 1 else 'are'} not what was saved. Nothing was written."
        )


def _dense_again(plain: nn.Module) -> nn.Module:
    """A copy with dense layers of the right sizes in the place of thin ones: the module as it was built."""
    copied = plain_copy(plain)
    new: dict[int, nn.Module] = {}
    for child in copied.modules():
        pair: Any = child
        if isinstance(child, ThinLinear):
            new[id(child)] = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
        elif is_thin_convolution(child):
            down, up = pair.down, pair.up
            geometry = {n: getattr(down, n) for n in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
            new[id(child)] = type(down)(down.in_channels, up.out_channels, bias=up.bias is not None, **geometry)
        if id(child) in new:
            new[id(child)].to(pair.down.weight)
    replace(copied, new)
    return copied


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_compressed(config: Mapping[str, Any]) -> bool:
    """Whether a model's config is a compressed model's."""
    return isinstance(config.get(RANKS), dict)
