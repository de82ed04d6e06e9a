"""Where a model's backbone ends and its head begins, when nobody says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_peft.adapters.attention import has_in_proj
from lightning_peft.adapters.layers import why_not
from lightning_peft.rank.budget import clean_name

# Attribute of the module that `inject` was called on.
KEPT = "_kept_by_inject"
"""Names of what stayed trainable beside the adapters."""


@dataclass(frozen=True)
class Head:
    """What is not adapted unless it is named.

    Attributes:
        trained: names of the parameters of the task's head, new and therefore trained.
        outside: names of the modules that are not adapted by default: the head, and a language model's output layer,
            which is pretrained and therefore stays as it is.
    """

    trained: frozenset[str]
    outside: tuple[str, ...]

    def holds(self, name: str) -> bool:
        """Whether the module called `name` is in the head."""
        return any(name == head or name.startswith(head + ".") for head in self.outside)


def find_head(module: nn.Module) -> Head:
    """Tell a module's head from its backbone.

    With transformers models inside: the head is everything outside their `base_model`; if such a model has output
    embeddings, what it has outside its base is a pretrained language-model head, which is neither adapted nor trained.
    Without: the head is the last linear layer or convolution in the order of registration, if there is more than one:
    the classifier of a network of convolutions, the last convolution of one that labels every pixel.
    A :class:`~lightning_peft.head_modules.HeadModule` is a head wherever it stands, and all of it.
    """
    models = hub_models(module)
    made = tuple(n for n, m in _named(module) if getattr(type(m), "is_head", False))
    if not models and made:
        parameters = (clean_name(n) for n, _ in module.named_parameters())
        return Head(frozenset(n for n in parameters if n.startswith(tuple(f"{head}." for head in made))), made)
    if not models:
        layers = [
            n for n, m in _named(module) if (why_not(m) is None and not isinstance(m, nn.Embedding)) or has_in_proj(m)
        ]
        last = layers[-1:] if len(layers) > 1 else []
        # The last layer of an attention is its out_proj: an attention is no head.
        parents = {n for n, m in _named(module) if isinstance(m, nn.MultiheadAttention)}
        last = [n for n in last if n.rpartition(".")[0] not in parents and n not in parents]
        parameters = (clean_name(n) for n, _ in module.named_parameters())
        return Head(frozenset(n for n in parameters if n.rpartition(".")[0] in last), tuple(last))

    names = {id(m): n for n, m in _named(module)}
    backbones, languages, outputs = [], [], []
    for name, model in models.items():
        base: nn.Module = model.base_model  # type: ignore[assignment]
        backbones.append(names[id(base)])
        output = model.get_output_embeddings()  # type: ignore[operator]
        if output is not None:
            languages.append(name)
            outputs.append(names.get(id(output), ""))  # inside the backbone where a model is its own base (T5)

    def below(name: str, roots: Sequence[str]) -> bool:
        return any(not root or name == root or name.startswith(root + ".") for root in roots)

    outside = tuple(
        n
        for n in names.values()
        if n and (n in outputs or below(n, made) or not (below(n, backbones) or _above(n, backbones)))
    )
    parameters = (clean_name(n) for n, _ in module.named_parameters())
    trained = (n for n in parameters if below(n, made) or not (below(n, backbones) or below(n, languages)))
    return Head(frozenset(trained), outside)


def _above(name: str, roots: list[str]) -> bool:
    return any(root.startswith(name + ".") for root in roots)


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((clean_name(name), child) for name, child in module.named_modules())


def hub_models(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers models by name, found by what they offer: importing transformers takes seconds."""
    found: dict[str, nn.Module] = {}
    for name, child in _named(module):
        inside = any(not outer or name.startswith(outer + ".") for outer in found)
        if not inside and hasattr(type(child), "base_model_prefix") and hasattr(child, "get_output_embeddings"):
            found[name] = child
    return found
