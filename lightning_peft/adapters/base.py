"""Adapter: a module that stands in place of a base layer."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.deferred import Deferred
from lightning_peft.adapters.layers import stored, why_not
from lightning_peft.rank.gate import Gate


class Adapter(nn.Module, ABC):
    """Stands in place of a base layer, which it freezes and keeps as `self.base`.

        forward(x) = effective_weight() x + bias

    Two views of one equation: `effective_weight` is what the paper writes, `forward` is what runs; a law says that they
    agree. The adapter answers for its base: an attribute that it does not have is the base's, and `weight` is the
    weight that the layer now acts with. Code that reads a layer's weight and never calls the layer (`out_proj` of
    MultiheadAttention, the fast path of TransformerEncoderLayer) therefore gets the adapted layer, not a silent base.

    A subclass is final: one paper, one class, no overriding of what is concrete here. Every argument of its constructor
    but `base` is also an attribute of the same name, so that the adapter can be described and built again.

    Args:
        base: layer to adapt; frozen and kept.

    Attributes:
        mergeable: whether `effective_weight` says all, so that the adapter can be merged into its base.
        identity_at_start: whether a new adapter gives the base's output bit for bit.
        adapts: what it stands in the place of: a "layer", or a "model": a whole transformers model.
        hosted: whether its tensors live in another library's layer, which computes. Such an adapter stands in no
            layer's place, so it is neither put in, taken out, merged nor cut here.
        releases_base: whether the base's weight is gone, and the adapter has it in another form. Such an adapter is not
            taken out again; it is merged.
        leaves: names of modules whose layers it takes only where they are named, beside the head and embeddings.
        trained: whether it has something to train itself; else something outside moves its gate.
        folds_lasting: whether an exported file has its `lasting_parameters` within its components, and not beside them.
        writes_base: whether it writes into its base's weight, which then holds what the adapter makes of it. Such an
            adapter says how to bring the weight up to date and back: :meth:`refresh` and :meth:`restore_base`.
        constants: names of own buffers that training leaves as they are, so that nothing has to send them around.
        elementwise: names of own parameters that multiply activations entry by entry along the last dimension. In the
            place of such an (n,) vector its `forward` takes a (batch, n) tensor as well, one vector for each example
            of an input (batch, ..., n), the same for what is between: noise can then be drawn per example.
    """

    mergeable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    adapts: ClassVar[Literal["layer", "model"]] = "layer"
    hosted: ClassVar[bool] = False
    releases_base: ClassVar[bool] = False
    leaves: ClassVar[tuple[str, ...]] = ()
    folds_lasting: ClassVar[bool] = False
    writes_base: ClassVar[bool] = False
    constants: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[tuple[str, ...]] = ()
    trained: bool = True

    base: nn.Module
    gate: Gate | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        base.requires_grad_(False)
        self.base = base
        self.gate = None
        self.training = base.training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # torch's layers call their input `input`, and so may whoever calls them.
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        return super().__call__(*args, **kwargs)

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """The weight that the layer acts with: (d_out, d_in), in the adapter's dtype."""

    @property
    def weight(self) -> Tensor:
        """The effective weight in the base's layout and dtype: what code that reads a layer's weight should get.

        Of an adapter that has it in another form it is computed where it is used, and not for its dtype alone.
        """
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        # Compiled, what nobody uses is not computed anyway.
        if self.releases_base and not torch.compiler.is_compiling():
            return Deferred(weight, self._stored_weight)
        return self._stored_weight()

    def _stored_weight(self) -> Tensor:
        """What :attr:`weight` is; an adapter that has it at hand may say so."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return stored(self.base, self.effective_weight()).to(weight.dtype)

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        """Why a layer cannot be adapted, as the end of a sentence; ``None`` if it can."""
        return why_not(layer)

    def compacted(self, keep: Tensor | None = None) -> Adapter | None:
        """An adapter with some of the components, on the same base; ``None`` if none is left.

        Parameters keep their names and dtypes, and are cut along one dimension, so that an optimizer's state can be cut
        alike.

        Args:
            keep: (n,) bool, the components to keep; ``None`` for those that are open, which leaves the output equal.
        """
        raise TypeError(f"{type(self).__name__} cannot be compacted: its components are not cut out of its tensors.")

    def kept(self, keep: Tensor) -> Tensor:
        """What `compacted(keep)` keeps, (n,) bool: these components, and more where the adapter must have some."""
        return keep

    def thin(self) -> nn.Module | None:
        """Plain layers that do the same without this library, or none: then merging is all there is, the default."""
        return None

    @classmethod
    def unfilled(cls, base: nn.Module, **arguments: Any) -> Adapter:
        """An adapter whose tensors are loaded next: its structure counts, not its start. By default a new one."""
        return cls(base, **arguments)

    def placed(self, name: str, others: Mapping[str, Adapter]) -> None:
        """Learn where it stands: in place of the layer `name`, put in together with these others; once, when it is new.

        An adapter that is built again from a file's arguments is told its place there too, so what it takes from its
        name belongs into its arguments.

        Args:
            name: the layer's, as the user knows it.
            others: by their layers' names, those that were told before it.
        """

    @classmethod
    def refresh(cls, group: Sequence[Adapter], followed: bool | None = None) -> None:  # most write nothing
        """Write what parameters, masks and buffers say now into the weights of their bases; by default nothing.

        An adapter that writes does so by itself before it computes, if it notices a change. Not where a sharding
        strategy has gathered the weight to compute with it, nor after an optimizer that leaves no trace of its step.

        Args:
            group: adapters of this class, in one model.
            followed: whether this is called after every step of every optimizer from now on; ``None`` says nothing.
        """

    def restore_base(self) -> None:
        """Write the base's own weight back, bit for bit; by default it was never touched.

        Until :meth:`refresh`, or the next forward.
        """

    def digest(self) -> str | None:
        """Digest of what it derives from its arguments and does not save; ``None`` if nothing, the default.

        Checkpoints hold it, and are refused where it is another one.
        """
        return None

    def large_parameters(self) -> Iterator[nn.Parameter]:
        """Own parameters as large as the base's, which may be split over processes as these are; by default none.

        All others stay whole on every process.
        """
        return iter(())

    def lasting_parameters(self) -> Iterator[nn.Parameter]:
        """Own parameters that belong to no component, and stay whole when components are cut out; by default none."""
        return iter(())

    def rates(self) -> Mapping[str, float]:
        """What multiplies the learning rate of own parameters, by name; those that are not named have the rate itself.

        By default all have. The modules here follow it, and your own does with
        :func:`lightning_peft.surgery.split_by_rate`; where nobody does, a warning says so when training starts.
        """
        return {}

    def lengths(self) -> Tensor | None:
        """Lengths of the effective weight's rows, (d_out,), if the adapter has them apart from the weight; else none.

        With such lengths it is more than its components: without an open one it is not its base.
        """
        return None

    @contextmanager
    def constants_held(self) -> Iterator[None]:
        """For a while, what the gradient takes for a constant keeps the value that it has at the start.

        Only then are gradients what finite differences give, and only then do components add up. By default there is
        no such constant.
        """
        yield

    @classmethod
    def take_over(cls, module: nn.Module, recipe: Mapping[str, Any], source: str) -> Callable[[], None]:
        """Have hosted adapters where a checkpoint's recipe has them, before it is loaded; returns the undoing.

        Args:
            module: has the other library's layers already.
            recipe: what the checkpoint says of its adapters.
            source: what to call the checkpoint.
        """
        raise TypeError(f"{cls.__name__} is not hosted: it is built around a layer.")

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments but `base`, so that `type(self)(base, **arguments)` builds the same structure."""
        names = list(inspect.signature(type(self)).parameters)[1:]
        return {name: getattr(self, name) for name in names}

    @property
    def dense_parameters(self) -> int:
        """Numbers in the weight that the layer has without an adapter; 0 if it is no layer with one.

        Raises:
            RuntimeError: FSDP1 has made the weight a part of a flat one.
        """
        weight = getattr(self.base, "weight", None)
        if getattr(weight, "_fsdp_flattened", False):
            raise RuntimeError(
                "a share of the dense layers' parameters cannot be told where FSDP1 has them in flat slices. Give the "
                "budget in parameters."
            )
        return weight.numel() if isinstance(weight, Tensor) else 0

    @property
    def placeholder(self) -> int | None:
        """A token id that it puts into its model's text, and whose embeddings it replaces; ``None`` for none."""
        return None

    def lengthened(self, mask: Tensor) -> Tensor | None:
        """Which columns of the text that its model sees are tokens that were shown to it; ``None`` if it adds none.

        Args:
            mask: (B, L), not 0 for what is no padding.

        Returns:
            (B, L + m), of the mask's dtype, and 0 in columns of its own.
        """
        return None

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's own parameters, without its base's."""
        return ((name, p) for name, p in self.named_parameters() if not name.startswith("base."))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # `weight` gets here only when computing it has failed; the base's would be a silent wrong answer.
            if name in ("base", "weight") or "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base, name)


AdapterFactory = Callable[[nn.Module], Adapter]
"""What builds an adapter around a layer: `partial(LoRA, rank=8)`, a class, a lambda."""
