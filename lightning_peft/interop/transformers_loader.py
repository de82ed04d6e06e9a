"""The file of code that loads a compressed transformers model: thin layers, and the model's own classes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_peft.heads import hub_models
from lightning_peft.interop import plain_loader

_CONFIG = "CompressedConfig"
_VAGUE = ("AutoModelForPreTraining", "AutoModelWithLMHead")  # auto classes that say less than another of the same model
_CLASSES = """

# --- {model}, of transformers, with such layers ---

import transformers  # noqa: E402


class {config_class}(transformers.{config}):
    model_type = "{model_type}"


class _Compressed:
    config_class = {config_class}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        put_in(self, getattr(config, "thin_layers", {{}}))
"""
_CLASS = """

class {name}(_Compressed, transformers.{model}):
    pass
"""


@dataclass(frozen=True)
class AutoClasses:
    """How transformers finds the classes of a compressed model.

    Attributes:
        model: name of the model's class in transformers.
        config: name of its config's class.
        base: name of the class of its base model.
        main: the auto class that loads the model itself.
        model_type: of the new config. Not the old one: a folder of that type would load without our layers, and the
            weights that are missing then would be random.
        names: auto class -> class in the file of code.
    """

    model: str
    config: str
    base: str
    main: str
    model_type: str
    names: Mapping[str, str]

    @property
    def architecture(self) -> str:
        """The class of the model in the file of code."""
        return f"Compressed{self.model}"


def auto_classes(host: nn.Module) -> AutoClasses | None:
    """What loads this model; ``None`` where it is no transformers model, or of a class that no auto class knows."""
    if host not in hub_models(host).values():
        return None
    from transformers.models.auto import modeling_auto

    kind, config = type(host), type(host.config)
    base = type(host.base_model)
    names: dict[str, str] = {}
    for name, auto in vars(modeling_auto).items():
        mapping: Any = getattr(auto, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or config not in mapping:
            continue
        known = mapping[config]
        known = known if isinstance(known, tuple) else (known,)
        if kind in known:
            names[name] = f"Compressed{kind.__name__}"
        elif name == "AutoModel" and base in known:
            names[name] = f"Compressed{base.__name__}"
    own = [name for name, known in names.items() if known == f"Compressed{kind.__name__}"]
    if not own:
        return None
    main = next((name for name in own if name not in _VAGUE), own[0])
    model_type = f"compressed-{host.config.model_type}"  # type: ignore[union-attr]
    return AutoClasses(kind.__name__, config.__name__, base.__name__, main, model_type, names)


def loader_source(classes: AutoClasses | None = None) -> str:
    """The text of the file of code: for any module, or for transformers' classes."""
    text = Path(plain_loader.__file__).read_text(encoding="utf-8")
    if classes is None:
        return text
    text += _CLASSES.format(
        model=classes.model, config_class=_CONFIG, config=classes.config, model_type=classes.model_type
    )
    for name in dict.fromkeys(classes.names.values()):
        text += _CLASS.format(name=name, model=name.removeprefix("Compressed"))
    return text


def auto_map(classes: AutoClasses, file: str) -> dict[str, str]:
    """What `auto_map` of a config says: auto class -> file and class."""
    return {"AutoConfig": f"{file}.{_CONFIG}"} | {name: f"{file}.{kind}" for name, kind in classes.names.items()}
