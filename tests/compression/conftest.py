"""Models and texts of a compression, and a check of what was written that needs no process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from lightning.pytorch import Trainer, seed_everything
from quiet import QUIET
from safetensors.torch import load_file
from tiny_models import save_decoder, save_encoder, save_texts, save_tokenizer
from torch import Tensor, nn

from lightning_peft.interop import plain, plain_loader
from lightning_peft.modules import CausalLM, LanguageData, TextClassifier, TextData


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders of an encoder and a decoder that were trained on the texts, the texts, and an encoder without a head."""
    place = tmp_path_factory.mktemp("models")
    csv, txt = save_texts(place / "texts.csv"), save_texts(place / "texts.txt")
    seed_everything(0, verbose=False)
    raw = save_encoder(place / "raw-encoder")
    classifier = TextClassifier(raw, 3, lr=5e-3)
    classifier.model.bert.save_pretrained(place / "headless")
    Trainer(max_steps=40, **QUIET).fit(classifier, datamodule=TextData(csv, raw, val_share=0.0, batch_size=16))
    raw = save_decoder(place / "raw-decoder")
    language = CausalLM(raw, lr=1e-2)
    data = LanguageData(txt, raw, val_share=0.0, block_size=8, batch_size=8)
    Trainer(max_steps=40, **QUIET).fit(language, datamodule=data)
    for name, model in (("encoder", classifier.model), ("decoder", language.model)):
        model.save_pretrained(place / name)
        save_tokenizer(place / name, classifies=name == "encoder")
    save_tokenizer(place / "headless", classifies=True)
    return SimpleNamespace(
        encoder=str(place / "encoder"),
        decoder=str(place / "decoder"),
        headless=str(place / "headless"),
        csv=csv,
        txt=txt,
    )


class InThisProcess(nn.Module):
    """What :class:`lightning_peft.interop.fresh.Fresh` does, from the same files, in a blink instead of seconds.

    The process of its own is real in tests/interop/test_plain.py and in one run of the command.
    """

    def __init__(self, folder: Path, auto_class: str, samples: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        settings = json.loads((folder / "config.json").read_text())
        kind = settings["model_type"].removeprefix("compressed-")
        config = transformers.CONFIG_MAPPING[kind].from_dict({**settings, "model_type": kind})
        self.model = getattr(transformers, auto_class).from_config(config).float()
        plain_loader.put_in(self.model, settings["thin_layers"])
        missing, unexpected = self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        self.model.tie_weights()

    def forward(self, **sample: Any) -> Any:
        return self.model(**sample)

    def load(self) -> None: ...


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "Fresh", InThisProcess)
