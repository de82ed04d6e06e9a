"""A variational autoencoder of sentences, its parts, and the ways against posterior collapse."""

from __future__ import annotations

from lightning_peft.modules.text_vae.board import latent_picture
from lightning_peft.modules.text_vae.critics import GaussianCritic
from lightning_peft.modules.text_vae.decoders import LSTMDecoder, TextDecoder, TransformerDecoder
from lightning_peft.modules.text_vae.encoders import Encoded, LSTMEncoder, PretrainedEncoder, TextEncoder
from lightning_peft.modules.text_vae.information import LatentInformation
from lightning_peft.modules.text_vae.lagging import Lagging
from lightning_peft.modules.text_vae.model import SentenceVAE
from lightning_peft.modules.text_vae.module import TextVAE
from lightning_peft.modules.text_vae.objective import FreeBits, LinearAnnealing

__all__ = [
    "Encoded",
    "FreeBits",
    "GaussianCritic",
    "LSTMDecoder",
    "LSTMEncoder",
    "Lagging",
    "LatentInformation",
    "LinearAnnealing",
    "PretrainedEncoder",
    "SentenceVAE",
    "TextDecoder",
    "TextEncoder",
    "TextVAE",
    "TransformerDecoder",
    "latent_picture",
]
