"""The two ways in which we touch Lightning: `when_built` and `wrap_method`. Nothing else in the package patches it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

Link = Callable[..., Any]
"""`link(call, owner, *args, **kwargs)`: calls `call(*args, **kwargs)`, before, after or around what it does."""

_LINKS = "_lightning_peft_links"


def wrap_method(owner: Any, name: str, link: Link, innermost: bool = False) -> Callable[[], None]:
    """Put `link` around a method of this one instance; the class and other instances are untouched.

    A method has one wrapper with an ordered chain of links, the last added outermost, or `innermost`: next to the
    method itself, inside of all that are there, whoever has come first. Links come off in any order,
    which matters because Lightning tears callbacks down in list order; with the last one the method is the class's own
    again. The wrapper is a bound method, so a deep copy of a module is wrapped around the copy.

    Returns:
        A function that takes the link off; calling it again does nothing.
    """
    method = getattr(owner, name)
    links: list[Link] | None = getattr(method, _LINKS, None)
    if links is None:
        links = []
        before = owner.__dict__.get(name)  # a method that somebody else has shadowed on the instance
        original = method.__func__ if isinstance(method, MethodType) else None

        @functools.wraps(original or method)  # the function: binding takes the first parameter off its signature
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Bound anew to `self`: in a deep copy that is the copy.
            call = method if original is None else MethodType(original, self)
            for each in wrapped.links:  # type: ignore[attr-defined]
                call = functools.partial(each, call, self)
            return call(*args, **kwargs)

        wrapped.links = links  # type: ignore[attr-defined]
        wrapped.before = before  # type: ignore[attr-defined]
        setattr(wrapped, _LINKS, links)
        # Past nn.Module.__setattr__: a bound method is no parameter, buffer or child.
        owner.__dict__[name] = MethodType(wrapped, owner)
    links.insert(0 if innermost else len(links), link)
    current = owner.__dict__[name]

    def remove() -> None:
        if link in links:
            links.remove(link)
            if not links and owner.__dict__.get(name) is current:
                shadowed = current.__func__.before
                if shadowed is None:
                    del owner.__dict__[name]
                else:
                    owner.__dict__[name] = shadowed

    return remove


def when_built(module: LightningModule, action: Callable[[LightningModule], None]) -> None:
    """Run `action(module)` as soon as the module's layers exist, and before the strategy wraps them.

    At once, or right after `configure_model` if the user overrides it, or right after the module's own `setup` if that
    is overridden. To be called from `Callback.setup`, which Lightning runs before both. `action` must be idempotent:
    every entry point of the Trainer comes by here.
    """
    name = next((hook for hook in ("configure_model", "setup") if is_overridden(hook, module)), None)
    if name is None:
        action(module)
        return

    def after(call: Callable[..., Any], owner: LightningModule, *args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        remove()
        action(owner)
        return result

    remove = wrap_method(module, name, after)
