"""Mistakes with checkpoints, exports and the command line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import lightning
import torch
from misuse.setups import LORA, Encoder, Rows, Told, adapted, cli, fit, saved
from tiny_models import save_tokenizer
from torch import nn

from lightning_peft import (
    AdapterFileError,
    Factorized,
    compact,
    eject,
    from_hf_peft,
    inject,
    load,
    merge,
    presets,
    save_compressed,
    to_hf_peft,
    to_plain,
)
from lightning_peft.compression.job import Compression
from lightning_peft.compression.progress import Progress


def a_list() -> str:
    torch.save([1, 2], "list.ckpt")
    return "list.ckpt"


def into_other_files() -> None:
    Path("out").mkdir()
    Path("out", "thesis.txt").write_text("")
    to_hf_peft(adapted("query"), "out")


def tampered() -> None:
    path = saved()
    content = torch.load(path, weights_only=True)
    content["state_dict"]["query.A"][0, 0] += 1
    torch.save(content, path)
    load(Encoder(), path)


def plain() -> str:
    """A checkpoint of an adapted module, written without AdapterCheckpoint."""
    trainer = fit(Encoder(), presets.lora(rank=4)[0], max_steps=1)
    trainer.save_checkpoint("plain.ckpt")
    return "plain.ckpt"


def after_injection() -> None:
    torch.save({"state_dict": Encoder().state_dict(), "pytorch-lightning_version": lightning.__version__}, "base.ckpt")
    fit(Encoder(), *presets.lora(rank=4), ckpt_path="base.ckpt")


def bert(compressed: bool = False, head: bool = True) -> str:
    """A folder of a BERT that is smaller than small, as `compress` takes it; or what is like its result."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    architecture = "BertForSequenceClassification" if head else "BertModel"
    config = {"model_type": "bert", "vocab_size": 8, "architectures": [architecture], **sizes}
    Path("bert").mkdir()
    Path("bert/config.json").write_text(json.dumps(config | ({"thin_layers": {"a": 2}} if compressed else {})))
    return "bert"


def compress(model: str, *options: str, texts: str | None = "text,label\nred car,street\ngreen tree,plant\n") -> None:
    """The command on a file of texts; without one where there is no text."""
    if texts is not None:
        Path("texts.csv").write_text(texts)
    cli("compress", model, "small", *(["--data", "texts.csv"] if texts is not None else []), *options)


def with_words(model: str) -> str:
    """The same folder with a tokenizer."""
    save_tokenizer(Path(model), classifies=True)
    return model


def plain_result() -> str:
    """What `save_compressed` writes of a module that is not transformers'."""
    Path("net").mkdir()
    Path("net/load_compressed.py").touch()
    return "net"


def other_job() -> None:
    """What a job does first, where one with another ratio was stopped."""
    Progress(Path("small"), {"ratio": 0.5}).once("the dense model", dict)
    Progress(Path("small"), {"ratio": 0.4})


def thin_again() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    inject(model, partial(Factorized, rank=2), ["0"])
    to_plain(model)
    inject(model, Factorized)


def peft_folder(**config: object) -> str:
    """A folder of PEFT's with these options, without weights."""
    Path("peft").mkdir()
    Path("peft", "adapter_config.json").write_text(json.dumps(config))
    Path("peft", "adapter_model.safetensors").touch()
    return "peft"


LORA_FOLDER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}

ROWS: Rows = {
    "`fit(ckpt_path=...)` on another base model": (
        lambda: fit(Encoder(seed=1), *presets.dynamic_dora(final_rank=2), ckpt_path=saved()),
        AdapterFileError,
    ),
    "`fit(ckpt_path=...)` with other adapters": (
        lambda: fit(Encoder(), *presets.dynamic_dora(final_rank=3), ckpt_path=saved()),
        AdapterFileError,
    ),
    "`fit(ckpt_path=...)` with a checkpoint of the base": (after_injection, AdapterFileError),
    "`load` on another model": (lambda: load(nn.Sequential(nn.Linear(8, 8)), saved()), AdapterFileError),
    "`load` of a file that is not there": (lambda: load(Encoder(), "none.ckpt"), FileNotFoundError),
    "`load` of a checkpoint that was written without AdapterCheckpoint": (
        lambda: load(Encoder(), plain()),
        AdapterFileError,
    ),
    "`load` of a file that holds something else": (lambda: load(Encoder(), a_list()), AdapterFileError),
    "`load` of a file that was changed": (tampered, AdapterFileError),
    "`merge` without adapters": (lambda: merge(Encoder()), ValueError),
    "`eject` without adapters": (lambda: eject(Encoder()), ValueError),
    "`compact` of one adapter": (lambda: compact(LORA(nn.Linear(8, 8))), ValueError),
    "`to_hf_peft` into a folder that holds other files": (into_other_files, FileExistsError),
    "`to_hf_peft` without adapters": (lambda: to_hf_peft(Encoder(), "out"), ValueError),
    "`from_hf_peft` of a folder that is none of PEFT's": (lambda: from_hf_peft(Encoder(), "."), AdapterFileError),
    "`from_hf_peft` of another method": (
        lambda: from_hf_peft(Encoder(), peft_folder(peft_type="IA3")),
        AdapterFileError,
    ),
    "`from_hf_peft` of an adapter that changed its base": (
        lambda: from_hf_peft(Encoder(), peft_folder(**LORA_FOLDER, init_lora_weights="pissa")),
        AdapterFileError,
    ),
    "`from_hf_peft` of a file that is cut short": (
        lambda: from_hf_peft(Encoder(), peft_folder(**LORA_FOLDER)),
        AdapterFileError,
    ),
    "`from_hf_peft` into a module with adapters": (lambda: from_hf_peft(adapted("query"), "."), ValueError),
    "`to_plain` without adapters": (lambda: to_plain(Encoder()), ValueError),
    "`save_compressed` of a model that is not compressed": (lambda: save_compressed(Encoder(), "out"), ValueError),
    "`Factorized` in the place of layers that are two thin ones": (thin_again, ValueError),
    "`lightning-peft compress` of something else than a transformers model's folder": (lambda: compress("."), Told),
    "`lightning-peft compress` of what is compressed already": (lambda: compress(bert(compressed=True)), Told),
    "`lightning-peft compress` of a module that is compressed already": (lambda: compress(plain_result()), Told),
    "`lightning-peft compress` of a model whose task has no loss": (lambda: compress(bert(head=False)), Told),
    "`lightning-peft compress` to a ratio that cannot be reached": (lambda: compress(bert(), "--ratio", "0.1"), Told),
    "`lightning-peft compress` to a ratio that is no share": (lambda: compress(bert(), "--ratio", "2"), Told),
    "`lightning-peft compress` without calibration data": (lambda: compress(bert(), texts=None), Told),
    "`lightning-peft compress` with data that hold nothing": (
        lambda: compress(with_words(bert()), texts="text,label\n"),
        Told,
    ),
    "`lightning-peft compress` with less text than one block": (
        lambda: compress(with_words(bert()), "--task", "lm", texts="text\nthe red car\n"),
        Told,
    ),
    "`lightning-peft compress` without a batch to look at": (
        lambda: compress(bert(), "--calibration", "0"),
        Told,
    ),
    "`Compression` by a method that there is not": (lambda: Compression(method="pca"), ValueError),
    "`lightning-peft compress` with steps for a method that takes none": (
        lambda: compress(bert(), "--method", "svd", "--steps", "9"),
        Told,
    ),
    "`lightning-peft compress` with other arguments than the job that was stopped": (other_job, FileExistsError),
    "command line: a checkpoint that is not there": (lambda: cli("inspect", "none.ckpt"), Told),
    "command line: an option of the other format": (
        lambda: cli("export", saved(), "out", "--format", "merged", "--no-head"),
        Told,
    ),
}
