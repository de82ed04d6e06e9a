"""A solver's settings, and examples that it has written, as a file of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightning_peft.archive import AdapterFileError
from lightning_peft.atomic import write_whole
from lightning_peft.reasoning.extraction import MARKER, Extractor, letter, number
from lightning_peft.reasoning.result import Example
from lightning_peft.reasoning.self_generated import SelfGeneratedCoT
from lightning_peft.reasoning.templates import Templates

_FORMAT = "lightning_peft/self_generated_cot/v1"
_OWN = (
    "n_examples", "mode", "votes", "filter_k", "agreement", "integrated_tokens", "max_new_tokens", "seed",
)  # fmt: skip
_WRITING = ("max_context_tokens", "temperature", "top_p", "batch_size", "stop")


def save_solver(
    path: str | os.PathLike[str], solver: SelfGeneratedCoT, examples: Mapping[str, Sequence[Example]] | None = None
) -> None:
    """Write a solver's templates and settings, whole or not at all; neither the model nor the tokenizer.

    Args:
        path: of the file.
        solver: whose they are.
        examples: by question, such as ``{question: result.examples}``; ``None`` for those that it was given itself.
            In mode "integrated" there are none: nobody has taken them apart.

    Raises:
        ValueError: there are examples, and the solver's mode is "integrated", which takes none.
        OSError: the file could not be written.
    """
    kept = solver.known if examples is None else examples
    if solver.mode == "integrated":
        if any(kept.values()):
            raise ValueError(
                "examples go with mode='staged', and this solver's is 'integrated': save it without, or give it the "
                "other mode."
            )
        kept = {}
    content = {
        "format": _FORMAT,
        "settings": {
            **{name: getattr(solver, name) for name in _OWN},
            **{name: getattr(solver.writer, name) for name in _WRITING},
        },
        "templates": asdict(solver.templates),
        "extractor": _name_of(solver),
        "examples": {question: [list(each) for each in found] for question, found in kept.items()},
    }
    write_whole(path, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode())


def load_solver(
    path: str | os.PathLike[str], model: nn.Module, tokenizer: Any, extractor: Extractor | None = None
) -> SelfGeneratedCoT:
    """A solver as one was written.

    Args:
        path: of the file.
        model: anything with transformers' `generate`.
        tokenizer: the model's.
        extractor: reads answers; a file holds no functions, but for the names of `letter` and of `number` with the
            templates' marker.

    Raises:
        AdapterFileError: there is no such file, or it is none of a solver.
        ValueError: the solver that was written had an extractor of its own, and none is given.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        templates, settings = Templates(**content["templates"]), dict(content["settings"])
        known = {question: [Example(*each) for each in found] for question, found in content["examples"].items()}
        name = content["extractor"]
        if extractor is None and name == "letter":
            extractor = letter
        solver = SelfGeneratedCoT(
            model, tokenizer, templates=templates, extractor=extractor, known=known or None, **settings
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterFileError(
            f"{os.fspath(path)} is no file of a solver: {error}. Give one that save_solver has written."
        ) from error
    if extractor is None and name != "number":  # which is a solver's own where it is given none
        raise ValueError(
            f"the solver in {os.fspath(path)} read answers with a function of its own, which no file holds. Give it: "
            "load_solver(..., extractor=...)."
        )
    return solver


def _name_of(solver: SelfGeneratedCoT) -> str:
    """The name of what reads answers; "number" is the one that reads behind the templates' marker."""
    extractor = solver.extractor
    behind = MARKER if extractor is number else None
    if isinstance(extractor, partial) and extractor.func is number and not extractor.args:
        behind = extractor.keywords.get("marker", MARKER)
    if behind == solver.templates.marker:
        return "number"
    return "letter" if extractor is letter else "own"
