"""Mistakes with sentences and their variational autoencoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from misuse.setups import Rows

from lightning_peft.modules import (
    FreeBits,
    LatentInformation,
    LSTMDecoder,
    LSTMEncoder,
    SentenceData,
    Sentences,
    TextVAE,
    TransformerDecoder,
)

SMALL: dict[str, Any] = {
    "encoder": partial(LSTMEncoder, embedding=4, hidden=4),
    "decoder": partial(LSTMDecoder, embedding=4, hidden=4),
}


def data(text: str = "The sky is blue. The tree is green.", name: str = "talk.txt", **options: Any) -> SentenceData:
    Path(name).write_text(text, encoding="utf-8")
    return SentenceData(name, test=name, **{"val_share": 0.0, "vocabulary_size": 20, **options})


def tested(vae: TextVAE, found: SentenceData) -> None:
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).test(vae, datamodule=found, verbose=False)


def without_punctuation() -> None:
    data("sky and tree " * 40).setup("fit")


def other_words() -> None:
    vae = TextVAE(20, 2, **SMALL, samples=1)
    tested(vae, data())
    tested(vae, data("A car is on the road. A car is red."))


def shared() -> None:
    information = LatentInformation()
    for _ in range(2):
        TextVAE(20, 2, **SMALL, information=information)


def long_sentence() -> None:
    decoder = partial(TransformerDecoder, width=4, layers=1, heads=1, positions=4)
    tested(TextVAE(20, 2, SMALL["encoder"], decoder, samples=1), data())


def lonely() -> None:
    vae = TextVAE(20, 2, **SMALL, information=LatentInformation())
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet)
    trainer.fit(vae, datamodule=data(batch_size=1))


def one_string() -> None:
    TextVAE(20, 2, **SMALL).model.read("The sky is blue.")


def nameless() -> None:
    vae = TextVAE(20, 2, **SMALL)
    vae.model.texts(vae.model.sample(1))


ROWS: Rows = {
    "texts without punctuation as sentences": (without_punctuation, ValueError),
    "one text to hold a share out of": (lambda: data(val_share=0.1).setup("fit"), ValueError),
    "a sentence of no words": (lambda: Sentences(fewest=0), ValueError),
    "a vocabulary without room for a word": (lambda: data(vocabulary_size=4).setup("fit"), ValueError),
    "a vocabulary larger than the model's": (lambda: tested(TextVAE(6, 2, **SMALL), data()), ValueError),
    "a vocabulary other than that of training": (other_words, ValueError),
    "sentences longer than a transformer's positions": (long_sentence, ValueError),
    "texts of a model that knows no words": (nameless, RuntimeError),
    "information of z to be minimised": (lambda: LatentInformation(-0.5), ValueError),
    "an estimator that a sentence VAE does not have": (
        lambda: LatentInformation(estimator="club"),  # type: ignore[arg-type]
        ValueError,
    ),
    "information in batches of one sentence": (lonely, ValueError),
    "one string as sentences": (one_string, TypeError),
    "one critic for two sentence VAEs": (shared, RuntimeError),
    "a negative weight of a VAE's divergence": (lambda: TextVAE(20, 2, **SMALL, kl_weight=-1.0), ValueError),
    "free bits of nothing": (lambda: FreeBits(0.0), ValueError),
}
