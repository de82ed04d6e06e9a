"""`lightning-peft certify`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.certification.accounting import (
    buffers,
    require_apart,
    require_apart_in_batches,
    require_drawn,
    require_in_q,
    require_not_selected,
    require_unchanged,
    require_untaught_prior,
)
from lightning_peft.certification.bound_set import BoundSet
from lightning_peft.certification.certify import Settings, certify
from lightning_peft.certification.counting import read_logits
from lightning_peft.certification.record import Certificate
from lightning_peft.certification.restore import (
    monitors_of,
    posterior_from,
    precision_from,
    prior_data_from,
    tried_from,
)
from lightning_peft.checkpoint import check_entry, load, read
from lightning_peft.compression.console import without_remarks
from lightning_peft.fingerprint import fingerprint
from lightning_peft.rank.budget import RankBudget, clean_name
from lightning_peft.rebuild import rebuild
from lightning_peft.surgery.layers import trained

HELP = "how often networks drawn from a checkpoint's posterior can err, at most"
_DESCRIPTION = (
    "Certify the posterior of a checkpoint that was trained with a PACBayes term: count the errors of drawn networks "
    "over the examples of a file, and bound their risk on new data of the same kind. The figure, and all that it "
    "follows from, is written beside the checkpoint."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.argument_default = argparse.SUPPRESS  # what is not given is the checkpoint's, or the certificate's own
    parser.description = _DESCRIPTION
    parser.usage = "%(prog)s CKPT --data FILE [options]"
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint written with AdapterCheckpoint")

    texts = parser.add_argument_group("bound set")
    texts.add_argument(
        "--data", metavar="FILE", required=True,
        help="csv, tsv, jsonl or tab file; of the file that a prior was chosen on a part of, the other part",
    )  # fmt: skip
    texts.add_argument("--text", metavar="COLUMN", help="column of the text (as in training)")
    texts.add_argument("--label", metavar="COLUMN", help="column of the label (as in training)")
    texts.add_argument("--labels", metavar="NAME", nargs="+", help="labels in the order of their numbers (sorted)")
    texts.add_argument("--length", type=int, metavar="N", help="tokens per text at most (as in training, or 64)")
    texts.add_argument("--batch-size", type=int, metavar="N", help="texts per batch (as in training, or 32)")

    how = parser.add_argument_group("certificate")
    how.add_argument("--passes", type=int, metavar="N", help="passes over the bound set (10)")
    how.add_argument("--unit", choices=("pass", "batch", "example"), help="what shares a draw of the noise (batch)")
    how.add_argument("--delta", type=float, metavar="P", help="probability that the bound fails (0.025)")
    how.add_argument("--delta-prime", type=float, metavar="P", help="probability that the draws mislead (0.01)")
    how.add_argument(
        "--tried",
        type=int,
        metavar="N",
        help="checkpoints and runs compared on the bound set (what the run says, or 1)",
    )
    how.add_argument("--seed", type=int, help="of the noise (0)")
    how.add_argument("--out", type=Path, metavar="FILE", help="file to write (CKPT with .certificate.json)")
    how.add_argument(
        "--model", metavar="CLASS", help="the LightningModule, as package.module.Class, where the checkpoint cannot say"
    )
    how.add_argument("--quiet", action="store_true", help="no progress bar")


_SETTINGS = ("passes", "unit", "delta", "delta_prime", "tried", "seed")


def run(options: argparse.Namespace) -> str:
    """The certificate as text, for parsed options.

    Raises:
        FileNotFoundError, ValueError, AdapterFileError, MisconfigurationException: what is wrong with the checkpoint,
            the file or an option, or why the certificate would not hold.
    """
    given = vars(options)
    settings = Settings(**{name: given[name] for name in _SETTINGS if name in given})
    path = Path(given["checkpoint"])
    checkpoint = read(path)
    check_entry(checkpoint, str(path))
    tried = tried_from(checkpoint, str(path))
    if "tried" not in given:
        settings = replace(settings, tried=tried)
    elif settings.tried < tried:
        raise ValueError(
            f"--tried {settings.tried}, and the run of {path} says RiskCertificate(tried={tried}): so many were "
            "compared already. Leave --tried out, or give all that were."
        )
    module = rebuild(path, given.get("model"))
    before = buffers(module)
    load(module, path)
    posterior = posterior_from(module, checkpoint, str(path))
    require_in_q(module, posterior, [clean_name(n) for n, p in trained(module).items() if p.requires_grad])
    require_unchanged(before, {name: value for name, value in buffers(module).items() if name in before})
    closed = next((name for name, site in RankBudget.of(module).items() if not bool(site.gate.open().all())), None)
    if closed is not None:
        raise MisconfigurationException(
            f"components of {closed!r} were closed by what training saw, and masks are not in Q, so the certificate "
            "would not account for the choice. Train without RankPruning."
        )
    require_drawn(posterior, settings.unit)
    require_apart_in_batches(module)
    require_not_selected(monitors_of(checkpoint), settings.tried)
    prior_data = prior_data_from(checkpoint, str(path))
    if prior_data is None:
        advice = f"{path} does not say what it was: train with RiskCertificate(prior_data=...), which notes it."
        require_untaught_prior(module, posterior, advice)
    data = _bound_set(given, checkpoint, module)
    if prior_data is not None:
        data.keep(prior_data.rest(data))
        require_apart(prior_data, data)
    base = fingerprint(module)
    trainer = _trainer(precision_from(checkpoint, str(path)))
    precision = trainer.precision_plugin
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    module.to(device)
    posterior.to(device)
    precision.convert_module(module)
    module.eval()
    module.trainer = trainer  # of which hooks may ask what is going on
    trainer.predicting = True

    def predict(batch: Any) -> tuple[Tensor, Tensor]:
        batch = module.on_before_batch_transfer(precision.convert_input(batch), 0)
        batch = module.on_after_batch_transfer(module.transfer_batch_to_device(batch, module.device, 0), 0)
        with precision.predict_step_context():
            return read_logits(module, batch)

    steps = settings.passes * len(data.batches)
    with Tqdm(total=steps, desc="Certificate", disable=given.get("quiet", False), leave=False) as bar:
        found: Certificate = certify(
            module, posterior, data, predict, settings,
            base=base, prior_data=prior_data, precision=precision.precision, advance=bar.update,
        )  # fmt: skip
    out = given.get("out") or path.with_suffix(".certificate.json")
    found.save(out)
    return f"{found}\n\nWrote {out}."


def _trainer(precision: Any) -> Trainer:
    """One that runs a model in a precision, on this machine."""
    with without_remarks():
        return Trainer(devices=1, precision=precision, logger=False, enable_checkpointing=False)


def _bound_set(given: Mapping[str, Any], checkpoint: Mapping[str, Any], module: Any) -> BoundSet:
    """The texts of a file, read as training read its own.

    Raises:
        ValueError: the file cannot be read, or has other classes than the model.
    """
    # Here, because it takes transformers, whose import takes seconds.
    from lightning_peft.modules import TextData

    saved = checkpoint.get("datamodule_hyper_parameters")
    known = inspect.signature(TextData).parameters.keys()
    options = {k: v for k, v in saved.items() if k in known} if isinstance(saved, Mapping) else {"val_share": 0.0}
    if options.get("val") is not None:
        options["val_share"] = 0.0  # nothing was held out
    for name in ("val", "test", "predict", "dataset"):
        options.pop(name, None)
    words = {"text": "text", "label": "label", "labels": "label_names", "length": "max_length"}
    options |= {
        name: given[option] for option, name in {**words, "batch_size": "batch_size"}.items() if option in given
    }
    options.setdefault("tokenizer", getattr(module.hparams, "backbone", None))
    if not isinstance(options["tokenizer"], str):
        raise ValueError(
            "the checkpoint does not say which tokenizer its texts were read with. Certify by the callback, "
            "RiskCertificate(data=...), in Python."
        )
    data = TextData(**{**options, "train": given["data"]})
    data.setup("fit")
    classes = getattr(module.hparams, "num_labels", data.num_labels)
    if classes != data.num_labels:
        raise ValueError(
            f"{given['data']!r} has {data.num_labels} classes and the model {classes}, so there is no telling which is "
            "which. Give all of them in the order of their numbers: --labels NAME NAME ..."
        )
    return BoundSet(data.train_dataloader())
