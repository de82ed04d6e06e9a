"""Ready LightningModules and data modules for the main jobs. None of them knows about adapters."""

from __future__ import annotations

from lightning_peft.modules.causal_lm import CausalLM
from lightning_peft.modules.language_data import LanguageData
from lightning_peft.modules.sentence_data import SentenceData
from lightning_peft.modules.sentences import Pieces, Sentences
from lightning_peft.modules.seq2seq import Seq2Seq
from lightning_peft.modules.seq2seq_data import Seq2SeqData
from lightning_peft.modules.text_classifier import TextClassifier
from lightning_peft.modules.text_data import TextData
from lightning_peft.modules.text_vae import (
    FreeBits,
    GaussianCritic,
    Lagging,
    LatentInformation,
    LinearAnnealing,
    LSTMDecoder,
    LSTMEncoder,
    PretrainedEncoder,
    TextVAE,
    TransformerDecoder,
)

__all__ = [
    "CausalLM",
    "FreeBits",
    "GaussianCritic",
    "LSTMDecoder",
    "LSTMEncoder",
    "Lagging",
    "LanguageData",
    "LatentInformation",
    "LinearAnnealing",
    "Pieces",
    "PretrainedEncoder",
    "SentenceData",
    "Sentences",
    "Seq2Seq",
    "Seq2SeqData",
    "TextClassifier",
    "TextData",
    "TextVAE",
    "TransformerDecoder",
]
