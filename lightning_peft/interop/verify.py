"""Checks that what was written is what was meant: files read again, outputs compared."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft.adapters.layers import stored
from lightning_peft.export import own_random
from lightning_peft.interop.fresh_load import floating
from lightning_peft.interop.host import plain_copy
from lightning_peft.interop.targets import PREFIX, Part, Target
from lightning_peft.surgery.removal import eject

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TOLERANCE = 1e-5
Head = Mapping[str, Mapping[str, Tensor]]  # the tensors of every module that is kept, by their names in it
# A name as a regular expression: as it is, or escaped from its start on.
_LITERAL = r"\^?(\\.|[^\\^$*+?{}\[\]|()])*"
_WRONG = "the export was checked and is not right"


def with_peft(folder: Path, host: nn.Module, targets: Sequence[Target], head: Head, inputs: Any) -> tuple[float, str]:
    """Load the folder with stock PEFT on a copy of the base and compare it with the module that it came from.

    The copy's head is changed first, so that a head that is not loaded is noticed. In float32 or wider throughout.

    Returns:
        The largest difference in outputs, or in updates where there are no inputs; and what was compared.

    Raises:
        RuntimeError: they differ.
    """
    ours = plain_copy(host) if _is_narrow(host) else host
    base = plain_copy(host)
    eject(base)
    if _is_narrow(host):
        ours, base = ours.float(), base.float()
    theirs = load_with_peft(folder, base, head)
    loaded: Any = theirs.base_model.model
    worst = _compare_updates(loaded, targets, theirs.peft_config["default"])
    for name, kept in head.items():
        wrapper: Any = loaded.get_submodule(name)
        got = wrapper.modules_to_save["default"].state_dict()
        for key, tensor in kept.items():
            require_close(got[key], tensor, f"{name}.{key}")
    samples = [inputs] if inputs is not None else made_up_inputs(host)
    difference = compare_outputs(ours, theirs, samples, given=inputs is not None)
    if difference is None:
        return worst, "loaded with stock PEFT on a copy of the base; updates of every layer compared, outputs not"
    return difference, f"loaded with stock PEFT on a copy of the base; outputs compared on {_counted(len(samples))}"


def load_with_peft(folder: Path, base: nn.Module, head: Iterable[str]) -> Any:
    """The folder, loaded with stock PEFT on this base, which is changed; its head first, so that it has to be loaded.

    Raises:
        RuntimeError: PEFT cannot load it, or finds no tensors for an adapter.
    """
    from peft import PeftModel

    for name in head:
        changed = base.get_submodule(name)
        for tensor in (*changed.parameters(), *changed.buffers()):
            if tensor.is_floating_point():
                tensor.data.add_(1.0)
    device = next(base.parameters()).device
    with own_random(base), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            theirs = PeftModel.from_pretrained(base, str(folder), torch_device=str(device))
        except Exception as error:
            raise RuntimeError(f"{_WRONG}: PEFT cannot load it. {type(error).__name__}: {error}") from error
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if missing:
        raise RuntimeError(f"{_WRONG}: PEFT says {missing[0]!r}")
    return theirs


def by_reading(folder: Path, targets: Sequence[Target], head: Head) -> tuple[float, str]:
    """Read the folder as PEFT would and compare every tensor with the module that it came from.

    Raises:
        RuntimeError: a tensor is missing, left over, or differs.
    """
    config, tensors = _read(folder)
    worst = 0.0
    for target in targets:
        rank = first_match(config["rank_pattern"], target.path, config["r"])
        scale = first_match(config["alpha_pattern"], target.path, config["lora_alpha"]) / rank
        for part in target.parts:
            A, B = (take(tensors, name) for name in part.names())
            wanted = part.update().cpu()
            # Before they are multiplied: a product can be far larger than its factors.
            if (tuple(A.shape), tuple(B.shape)) != part.shapes(rank):
                raise RuntimeError(
                    f"{_WRONG}: {part.key} is of shape {tuple(A.shape)}, not of rank {rank} as configured."
                )
            worst = max(worst, require_close((scale * B.flatten(1)) @ A.flatten(1), wanted, part.key))
            if config["use_dora"]:
                worst = max(worst, require_close(take(tensors, part.lengths_name), part.lengths(), part.lengths_name))
    for name, kept in head.items():
        for key, tensor in kept.items():
            require_close(take(tensors, f"{PREFIX}{name}.{key}"), tensor, f"{name}.{key}")
    if tensors:
        raise RuntimeError(f"{_WRONG}: {WEIGHTS} holds tensors that belong nowhere: {', '.join(sorted(tensors)[:3])}.")
    return worst, "files read again and every tensor compared; PEFT did not load them"


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config's part on ranks and scales, and the tensors; from files that may be damaged.

    Raises:
        RuntimeError: a file cannot be read, or is not of the kind that we write.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        numbers = [config["r"], config["lora_alpha"]]
        if type(config["use_dora"]) is not bool:
            raise ValueError(f"use_dora={config['use_dora']!r} is neither true nor false")
        for patterns in (config["rank_pattern"], config["alpha_pattern"]):
            numbers += patterns.values()
            # Without repetition, which a crafted pattern would use to take for ever.
            if odd := [pattern for pattern in patterns if not re.fullmatch(_LITERAL, pattern)]:
                raise ValueError(f"the pattern {odd[0]!r} is no name")
        if odd := [n for n in numbers if type(n) not in (int, float) or not 0 < n < 2**31]:
            raise ValueError(f"{odd[0]!r} is no rank or scale")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RuntimeError(f"{_WRONG}: {CONFIG} cannot be read. {type(error).__name__}: {error}") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        raise RuntimeError(f"{_WRONG}: {WEIGHTS} cannot be read. {type(error).__name__}: {error}") from error
    return config, tensors


@torch.no_grad()
def compare_outputs(ours: nn.Module, theirs: nn.Module, samples: Sequence[Any], given: bool) -> float | None:
    """The largest difference of two models' outputs; ``None`` if the samples were made up and do not fit the model.

    Raises:
        RuntimeError: a difference is above the tolerance and more than ten times what rounding alone does to our model.
    """
    if not samples:
        return None
    worst = 0.0
    with _evaluating(ours), _evaluating(theirs):
        for sample in samples:
            try:
                wanted = list(floating(_call(ours, sample)))
            except Exception:
                if given:
                    raise
                return None
            got = list(floating(_call(theirs, sample)))
            if len(wanted) != len(got) or not wanted:
                raise RuntimeError(f"{_WRONG}: {len(got)} outputs, not {len(wanted)}.")
            for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
                difference = _difference(g, w, "the output")
                if not difference <= _allowed(w) and not difference <= 10 * _rounding(ours, sample, i, w):
                    raise RuntimeError(
                        f"{_beyond('the output', difference)} One cause: the model reads an adapted layer's weight "
                        "and does not call the layer, and other libraries' adapters have no effect then."
                    )
                worst = max(worst, difference)
    return worst


def made_up_inputs(host: nn.Module) -> list[dict[str, Tensor]]:
    """Inputs for a transformers model of text: four sequences, one at a time, over its whole vocabulary; else none."""
    config = getattr(host, "config", None)
    if getattr(host, "main_input_name", None) != "input_ids" or config is None:
        return []
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    if not vocabulary:
        return []
    # Two positions less: RoBERTa's begin behind its padding index.
    length = max(1, min(16, (getattr(text, "max_position_embeddings", None) or 18) - 2))
    device = next(host.parameters()).device
    ids = torch.linspace(0, vocabulary - 1, 4 * length, device=device).round().long().view(length, 4).t()
    names = ["input_ids"] + (["decoder_input_ids"] if getattr(config, "is_encoder_decoder", False) else [])
    # No padding: one sequence at a time needs none, and a decoder that classifies refuses a batch without a pad token.
    return [dict.fromkeys(names, row[None].contiguous()) for row in ids]


def _compare_updates(loaded: nn.Module, targets: Sequence[Target], config: Any) -> float:
    worst = 0.0
    for target in targets:
        layer: Any = loaded.get_submodule(target.path)
        for part in target.parts:
            if config.use_dora:  # on no attention: its one part is the layer
                got = layer.lora_magnitude_vector["default"].weight.detach()
                worst = max(worst, require_close(got, part.lengths(), part.lengths_name))
            if part.kernel:
                worst = max(worst, _compare_kernels(layer, part))
                continue
            place = layer if part.key == PREFIX + target.path else layer.base_layer.out_proj
            wanted = part.update() if part.adapter is None else stored(part.adapter.base, part.update())
            worst = max(worst, require_close(place.get_delta_weight("default").detach(), wanted, part.key))
            if place is not layer and part.rank:
                _require_added_once(layer, wanted, target.path)
    return worst


def _compare_kernels(layer: Any, part: Part) -> float:
    """A convolution's update, by PEFT's kernels and by what PEFT makes of an input with them.

    Not by its `get_delta_weight`, which cannot multiply all kernels of three dimensions and is used for merging alone.
    """
    adapter: Any = part.adapter
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    update, scale = part.update(), layer.scaling["default"]
    worst = require_close((scale * B.weight.detach().flatten(1)) @ A.weight.detach().flatten(1), update, part.key)
    base = adapter.base
    # Large enough that places without padding are among the output's.
    size = [3 * step + edge for step, edge in zip(base.stride, base.kernel_size, strict=True)]
    x = torch.arange(base.in_channels * prod(size), device=A.weight.device, dtype=A.weight.dtype).cos()
    x = x.view(1, base.in_channels, *size)
    with torch.no_grad():
        wanted = base._conv_forward(x, stored(base, update.to(x)), None)
        return max(worst, require_close(scale * B(A(x)), wanted, part.key))


def _require_added_once(attention: Any, update: Tensor, path: str) -> None:
    """Refuse an attention's out_proj where PEFT adds its update twice, as versions up to 0.21 do in every forward."""
    plain = attention.base_layer.out_proj.get_base_layer()
    before = plain.weight.detach().clone()
    attention.merge(adapter_names=["default"])
    added = plain.weight.detach() - before
    attention.unmerge()
    try:
        require_close(added, update, path)
    except RuntimeError as error:
        raise RuntimeError(
            f"layer {path + '.out_proj'!r}: the installed PEFT does not apply an adapter on an attention's out_proj "
            "as trained: it adds the update twice (huggingface/peft#3774). Adapt in_proj alone, or export the merged "
            "model, or give check='files' to write it for a PEFT in which this is repaired. Nothing was written."
        ) from error


def require_close(got: Tensor, wanted: Tensor, name: str) -> float:
    """The difference, if it is within the tolerance.

    Raises:
        RuntimeError: it is not.
    """
    difference = _difference(got, wanted, name)
    if not difference <= _allowed(wanted):  # written so that not-a-number fails too
        raise RuntimeError(_beyond(name, difference))
    return difference


def _difference(got: Tensor, wanted: Tensor, name: str) -> float:
    if got.shape != wanted.shape:
        raise RuntimeError(f"{_WRONG}: {name} is of shape {tuple(got.shape)}, not {tuple(wanted.shape)}.")
    if got.is_complex() != wanted.is_complex() or (got.is_floating_point() and got.element_size() < 2):
        raise RuntimeError(f"{_WRONG}: {name} is of dtype {got.dtype}, not {wanted.dtype}.")
    dtype = torch.promote_types(got.dtype, wanted.dtype)
    return (got.to(dtype) - wanted.to(got.device, dtype)).abs().max().item() if got.numel() else 0.0


def _allowed(wanted: Tensor) -> float:
    """The tolerance: absolute, or relative to the largest number where that is above 1."""
    return TOLERANCE * max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)


def _rounding(model: nn.Module, sample: Any, index: int, wanted: Tensor) -> float:
    """What rounding to float32 does to a model's output: it can be large where small activations are normalized."""
    try:
        exact = _call(plain_copy(model).double(), _doubled(sample))
    except Exception:
        return 0.0  # a model that does not run in float64: the tolerance is all there is
    return _difference(list(floating(exact))[index].to(wanted.dtype), wanted, "the output")


def _doubled(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return {key: _doubled(value) for key, value in sample.items()}
    if isinstance(sample, (list, tuple)):
        return [_doubled(value) for value in sample]
    return sample.double() if isinstance(sample, Tensor) and sample.is_floating_point() else sample


def _beyond(name: str, difference: float) -> str:
    return f"{_WRONG}: {name} differs by {difference:.2e} (tolerance {TOLERANCE:.0e}). Nothing was written."


def first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """What PEFT takes from a pattern for a layer: the first whose expression matches the end of its path."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def take(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Take a tensor out of those that were read.

    Raises:
        RuntimeError: it is not there.
    """
    if name not in tensors:
        raise RuntimeError(f"{_WRONG}: {WEIGHTS} has no tensor {name!r}.")
    return tensors.pop(name)


def _call(model: nn.Module, sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return model(**sample)
    return model(*sample) if isinstance(sample, (list, tuple)) else model(sample)


def _is_narrow(module: nn.Module) -> bool:
    return any(p.is_floating_point() and p.element_size() < 4 for p in module.parameters())


def _counted(samples: int) -> str:
    return "1 input" if samples == 1 else f"{samples} inputs"


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, each module's own mode put back; without the attention fast path (see `notes`)."""
    modes = [(child, child.training) for child in module.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for child, mode in modes:
            child.training = mode
