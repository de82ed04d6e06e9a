"""A compression from folder to folder, by every method, on models that train in a blink."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_encoder, save_texts
from transformers import AutoModelForSequenceClassification

from lightning_peft.compression.job import Compression, compress
from lightning_peft.compression.methods import METHODS
from lightning_peft.compression.report import Report
from lightning_peft.compression.task import Source

pytestmark = pytest.mark.usefixtures("in_this_process")


def run(models: SimpleNamespace, out: str = "out", **options: Any) -> Report:
    """A compression of the encoder, evaluated on the texts that it was trained on."""
    trains = METHODS[options["method"]].trains
    steps = {"steps": 20} if trains else {}
    source = Source(models.csv, test=models.csv, batch_size=16)
    return compress(models.encoder, source, out, **{"progress": False, "calibration": 2, **steps, **options})


def shape(folder: str, layer: str) -> tuple[int, int]:
    """Inputs and outputs of a layer, by what was written of it."""
    tensors = load_file(Path(folder) / "model.safetensors")
    if f"{layer}.weight" in tensors:
        d_out, d_in = tensors[f"{layer}.weight"].shape
    else:
        d_out, d_in = len(tensors[f"{layer}.up.weight"]), tensors[f"{layer}.down.weight"].shape[1]
    return d_in, d_out


@pytest.mark.filterwarnings("ignore:masks have learned to keep")  # too few steps to learn much: not the point here
@pytest.mark.parametrize("method", METHODS)
def test_every_method(models: SimpleNamespace, method: str) -> None:
    report = run(models, method=method, ratio=0.5)
    config = json.loads(Path("out/config.json").read_text())
    thin = {name: rank for name, rank in report.ranks.items() if name not in report.dense}
    assert config["thin_layers"] == thin
    assert len(report.ranks) == 12
    kept = full = 0
    for name, rank in report.ranks.items():
        d_in, d_out = shape("out", name)
        assert 1 <= rank <= report.full[name] == min(d_in, d_out)
        assert (name in report.dense) == (rank * (d_in + d_out) >= d_in * d_out)
        kept += min(rank * (d_in + d_out), d_in * d_out)
        full += d_in * d_out
    assert report.before.linear_parameters == full
    assert report.after.linear_parameters == kept
    assert report.ratio == kept / full
    assert 0.35 < report.ratio <= 0.5
    assert report.before.parameters - report.after.parameters == full - kept
    tensors = load_file("out/model.safetensors")
    assert report.after.parameters == sum(t.numel() for t in tensors.values())
    assert report.after.bytes == 4 * report.after.parameters
    assert report.quality_before["accuracy"] == 1.0
    assert set(report.quality_after) == {"loss", "accuracy", "macro_f1"}
    assert report.quality_after == report.quality_compressed
    assert min(report.milliseconds) > 0


def test_a_decoder(models: SimpleNamespace) -> None:
    source = Source(models.txt, test=models.txt, length=8, batch_size=8)
    report = compress(models.decoder, source, "out", method="svd-llm", ratio=0.6, calibration=4, progress=False)
    assert len(report.ranks) == 14
    assert "lm_head" not in report.ranks
    assert "lm_head.weight" not in load_file("out/model.safetensors")
    assert report.quality_before["perplexity"] < 3
    assert report.quality_after["perplexity"] > report.quality_before["perplexity"]
    assert report.timed_on == "block of 8 tokens"
    assert json.loads(Path("out/tokenizer_config.json").read_text())["eos_token"] == "[SEP]"


def test_fine_tuning_with_distillation(models: SimpleNamespace) -> None:
    report = run(models, method="svd", ratio=0.3, fine_tuning=40, lr=5e-3, distill=0.5)
    assert report.quality_compressed["loss"] > 2 * report.quality_after["loss"]
    assert report.quality_after["accuracy"] == 1.0
    assert report.steps == {"compression": 0, "fine-tuning": 40}
    assert "accuracy before fine-tuning" in str(report)


def test_a_model_without_a_head_is_trained_in_one_round(models: SimpleNamespace) -> None:
    source = Source(models.csv, test=models.csv, batch_size=16)
    report = compress(
        models.headless, source, "out", task="classification", method="rankdyna", ratio=0.5, steps=60, lr=5e-3,
        progress=False,
    )  # fmt: skip
    assert report.quality_before == {}
    assert report.quality_after["accuracy"] > 0.9
    assert re.search(r"accuracy +not measured +", str(report))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_trained_in_32_and_written_as_they_were(
    models: SimpleNamespace, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(models.encoder).to(dtype)
    found = {}
    for name, stored in (("half", dtype), ("whole", torch.float32)):
        folder = shutil.copytree(models.encoder, tmp_path / "stored" / name)
        model.to(stored).save_pretrained(folder)
        encoder = SimpleNamespace(encoder=str(folder), csv=models.csv)
        found[name] = run(encoder, name, method="svd", ratio=0.5, fine_tuning=60)
    half, whole = found["half"], found["whole"]
    # The same values, trained by the same numbers; only what is written is rounded.
    assert half.quality_compressed == whole.quality_compressed
    assert half.quality_after["loss"] == pytest.approx(whole.quality_after["loss"], abs=2e-2)
    assert half.quality_after["loss"] < half.quality_compressed["loss"] - 0.2
    one, two = (load_file(f"{out}/model.safetensors") for out in ("half", "whole"))
    assert {tensor.dtype for tensor in one.values()} == {dtype}
    assert all(torch.equal(one[name], two[name].to(dtype)) for name in two)
    assert (2 * half.before.bytes, 2 * half.after.bytes) == (whole.before.bytes, whole.after.bytes)
    assert json.loads(Path("half/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_the_report_is_written(models: SimpleNamespace) -> None:
    report = run(models, method="svd")
    found = json.loads(Path("out/report.json").read_text())
    assert found["ranks"] == dict(report.ranks)
    assert found["quality_after"] == dict(report.quality_after)
    assert found["after"]["bytes"] == report.after.bytes
    page = Path("out/report.md").read_text()
    assert "![Rank per layer](ranks.png)" in page
    for name, rank in report.ranks.items():
        assert f"| {name} | {rank} | 16 |" in page
    assert Path("out/ranks.png").read_bytes().startswith(b"\x89PNG")
    for line in ("parameters", "in compressed layers", "bytes", "ms per 48 texts of up to 11 tokens", "accuracy"):
        assert f"| {line} |" in page
        assert re.search(rf"^{line} +\S", str(report), re.MULTILINE)


def test_the_same_again(models: SimpleNamespace) -> None:
    """All that is drawn comes from the seed."""
    first, second = (run(models, out, method="fwsvd") for out in ("one", "two"))
    assert first.ranks == second.ranks
    one, two = (load_file(f"{out}/model.safetensors") for out in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_callers_random_numbers_go_on(models: SimpleNamespace) -> None:
    before, seeded = torch.random.get_rng_state(), os.environ.get("PL_GLOBAL_SEED")
    run(models, method="rankdyna", ratio=0.5, steps=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert os.environ.get("PL_GLOBAL_SEED") == seeded


def test_some_layers_only(models: SimpleNamespace) -> None:
    report = run(models, method="asvd", targets=["query", "value"])
    assert {name.rpartition(".")[2] for name in report.ranks} == {"query", "value"}


def test_held_out_texts_are_the_default(models: SimpleNamespace) -> None:
    report = compress(models.encoder, models.csv, "out", method="svd", progress=False)
    assert report.quality_on == "6 rows, held out"


def test_labels_have_the_order_of_the_model(models: SimpleNamespace, tmp_path: Path) -> None:
    """A model that names its outputs is asked for these, whatever order the texts' labels sort to."""
    names = {"0": "weather", "1": "plant", "2": "street"}
    folder = save_encoder(tmp_path / "named", id2label=names, label2id={name: int(i) for i, name in names.items()})
    data = Compression(method="svd")
    from lightning_peft.compression.task import Classification

    found = Classification(folder).data(Source(models.csv))
    assert found.label_names == ["weather", "plant", "street"]
    other = save_encoder(tmp_path / "other", 2, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(ValueError, match=r"labels that are not among label_names: 'plant', 'street', 'weather'"):
        data.run(other, Source(models.csv), "out")


# --- what is refused, and when ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "pca"}, r"method='pca': choose svd, fwsvd, asvd, svd-llm, ars, rankdyna"),
        ({"ratio": 1.0}, r"ratio=1\.0: it is the share of the weights that is kept, above 0 and below 1"),
        ({"calibration": 0}, r"calibration=0: at least 1 batch is looked at"),
        ({"fine_tuning": -1}, r"fine_tuning=-1: it is a number of steps"),
        ({"distill": 0.5}, r"distill=0\.5 is for fine-tuning after compression, and there is none"),
        ({"method": "svd", "steps": 5}, r"steps=5: svd takes none\. For those afterwards, give fine_tuning"),
        ({"steps": 0}, r"steps=0: ars trains, for at least 1 step"),
        ({"method": "svd", "weighting": "fisher"}, r"weighting='fisher': svd has its own"),
        ({"task": "summaries"}, r"task='summaries': choose classification or lm"),
        ({"ratio": 0.01}, r"ratio=0\.01 cannot be reached: one component in each of 12 layers is 0\.10\d\d of their"),
        ({"targets": ["no_such_layer"]}, r"matches no layer"),
        ({"lr": -1.0}, r"lr=-1\.0: it is the peak learning rate, above 0"),
        ({"lr": float("nan")}, r"lr=nan: it is a finite number"),
        ({"fine_tuning": 1, "distill": float("inf")}, r"distill=inf: it is a finite number"),
        ({"weighting": "pca"}, r"weighting='pca': choose none, fisher, taylor, activation, whiten"),
    ],
)
def test_options_are_refused_before_anything_is_read(
    models: SimpleNamespace, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        compress(models.encoder, "no-such-file.csv", "out", **{"progress": False, **options})
    assert not Path("out").exists()


def test_equal_shares_that_a_layer_cannot_keep_are_refused_with_those_it_can(
    models: SimpleNamespace, tmp_path: Path
) -> None:
    """All 12 layers together could be cut to 0.1, the wide ones alone could not."""
    folder = save_encoder(tmp_path / "wide", intermediate_size=512)
    with pytest.raises(ValueError, match=r"ratio=0\.1 leaves nothing of 'bert.*query' where .* is 0\.1250 of its"):
        compress(folder, models.csv, "out", method="svd", ratio=0.1, progress=False)
    assert sorted(path.name for path in Path().iterdir() if "out" in path.name) == []
    compress(folder, models.csv, "out", method="svd", ratio=0.125, progress=False)


def test_sources_that_are_refused(models: SimpleNamespace) -> None:
    for name in ("length", "batch_size"):
        with pytest.raises(ValueError, match=rf"{name}=0: it is at least 1\. Leave it out for the task's own"):
            Source(models.csv, **{name: 0})
        with pytest.raises(TypeError, match=f"{name} must be an integer"):
            Source(models.csv, **{name: 1.5})
    source = Source(models.txt, label="street")
    with pytest.raises(ValueError, match=r"label='street': a language model's texts have none\. Leave it out"):
        compress(models.decoder, source, "out", method="svd", progress=False)


def test_models_that_are_refused(models: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json at 'nowhere'; give the folder of a transf"):
        compress("nowhere", models.csv, "out")
    with pytest.raises(
        ValueError, match=r"architecture 'BertModel', which has no loss .* task='classification' or task="
    ):
        compress(models.headless, models.csv, "out")
    with pytest.raises(ValueError, match=r"has no weights for classifier\.bias, classifier\.weight for the 3 labels"):
        compress(models.headless, models.csv, "out", task="classification", method="svd", progress=False)
    with pytest.raises(
        ValueError, match=r"distill=0\.5: .* no weights for classifier\.bias, .* no dense model of this"
    ):
        compress(
            models.headless, models.csv, "out", task="classification", method="rankdyna", distill=0.5, fine_tuning=5,
            progress=False,
        )  # fmt: skip
    run(models, "small", method="svd")
    with pytest.raises(ValueError, match=r"'small' is a compressed model already\. Compress the dense model"):
        compress("small", models.csv, "out")
    with pytest.raises(ValueError, match=r"the layer 'lm_head' has the weight of the embeddings, which stay"):
        compress(models.decoder, models.txt, "out", targets=["lm_head", "q_proj"], method="svd", progress=False)


def test_places_that_are_refused(models: SimpleNamespace) -> None:
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"full holds files that are no earlier export"):
        run(models, "full", method="svd")
    assert [path.name for path in Path("full").iterdir()] == ["notes.txt"]


def test_texts_that_are_refused(models: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match=r"'empty\.csv' has 0 class\(es\) in 0 labelled rows; it needs at least 2"):
        compress(models.encoder, "empty.csv", "out", method="svd", progress=False)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"'empty\.txt' has 0 tokens, less than one block of 256"):
        compress(models.decoder, "empty.txt", "out", method="svd", progress=False)
    four = save_texts(tmp_path / "four.csv", 2)
    (tmp_path / "four.csv").write_text(Path(four).read_text() + "the sea,ocean\n")
    with pytest.raises(
        ValueError, match=r"classifier\.weight for the 4 labels of the texts, so there is no quality for svd"
    ):
        compress(models.encoder, four, "out", method="svd", progress=False)
    assert not Path("out").exists()
