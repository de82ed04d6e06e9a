"""Solvers as files, and examples that are there already."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from reasoning.test_self_generated import SHORT, STAGED

from lightning_peft import AdapterFileError
from lightning_peft.reasoning import Example, SelfGeneratedCoT, letter, load_solver, number, save_solver


def test_a_solver_comes_back_with_its_settings_and_examples(scripted: Any, tokenizer: Any, tmp_path: Path) -> None:
    first = SelfGeneratedCoT(
        scripted(STAGED), tokenizer, mode="staged", templates=SHORT, seed=3, temperature=0.5, stop=("#",),
        max_new_tokens=40, batch_size=5, max_context_tokens=900,
    )  # fmt: skip
    result = first.solve("1+2")
    assert result.examples
    save_solver(tmp_path / "solver.json", first, {"1+2": result.examples})
    model = scripted(STAGED)
    again = load_solver(tmp_path / "solver.json", model, tokenizer)
    for name in ("n_examples", "mode", "votes", "filter_k", "agreement", "max_new_tokens", "seed", "templates"):
        assert getattr(again, name) == getattr(first, name), name
    for name in ("max_context_tokens", "temperature", "top_p", "batch_size", "stop"):
        assert getattr(again.writer, name) == getattr(first.writer, name), name
    known = again.solve("1+2")
    assert (known.answer, known.text, known.examples) == (result.answer, result.text, result.examples)
    assert (known.n_calls, len(model.prompts)) == (1, 1)  # no example was written again
    assert known.n_prompt_tokens == len(model.prompts[0])
    assert [path.name for path in tmp_path.iterdir()] == ["solver.json"]


def test_known_and_new_questions_in_one_batch(scripted: Any, tokenizer: Any) -> None:
    script = STAGED | {"3+4~3": "none", "3+4?": "So 7.", "6+6? b So 12.\n\n2+2?": "So 4."}
    known = {"2+2": [Example("6+6", "b", "12")]}
    solver = SelfGeneratedCoT(scripted(script), tokenizer, mode="staged", templates=SHORT, known=known)
    found = solver.solve_batch(["3+4", "2+2", "1+2"])
    assert [result.answer for result in found] == ["7", "4", "3"]
    assert [result.fallback for result in found] == [True, False, False]
    assert [result.n_calls for result in found] == [2, 1, 5]


def test_extractors_by_name_or_given_again(scripted: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "solver.json"
    save_solver(path, SelfGeneratedCoT(scripted({}), tokenizer, extractor=letter))
    assert load_solver(path, scripted({}), tokenizer).extractor is letter
    save_solver(path, SelfGeneratedCoT(scripted({}), tokenizer, extractor=str.strip))
    with pytest.raises(ValueError, match=r"a function of its own, which no file holds\. Give it: load_solver"):
        load_solver(path, scripted({}), tokenizer)
    assert load_solver(path, scripted({}), tokenizer, extractor=str.strip).extractor is str.strip


def test_a_number_behind_the_templates_marker_is_known_by_name_and_no_other(
    scripted: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "solver.json"
    for extractor in (number, partial(number, marker="The answer is"), None):
        save_solver(path, SelfGeneratedCoT(scripted({}), tokenizer, extractor=extractor))
        assert load_solver(path, scripted({}), tokenizer).extractor("The answer is 8.\n9") == "8"
    save_solver(path, SelfGeneratedCoT(scripted({}), tokenizer, extractor=partial(number, marker="####")))
    with pytest.raises(ValueError, match="a function of its own"):
        load_solver(path, scripted({}), tokenizer)


def test_an_integrated_solver_has_no_examples_to_keep(scripted: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "solver.json"
    solver = SelfGeneratedCoT(scripted({"1+2*3== mine ==": "== mine == So 3."}), tokenizer, templates=SHORT)
    save_solver(path, solver, {"1+2": solver.solve("1+2").examples})
    assert load_solver(path, scripted({}), tokenizer).mode == "integrated"
    with pytest.raises(ValueError, match=r"examples go with mode='staged', and this solver's is 'integrated'"):
        save_solver(path, solver, {"1+2": [Example("6+6", "b", "12")]})


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"format": "another"}'])
def test_other_files_are_refused(content: str | None, scripted: Any, tokenizer: Any, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "solver.json").write_text(content)
    with pytest.raises(AdapterFileError, match=r"solver\.json is no file of a solver: .*save_solver has written"):
        load_solver(tmp_path / "solver.json", scripted({}), tokenizer)


def test_known_examples_are_for_staged_solving(scripted: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"known examples are for mode='staged'"):
        SelfGeneratedCoT(scripted({}), tokenizer, known={"1+2": [Example("a", "b", "c")]})
