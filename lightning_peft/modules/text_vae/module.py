"""A variational autoencoder of sentences whose latent space stays in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.arguments import require_finite, require_instance, require_integer
from lightning_peft.callbacks.board import boards
from lightning_peft.distributed import Processes, world_size
from lightning_peft.functional.latent import active_units, gaussian_kl_per_unit
from lightning_peft.modules.optimization import Schedule, adamw, require_schedule
from lightning_peft.modules.sentence_data import SentenceBatch
from lightning_peft.modules.text_vae.board import LatentBoard
from lightning_peft.modules.text_vae.decoders import DecoderFactory, LSTMDecoder
from lightning_peft.modules.text_vae.encoders import Encoded, EncoderFactory, LSTMEncoder
from lightning_peft.modules.text_vae.information import LatentInformation
from lightning_peft.modules.text_vae.lagging import Lagging
from lightning_peft.modules.text_vae.metrics import LatentLanguageMetrics
from lightning_peft.modules.text_vae.model import SentenceVAE
from lightning_peft.modules.text_vae.noise import generator_of, normal_rows, private
from lightning_peft.modules.text_vae.objective import FreeBits
from lightning_peft.modules.vocabulary import Vocabulary
from lightning_peft.regularizers.base import Weight, weight_at
from lightning_peft.regularizers.everyone import Everyone

# What random numbers are for; a process's own dropout comes after them.
_TRAINING, _EVALUATION, _SAMPLES, _CRITIC, _DROPOUT = range(5)


class Latent(TypedDict):
    """What ``predict_step`` returns: ``mean`` and ``log_variance`` of q(z | x), and the ``tokens`` it is decoded to."""

    mean: Tensor
    log_variance: Tensor
    tokens: Tensor


class TextVAE(LightningModule):
    """Sentences as points of a latent space, and back.

        q(z | x) = N(mu(x), diag sigma(x)^2),   p(z) = N(0, I),   p(x | z) = prod_t p(x_t | x_<t, z)
        L = -E_q[ ln p(x | z) ] + beta_t KL(q(z | x) || p(z)) - w_t I_hat(h(x); z)

    With a strong decoder the divergence of a plain VAE falls to 0 and z says nothing: the posterior collapses. Each of
    `kl_weight`, `free_bits`, `lagging` and `information` is a way against it, alone or with others.

    Reparametrisation noise and dropout are private and depend on seed, epoch and batch alone, so a resumed run draws
    what the uninterrupted one did, and with DDP each sentence has the noise that it has in one process (dropout aside).
    Checkpoints hold the vocabulary, which comes from the `SentenceData` that the Trainer is given.

    Args:
        vocabulary_size: words at most; not below that of the data.
        latent: width of z.
        encoder: makes it, of the number of words: a class, or `partial(LSTMEncoder, hidden=256)`.
        decoder: makes it, of the number of words and the width of z.
        kl_weight: beta: a number (below 1: a beta-VAE), or a function of (step, total): `LinearAnnealing()`.
        free_bits: nats of divergence that cost nothing.
        information: w I_hat: MI-VAE.
        lagging: turns of the encoder and of the decoder.
        lr: peak learning rate.
        weight_decay: AdamW's decoupled weight decay; the critic has none.
        warmup: share of the optimizer steps in which the rates rise from 0.
        schedule: "linear" lets them fall to 0 then, "constant" leaves them.
        samples: draws of z for the importance-weighted likelihood of `test`.
        rows: sentences that are decoded at a time there, which bounds memory.
        longest: words of a sentence that is written.
        spread: weights of mean and log-variance start in U(-spread, spread). With 0.01, that of He et al., all
            sentences start at nearly one point, where no critic tells them apart.
        seed: of all random numbers but the start values.
    Raises:
        TypeError: a number is no integer.
        ValueError: one is out of range.
    Reference:
        Bowman et al. 2016 (the model; remembered). Sizes, start values and measures are those of He et al. 2019, arXiv
        1901.05534; AdamW is our choice (they have SGD of rate 1, halved on plateaus), since one optimizer then serves
        the critic too. For `information` see :class:`LatentInformation`.
    """

    def __init__(
        self,
        vocabulary_size: int = 10_000,
        latent: int = 32,
        encoder: EncoderFactory = LSTMEncoder,
        decoder: DecoderFactory = LSTMDecoder,
        kl_weight: Weight = 1.0,
        free_bits: FreeBits | None = None,
        information: LatentInformation | None = None,
        lagging: Lagging | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup: float = 0.0,
        schedule: Schedule = "constant",
        samples: int = 500,
        rows: int = 256,
        longest: int = 40,
        spread: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"vocabulary_size": vocabulary_size, "latent": latent, "samples": samples}
        for name, value in {**counts, "rows": rows, "longest": longest}.items():
            require_integer(name, value)
            if value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1.")
        if not callable(kl_weight):
            _require_weight(kl_weight)
        require_integer("seed", seed)
        for name, number in (("lr", lr), ("weight_decay", weight_decay), ("warmup", warmup), ("spread", spread)):
            require_finite(name, number)
        if min(lr, weight_decay) < 0:
            raise ValueError(f"lr={lr}, weight_decay={weight_decay}: a rate and a decay are 0 or above.")
        parts = {"free_bits": (free_bits, FreeBits), "information": (information, LatentInformation)}
        for name, (part, kind) in {**parts, "lagging": (lagging, Lagging)}.items():
            if part is not None:
                require_instance(name, part, kind, f"{kind.__name__}()")
        if spread <= 0:
            raise ValueError(f"spread={spread}: weights are drawn from (-spread, spread); give a number above 0.")
        require_schedule(warmup, schedule)
        # Parts and functions are no numbers: a checkpoint of tensors and numbers cannot hold them.
        ignored = ["encoder", "decoder", "kl_weight", "free_bits", "information", "lagging"]
        self.save_hyperparameters(ignore=ignored)
        self.kl_weight, self.free_bits = kl_weight, free_bits
        self.information, self.lagging = information, lagging
        self.lr, self.weight_decay, self.warmup, self.schedule = lr, weight_decay, warmup, schedule
        self.vocabulary_size, self.samples, self.rows, self.seed = vocabulary_size, samples, rows, seed
        self.model = SentenceVAE(vocabulary_size, latent, encoder, decoder, longest, spread)
        if information is not None:
            information.build(self.model.encoder, latent)
        self.everyone = Everyone()
        self.val_metrics, self.test_metrics = LatentLanguageMetrics(), LatentLanguageMetrics()
        self._board = LatentBoard()
        self._seen = -1  # the last evaluated place: a distributed sampler begins anew to fill its last batch
        self._noted: tuple[Tensor, Tensor] | None = None
        self._left_over = -1  # the epoch of the last batch of a single sentence

    # Training

    def setup(self, stage: str) -> None:
        """Take the vocabulary of the data, and the processes that train together."""
        self.everyone = Processes() if world_size() > 1 else Everyone()
        found = getattr(getattr(self.trainer, "datamodule", None), "vocabulary", None)
        if isinstance(found, Vocabulary):
            if len(found) > self.vocabulary_size:
                raise ValueError(
                    f"the data has {len(found)} words, and TextVAE has room for vocabulary_size="
                    f"{self.vocabulary_size}. Give both the same."
                )
            self._agree(found.words)
            self.model.vocabulary = found

    def _agree(self, words: Sequence[str]) -> None:
        if self.model.vocabulary is None or self.model.vocabulary.words == tuple(words):
            return
        own = self.model.vocabulary.words
        place = next((i for i, (a, b) in enumerate(zip(own, words, strict=False)) if a != b), min(len(own), len(words)))
        raise ValueError(
            f"the data's vocabulary is not the one of training: word {place} of {len(own)} and {len(words)} differs. "
            "Give SentenceData the training file, cut, vocabulary_size and seed that the model was trained with."
        )

    def training_step(self, batch: SentenceBatch, batch_idx: int) -> Tensor:
        """The objective of a batch."""
        step, total = self.trainer.global_step + 1, int(self.trainer.estimated_stepping_batches)
        tokens, world, rank = batch["tokens"], self.everyone.world, self.everyone.rank
        place = (self.seed, self.current_epoch, batch_idx)
        noise = normal_rows(len(tokens), self.model.latent, generator_of(*place, _TRAINING), rank, world)
        with private(self, generator_of(*place, _DROPOUT + rank, device=tokens.device)):
            mean, log_variance, encoded = self.model(batch)
            z = mean + (log_variance / 2).exp() * noise.to(mean)
            self._train_critic(encoded, mean, log_variance, place)
            reconstruction = self.model.reconstruction(z, tokens)
        kl = gaussian_kl_per_unit(mean, (log_variance / 2).exp(), 0.0, 1.0)
        paid = kl.sum(1).mean() if self.free_bits is None else self.free_bits(self.everyone.gather(kl))
        beta = weight_at(self.kl_weight, step, total)
        _require_weight(beta)
        loss = reconstruction.mean() + beta * paid
        figures: dict[str, Tensor | float] = {"reconstruction": reconstruction.mean(), "kl": kl.sum(1).mean()}
        figures["beta"] = beta
        if len(mean) > 1:
            figures["au"] = active_units(mean.detach()).float()
        if self.information is not None and self._has_negatives(len(tokens) * world):
            loss = loss - self._inform(self.information, self.information.features(encoded), z, step, total)
        if self.lagging is not None and self.lagging.active:
            sums = torch.stack([(reconstruction + beta * kl.sum(1)).sum().detach(), batch["lengths"].sum().to(loss)])
            words_and_loss = self.everyone.gather(sums[None]).sum(0)
            self._noted = (words_and_loss[0], words_and_loss[1])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(tokens))
        self.log_dict({f"train/{name}": value for name, value in figures.items()}, batch_size=len(tokens))
        return loss

    def _has_negatives(self, sentences: int) -> bool:
        """Whether a global batch has pairs to compare: one of an epoch, what is left over, may be one sentence."""
        if sentences > 1:
            return True
        if self._left_over == self.current_epoch or self.trainer.num_training_batches == 1:
            raise ValueError(
                "information compares each sentence with the others of its batch, and batches have 1. Give "
                "SentenceData a batch_size of 2 or more (32 or 64 are usual), or leave out information."
            )
        self._left_over = self.current_epoch
        return False

    def _inform(self, information: LatentInformation, h: Tensor, z: Tensor, step: int, total: int) -> Tensor:
        scores = information.scores(self.everyone.gather(h), self.everyone.gather(z))
        weight = information.weight_at(step, total)
        gain = weight * information.objective(scores)
        information.move(scores)
        n = float(len(scores))
        figures: dict[str, Tensor | float] = {"estimate": information.estimate(scores), "n": n, "weight": weight}
        self.log_dict({f"mi/{name}": value for name, value in figures.items()}, batch_size=len(z))
        return gain

    @torch.no_grad()
    def _train_critic(self, encoded: Encoded, mean: Tensor, log_variance: Tensor, place: tuple[int, ...]) -> None:
        """The critic's steps on this batch before the last, which is everybody's: on all processes alike."""
        information, world = self.information, self.everyone.world
        if information is None or information.critic_steps == 1 or len(mean) * world == 1:
            return
        h, mean, std = (
            self.everyone.gather(t) for t in (information.features(encoded), mean, (log_variance / 2).exp())
        )
        generator, rows = generator_of(*place, _CRITIC), len(mean) // world
        drawn = (normal_rows(len(mean), self.model.latent, generator) for _ in range(information.critic_steps - 1))
        # The rows of the global batch in the order in which they are gathered: by process.
        order = torch.arange(len(mean)).view(rows, world).T.flatten()
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        with torch.enable_grad():
            information.train_critic(optimizer, h, (mean + std * noise[order].to(mean) for noise in drawn))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let rest whose turn it is not."""
        turn = "both" if self.lagging is None else self.lagging.turn
        resting = {"encoder": "decoder", "decoder": "encoder"}.get(turn)
        for group in optimizer.param_groups:
            if group["name"] == resting:
                for parameter in group["params"]:
                    parameter.grad = None  # a zero would let momentum and weight decay go on

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """The Trainer's clipping for the model, and the critic's own for the critic: neither shrinks the other."""
        if self.information is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        groups = {group["name"]: group["params"] for group in optimizer.param_groups}
        if "critic" in groups:
            nn.utils.clip_grad_norm_(groups["critic"], self.information.clip)
        model = [p for name, parameters in groups.items() if name != "critic" for p in parameters]
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(model, gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(model, gradient_clip_val)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """A step; then the turn of who is next."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.lagging is not None and self._noted is not None:
            self.lagging.done(*self._noted)
        self._noted = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters in groups ``encoder``, ``decoder`` and ``critic``; an empty group is left out."""
        encoder = [*self.model.encoder.parameters(), *self.model.posterior.parameters()]
        groups: list[dict[str, Any]] = [
            {"name": "encoder", "lr": self.lr, "params": encoder},
            {"name": "decoder", "lr": self.lr, "params": list(self.model.decoder.parameters())},
        ]
        if self.information is not None:
            critic = {"name": "critic", "lr": self.information.lr, "weight_decay": 0.0}
            groups.append({**critic, "params": list(self.information.parameters())})
        placed = {id(p) for group in groups for p in group["params"]}
        rest = [p for p in self.parameters() if id(p) not in placed]  # terms of a Regularization callback
        groups.append({"name": "terms", "lr": self.lr, "params": rest})
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        return [group for group in groups if group["params"]]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW on all groups, with the schedule over the trainer's own number of steps.

        Raises:
            MisconfigurationException: nothing is trainable, or the number of steps is not known.
        """
        advice = "let encoder and decoder train"
        return adamw(self, self.parameter_groups(), self.weight_decay, self.warmup, self.schedule, advice)

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        self._seen = -1

    def on_test_epoch_start(self) -> None:
        self._seen = -1

    def validation_step(self, batch: SentenceBatch, batch_idx: int) -> None:
        """Add to ``val/nll`` (the ELBO's), ``val/ppl``, ``val/kl``, ``val/mi``, ``val/au`` and their ``val/n``."""
        self._evaluate(batch, batch_idx, self.val_metrics, samples=0)
        if batch_idx == int(self.trainer.num_val_batches[0]) // 2:  # neither the shortest sentences nor the longest
            self._board.show(batch)

    def test_step(self, batch: SentenceBatch, batch_idx: int) -> None:
        """Add to ``test/nll`` (importance weighted), ``test/ppl``, and the others as in validation."""
        self._evaluate(batch, batch_idx, self.test_metrics, self.samples)

    def predict_step(self, batch: SentenceBatch, batch_idx: int) -> Latent:
        """The posterior of each sentence, and the likeliest words of its mean."""
        mean, log_variance, _ = self.model(batch)
        return {"mean": mean, "log_variance": log_variance, "tokens": self.model.decode(mean)}

    def _evaluate(self, batch: SentenceBatch, batch_idx: int, metrics: LatentLanguageMetrics, samples: int) -> None:
        rank, world = self.everyone.rank, self.everyone.world
        generator = generator_of(self.seed, batch_idx, _EVALUATION)
        noise = normal_rows(len(batch["tokens"]), self.model.latent, generator, rank, world)
        new = self._new(batch)
        if not new.any():
            return
        batch = {name: value[new] for name, value in batch.items()}  # type: ignore[assignment,index]
        tokens = batch["tokens"]
        mean, log_variance, _ = self.model(batch)
        z = mean + (log_variance / 2).exp() * noise.to(mean)[new]
        reconstruction = self.model.reconstruction(z, tokens)
        kl = gaussian_kl_per_unit(mean, (log_variance / 2).exp(), 0.0, 1.0).sum(1)
        # The ELBO, whose divergence is exact, takes the place of one draw's ln p(x, z) - ln q(z | x).
        joint, posterior = -(reconstruction + kl)[:, None], torch.zeros_like(kl)[:, None]
        if samples:
            generator = generator_of(self.seed, batch_idx, _SAMPLES, rank)
            joint, posterior = self.model.importance_weighted(tokens, mean, log_variance, samples, generator, self.rows)
        metrics.add(joint, posterior, reconstruction, batch["lengths"], mean, log_variance, z)

    def _new(self, batch: SentenceBatch) -> Tensor:
        """Which sentences a distributed sampler does not repeat: repeated ones would bias MI and AU."""
        if "position" not in batch or self.everyone.world == 1:
            return torch.ones(len(batch["tokens"]), dtype=torch.bool, device=batch["tokens"].device)
        new = batch["position"] > self._seen
        self._seen = max(self._seen, int(batch["position"].max()))
        return new

    def on_validation_epoch_end(self) -> None:
        figures = self._report(self.val_metrics, "val")
        if self.trainer.sanity_checking or figures is None:
            return
        if self.lagging is not None and self.trainer.state.fn == "fit":
            self.lagging.validated(float(figures["mi"]))
        loggers = boards(self.trainer)
        if loggers and self.trainer.is_global_zero and self.model.vocabulary is not None:
            self._board.write(loggers, self.model, self.global_step, self.seed)

    def on_test_epoch_end(self) -> None:
        self._report(self.test_metrics, "test")

    def _report(self, metrics: LatentLanguageMetrics, stage: str) -> dict[str, Tensor] | None:
        if stage == "val":
            self._board.place(metrics)
        figures: dict[str, Tensor] = metrics.compute()
        metrics.reset()
        # They are of all processes already; without sync_dist Lightning remarks that they might not be.
        self.log_dict({f"{stage}/{name}": value.float() for name, value in figures.items()}, sync_dist=True)
        self.log(f"{stage}/loss", figures["nll"].float(), prog_bar=True, sync_dist=True)
        return figures

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the words and the turns: strings and numbers."""
        checkpoint["text_vae"] = {
            "words": None if self.model.vocabulary is None else list(self.model.vocabulary.words),
            "lagging": None if self.lagging is None else self.lagging.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back.

        Raises:
            ValueError: the data's vocabulary is another.
        """
        saved = checkpoint.get("text_vae", {})
        if saved.get("words"):
            self._agree(saved["words"])
            self.model.vocabulary = Vocabulary(saved["words"])
        if self.lagging is not None and saved.get("lagging"):
            self.lagging.load_state_dict(saved["lagging"])


def _require_weight(weight: float) -> None:
    require_finite("kl_weight", weight)
    if weight < 0:
        raise ValueError(f"kl_weight={weight}: the weight of a divergence is 0 or above.")
