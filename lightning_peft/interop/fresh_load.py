"""Loads a folder as its users will, in a process of its own that cannot import this package, and runs it on samples.

    python -c "<this file>" FOLDER CLASS SAMPLES OUTPUTS

CLASS is an auto class of transformers. SAMPLES and OUTPUTS are safetensors files: `<sample>.<argument>`, and
`<sample>.<place>` of every floating-point tensor that the model returns, in order.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any


def main(folder: str, auto_class: str, samples: str, outputs: str) -> None:
    """Load, run, save."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    # The code in the folder is what is checked; it was written a moment ago by the process that started this one.
    loader = getattr(transformers, auto_class)
    model = loader.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    if any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters()):
        model.float()
    inputs: dict[int, dict[str, Any]] = {}
    for key, tensor in load_file(samples).items():
        number, _, name = key.partition(".")
        inputs.setdefault(int(number), {})[name] = tensor
    found: dict[str, Any] = {}
    with torch.no_grad():
        for index, sample in inputs.items():
            for place, tensor in enumerate(floating(model.eval()(**sample))):
                found[f"{index}.{place}"] = tensor.contiguous().clone()
    save_file(found, outputs)


def floating(output: Any) -> Iterator[Any]:
    """The floating-point tensors of a model's output, in order."""
    if hasattr(output, "is_floating_point"):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from floating(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from floating(value)


if __name__ == "__main__":
    sys.modules["lightning_peft"] = None  # type: ignore[assignment]  # an import of it fails
    main(*sys.argv[1:])
