"""The command line in this process, on a model and texts that train in a blink: from a job to an exported folder."""

from __future__ import annotations

import csv
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

from lightning_peft import AdapterFileError, __main__, __version__, cli
from lightning_peft.checkpoint import ENTRY, digest
from lightning_peft.rebuild import rebuild

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "red", "car", "green", "tree"]
TEXTS = {"plant": "the green tree", "street": "the red car"}
ROWS = [(" ".join([TEXTS[name]] * (1 + i % 3)), name) for i in range(12) for name in TEXTS]

Job = dict[str, Any]

# Lightning, on a checkpoint that another run wrote: which one was best is not known here.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def make_bert(folder: Path) -> str:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    # Large weights, so that the texts have logits which differ.
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job of twelve steps with dynamic DoRA 3 -> 2."""
    folder = tmp_path_factory.mktemp("job")
    texts = folder / "texts.csv"
    texts.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = make_bert(folder / "bert")
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_peft.modules.TextClassifier",
            "init_args": {"backbone": encoder, "num_labels": 2, "lr": 0.02},
        },
        "data": {
            "class_path": "lightning_peft.modules.TextData",
            "init_args": {"train": str(texts), "val": str(texts), "tokenizer": encoder, "batch_size": 4},
        },
        "peft": {
            "class_path": "lightning_peft.presets.dynamic_dora",
            "init_args": {"final_rank": 2, "interval": 1, "targets": ["encoder.*"]},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "fit"},
            },
        },
    }


def changed(job: Job, folder: Path, name: str, **parts: Any) -> str:
    """Write the job to a file, with some parts changed or, if None, left out, and its logs in `folder`."""
    parts = {**job, **parts}
    logger = {**job["trainer"]["logger"], "init_args": {"save_dir": str(folder), "name": name}}
    parts["trainer"] = {**parts["trainer"], "logger": logger}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in parts.items() if value is not None}))
    return str(path)


@pytest.fixture(scope="module")
def trained(job: Job, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What one `fit` leaves behind."""
    folder = tmp_path_factory.mktemp("fit")
    config = changed(job, folder, "fit")
    assert cli.main(["fit", "-c", config]) == 0
    logs = folder / "fit" / "version_0"
    (checkpoint,) = (logs / "checkpoints").glob("*.ckpt")
    return SimpleNamespace(folder=folder, config=config, logs=logs, checkpoint=str(checkpoint))


def logged(folder: Path, name: str) -> float:
    """The last value of a metric in a CSVLogger's file."""
    with (folder / "metrics.csv").open(newline="") as file:
        return float([row[name] for row in csv.DictReader(file) if row.get(name)][-1])


def test_fit_follows_the_job(trained: SimpleNamespace) -> None:
    checkpoint = torch.load(trained.checkpoint, weights_only=True)  # tensors and plain values only
    assert checkpoint["global_step"] == 12
    ranks = checkpoint["lightning_peft"]["ranks"]
    assert len(ranks) == 12
    assert sum(ranks.values()) == 2 * 12
    assert checkpoint["hyper_parameters"]["_class_path"] == "lightning_peft.modules.TextClassifier"
    assert not [key for key in checkpoint["state_dict"] if "embeddings" in key]
    saved = yaml.safe_load((trained.logs / "config.yaml").read_text())
    assert saved["peft"]["init_args"]["final_rank"] == 2


def test_validate_restores_the_checkpoint(trained: SimpleNamespace, job: Job, tmp_path: Path) -> None:
    config = changed(job, tmp_path, "validate")
    assert cli.main(["validate", "-c", config, "--ckpt_path", trained.checkpoint]) == 0
    assert logged(tmp_path / "validate" / "version_0", "val/loss") == logged(trained.logs, "val/loss")


@pytest.fixture(scope="module")
def predictions(trained: SimpleNamespace, job: Job, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Logits of the training texts by `predict`."""
    folder = tmp_path_factory.mktemp("predict")
    data = {**job["data"], "init_args": {**job["data"]["init_args"], "predict": job["data"]["init_args"]["train"]}}
    config = changed(job, folder, "predict", data=data)
    assert cli.main(["predict", "-c", config, "--ckpt_path", trained.checkpoint]) == 0
    batches = torch.load(folder / "predict" / "version_0" / "predictions.pt", weights_only=True)
    return torch.cat([batch["logits"] for batch in batches])


@torch.no_grad()
def logits(model: torch.nn.Module, encoder: str) -> Tensor:
    """Logits of the training texts by a model that this package has nothing to do with."""
    batch = AutoTokenizer.from_pretrained(encoder)([text for text, _ in ROWS], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    return model.eval()(**batch).logits


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match.*lora_E")  # PEFT, of its own files
@pytest.mark.parametrize("mode", ["padded", "compact", "folded", "adalora"])
def test_export_for_peft(mode: str, trained: SimpleNamespace, predictions: Tensor, job: Job, tmp_path: Path) -> None:
    out = tmp_path / mode
    assert cli.main(["export", trained.checkpoint, str(out), "--format", "hf-peft", "--mode", mode]) == 0
    encoder = job["model"]["init_args"]["backbone"]
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2), str(out)
    )
    assert model.peft_config["default"].peft_type == ("ADALORA" if mode == "adalora" else "LORA")
    torch.testing.assert_close(logits(model, encoder), predictions, rtol=0, atol=1e-5)
    assert predictions.std(0).min() > 0.1  # there is something to agree on


def test_export_without_head(trained: SimpleNamespace, tmp_path: Path) -> None:
    for name, options in {"with": [], "without": ["--no-head"]}.items():
        assert cli.main(["export", trained.checkpoint, str(tmp_path / name), "--format", "hf-peft", *options]) == 0
    keys = {}
    for name in ("with", "without"):
        with safe_open(tmp_path / name / "adapter_model.safetensors", "pt") as file:
            keys[name] = set(file.keys())
    assert {key.rpartition(".classifier.")[2] for key in keys["with"] - keys["without"]} == {"weight", "bias"}


def test_export_merged(trained: SimpleNamespace, predictions: Tensor, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert cli.main(["export", trained.checkpoint, str(out), "--format", "merged"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(out)
    torch.testing.assert_close(logits(model, job["model"]["init_args"]["backbone"]), predictions, rtol=0, atol=1e-5)


def test_inspect_needs_no_model(
    trained: SimpleNamespace, job: Job, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    entry = torch.load(trained.checkpoint, weights_only=True)["lightning_peft"]
    encoder, away = Path(job["model"]["init_args"]["backbone"]), tmp_path / "away"
    encoder.rename(away)
    try:
        assert cli.main(["inspect", trained.checkpoint]) == 0
    finally:
        away.rename(encoder)
    shown = capsys.readouterr().out
    rows = re.findall(r"^(\S+)  +DynamicDoRA  +(\d+)/3  +([\d,]+)$", shown, re.MULTILINE)
    assert {name: int(rank) for name, rank, _ in rows} == entry["ranks"]
    cost = sum(rank * entry["costs"][name] for name, rank in entry["ranks"].items())
    assert re.search(rf"^12 layers +24/36 +{cost:,}$", shown, re.MULTILINE)
    assert f"{Path(trained.checkpoint).stat().st_size:,} bytes, unchanged since it was written at step 12" in shown
    assert "Trained beside the adapters: model.classifier." in shown
    assert "Rank schedule over 12 steps, its last event at step 6." in shown


PARTS = """
- class_path: lightning_peft.AdapterInjection
  init_args:
    adapter: {class_path: lightning_peft.LoRA, init_args: {rank: 16, alpha: 32.0}}
    targets: [query, value]
    train: [classifier]
- class_path: lightning_peft.RankPruning
  init_args:
    policy:
      class_path: lightning_peft.RankPolicy
      init_args:
        schedule: {class_path: lightning_peft.Cubic, init_args: {warmup: 0.1, tail: 0.2}}
        importance: {class_path: lightning_peft.Taylor, init_args: {beta: 0.85}}
        final: {share: 0.25}
        interval: 2
- class_path: lightning_peft.Regularization
  init_args:
    terms:
      flat: {class_path: lightning_peft.Orthogonality, init_args: {weight: 0.1}}
      dem:
        class_path: lightning_peft.DEM
        init_args: {weight: {class_path: lightning_peft.UntilTail, init_args: {value: 0.3, tail: 0.5}}}
- class_path: lightning_peft.RandomPositionNoise
  init_args: {p: 0.2, passes: 2, scope: dim, protect_ids: [2, 3]}
- class_path: lightning_peft.RankMonitor
- class_path: lightning_peft.AdapterCheckpoint
"""


def test_callbacks_by_class_path(job: Job, tmp_path: Path) -> None:
    trainer = {**job["trainer"], "max_epochs": 1, "callbacks": yaml.safe_load(PARTS)}
    config = changed(job, tmp_path, "parts", peft=None, trainer=trainer)
    assert cli.main(["fit", "-c", config]) == 0
    logs = tmp_path / "parts" / "version_0"
    (checkpoint,) = (logs / "checkpoints").glob("*.ckpt")
    entry = torch.load(checkpoint, weights_only=True)["lightning_peft"]
    (group,) = entry["recipe"]["adapters"]
    assert group["class"] == "lightning_peft.adapters.lora:LoRA"
    assert group["arguments"] == {"rank": 16, "alpha": 32.0, "dropout": 0.0}
    assert [name.rpartition(".")[2] for name in group["layers"]] == ["query", "value"] * 2
    assert sum(entry["ranks"].values()) == 4 * 16 // 4
    assert logged(logs, "loss/flat") > 0
    assert logged(logs, "loss/dem") > 0
    assert logged(logs, "loss/noisy") > 0


def test_own_callbacks_come_after_the_method(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruning = yaml.safe_load(PARTS)[1]
    peft = {"class_path": "lightning_peft.presets.lora", "init_args": {"rank": 4}}
    config = changed(job, tmp_path, "after", peft=peft, trainer={**job["trainer"], "callbacks": pruning})
    assert cli.main(["fit", "-c", config]) == 2
    assert "RankMonitor comes before RankPruning in the Trainer's callbacks" in capsys.readouterr().err


NET = """
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader


class Block(torch.nn.Module):
    def __init__(self, width: int, fault: bool = False):
        super().__init__()
        self.one, self.two = torch.nn.Linear(4, width), torch.nn.Linear(width, 2)
        torch.nn.init.eye_(self.one.weight)  # pretrained, in its way: the same in every process
        torch.nn.init.zeros_(self.one.bias)
        self.fault = fault

    def forward(self, x):
        return self.two(self.one(x).relu())


class Net(LightningModule):
    def __init__(self, block: Block, rate: float):
        super().__init__()
        self.save_hyperparameters()
        self.block, self.rate = block, rate

    def train_dataloader(self):
        return DataLoader(torch.ones(4, 4))

    def training_step(self, batch, batch_idx):
        if self.block.fault:
            raise ValueError("a fault of the user's own")
        return self.block(batch).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


class Forgetful(Net):
    def save_hyperparameters(self):
        pass
"""


def foreign(job: Job, folder: Path, name: str = "Net", fault: bool = False) -> str:
    """A job with a LightningModule of somebody else, which takes a module."""
    block = {"class_path": "foreign_net.Block", "init_args": {"width": 8, "fault": fault}}
    return changed(
        job,
        folder,
        name,
        model={"class_path": f"foreign_net.{name}", "init_args": {"block": block, "rate": 0.01}},
        data=None,
        peft={"class_path": "lightning_peft.presets.lora", "init_args": {"rank": 2}},
        trainer={**job["trainer"], "max_epochs": 1},
    )


@pytest.fixture
def foreign_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_net.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "foreign_net", raising=False)


@pytest.mark.usefixtures("foreign_net")
@pytest.mark.filterwarnings("ignore:Attribute 'block' is an instance of `nn.Module`")
def test_a_module_from_outside(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "-c", foreign(job, tmp_path)]) == 0
    (checkpoint,) = tmp_path.glob("Net/version_0/checkpoints/*.ckpt")
    monkeypatch.delitem(sys.modules, "foreign_net")  # as in a new process
    export = ["export", str(checkpoint), str(tmp_path / "out"), "--format", "hf-peft"]
    capsys.readouterr()
    assert cli.main(export) == 2
    assert "was trained on foreign_net.Net, and a file does not make us import code" in capsys.readouterr().err
    assert "foreign_net" not in sys.modules
    assert cli.main([*export, "--model", "foreign_net.Net"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "1 with ranks 2 to 2" in capsys.readouterr().out


@pytest.mark.usefixtures("foreign_net")
def test_a_checkpoint_that_does_not_say_what_it_is_of(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "-c", foreign(job, tmp_path, "Forgetful")]) == 0
    (checkpoint,) = tmp_path.glob("Forgetful/version_0/checkpoints/*.ckpt")
    export = ["export", str(checkpoint), str(tmp_path / "out"), "--format", "hf-peft"]
    capsys.readouterr()
    assert cli.main(export) == 2
    assert "does not say which LightningModule it was trained on; name it: --model" in capsys.readouterr().err
    assert cli.main([*export, "--model", "foreign_net.Forgetful"]) == 2
    assert "does not hold 'block', which Forgetful needs" in capsys.readouterr().err


@pytest.mark.usefixtures("foreign_net")
def test_a_fault_of_the_users_code_keeps_its_traceback(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a fault of the user's own"):
        cli.main(["fit", "-c", foreign(job, tmp_path, fault=True)])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["inspect", "none.ckpt"], "there is no checkpoint 'none.ckpt'."),
        (["inspect", "{config}"], "{config} cannot be read: it is cut short, damaged, or holds more than tensors"),
        (["export", "none.ckpt", "out", "--format", "merged"], "there is no checkpoint 'none.ckpt'."),
        (
            ["export", "{checkpoint}", "out", "--format", "merged", "--no-head"],
            "--mode and --no-head are for --format hf-peft; --format merged writes the whole model.",
        ),
        (
            ["export", "{checkpoint}", "{folder}", "--format", "hf-peft"],
            "{folder} holds files that are no earlier export (fit, fit.yaml). Give another folder",
        ),
        (
            ["export", "{checkpoint}", "out", "--format", "hf-peft", "--model", "torch.nn.Linear"],
            "'torch.nn.Linear' is no LightningModule that can be imported",
        ),
        (
            ["export", "{checkpoint}", "out", "--format", "hf-peft", "--model", "no_such_module.Net"],
            "'no_such_module.Net' is no LightningModule that can be imported",
        ),
        (["fit", "-c", "{config}", "--peft.targets", "[nope]"], "targets=['nope'] matches no layer; the nearest names"),
        (
            ["fit", "-c", "{config}", "--peft.final_rank", "0.01"],
            "Budget(rank=0.01) is 0 components for 12 layers, below",
        ),
        (["fit", "-c", "{config}", "--peft.final_rnk", "1"], "lightning_peft.presets.dynamic_dora': "),
        (["fit", "-c", "{config}", "--peft", "lightning_peft.inject"], "does not correspond to a subclass of Preset"),
        (
            ["fit", "-c", "{config}", "--model.backbone", "no/such"],
            "backbone='no/such' cannot be loaded: it is neither",
        ),
        (["fit", "-c", "none.yaml"], "File does not exist"),
    ],
)
def test_errors_are_one_sentence(
    options: list[str],
    sentence: str,
    trained: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([option.format(**vars(trained)) for option in options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lightning-peft: ")
    assert sentence.format(**vars(trained)) in last
    assert not Path("out").exists()


def test_a_damaged_checkpoint_is_not_exported(
    trained: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    checkpoint["state_dict"]["model.classifier.bias"] += 1
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    for options in (["inspect"], ["export", "--format", "merged", str(tmp_path / "out")]):
        assert cli.main([options[0], str(tmp_path / "changed.ckpt"), *options[1:]]) == 2
        assert "changed.ckpt was changed after it was written" in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback(trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody raised it on purpose, so there is no sentence for the user."""
    monkeypatch.setattr(cli, "report", lambda path: {}["costs"])
    with pytest.raises(KeyError, match="costs"):
        cli.main(["inspect", trained.checkpoint])


def test_an_entry_that_no_release_wrote_is_told(
    trained: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    del checkpoint[ENTRY]["costs"]
    checkpoint[ENTRY]["digest"] = digest(checkpoint["state_dict"], checkpoint[ENTRY])
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    assert cli.main(["inspect", str(tmp_path / "odd.ckpt")]) == 2
    assert "says that costs is None; it must be a dictionary" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "jsonargparse" else find_spec(name))
    assert cli.main(["fit", "-c", trained.config]) == 2
    assert capsys.readouterr().err == (
        "lightning-peft: fit, validate, test and predict read jobs with 'jsonargparse', which is not installed: run "
        "`pip install 'lightning-peft[cli]'`.\n"
    )
    assert cli.main(["inspect", trained.checkpoint]) == 0


def options_of(text: str) -> set[str]:
    return set(re.findall(r"--[\w-]+", text.split("\n\n", maxsplit=1)[0]))


def test_commands_and_options_stay_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for command in ("", "plan", "compress", "certify", "inspect", "export"):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*([command] if command else []), "--help"])
        assert exit_.value.code == 0
        shown[command] = capsys.readouterr().out
    commands = re.findall(r"^    (\w+) ", shown[""], re.MULTILINE)
    assert commands == ["fit", "validate", "test", "predict", "plan", "compress", "certify", "inspect", "export"]
    assert shown["plan"].startswith("usage: lightning-peft plan MODEL [options]\n")
    assert shown["inspect"].startswith("usage: lightning-peft inspect [-h] CKPT\n")
    assert set(re.findall(r"^  (--[\w-]+)", shown["plan"], re.MULTILINE)) == {
        "--architecture", "--dtype", "--method", "--rank", "--final-rank", "--targets", "--train", "--world-size",
        "--nodes", "--strategy", "--precision", "--optimizer", "--accumulate", "--json",
        "--sparsity", "--density", "--parameters",
    }  # fmt: skip
    assert shown["compress"].startswith("usage: lightning-peft compress MODEL OUT --data FILE [options]\n")
    assert set(re.findall(r"^  (--[\w-]+)", shown["compress"], re.MULTILINE)) == {
        "--overwrite", "--data", "--test", "--task", "--text", "--label", "--length", "--batch-size", "--method",
        "--ratio", "--targets", "--weighting", "--calibration", "--steps", "--fine-tuning", "--lr", "--distill",
        "--precision", "--seed", "--save-every", "--quiet",
    }  # fmt: skip
    assert shown["certify"].startswith("usage: lightning-peft certify CKPT --data FILE [options]\n")
    assert set(re.findall(r"^  (--[\w-]+)", shown["certify"], re.MULTILINE)) == {
        "--data", "--text", "--label", "--labels", "--length", "--batch-size", "--passes", "--unit", "--delta",
        "--delta-prime", "--tried", "--seed", "--out", "--model", "--quiet",
    }  # fmt: skip
    assert options_of(shown["export"]) == {"--format", "--mode", "--no-head", "--overwrite", "--model"}
    assert " ".join(shown["export"].split("\n\n")[0].split()).endswith("CKPT OUT")
    assert "{hf-peft,merged}" in shown["export"]
    assert "{padded,compact,folded,adalora}" in shown["export"]


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A console script finds the modules beside a job, as `python -m` does."""
    monkeypatch.setattr(sys, "argv", ["lightning-peft", "--version"])
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    with pytest.raises(SystemExit):
        __main__.main()
    assert capsys.readouterr().out == f"lightning-peft {__version__}\n"
    assert sys.path[-1] == str(tmp_path)


def test_a_checkpoint_makes_nobody_import_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_thing.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Thing: ...\n")
    (tmp_path / "mine_net.py").write_text(
        "from lightning.pytorch import LightningModule\n"
        "class Net(LightningModule):\n"
        "    def __init__(self, net: object): super().__init__()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry: dict[str, Any] = {
        "version": 1,
        "recipe": {"adapters": [], "trained": []},
        "ranks": {},
        "costs": {},
        "base": {},
    }
    entry["digest"] = digest({}, entry)
    saved = {"state_dict": {}, ENTRY: entry, "hyper_parameters": {"net": {"class_path": "evil_thing.Thing"}}}
    torch.save(saved, tmp_path / "evil.ckpt")
    with pytest.raises(AdapterFileError, match=r"names the class 'evil_thing.Thing' .* is not imported"):
        rebuild(tmp_path / "evil.ckpt", "mine_net.Net")
    assert not (tmp_path / "ran").exists()
