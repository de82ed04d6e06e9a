"""Pages of benchmarks: what they say of their rows is true of these rows, and plans do what pages say."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LAYERS, RANK = "Adapters on all 36 linear layers of the encoder.", "Rank is the average per layer at the end."


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a script of the folder, with the path that it makes for itself."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])

    def load(name: str) -> ModuleType:
        return import_module(name)

    return load


def test_the_accuracy_page_is_that_of_its_rows(script: Any) -> None:
    accuracy = script("accuracy")
    page = accuracy.PAGES["accuracy"]
    text = accuracy.table(accuracy.load("accuracy"), page.methods, page.tables, accuracy.seeds)
    assert text == (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert LAYERS in text
    assert RANK in text


@pytest.mark.parametrize("name", ["few-shot", "low-resource", "low-data-noise"])
def test_a_page_on_few_labels_is_that_of_its_rows(name: str, script: Any) -> None:
    study = script(name.replace("-", "_")).STUDY
    assert script("few_labels").table(study) == (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_the_page_of_posterior_collapse_is_that_of_its_rows(script: Any) -> None:
    text = script("text_vae").Bench().table()
    assert text == (ROOT / "docs" / "posterior-collapse.md").read_text(encoding="utf-8")


def test_the_pages_on_sparse_rows_and_prompts_are_those_of_their_rows(script: Any) -> None:
    accuracy, words = script("accuracy"), script("accuracy_table").WORDS["sparse"]
    page, seeds = accuracy.PAGES["sparse"], accuracy.seeds
    text = accuracy.table(accuracy.load("sparse"), page.methods, page.tables, seeds, words)
    assert text == (ROOT / "docs" / "sparse-accuracy.md").read_text(encoding="utf-8")
    prompts = script("prompts")
    titles = {name: method.title for name, method in prompts.METHODS.items()}
    text = script("prompts_table").table(prompts.load(), titles, prompts.JOBS, prompts.SEEDS, prompts.rates())
    assert text == (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8")


def test_the_sparse_page_says_nothing_of_other_rows(script: Any) -> None:
    accuracy, words = script("accuracy"), script("accuracy_table").WORDS["sparse"]
    page = accuracy.PAGES["sparse"]
    text = accuracy.table([], page.methods, page.tables, accuracy.seeds, words)
    assert LAYERS not in text
    assert RANK not in text
    assert "full fine-tuning trains everything" in text
    assert f"up to {page.changes['max_length']} tokens" in text
    assert "over a fourth rate" not in text


def test_a_plan_of_the_sparse_page_leaves_recorded_runs_alone(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = script("accuracy")
    recorded = accuracy.load("accuracy")
    assert len(recorded) == len(accuracy.runs.read(accuracy.RESULTS)) - len(accuracy.load("sparse"))
    sparse = list(accuracy.PAGES["sparse"].methods)
    search = next(iter(accuracy.plan("r52", 2, sparse, "sparse")))
    assert {run.page for run in search} == {"sparse"}
    assert [run.lr for run in search if run.method == "lora"] == [1e-3, 2e-3]
    assert {accuracy.settings(run)["epochs"] for run in search} == {1}
    # All searched at 1e-3: the rate beyond it is tried too, and final runs are three seeds, or one.
    found = [{**vars(run), "accuracy": 0.9 - run.lr, "macro_f1": 0.5} for run in search]
    monkeypatch.setattr(accuracy, "load", lambda page=None: found)
    _, beyond, final = accuracy.plan("r52", 2, sparse, "sparse")
    assert {run.lr for run in beyond if run.method == "sparta"} == {5e-4}
    seeds = {name: sum(run.method == name for run in final) for name in sparse}
    assert seeds == {name: 1 if name in ("frozen", "sparta-value-output") else 3 for name in sparse}
    (other,) = accuracy.plan("r8", 2, sparse, "sparse")
    assert {run.method for run in other} == set(sparse)  # the first table of R8
    assert {(run.seed, run.epochs) for run in other} == {(0, 1)}
    (second,) = accuracy.plan("r52", 14, sparse, "sparse")
    assert {run.method for run in second} == {"lora", "sparta", "sparta-magnitude", "sparta-gradient", "sparta-regrow"}


def row(method: str, lr: float, search: bool, loss: float = 0.5) -> dict[str, Any]:
    figures = {"adapter_parameters": 5, "cpu_ms_per_step": 7, "peak_memory": 1e8, "accuracy": 0.9, "loss": loss}
    return {"job": "r8", "method": method, "lr": lr, "seed": 0, "search": search, **figures}


def test_the_prompts_page_says_which_rates_stand_at_an_end(script: Any) -> None:
    table, titles = script("prompts_table").table, {"one": "One", "two": "Two", "three": "Three"}
    found = {"one": 1e-3, "two": 2e-3, "three": 4e-3}
    tried = [row(name, lr, True, abs(lr - best)) for name, best in found.items() for lr in (1e-3, 2e-3, 4e-3)]
    final = [row(name, lr, False) for name, lr in found.items()]
    seeds, jobs = dict.fromkeys(titles, (0,)), {"r8": list(titles), "smollm2": []}
    said = "The best rate stands at an end of those that were tried, the lowest for One (0.001); the highest for Three"
    assert said in table(tried + final, titles, jobs, seeds, {})
    assert "stands at an end" not in table(tried + final[1:2], titles, jobs, seeds, {})
    # A run at a rate that is not the best one, from before another was tried, is not shown.
    assert table([*tried, row("one", 2e-3, False)], titles, jobs, seeds, {}) == table(tried, titles, jobs, seeds, {})


def test_the_prompts_page_shows_the_answers_at_the_best_rate_and_what_is_missing(script: Any) -> None:
    figures: dict[str, Any] = {
        "seed": 0,
        "search": False,
        "adapter_parameters": 9,
        "cpu_ms_per_step": 1,
        "job": "smollm2",
    }
    tried = {("one", 1e-3): 700.0, ("one", 1e-2): 6.5, ("two", 1e-2): 2.0, ("two", 3e-2): 2.5, ("two", 1e-3): 3.0}
    rows = [
        figures | {"method": name, "lr": lr, "val_perplexity": value, "test_perplexity": value + 1, "accuracy": lr}
        | {"peak_memory": 5e6}
        for (name, lr), value in tried.items()
    ]  # fmt: skip
    titles = {"one": "One", "two": "Two", "three": "Three"}
    jobs, rates = {"r8": [], "smollm2": list(titles)}, {("smollm2", name): (1e-3, 1e-2, 3e-2) for name in titles}
    text = script("prompts_table").table(rows, titles, jobs, {}, rates)
    assert "| One | 7.500 | 0.010 | 0.001: 700, 0.01: 6.5, 0.03: – | 0.01 | 9 | 1 | 5 |" in text
    assert "| Two | 3.000 | 0.010 | 0.001: 3, 0.01: 2, 0.03: 2.5 | 0.01 | 9 | 1 | 5 |" in text
    assert "| Three | – | – | 0.001: –, 0.01: –, 0.03: – | – | – | – | – |" in text
    assert "stands at an end of those that were tried, the highest for One (0.01): none" in text


def test_a_plan_of_prompts_goes_by_loss_and_one_rate_beyond_an_end(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = script("prompts")
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(prompts, "load", lambda: rows)
    best, found = {"prompt": 3e-2, "dpt": 1e-2, "dept": 3e-3, "lora": 4e-3, "lora-8": 2e-3}, []
    for stage in prompts.plan(["r8"]):
        found.append(stage)
        rows += [row(run.method, run.lr, run.search, abs(run.lr - best[run.method])) for run in stage]
    _, further, final = found
    assert {(run.method, run.lr) for run in further} == {("prompt", 0.1), ("dept", 9e-4), ("lora", 8e-3)}
    assert {(run.method, run.lr) for run in final} == set(best.items())


def test_rounds_of_prompts_are_two_at_least(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = script("prompts")
    for command in ("speed", "plan"):
        monkeypatch.setattr(sys, "argv", ["prompts.py", command, "--rounds", "1"])
        with pytest.raises(SystemExit):
            prompts.main()
        assert "--rounds must be at least 2 to have quartiles. Got 1." in capsys.readouterr().err


def test_the_prompts_page_says_what_the_plan_does(script: Any) -> None:
    prompts = script("prompts")
    titles = {name: method.title for name, method in prompts.METHODS.items()}
    text = prompts.table([], titles, prompts.JOBS, prompts.SEEDS, prompts.rates())
    assert f"texts of at most {prompts.LENGTHS['r8']} tokens" in text
    assert f"of three in {prompts.SEARCH_STEPS} steps or four where the best is at an end" in text
    assert f"{prompts.ANSWERS['steps']} steps of {prompts.ANSWERS['batch_size']} texts" in text
    assert f"writes, of {prompts.ANSWERS['test_rows']}" in text
    assert {len(rates) for (job, _), rates in prompts.rates().items() if job == "smollm2"} == {3}
    (runs,) = prompts.plan(["smollm2"])
    assert f"steps of {prompts.ANSWERS['batch_size']} texts in float32" in text
    assert prompts.precision("smollm2") == "32-true"
    assert [run.lr for run in runs] == [3e-3] * 3 + [1e-3] + [1e-2] * 3 + [3e-3] + [3e-2] * 3 + [1e-2]


def test_every_noise_is_run_on_both_data_sets_and_longer_with_more_texts(script: Any) -> None:
    study = script("low_data_noise").STUDY
    longer, whole = study.longer[500], study.whole["r8"]
    assert f"{study.steps} steps of {study.batch} texts ({longer} of 500 texts, {whole} of all of R8" in study.about
    assert f"with {study.tested} test texts" in study.about
    *_, final = script("few_labels").plan(study_with_rates(study), ["r8", "20ng"], list(study.methods))
    sizes = {(run.data, run.examples): study.settings(run)["steps"] for run in final}
    assert sizes == {("r8", 100): 40, ("r8", 500): 100, ("r8", 0): 343, ("20ng", 100): 40, ("20ng", 500): 100}
    for place in sizes:
        assert {run.method for run in final if (run.data, run.examples) == place} == set(study.methods)


def study_with_rates(study: Any) -> Any:
    """The study as if its searches were done."""

    class Done(type(study)):  # type: ignore[misc]
        def best(self, method: str, data: str, examples: int) -> tuple[float, float]:
            return 1e-3, 0.0

    return Done(**{name: getattr(study, name) for name in study.__dataclass_fields__})


def test_the_page_of_sparse_steps_says_what_fell_short(script: Any) -> None:
    sparse = script("sparse")
    rows = {name: {"held": held, "seconds": [s] * 4} for name, held, s in
            (("auto", 50, 1.2), ("lora", 90, 1.0), ("shira", 100, 2.0))}  # fmt: skip
    assert sparse._fell_short(rows) == ["the time of a step of SpaRTA is 1.20 times that of LoRA, asked is 1.05"]
    rows["auto"]["seconds"] = [1.0] * 4
    assert sparse._fell_short(rows) == []
    text = sparse.table()
    assert text + "\n" == (ROOT / "docs" / "sparse.md").read_text(encoding="utf-8")
    last = {line["what"]: line for line in sparse.runs.read(sparse.RESULTS)}["step"]
    assert ("fell short of what was asked" in text) == bool(sparse._fell_short(last["found"][0]["rows"]))
