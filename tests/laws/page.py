"""The tables of laws in docs/own-method.md. To write them anew: `PYTHONPATH=.:tests python -m laws.page`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_peft.testing import IMPORTANCE_LAWS, LAWS, POLICY_LAWS, remedy

PAGE = Path(__file__).parents[2] / "docs" / "own-method.md"
TABLES: dict[str, Mapping[str, Callable[[Any], None]]] = {
    "Adapters": LAWS,
    "Importances": IMPORTANCE_LAWS,
    "Policies": POLICY_LAWS,
}


def table(laws: Mapping[str, Callable[[Any], None]]) -> str:
    """A row per law, from its docstring: what it says, and what usually mends what breaks it."""
    rows = [f"| `{name}` | {(law.__doc__ or '').partition(chr(10))[0]} | {remedy(law)} |" for name, law in laws.items()]
    return "\n".join(["| law | what it says | what usually mends a failure |", "|---|---|---|", *rows])


def with_tables(text: str) -> str:
    """The page with the tables as the code has them now, each after its heading."""
    for title, laws in TABLES.items():
        heading = re.compile(rf"^### {title}\n\n(?:\|[^\n]*\n)*", re.MULTILINE)
        if len(heading.findall(text)) != 1:
            raise ValueError(f"{PAGE.name} has no heading '### {title}', or several.")
        new = f"### {title}\n\n{table(laws)}\n"
        text = heading.sub(lambda _, new=new: new, text)  # type: ignore[misc]
    return text


def main() -> None:
    """Write the tables."""
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
