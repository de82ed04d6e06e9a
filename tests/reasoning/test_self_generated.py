"""Self-generated in-context chains of thought, on a model whose texts are scripted and on a real one."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

from lightning_peft.reasoning import (
    Example,
    FewShotCoT,
    SelfConsistency,
    SelfGeneratedCoT,
    Solver,
    Templates,
    ZeroShot,
    ZeroShotCoT,
)
from lightning_peft.reasoning.generation import Ask, Writer

SHORT = Templates(
    marker="So", heading="== mine ==", direct="{question}!", cot="{question}?", integrated="{question}*{n}{heading}",
    similar="{question}~{n}", example="{question}? {solution} {marker} {answer}.",
)  # fmt: skip
LIST = "1. 5+6\n2) 7+8\n3: 9+9"
STAGED: dict[str, Any] = {
    "1+2~3": LIST,
    "5+6?": "five, six So 11.",
    "7+8?": "seven, eight So 15.",
    "9+9?": "no idea",
    "5+6? five, six So 11.\n\n7+8? seven, eight So 15.\n\n1+2?": "one, two So 3.",
    "1+2?": "well So 4.",
}


def test_property_1_prompts_calls_and_answer_of_an_integrated_text(scripted: Any, tokenizer: Any) -> None:
    model = scripted({"1+2*3== mine ==": "P: 5+6 So 11.\nQ: more\n== mine ==\none, two So 3."})
    result = SelfGeneratedCoT(model, tokenizer, templates=SHORT).solve("1+2")
    assert model.prompts == ["1+2*3== mine =="]
    assert (result.answer, result.n_calls, result.examples, result.fallback) == ("3", 1, (), False)
    assert result.n_prompt_tokens == len("1+2*3== mine ==")
    assert result.n_new_tokens == len(result.text) > 40  # a token is a byte here


def test_property_1_prompts_calls_and_answer_of_staged_solving(scripted: Any, tokenizer: Any) -> None:
    model = scripted(STAGED)
    result = SelfGeneratedCoT(model, tokenizer, mode="staged", templates=SHORT).solve("1+2")
    last = "5+6? five, six So 11.\n\n7+8? seven, eight So 15.\n\n1+2?"
    assert model.prompts == ["1+2~3", "5+6?", "7+8?", "9+9?", last]
    assert model.batches == [1, 3, 1]  # one call of generate per stage
    assert (result.answer, result.text, result.n_calls) == ("3", "one, two So 3.", 5)
    assert result.examples == (Example("5+6", "five, six", "11"), Example("7+8", "seven, eight", "15"))
    assert result.n_prompt_tokens == sum(map(len, model.prompts))
    assert result.n_new_tokens == sum(len(str(STAGED[prompt])) for prompt in model.prompts)
    assert not result.fallback


def test_property_2_the_model_is_left_as_it_was(scripted: Any, tokenizer: Any) -> None:
    model = scripted(STAGED).train()
    model.inner.eval()
    before, state = model.weight.detach().clone(), torch.get_rng_state()
    SelfGeneratedCoT(model, tokenizer, mode="staged", templates=SHORT).solve("1+2")
    assert not any(model.modes)  # it wrote in evaluation mode
    assert (model.training, model.inner.training) == (True, False)
    assert model.weight.grad is None
    assert torch.equal(model.weight, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_property_2_the_mode_is_put_back_after_an_error(scripted: Any, tokenizer: Any) -> None:
    model = scripted({}).train()
    with pytest.raises(KeyError):
        ZeroShot(model, tokenizer).solve("?")
    assert model.training


def test_property_3_a_batch_is_its_questions_one_by_one(tiny: Any) -> None:
    """On a real model, greedily and sampled: padding, other rows and their order change nothing."""
    writer = Writer(*tiny, temperature=1.0, batch_size=3, stop=())
    asks = [Ask("two"), Ask("a longer one", 7), Ask("b", 8), Ask("a longer one", 9), Ask("two", 7)]
    together = writer.write(asks, 12)
    assert together == [writer.write([ask], 12)[0] for ask in asks]
    assert together == writer.write(asks[::-1], 12)[::-1]
    assert together[1].text != together[3].text  # another seed
    assert together[0].text != together[4].text  # greedy is not sampled


@pytest.mark.parametrize("options", [{}, {"mode": "staged"}, {"mode": "staged", "votes": 3}], ids=str)
def test_property_3_the_same_seed_gives_the_same_results(tiny: Any, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 8, "integrated_tokens": 8, "stop": (), "templates": SHORT, **options}
    first = SelfGeneratedCoT(*tiny, **settings).solve_batch(["1+2", "30+4"])
    torch.manual_seed(5)  # no global generator is asked
    again = SelfGeneratedCoT(*tiny, **settings).solve_batch(["30+4", "1+2"])
    assert first == again[::-1]
    if options:  # it samples
        assert first != SelfGeneratedCoT(*tiny, seed=1, **settings).solve_batch(["1+2", "30+4"])


def test_sampling_follows_the_distribution(tiny: Any) -> None:
    """Frequencies of a first token against the model's own probabilities, cut at top_p."""
    model, tokenizer = tiny
    writer = Writer(model, tokenizer, temperature=2.0, top_p=0.6, batch_size=500, stop=())
    seen: dict[int, int] = {}
    for written in writer.write([Ask("x", seed) for seed in range(2000)], 1):
        token = tokenizer(written.text)["input_ids"][0] if written.text else -1
        seen[token] = seen.get(token, 0) + 1
    with torch.no_grad():
        chances = (model(torch.tensor([tokenizer("x")["input_ids"]])).logits[0, -1] / 2.0).softmax(-1)
    ordered, order = chances.sort(descending=True)
    kept = int((ordered.cumsum(0) - ordered < 0.6).sum())
    assert kept > 3
    wanted = ordered[:kept] / ordered[:kept].sum()
    for token, share in zip(order[:kept].tolist(), wanted.tolist(), strict=True):
        text = tokenizer.decode([token])
        if len(text.strip()) == 1 and tokenizer(text)["input_ids"] == [token]:
            assert seen.get(token, 0) / 2000 == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)
    assert set(seen) - set(order[:kept].tolist()) <= {-1} | {tokenizer("\ufffd")["input_ids"][0]}


def test_property_4_an_answer_is_never_read_from_an_example(scripted: Any, tokenizer: Any) -> None:
    prompt = "1+2*3== mine =="
    for text, answer in {
        "5+6 So 11.\n== mine ==\nlet me see": None,  # a planted answer, and none of its own
        "5+6 So 11.\n== mine ==\nSo 3.": "3",
        "5+6 So 11.": None,  # no section of its own
        "== mine == So 9.\n== mine == So 3.": "3",
        "== mine ==\n1+2\nSo 3, as there are 3.\n\n5+6 So 11.": "3",  # an example behind it
        "== Mine == so 3.\n5+6 so 11.": "3",
        "== mine == \\boxed{3}.\n5+6 \\boxed{11}.": "3",
    }.items():
        assert SelfGeneratedCoT(scripted({prompt: text}), tokenizer, templates=SHORT).solve("1+2").answer == answer


def test_property_5_the_farthest_examples_are_dropped_to_fit(scripted: Any, tokenizer: Any) -> None:
    near, far = "the cost of 4 red pens", "8 dogs"
    question = "the cost of 2 red pens"
    script = {
        f"{question}~3": f"1) {near}\n2) {far}\n3) cut",
        f"{near}?": "So 1.",
        f"{far}?": "So 2.",
        f"{far}? So 2.\n\n{near}? So 1.\n\n{question}?": "all So 1.",
        f"{near}? So 1.\n\n{question}?": "near So 2.",
        f"{question}?": "none So 3.",
    }
    template = Templates(**{**vars(SHORT), "example": "{question}? {solution}{marker} {answer}."})
    found = {}
    for limit in (130, 100, 70):
        model = scripted(script)
        solver = SelfGeneratedCoT(
            model, tokenizer, mode="staged", templates=template, max_context_tokens=limit, max_new_tokens=40
        )
        result = solver.solve(question)
        found[limit] = (result.text, [example.question for example in result.examples], result.fallback)
        assert all(len(prompt) + 40 <= limit for prompt in model.prompts)
    assert found == {
        130: ("all So 1.", [far, near], False),
        100: ("near So 2.", [near], False),
        70: ("none So 3.", [], True),
    }
    with pytest.raises(
        ValueError, match=r"a prompt has 24 tokens, and with 30 new ones more than max_context_tokens=50"
    ):
        SelfGeneratedCoT(scripted(script), tokenizer, mode="staged", templates=template, max_context_tokens=50,
                         max_new_tokens=30).solve(question)  # fmt: skip


@pytest.mark.parametrize("written", ["", "nothing of the kind", "1. 1+2\n2. 1 + 2 !\n3. 2+1 or 1+2", "1. one more"])
def test_property_6_without_a_fit_example_it_is_asked_alone_and_says_so(
    written: str, scripted: Any, tokenizer: Any
) -> None:
    model = scripted({**STAGED, "1+2~3": written, "2+1 or 1+2?": "hm", "one more?": "hm"})
    result = SelfGeneratedCoT(model, tokenizer, mode="staged", templates=SHORT).solve("1+2")
    assert (result.answer, result.text, result.fallback, result.examples) == ("4", "well So 4.", True, ())
    assert result.n_calls == len(model.prompts)


@pytest.mark.parametrize("mode", ["integrated", "staged"])
@pytest.mark.parametrize("votes", [1, 3])
def test_property_8_no_examples_is_zero_shot_cot(mode: Any, votes: int, tiny: Any) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 8, "stop": ()}
    found = SelfGeneratedCoT(*tiny, n_examples=0, mode=mode, votes=votes, **settings).solve_batch(["1+2", "3"])
    if votes == 1:
        assert found == ZeroShotCoT(*tiny, **settings).solve_batch(["1+2", "3"])
    else:
        assert [result.n_calls for result in found] == [3, 3]


@pytest.mark.parametrize(
    ("texts", "answer", "text"),
    [
        (["So 1.", "a So 2.", "b So 2.0."], "2", "a So 2."),
        (["So 5.", "So 7.", "none"], "5", "So 5."),  # a tie: the first
        (["none", "a So 7.", "So 5."], "7", "a So 7."),
        (["none", "nor here", "nor"], None, "none"),
    ],
)
def test_property_9_the_answer_of_most_and_of_a_tie_the_first(
    texts: list[str], answer: str | None, text: str, scripted: Any, tokenizer: Any
) -> None:
    for solver in (
        SelfConsistency(scripted({"1+2?": texts}), tokenizer, chains=3, templates=SHORT),
        SelfGeneratedCoT(scripted({"1+2?": texts}), tokenizer, n_examples=0, votes=3, templates=SHORT),
    ):
        result = solver.solve("1+2")
        assert (result.answer, result.text, result.n_calls) == (answer, text, 3)


def test_property_9_every_vote_is_sampled_by_a_seed_of_its_own(scripted: Any, tokenizer: Any) -> None:
    for options, prompt in (({"n_examples": 0}, "1+2?"), ({"mode": "integrated"}, "1+2*3== mine ==")):
        model = scripted({prompt: "So 3."})
        SelfGeneratedCoT(model, tokenizer, votes=3, templates=SHORT, **options).solve("1+2")
        assert len(set(model.seeds)) == len(model.seeds) == 3
        assert None not in model.seeds


def test_a_question_that_is_too_long_to_be_solved_is_no_example(scripted: Any, tokenizer: Any) -> None:
    script = STAGED | {"1+2~3": "1. 5+6\n2. 5+" + "6" * 30, "5+6? five, six So 11.\n\n1+2?": "So 3."}
    limits = {"max_new_tokens": 60, "max_context_tokens": 87}  # room for prompts of 27 letters
    result = SelfGeneratedCoT(scripted(script), tokenizer, mode="staged", templates=SHORT, **limits).solve("1+2")
    assert [example.question for example in result.examples] == ["5+6"]
    assert result.answer == "3"


def test_examples_whose_solutions_disagree_are_left_out(scripted: Any, tokenizer: Any) -> None:
    model = scripted({
        **STAGED,
        "5+6?": ["a So 11.", "b So 12.", "c So 13.", "d So 14."],
        "7+8?": ["no idea", "b So 15.", "c So 15.", "d So 15."],
        "7+8? b So 15.\n\n1+2?": "then So 3.",
    })  # fmt: skip
    result = SelfGeneratedCoT(model, tokenizer, mode="staged", filter_k=3, templates=SHORT).solve("1+2")
    assert result.examples == (Example("7+8", "b", "15"),)  # the solution that comes to the answer of most
    assert (result.answer, result.n_calls) == ("3", 1 + 3 * 4 + 1)


@pytest.mark.parametrize("solver", [SelfGeneratedCoT, ZeroShot, ZeroShotCoT, FewShotCoT, SelfConsistency, Solver])
def test_property_10_solvers_are_told_questions_and_nothing_else(solver: type) -> None:
    for name in ("solve_batch", "solve"):
        if hasattr(solver, name):
            parameters = [*inspect.signature(getattr(solver, name)).parameters]
            assert parameters == ["self", "questions" if name == "solve_batch" else "question"]


def test_baselines_ask_what_they_say(scripted: Any, tokenizer: Any) -> None:
    assert ZeroShot(scripted({"1+2!": "So 3."}), tokenizer, templates=SHORT).solve("1+2").answer == "3"
    few = FewShotCoT(scripted({"2+2? two So 4.\n\n1+2?": "So 3."}), tokenizer, [Example("2+2", "two", "4")],
                     templates=SHORT)  # fmt: skip
    assert few.solve("1+2").answer == "3"


def test_self_consistency_writes_at_least_the_tokens_it_may(scripted: Any, tokenizer: Any) -> None:
    model = scripted({"1+2?": "So 12345.", "3+4?": ["", "So 7."]})
    solver = SelfConsistency(model, tokenizer, chains=None, templates=SHORT)
    first, second = solver.solve_within(["1+2", "3+4"], [10, 4])
    assert (first.n_calls, first.n_new_tokens) == (2, 18)  # 9 tokens are not 10
    assert (second.n_calls, second.n_new_tokens, second.answer) == (2, 5, "7")
    with pytest.raises(RuntimeError, match=r"chains=None has no number of chains by itself"):
        solver.solve("1+2")


def test_progress_is_told_after_each_batch(scripted: Any, tokenizer: Any) -> None:
    told: list[tuple[int, int]] = []
    model = scripted({f"{i}?": "So 1." for i in range(5)})
    solver = ZeroShotCoT(
        model, tokenizer, templates=SHORT, batch_size=2, progress=lambda written, of: told.append((written, of))
    )
    solver.solve_batch([str(i) for i in range(5)])
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_a_text_ends_where_it_is_stopped(scripted: Any, tokenizer: Any) -> None:
    model = scripted({"1+2?": "So 3.\nQ: 5+5? So 10."})
    assert ZeroShotCoT(model, tokenizer, templates=SHORT).solve("1+2").text == "So 3."
    assert ZeroShotCoT(model, tokenizer, templates=SHORT, stop=("So",)).solve("1+2").answer is None


def test_a_real_model_stops_by_itself(tiny: Any) -> None:
    free = Writer(*tiny, stop=()).write([Ask("two"), Ask("b")], 20)
    text = free[0].text
    stop = next(letter for letter in text[1:] if letter.isascii() and letter not in (text[0], " "))
    stopped = Writer(*tiny, stop=(stop,)).write([Ask("two"), Ask("b")], 20)
    assert stopped[0].text == text[: text.index(stop)].strip()
    assert stopped[0].n_new_tokens < free[0].n_new_tokens


def test_a_chat_model_is_asked_as_a_user(tokenizer: Any, scripted: Any) -> None:
    talker = copy.deepcopy(tokenizer)
    talker.chat_template = "{% for t in messages %}[{{ t.role }}]{{ t.content }}{% endfor %}[assistant]"
    model = scripted({"[user]1+2?[assistant]": "So 3."})
    assert ZeroShotCoT(model, talker, templates=SHORT).solve("1+2").answer == "3"


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"n_examples": -1}, ValueError, r"n_examples=-1: it must be at least 0"),
        ({"n_examples": 1.5}, TypeError, r"n_examples must be an integer"),
        ({"votes": 0}, ValueError, r"votes=0: it must be at least 1"),
        ({"max_new_tokens": 0}, ValueError, r"max_new_tokens=0"),
        ({"mode": "both"}, ValueError, r"mode='both': choose 'integrated' or 'staged'"),
        ({"agreement": 0.0}, ValueError, r"agreement=0\.0: it is a share"),
        ({"filter_k": 2}, ValueError, r"filter_k=2 is for mode='staged'"),
        ({"temperature": 0.0}, ValueError, r"temperature=0\.0: it is above 0\."),
        ({"top_p": 1.5}, ValueError, r"top_p=1\.5: it is above 0 and at most 1"),
        ({"batch_size": 0}, ValueError, r"batch_size=0"),
    ],
)
def test_refusals(options: dict[str, Any], error: type, sentence: str, scripted: Any, tokenizer: Any) -> None:
    with pytest.raises(error, match=sentence):
        SelfGeneratedCoT(scripted({}), tokenizer, **options)


def test_refusals_of_others(scripted: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"few-shot solving needs at least one example"):
        FewShotCoT(scripted({}), tokenizer, [])
    with pytest.raises(ValueError, match=r"chains=0: it must be at least 1"):
        SelfConsistency(scripted({}), tokenizer, chains=0)
    with pytest.raises(ValueError, match=r"the template 'cot' has no place \{question\}\. Got 'solve'"):
        Templates(cot="solve")
    with pytest.raises(ValueError, match=r"heading is empty"):
        Templates(heading=" ")
