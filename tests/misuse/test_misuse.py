"""Wrong set-ups, as users make them, and the sentence that names the thing and says the fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from misuse import processes
from misuse.page import PAGE, TOLD, entry
from misuse.setups import Encoder, fit, tell

from lightning_peft import AdapterFileError, presets

ROWS = {mistake: row for rows in TOLD.values() for mistake, row in rows.items()}


@pytest.mark.parametrize(("mistake", "wrong", "error"), [(m, *row) for m, row in ROWS.items()], ids=ROWS.keys())
def test_a_mistake_is_told_as_the_page_says(mistake: str, wrong: Callable[[], object], error: type[Exception]) -> None:
    kind, sentence = tell(wrong)
    assert entry(mistake, kind, sentence) in PAGE.read_text(encoding="utf-8")
    assert kind == error.__name__


def test_what_is_said_does_not_depend_on_the_random_numbers_before_it() -> None:
    wrong, _ = ROWS["a run too short for masks to learn their budget"]
    torch.manual_seed(1)
    first = tell(wrong)
    torch.manual_seed(2)
    assert tell(wrong) == first


def test_the_page_holds_these_mistakes_and_no_other() -> None:
    page = PAGE.read_text(encoding="utf-8")
    mistakes = [mistake for rows in [*TOLD.values(), processes.ROWS] for mistake in rows]
    assert [line.split("**")[1] for line in page.splitlines() if line.startswith("- **")] == mistakes
    assert len(mistakes) >= 40
    for mistake, (_, sentence) in processes.ROWS.items():
        assert entry(mistake, processes.kind(sentence), sentence) in page


def saved(folder: Path) -> Path:
    trainer = fit(Encoder(), *presets.dynamic_dora(final_rank=2), max_steps=12)
    trainer.save_checkpoint(folder / "some.ckpt")
    return folder / "some.ckpt"


def another_base(path: Path) -> None:
    fit(Encoder(seed=1), *presets.dynamic_dora(final_rank=2), ckpt_path=path)


def other_adapters(path: Path) -> None:
    fit(Encoder(), *presets.dynamic_dora(final_rank=3), ckpt_path=path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    fit(Encoder(), *presets.dynamic_dora(final_rank=2), ckpt_path=path)


def tampered(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["state_dict"]["query.A"][0, 0] += 1
    torch.save(content, path)
    fit(Encoder(), *presets.dynamic_dora(final_rank=2), ckpt_path=path)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (another_base, "was made for another base model: 'query.base.bias' differs"),
        (other_adapters, r"holds other adapters than this model has: at 'query' it has DynamicDoRA\(rank=3"),
        (truncated, r"some.ckpt cannot be read: it is cut short, damaged, or holds more than tensors"),
        (tampered, "was changed after it was written: its contents do not match their digest. Use another copy."),
    ],
)
def test_a_wrong_checkpoint_is_told_in_a_sentence(wrong: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(AdapterFileError, match=says):
        wrong(path)
