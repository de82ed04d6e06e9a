"""The page of mistakes, docs/misuse.md. To write it anew: `PYTHONPATH=.:tests python -m misuse.page`."""

from __future__ import annotations

from pathlib import Path

from misuse import (
    adopted,
    arguments,
    certificates,
    files,
    information,
    information_terms,
    language_models,
    models_with_prompts,
    noise,
    processes,
    prompts,
    sentences,
    sparse,
    trainers,
)
from misuse.setups import Rows, tell

PAGE = Path(__file__).parents[2] / "docs" / "misuse.md"
TOLD: dict[str, Rows] = {
    "Arguments": arguments.ROWS,
    "Trainer and module": trainers.ROWS,
    "Terms of information": information_terms.ROWS,
    "Noise on embeddings": noise.ROWS,
    "Models that write, and reasoning": language_models.ROWS,
    "Certificates": certificates.ROWS,
    "Measures of information": information.ROWS,
    "Files and the command line": files.ROWS,
    "A PEFT model of your own": adopted.ROWS,
    "A model with a prompt": models_with_prompts.ROWS,
    "Sentences and their VAE": sentences.ROWS,
    "Prompts": prompts.ROWS,
    "Sparse adapters": sparse.ROWS,
}
SEVERAL = "Several processes"
_HEAD = """# What went wrong?

Mistakes, and what is said to them. Search this page for a piece of the sentence that you got. The page is written from
a table of set-ups that the tests run, and holds what was really said: a class of exception (or `UserWarning`, where
training goes on) and its text. `Told` is what the command line says with exit code 2. A sentence that knows nothing of
adapters is Lightning's own.
"""


def entry(mistake: str, kind: str, sentence: str) -> str:
    """A mistake on the page."""
    return f"- **{mistake}** (`{kind}`):\n  `` {sentence} ``\n"


def main() -> None:
    """Make every mistake and write down what is said."""
    text = _HEAD
    for title, rows in TOLD.items():
        text += f"\n## {title}\n\n"
        for mistake, (wrong, _) in rows.items():
            text += entry(mistake, *tell(wrong))
    text += f"\n## {SEVERAL}\n\nEvery process says so, and none is left waiting for another.\n\n"
    for mistake, (_, sentence) in processes.ROWS.items():
        text += entry(mistake, processes.kind(sentence), sentence)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
