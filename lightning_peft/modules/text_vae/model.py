"""The model of a variational autoencoder of sentences: points from sentences, sentences from points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_peft.functional.gaussian import gaussian_log_density
from lightning_peft.modules.sentence_data import Collate, SentenceBatch
from lightning_peft.modules.sentences import words_of
from lightning_peft.modules.text_vae.decoders import DecoderFactory
from lightning_peft.modules.text_vae.decoding import beam_search, one_by_one
from lightning_peft.modules.text_vae.encoders import Encoded, EncoderFactory
from lightning_peft.modules.text_vae.noise import generator_of
from lightning_peft.modules.text_vae.objective import sentence_losses
from lightning_peft.modules.vocabulary import Vocabulary


class SentenceVAE(nn.Module):
    """Sentences as points of a latent space, and back.

        q(z | x) = N(mu(x), diag sigma(x)^2),   p(z) = N(0, I),   p(x | z) = prod_t p(x_t | x_<t, z)

    Args:
        vocabulary_size: words at most.
        latent: width of z.
        encoder: makes it, of the number of words.
        decoder: makes it, of the number of words and the width of z.
        longest: words of a sentence that is written.
        spread: the weights of mean and log-variance start in U(-spread, spread).

    Attributes:
        vocabulary: the words; ``None`` until they are known.
    """

    def __init__(
        self,
        vocabulary_size: int,
        latent: int,
        encoder: EncoderFactory,
        decoder: DecoderFactory,
        longest: int = 40,
        spread: float = 0.01,
    ) -> None:
        super().__init__()
        self.latent, self.longest = latent, longest
        self.encoder, self.decoder = encoder(vocabulary_size), decoder(vocabulary_size, latent)
        self.posterior = nn.Linear(self.encoder.features, 2 * latent, bias=False)
        nn.init.uniform_(self.posterior.weight, -spread, spread)
        self.vocabulary: Vocabulary | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.posterior.weight.device

    def forward(self, batch: SentenceBatch) -> tuple[Tensor, Tensor, Encoded]:
        """Mean and log-variance of q(z | x), (batch, latent) each, and what the encoder gave."""
        encoded = self.encoder(batch)
        found = self.posterior(encoded.state)
        mean, log_variance = found.to(torch.promote_types(found.dtype, torch.float32)).chunk(2, dim=-1)
        return mean, log_variance, encoded

    def reconstruction(self, z: Tensor, tokens: Tensor) -> Tensor:
        """-ln p(x | z) of each sentence: (batch,), in nats."""
        # z is kept in float32 at least; a decoder of a model of lower precision takes its own type.
        return sentence_losses(self.decoder(z.to(self.posterior.weight), tokens[:, :-1]), tokens[:, 1:])

    @torch.no_grad()
    def decode(
        self, z: Tensor, temperature: float = 0.0, beam: int = 1, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sentences of points of the latent space.

        Args:
            z: (batch, latent).
            temperature: of drawn words; 0 for the likeliest each time.
            beam: sentences that are kept at each word; above 1 there is no temperature.
            generator: of the draws; ``None`` for the global one.

        Returns:
            (batch, at most `longest`) words; :meth:`texts` writes them.

        Raises:
            ValueError: z is of another width, or both a beam and a temperature are given.
        """
        if beam > 1 and temperature > 0:
            raise ValueError(
                f"beam={beam} looks for likely sentences, and temperature={temperature} draws: choose one."
            )
        if z.ndim != 2 or z.shape[1] != self.latent:
            raise ValueError(f"z must be (batch, {self.latent}), one point in each row. Got {tuple(z.shape)}.")
        known = None if self.vocabulary is None else len(self.vocabulary)
        with _evaluating(self):
            z = z.to(self.posterior.weight)
            if beam != 1:
                return beam_search(self.decoder, z, self.longest, beam, known)
            return one_by_one(self.decoder, z, self.longest, temperature, generator, known)

    def sample(self, count: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """Sentences of points that are drawn from the prior: (count, at most `longest`)."""
        z = torch.randn(count, self.latent, generator=generator_of(seed))
        return self.decode(z, temperature, generator=generator_of(seed, 1, device=self.device))

    @torch.no_grad()
    def reconstruct(self, batch: SentenceBatch, temperature: float = 0.0, beam: int = 1, seed: int = 0) -> Tensor:
        """The sentences' posterior means, decoded."""
        generator = generator_of(seed, device=self.device) if temperature else None
        return self.decode(self.means(batch), temperature, beam, generator)

    @torch.no_grad()
    def means(self, batch: SentenceBatch) -> Tensor:
        """The sentences' posterior means: (batch, latent)."""
        with _evaluating(self):
            return self(batch)[0]  # type: ignore[no-any-return]

    def interpolate(self, start: Tensor, end: Tensor, steps: int = 7, beam: int = 1) -> Tensor:
        """Sentences on the straight line between two points, both included: (steps, at most `longest`).

        Args:
            start: (latent,).
            end: (latent,).
            steps: points, at least 2.
            beam: see :meth:`decode`.
        """
        if steps < 2:
            raise ValueError(f"steps={steps}: a line has at least 2 points, its ends.")
        share = torch.linspace(0, 1, steps, device=start.device)[:, None]
        return self.decode(start + share * (end - start), beam=beam)

    def texts(self, tokens: Tensor) -> list[str]:
        """The words of sentences.

        Raises:
            RuntimeError: the vocabulary is not known.
        """
        vocabulary = self._require_vocabulary()
        return [vocabulary.decode(row) for row in tokens]

    def read(self, sentences: Sequence[str]) -> SentenceBatch:
        """A batch of sentences that somebody wrote, for an encoder that reads words.

        Raises:
            TypeError: it is one string.
            ValueError: there is none.
            RuntimeError: the vocabulary is not known.
        """
        if isinstance(sentences, str):
            raise TypeError(f"sentences={sentences!r}: give a list of sentences, [{sentences!r}].")
        if not sentences:
            raise ValueError("sentences is empty: give at least one.")
        vocabulary = self._require_vocabulary()
        batch = Collate(None)([{"tokens": torch.tensor(vocabulary.encode(words_of(text)))} for text in sentences])
        return {"tokens": batch["tokens"].to(self.device), "lengths": batch["lengths"].to(self.device)}

    def _require_vocabulary(self) -> Vocabulary:
        if self.vocabulary is None:
            raise RuntimeError(
                "the model knows no words yet: they come with a checkpoint, or from the SentenceData that a Trainer is "
                "given."
            )
        return self.vocabulary

    @torch.no_grad()
    def importance_weighted(
        self, tokens: Tensor, mean: Tensor, log_variance: Tensor, samples: int, generator: torch.Generator, rows: int
    ) -> tuple[Tensor, Tensor]:
        """ln p(x, z) and ln q(z | x) of draws z ~ q(z | x): what `importance_weighted_nll` is given.

        Args:
            tokens: (batch, length).
            mean: (batch, latent).
            log_variance: (batch, latent).
            samples: draws.
            generator: of the draws, on the CPU.
            rows: sentences that are decoded at a time, which bounds memory.

        Returns:
            (batch, samples) each, in nats.
        """
        count, zero = len(tokens), torch.zeros_like(mean)
        joint: list[Tensor] = []
        posterior: list[Tensor] = []
        each = max(1, rows // count)
        for start in range(0, samples, each):
            draws = min(each, samples - start)
            noise = torch.randn(draws, *mean.shape, generator=generator).to(mean)
            z = mean + (log_variance / 2).exp() * noise
            repeated = tokens.expand(draws, *tokens.shape).flatten(0, 1)
            likelihood = -self.reconstruction(z.flatten(0, 1), repeated).view(draws, count)
            joint.append(likelihood + gaussian_log_density(zero, zero, z))
            posterior.append(gaussian_log_density(mean, log_variance, z))
        return torch.cat(joint).T, torch.cat(posterior).T


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each part's own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
