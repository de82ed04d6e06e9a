"""Files, labels, batches, and a run that is stopped inside an epoch."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from lightning_peft.modules import TextClassifier, TextData
from lightning_peft.modules.batching import LengthGrouped, PlannedLoader
from lightning_peft.modules.text_files import read_dataset, read_file

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.tab"])
def test_every_format_gives_the_same_rows(name: str, write: Any, rows: Any) -> None:
    assert [tuple(row) for row in read_file(write(name, rows))] == rows


def test_columns_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("topic,id,body\nx,1,one\ny,2,two\n")
    (tmp_path / "a.tab").write_text("kind\ttopic\tbody\nd\td\tstring\n\tclass\tmeta\na\tx\tone\n\na\ty\ttwo\n")
    assert read_file("a.csv", text="body", label="topic") == read_file("a.tab") == [("one", "x"), ("two", "y")]
    assert read_file("a.tab", label="kind") == [("one", "a"), ("two", "a")]


def test_long_field_is_read_and_the_limit_put_back(write: Any) -> None:
    before = csv.field_size_limit()
    long = "red " * 50_000
    assert len(long) > before
    assert read_file(write("long.tab", [(long, "a")]))[0].text == long
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "arguments", "sentence"),
    [
        ("a.txt", "x", {}, r"suffix '\.txt'; files end in \.csv, \.tsv, \.jsonl, \.tab"),
        ("", None, {"path": "none.csv"}, r"there is no file 'none\.csv' \(looked in '.+'\)"),
        ("a.csv", "body,label\n", {}, r"'a\.csv' has no column 'text'; it has 'body', 'label'\. Name it with text="),
        ("a.csv", "text,tag\n", {"label": "x"}, r"has no column 'x'; it has 'text', 'tag'\. Name it with label="),
        ("a.csv", "", {}, r"has no column 'text'; it has no columns"),
        ("a.jsonl", '{"text": "a"}\n{oops', {}, r"'a\.jsonl', line 2, is not JSON"),
        ("a.jsonl", '{"body": "a"}', {}, r"line 1, has no 'text'; it has 'body'\. Name the field with text="),
        ("a.jsonl", '{"text": "a"}', {"label": "y"}, r"line 1, has no 'y'; it has 'text'"),
    ],
)
def test_bad_files_say_what_and_where(name: str, content: str | None, arguments: Any, sentence: str) -> None:
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_file(**{"path": name, **arguments})


def test_missing_datasets_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tiny_bert: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    data = TextData("train", tokenizer=tiny_bert, dataset="imdb")
    with pytest.raises(ModuleNotFoundError, match=r"dataset='imdb' .* not installed: run `pip install datasets`"):
        data.setup("fit")


def test_datasets_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the optional package 'datasets' is not installed")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\none,1\ntwo,\nthree,0\n")
    assert [row.text for row in read_dataset(str(folder), "train")] == ["one", "two", "three"]
    assert [row.label == "" for row in read_dataset(str(folder), "train")] == [False, True, False]


# --- labels and splits -----------------------------------------------------------------------------------------------


def test_labels_are_sorted_and_rows_without_are_dropped(write: Any, tiny_bert: str) -> None:
    train = write("t.csv", [("red", "b"), ("car", ""), ("sky", "a"), ("tree", "b")])
    data = TextData(train, tokenizer=tiny_bert, val_share=0.0)
    assert (data.label_names, data.num_labels) == (["a", "b"], 2)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch["labels"].tolist()) == [0, 1, 1]


def test_numbers_are_sorted_as_numbers(write: Any, tiny_bert: str) -> None:
    data = TextData(write("t.csv", [("red", str(n)) for n in (10, 9, -1, 2)]), tokenizer=tiny_bert)
    assert data.label_names == ["-1", "2", "9", "10"]


def test_held_out_share_is_taken_of_every_class(write: Any, tiny_bert: str) -> None:
    rows = [("red", "often")] * 50 + [("car", "rare")] * 10 + [("sky", "once")]
    train = write("t.tsv", rows)

    def split(seed: int) -> tuple[list[int], list[int]]:
        data = TextData(train, tokenizer=tiny_bert, val_share=0.2, seed=seed)
        data.setup("fit")
        held = torch.cat([batch["labels"] for batch in data.val_dataloader()]).bincount(minlength=3)
        kept = torch.cat([batch["labels"] for batch in data.train_dataloader()]).bincount(minlength=3)
        return held.tolist(), kept.tolist()

    assert split(0) == split(1) == ([10, 0, 2], [40, 1, 8])  # often, once, rare: a class never loses its last row


def test_held_out_rows_are_the_seeds(write: Any, tiny_bert: str) -> None:
    train = write("t.tsv", [(" ".join(["red"] * (1 + i)), "ab"[i % 2]) for i in range(40)])

    def held(seed: int) -> set[int]:
        data = TextData(train, tokenizer=tiny_bert, val_share=0.25, seed=seed)
        data.setup("fit")
        lengths = {int(n) for batch in data.val_dataloader() for n in batch["attention_mask"].sum(1)}
        rest = {int(n) for batch in data.train_dataloader() for n in batch["attention_mask"].sum(1)}
        assert lengths.isdisjoint(rest)
        return lengths

    assert held(3) == held(3) != held(4)


def test_given_val_and_test_sets(write: Any, tiny_bert: str, rows: Any) -> None:
    train, val, test = write("a.csv", rows), write("b.csv", rows[:7]), write("c.jsonl", rows[:4])
    data = TextData(train, tokenizer=tiny_bert, val=val, test=test, val_share=0.5)
    for stage in ("fit", "validate", "test", "predict"):
        data.setup(stage)
    assert [len(data._split(split)) for split in ("train", "val", "test", "predict")] == [47, 7, 4, 4]


def test_label_that_training_never_saw(write: Any, tiny_bert: str) -> None:
    data = TextData(write("a.csv", [("red", "a"), ("car", "b")]), tiny_bert, test=write("b.csv", [("sky", "c")]))
    with pytest.raises(
        ValueError, match=r"'.*b\.csv' has labels that the training set '.*a\.csv' .*: 'c'\. Known: 'a', 'b'"
    ):
        data.setup("test")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"val_share": 1.0}, r"val_share=1\.0: it is a share of the training rows"),
        ({"batch_size": 0}, r"batch_size=0: it must be at least 1"),
        ({"tokenizer": "no/such/folder"}, r"tokenizer='no/such/folder' cannot be loaded"),
    ],
)
def test_bad_arguments(arguments: Any, sentence: str, write: Any, tiny_bert: str, rows: Any) -> None:
    with pytest.raises(ValueError, match=sentence):  # noqa: PT012  # where it is noticed differs
        data = TextData(**{"train": write("t.csv", rows), "tokenizer": tiny_bert, **arguments})
        data.setup("fit")
        data.train_dataloader()


def test_one_class_is_not_enough(write: Any, tiny_bert: str) -> None:
    with pytest.raises(ValueError, match=r"t\.csv' has 1 class\(es\) in 2 labelled rows; it needs at least 2"):
        _ = TextData(write("t.csv", [("red", "a"), ("car", "a")]), tokenizer=tiny_bert).num_labels


def test_missing_set_and_missing_setup(write: Any, tiny_bert: str, rows: Any) -> None:
    data = TextData(write("t.csv", rows), tokenizer=tiny_bert)
    with pytest.raises(ValueError, match=r"TextData has no test set: give test="):
        data.test_dataloader()
    with pytest.raises(RuntimeError, match=r"TextData has not read its train set: call setup\(\) first"):
        data.train_dataloader()


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_are_padded_to_their_own_longest_row(write: Any, tiny_bert: str, rows: Any) -> None:
    data = TextData(write("t.tab", rows), tokenizer=tiny_bert, max_length=12, batch_size=5, val_share=0.0)
    data.setup("fit")
    widths = set()
    for batch in data.train_dataloader():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        widths.add(ids.shape[1])
        assert int(mask.sum(1).max()) == ids.shape[1] <= 12  # some rows have 21 tokens: cut
        assert torch.equal(ids != 0, mask == 1)  # [PAD] is 0
        assert torch.equal(ids[:, 0], torch.full((len(ids),), 2))  # [CLS]
    assert len(widths) > 1


def test_evaluation_pads_little_and_prediction_keeps_order(write: Any, tiny_bert: str, rows: Any) -> None:
    source = write("t.tab", rows)
    data = TextData(source, tokenizer=tiny_bert, test=source, batch_size=5)
    data.setup("test")
    data.setup("predict")

    def lengths(loader: Any) -> list[int]:
        return [int(n) for batch in loader for n in batch["attention_mask"].sum(1)]

    in_file = [len(text.split()) + 2 for text, _ in rows]
    assert lengths(data.predict_dataloader()) == in_file
    assert lengths(data.test_dataloader()) == sorted(in_file)


def test_prediction_needs_no_labels(write: Any, tiny_bert: str, rows: Any) -> None:
    Path("new.csv").write_text("text\nred car\nblue sky\n")
    data = TextData(write("t.csv", rows), tokenizer=tiny_bert, predict="new.csv")
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape == (2, 4)


def test_token_ids_are_kept_small(write: Any, tiny_bert: str, rows: Any) -> None:
    data = TextData(write("t.csv", rows), tokenizer=tiny_bert, val_share=0.0)
    data.setup("fit")
    ids = data._split("train")._ids
    assert (ids.dtype, ids.ndim) == (torch.int32, 1)
    assert len(ids) == sum(len(text.split()) + 2 for text, _ in rows)


LENGTHS = torch.randint(3, 60, (103,), generator=torch.Generator().manual_seed(1))


def test_plan_holds_every_row_once() -> None:
    plan = LengthGrouped(LENGTHS, batch_size=8, seed=5, window=4)
    batches = list(plan)
    assert sorted(i for batch in batches for i in batch) == list(range(103))
    assert len(batches) == len(plan) == 13
    assert sorted(map(len, batches)) == [7] + [8] * 12


def test_plan_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        plan = LengthGrouped(LENGTHS, batch_size=8, seed=seed)
        plan.set_epoch(epoch)
        return list(plan)

    state = torch.get_rng_state()
    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert order(1, 1) == orders[3]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_grouping_saves_padding_and_keeps_a_random_order() -> None:
    batches = list(LengthGrouped(LENGTHS, batch_size=8))

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * int(LENGTHS[batch].max()) for batch in batches)

    in_file_order = padded([list(range(103))[i : i + 8] for i in range(0, 103, 8)])
    assert padded(batches) - int(LENGTHS.sum()) < 0.2 * (in_file_order - int(LENGTHS.sum()))
    longest = [int(LENGTHS[batch].max()) for batch in batches]
    assert longest != sorted(longest)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_every_batch(world_size: int) -> None:
    plans = [list(LengthGrouped(LENGTHS, 4, seed=2, rank=r, world_size=world_size)) for r in range(world_size)]
    assert len({len(plan) for plan in plans}) == 1
    for batches in zip(*plans, strict=True):
        assert len({len(batch) for batch in batches}) == 1  # the same gradient weight in every process
    seen = [i for plan in plans for batch in plan for i in batch]
    assert set(seen) == set(range(103))
    assert len(seen) - 103 < world_size  # at most a few rows twice, to fill the last batch


# --- stopping and resuming -------------------------------------------------------------------------------------------


def loader(workers: int = 0, seed: int = 5) -> PlannedLoader:
    plan = LengthGrouped(LENGTHS, batch_size=8, seed=seed, window=4)
    return PlannedLoader(range(103), plan, torch.tensor, workers)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_loader_continues_with_the_batches_that_remain(workers: int) -> None:
    first = loader(workers)
    first.sampler.set_epoch(1)
    expected = [batch.tolist() for batch in loader_at(1)]
    iterator = iter(first)
    seen = [next(iterator).tolist() for _ in range(5)]
    second = loader(workers)
    second.load_state_dict(first.state_dict())
    iterator = iter(second)
    second.sampler.set_epoch(1)  # after the iterator was made, as Lightning does when it resumes
    assert seen + [batch.tolist() for batch in iterator] == expected
    assert second.state_dict()["done"] == 13
    second.sampler.set_epoch(2)
    assert [batch.tolist() for batch in second] == [batch.tolist() for batch in loader_at(2)]


def loader_at(epoch: int) -> PlannedLoader:
    fresh = loader()
    fresh.sampler.set_epoch(epoch)
    return fresh


def test_loader_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    assert len(list(loader())) == 13
    assert torch.equal(torch.get_rng_state(), state)


def test_loader_refuses_another_plan_inside_an_epoch_only() -> None:
    stopped = loader()
    iterator = iter(stopped)
    next(iterator)
    sentence = r"stopped after batch 1 of 13 \(seed 5\), but the data module now makes 13 batches with seed 6"
    with pytest.raises(RuntimeError, match=sentence):
        loader(seed=6).load_state_dict(stopped.state_dict())
    for _ in iterator:
        pass
    other = loader(seed=6)
    other.load_state_dict(stopped.state_dict())  # at an epoch's end there is nothing left to be exact about
    other.sampler.set_epoch(1)
    assert len(list(other)) == 13


class Interrupted(RuntimeError):
    pass


class Reader(LightningModule):
    """Notes what it is given; a wrong batch, a batch too many or one too few shows in its weight too."""

    def __init__(self, fail_at: int = -1, fail_in: str = "training_step") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, list[int]]] = []
        self.fail_at, self.fail_in = fail_at, fail_in

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.fail("training_step")
        self.seen.append((self.current_epoch, batch["input_ids"].sum(1).tolist()))
        return self.weight * batch["input_ids"].float().mean() + self.weight**2

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.fail("on_train_batch_end")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def fail(self, where: str) -> None:
        if (self.global_step, where) == (self.fail_at, self.fail_in):
            raise Interrupted

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


@pytest.fixture
def data(write: Any, tiny_bert: str, rows: Any) -> Any:
    """Makes the same data module again and again: 9 batches an epoch, 27 steps in three."""
    train = write("t.tsv", rows)
    return lambda: TextData(train, tokenizer=tiny_bert, batch_size=5, window=3, seed=4, val_share=0.1)


def fit(reader: Reader, data: TextData, ckpt_path: str | None = None, **settings: Any) -> Reader:
    trainer = Trainer(max_epochs=3, **QUIET, **{"enable_checkpointing": False, **settings})
    trainer.fit(reader, datamodule=data, ckpt_path=ckpt_path)
    return reader


# Each resumed run here has no checkpoint callback of its own, which Lightning remarks.
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("saved", "settings", "count"),
    [
        pytest.param({"every_n_train_steps": 1}, {}, 27, id="every step"),
        pytest.param({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}, 3, id="end of epoch"),
        pytest.param(
            {"every_n_epochs": 1, "save_on_train_epoch_end": False}, {"val_check_interval": 4}, 6, id="validation"
        ),
        pytest.param({"every_n_train_steps": 1}, {"accumulate_grad_batches": 2}, 15, id="accumulation"),
    ],
)
def test_resumed_run_sees_exactly_what_remains(
    saved: Any, settings: Any, count: int, data: Any, tmp_path: Path
) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "all", save_top_k=-1, **saved)
    full = fit(Reader(), data(), callbacks=[checkpoints], enable_checkpointing=True, **settings)
    assert len(full.seen) == 27
    paths = list((tmp_path / "all").glob("*.ckpt"))
    assert len(paths) == count
    steps = set()
    for path in paths[:: 1 if count < 20 else 4]:
        resumed = fit(Reader(), data(), str(path), **settings)
        steps.add(len(resumed.seen))
        assert resumed.seen == full.seen[27 - len(resumed.seen) :], path.name
        assert torch.equal(resumed.weight, full.weight), path.name
    assert len(steps) > 2


# Lightning looks for an older file of that callback first and calls the fit one without a model.
@pytest.mark.filterwarnings("ignore:.*ckpt_path=.(None|last)")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("fail_in", ["training_step", "on_train_batch_end"])
@pytest.mark.parametrize("fail_at", [3, 9, 13])
def test_run_that_broke_off_goes_on_where_it_was(fail_at: int, fail_in: str, data: Any, tmp_path: Path) -> None:
    full = fit(Reader(), data())
    broken = Reader(fail_at, fail_in)
    with pytest.raises(Interrupted):
        fit(broken, data(), callbacks=[OnExceptionCheckpoint(tmp_path, "broken")], enable_checkpointing=True)
    resumed = fit(Reader(), data(), str(tmp_path / "broken.ckpt"))
    assert broken.seen + resumed.seen == full.seen
    assert torch.equal(resumed.weight, full.weight)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_classifier_resumes_bit_for_bit(data: Any, tiny_bert: str, tmp_path: Path) -> None:
    def run(ckpt_path: str | None = None, **settings: Any) -> TextClassifier:
        torch.manual_seed(1)
        classifier = TextClassifier(tiny_bert, num_labels=3)
        trainer = Trainer(max_epochs=2, **QUIET, **settings)
        trainer.fit(classifier, datamodule=data(), ckpt_path=ckpt_path)
        return classifier

    full = run(callbacks=[ModelCheckpoint(tmp_path / "all", "stop-{step}", every_n_train_steps=5, save_top_k=-1)])
    resumed = run(str(tmp_path / "all" / "stop-step=5.ckpt"), enable_checkpointing=False)
    for (name, a), b in zip(full.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_overfitting_repeats_the_same_batches(data: Any) -> None:
    reader = Reader()
    fit(reader, data(), overfit_batches=2)
    assert [epoch for epoch, _ in reader.seen] == [0, 0, 1, 1, 2, 2]
    assert len({str(rows) for _, rows in reader.seen}) == 2
