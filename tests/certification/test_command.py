"""`lightning-peft certify`, from a job to a file: what the callback says, from the checkpoint alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from test_cli import make_bert

from lightning_peft import Certificate, PACBayes, Regularization, RiskCertificate, cli, presets
from lightning_peft.checkpoint import ENTRY, digest
from lightning_peft.modules import TextClassifier, TextData

TEXTS = {"plant": "the green tree", "street": "the red car"}
TARGETS = ["encoder.*query"]


def fitted(
    folder: Path, encoder: str, texts: str, *extra: Any, precision: Any = None, tried: int = 1, **pac: Any
) -> RiskCertificate:
    made = RiskCertificate(passes=2, seed=3, tried=tried)
    callbacks = [*presets.lora(rank=2, targets=TARGETS)]
    callbacks[1:2] = [Regularization({"pac": PACBayes(sigma=0.05, **pac)}), made]
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[*callbacks, *extra], limit_val_batches=0,
        precision=precision,
    )  # fmt: skip
    trainer.fit(TextClassifier(encoder, 2), TextData(texts, encoder, batch_size=4, max_length=12))
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("certify")
    rows = [(" ".join([TEXTS[name]] * (1 + i % 3)), name) for i in range(15) for name in TEXTS]
    texts = folder / "texts.csv"
    texts.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = make_bert(folder / "bert")
        made = fitted(folder, encoder, str(texts))
    (checkpoint,) = folder.glob("checkpoints/*.ckpt")
    return SimpleNamespace(folder=folder, texts=str(texts), encoder=encoder, checkpoint=str(checkpoint), made=made)


def test_it_says_what_the_callback_said(
    trained: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again.json"
    asked = ["--data", trained.texts, "--passes", "2", "--seed", "3", "--out", str(out), "--quiet"]
    assert cli.main(["certify", trained.checkpoint, *asked]) == 0
    found = Certificate.load(out)
    assert found == trained.made.certificate
    assert (trained.folder / "checkpoints" / "certificate.json").read_bytes() == out.read_bytes()
    assert found.examples == 26  # two of the fifteen of each class were held out
    assert found.bound < 1
    shown = capsys.readouterr().out
    assert f"certified risk           {found.bound:.4f}" in shown
    assert shown.endswith(f"Wrote {out}.\n")


def test_other_settings_give_another_figure(trained: SimpleNamespace) -> None:
    options = ["--data", trained.texts, "--passes", "1", "--unit", "pass", "--tried", "3", "--delta", "0.05", "--quiet"]
    assert cli.main(["certify", trained.checkpoint, *options]) == 0
    found = Certificate.load(Path(trained.checkpoint).with_suffix(".certificate.json"))
    first = trained.made.certificate
    assert (found.kl, found.hashes) == (first.kl, first.hashes)
    assert (found.units, found.tried, found.delta, found.seed) == (1, 3, 0.05, 0)
    assert found.recompute() == (found.monte_carlo, found.bound)


def three_classes(folder: Path) -> str:
    path = folder / "three.csv"
    path.write_text("text,label\n" + "".join(f"the {name} car,{name}\n" for name in ("red", "green", "blue") * 9))
    return str(path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "{texts}", "--unit", "example"], "unit='example' counts every example as a draw of its own"),
        (["--data", "{three}"], "has 3 classes and the model 2, so there is no telling which is which"),
        (["--data", "{texts}", "--labels", "street", "plant", "sky"], "has 3 classes and the model 2"),
        (["--data", "none.csv"], "there is no file 'none.csv'"),
        (["--data", "{texts}", "--passes", "0"], "passes must be at least 1. Got 0."),
        (["--data", "{texts}", "--delta", "2"], "delta is a probability"),
    ],
)
def test_what_is_wrong_is_told(
    options: list[str], says: str, trained: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = three_classes(tmp_path)
    given = [option.format(texts=trained.texts, three=three) for option in options]
    out = tmp_path / "no.json"
    assert cli.main(["certify", trained.checkpoint, *given, "--out", str(out), "--quiet"]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_what_a_checkpoint_lacks_is_told(
    trained: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(path: Path) -> str:
        assert cli.main(["certify", str(path), "--data", trained.texts, "--quiet"]) == 2
        return capsys.readouterr().err

    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[*presets.lora(rank=2, targets=TARGETS)], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(TextClassifier(trained.encoder, 2), TextData(trained.texts, trained.encoder))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert "plain.ckpt has no posteriors, and a certificate is of one." in told(tmp_path / "plain.ckpt")
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    checkpoint["callbacks"]["ModelCheckpoint{'monitor': 'train/loss'}"] = {"monitor": "train/loss"}
    torch.save(checkpoint, tmp_path / "kept.ckpt")
    assert "checkpoints are kept by 'train/loss'" in told(tmp_path / "kept.ckpt")
    assert "there is no checkpoint" in told(tmp_path / "none.ckpt")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_run_says_how_many_were_tried_and_in_what_precision(
    precision: str, trained: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = fitted(tmp_path, trained.encoder, trained.texts, precision=precision, tried=4)
    (checkpoint,) = tmp_path.glob("checkpoints/*.ckpt")
    asked = ["certify", str(checkpoint), "--data", trained.texts, "--passes", "2", "--seed", "3", "--quiet"]
    assert cli.main(asked) == 0
    found = Certificate.load(checkpoint.with_suffix(".certificate.json"))
    assert (found.precision, found.tried) == (precision, 4)
    assert found == made.certificate
    assert cli.main([*asked, "--tried", "9"]) == 0  # more were looked at since
    assert Certificate.load(checkpoint.with_suffix(".certificate.json")).tried == 9
    capsys.readouterr()
    assert cli.main([*asked, "--tried", "2"]) == 2
    assert "--tried 2, and the run of" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_say_its_precision_is_run_in_full(
    trained: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    state = checkpoint["callbacks"]["AdapterCheckpoint"]
    assert state.pop("precision") == "32-true"
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert cli.main(["certify", str(tmp_path / "old.ckpt"), "--data", trained.texts, "--passes", "1", "--quiet"]) == 0
    assert Certificate.load(tmp_path / "old.certificate.json").precision == "32-true"
    state["precision"] = "8-mixed"
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    assert cli.main(["certify", str(tmp_path / "odd.ckpt"), "--data", trained.texts, "--quiet"]) == 2
    assert "odd.ckpt names the precision '8-mixed', which Lightning does not know" in capsys.readouterr().err


@pytest.mark.parametrize("prior", ["learned", "per_tensor"])
def test_learnt_priors_are_paid_for(prior: Any, trained: SimpleNamespace, tmp_path: Path) -> None:
    made = fitted(tmp_path, trained.encoder, trained.texts, prior=prior)
    (checkpoint,) = tmp_path.glob("checkpoints/*.ckpt")
    asked = ["--data", trained.texts, "--passes", "2", "--seed", "3", "--quiet"]
    assert cli.main(["certify", str(checkpoint), *asked]) == 0
    found = Certificate.load(checkpoint.with_suffix(".certificate.json"))
    assert found == made.certificate
    assert dataclasses.asdict(found)["prior"] == {"scale": prior, "chosen by": "no data"}


def forged(trained: SimpleNamespace, path: Path, change: Any) -> str:
    """A checkpoint that somebody has written, digest and all."""
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    entry = checkpoint[ENTRY]
    change(entry["recipe"]["beside"], checkpoint)
    entry["digest"] = digest(checkpoint["state_dict"], entry)
    torch.save(checkpoint, path)
    return str(path)


Q = "peft_terms.pac.posterior"


def shorter(beside: Any, checkpoint: Any) -> None:
    checkpoint["state_dict"][f"{Q}.prior_mean"] = checkpoint["state_dict"][f"{Q}.prior_mean"][:5].clone()


def closed(beside: Any, checkpoint: Any) -> None:
    name = next(name for name in checkpoint["state_dict"] if name.endswith("gate.mask"))
    checkpoint["state_dict"][name][0] = 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda beside, _: beside[0].update(path=3), "its path is 3; it must be text that can be printed"),
        (lambda beside, _: beside[0].update(arguments=[]), "its arguments is []; it must be a dictionary"),
        (lambda beside, _: beside.append(beside[0]), "has 2 posteriors, and a certificate is of one"),
        (
            lambda beside, _: beside[0]["arguments"].pop("speed"),
            "has a posterior that does not fit this model: 'speed'",
        ),
        (lambda beside, _: beside[0]["arguments"].update(prior="free"), "prior='free': choose 'fixed'"),
        (lambda beside, _: beside[0]["arguments"]["names"].pop(), "'offset' has shape (162,)"),
        (lambda beside, _: beside[0]["arguments"]["names"].append("(.*"), "matches no trained parameter"),
        (shorter, "'prior_mean' has shape (5,)"),
        (closed, "were closed by what training saw, and masks are not in Q"),
        (
            lambda _, checkpoint: checkpoint["state_dict"].pop(f"{Q}.start"),
            "has a posterior that does not fit this model: it is over other parameters than the model trains",
        ),
        (
            lambda _, checkpoint: checkpoint["callbacks"]["RiskCertificate"].update(prior_data={"dataset": "aa"}),
            "does not say which examples chose the prior as we write it",
        ),
        (
            lambda _, checkpoint: checkpoint["state_dict"][f"{Q}.prior_mean"].add_(1.0),
            "had learned something before the prior was taken from it",
        ),
        (
            lambda _, checkpoint: checkpoint["state_dict"][f"{Q}.taught"].fill_(True),
            "TextClassifier had been trained before the prior was taken from it, and what it had learned from",
        ),
        (
            lambda _, checkpoint: checkpoint["state_dict"][f"{Q}.offset"].fill_(torch.nan),
            "KL(Q || P) is nan: training has diverged; a sigma or a lambda is no longer finite",
        ),
    ],
)
def test_a_forged_checkpoint_is_told(
    change: Any, says: str, trained: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = forged(trained, tmp_path / "forged.ckpt", change)
    assert cli.main(["certify", path, "--data", trained.texts, "--quiet"]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))
