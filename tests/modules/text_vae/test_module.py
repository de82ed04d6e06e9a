"""The variational autoencoder of sentences: its objective by hand, its parts, and what it reports."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from quiet import QUIET
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_peft import AdapterInjection, ConcatCritic, LoRA, SeparableCritic
from lightning_peft.functional.latent import importance_weighted_nll
from lightning_peft.functional.mutual_information import dv
from lightning_peft.modules import (
    FreeBits,
    GaussianCritic,
    Lagging,
    LatentInformation,
    LinearAnnealing,
    LSTMDecoder,
    LSTMEncoder,
    PretrainedEncoder,
    SentenceData,
    Sentences,
    TextVAE,
    TransformerDecoder,
)
from lightning_peft.modules.text_vae import Encoded, latent_picture
from lightning_peft.modules.text_vae.decoding import beam_search, one_by_one
from lightning_peft.modules.text_vae.metrics import LatentLanguageMetrics
from lightning_peft.modules.text_vae.noise import generator_of, normal_rows
from lightning_peft.modules.text_vae.objective import sentence_losses
from lightning_peft.modules.vocabulary import END, PAD, START

LATENT = 4
WORDS = 12


@pytest.fixture
def data(write: Any, rows: Any) -> SentenceData:
    source = write("t.csv", rows)
    return SentenceData(source, val=source, test=source, cut=Sentences(fewest=2), vocabulary_size=WORDS, batch_size=8)


def make(**arguments: Any) -> TextVAE:
    torch.manual_seed(3)
    parts = {
        "encoder": partial(LSTMEncoder, embedding=6, hidden=8),
        "decoder": partial(LSTMDecoder, embedding=6, hidden=8, dropout=0.0),
    }
    vae = TextVAE(WORDS, LATENT, **{**parts, "samples": 3, "lr": 1e-2, "longest": 12, **arguments})
    for parameter in vae.model.parameters():
        with torch.no_grad():
            parameter.mul_(20)  # so that sentences differ
    return vae


def batch_of(rows: int = 6, length: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tokens = torch.randint(4, WORDS, (rows, length))
    tokens[:, 0], tokens[:, -1] = START, END
    tokens[0, 4:] = torch.tensor([END, PAD, PAD])
    return {"tokens": tokens, "lengths": (tokens != PAD).sum(1) - 1}


def fit(vae: TextVAE, data: SentenceData, *callbacks: Callback, steps: int = 4, **options: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, "max_steps": steps, "callbacks": [*callbacks], "limit_val_batches": 2, **options})
    trainer.fit(vae, datamodule=data)
    return trainer


class Losses(Callback):
    """The loss of each step, as Lightning has it, and the state of what it was of."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.values.append(loss.item())


# The objective


def test_the_loss_is_the_negative_elbo_by_hand(data: SentenceData) -> None:
    vae, seen = make(kl_weight=0.5, lr=0.0), Losses()
    fit(vae, data, seen, steps=1)
    batch = next(iter(data.train_dataloader()))
    mean, log_variance, _ = vae.model(batch)
    noise = normal_rows(len(mean), LATENT, generator_of(0, 0, 0, 0))
    z = mean + (log_variance / 2).exp() * noise
    logs = vae.model.decoder(z, batch["tokens"][:, :-1]).log_softmax(-1)
    total = 0.0
    for row, tokens in enumerate(batch["tokens"]):
        for place, token in enumerate(tokens[1:]):
            total -= logs[row, place, token].item() if token != PAD else 0.0
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum()
    assert seen.values[0] == pytest.approx((total + 0.5 * kl.item()) / len(mean), rel=1e-5)


def test_filling_costs_nothing() -> None:
    logits = torch.randn(2, 5, 9)
    targets = torch.tensor([[4, 5, 2, PAD, PAD], [4, 5, 6, 7, 2]])
    short = sentence_losses(logits[:1, :3], targets[:1, :3])
    assert torch.equal(sentence_losses(logits, targets)[:1], short)
    assert sentence_losses(logits.bfloat16(), targets).dtype == torch.float32


def test_noise_of_a_row_is_the_same_in_any_share() -> None:
    whole = normal_rows(7, 3, generator_of(1))
    shared = [normal_rows(4, 3, generator_of(1), rank, 2) for rank in (0, 1)]  # the last row of the second is filling
    assert torch.equal(torch.stack(shared, 1).flatten(0, 1)[:7], whole)
    assert abs(normal_rows(4000, 3, generator_of(2)).std().item() - 1) < 0.03
    assert generator_of(0, 1).initial_seed() != generator_of(1, 0).initial_seed()


def test_free_bits_are_of_means_over_the_batch() -> None:
    kl = torch.tensor([[0.0, 1.0, 0.05], [0.4, 2.0, 0.05]])
    assert FreeBits(0.1)(kl).item() == pytest.approx(0.2 + 1.5 + 0.1)  # the third unit pays for its floor
    assert FreeBits(3.0, over="total")(kl).item() == pytest.approx(3.0)
    assert FreeBits(1.0, over="total")(kl).item() == pytest.approx(1.75)
    kl.requires_grad_()
    FreeBits(0.1)(kl).backward()
    assert torch.equal(kl.grad != 0, torch.tensor([[True, True, False]] * 2))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("step", "expected"), [(1, 0.1), (2, 0.1 + 0.9 / 9), (10, 1.0), (11, 1.0), (100, 1.0)], ids=str
)
def test_annealing_rises_and_stays(step: int, expected: float) -> None:
    assert LinearAnnealing(start=0.1, share=0.1)(step, 100) == pytest.approx(expected)


# Decoders


@pytest.mark.parametrize(
    "decoder",
    [
        LSTMDecoder(WORDS, LATENT, embedding=6, hidden=8),
        TransformerDecoder(WORDS, LATENT, width=8, layers=2, heads=2),
    ],
    ids=lambda decoder: type(decoder).__name__,
)
def test_a_decoder_steps_as_it_runs_and_looks_only_back(decoder: nn.Module) -> None:
    nn.init.normal_(decoder.output.weight)  # type: ignore[arg-type,union-attr]
    decoder.eval()
    z, tokens = torch.randn(3, LATENT), torch.randint(4, WORDS, (3, 6))
    whole = decoder(z, tokens)
    state: Any = decoder.start(z)  # type: ignore[operator]
    for place in range(6):
        logits, state = decoder.step(tokens[:, place], state)  # type: ignore[operator]
        torch.testing.assert_close(logits, whole[:, place])
    later = tokens.clone()
    later[:, 3:] = 4
    torch.testing.assert_close(decoder(z, later)[:, :3], whole[:, :3])
    assert not torch.allclose(decoder(z + 1, tokens), whole)  # z is heard


class Scripted(LSTMDecoder):
    """Scores from a table: row t is what follows after t words."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(table.shape[-1], LATENT, embedding=2, hidden=2)
        self.table = table

    def start(self, z: Tensor) -> tuple[Tensor, ...]:
        return (torch.zeros(len(z), dtype=torch.int64), torch.full((len(z),), START))

    def step(self, token: Tensor, state: Any) -> Any:
        return self.table[state[0], token], (state[0] + 1, token)


def test_a_beam_finds_what_the_likeliest_word_misses() -> None:
    """After start: word 4 (0.6) or 5 (0.4); after 4 each of three words a third, after 5 surely the end."""
    table = torch.full((3, 8, 8), -1e9)
    table[0, START, 4], table[0, START, 5] = math.log(0.6), math.log(0.4)
    table[1, 4, [4, 6, 7]], table[1, 5, END] = math.log(1 / 3), 0.0
    table[2, :, END] = 0.0
    decoder, z = Scripted(table), torch.zeros(2, LATENT)
    assert one_by_one(decoder, z, 5).tolist() == [[4, 4, END]] * 2
    assert beam_search(decoder, z, 5, width=1).tolist() == [[4, 4, END]] * 2
    assert beam_search(decoder, z, 5, width=2)[:, :2].tolist() == [[5, END]] * 2


def test_temperature_draws_what_softmax_says() -> None:
    table = torch.full((2, 8, 8), -1e9)
    table[0, START, 4], table[0, START, 5] = math.log(0.8), math.log(0.2)
    table[1, :, END] = 0.0
    table[0, START, PAD] = 5.0  # no word
    decoder, z = Scripted(table), torch.zeros(4000, LATENT)
    for temperature, share in ((1.0, 0.8), (2.0, 2 / 3)):
        words = one_by_one(decoder, z, 3, temperature, generator_of(1))
        assert (words[:, 0] == 4).float().mean().item() == pytest.approx(share, abs=0.02)
    assert torch.equal(one_by_one(decoder, z, 3, 1.0, generator_of(1)), one_by_one(decoder, z, 3, 1.0, generator_of(1)))


def test_sentences_of_points(data: SentenceData) -> None:
    vae = make()
    fit(vae, data, steps=1)
    model, before = vae.model, torch.get_rng_state()
    first, second = model.sample(3), model.sample(3)
    assert torch.equal(first, second)
    assert first.shape[0] == 3
    assert torch.equal(before, torch.get_rng_state())
    batch = next(iter(data.val_dataloader()))
    means = model.means(batch)
    line = model.interpolate(means[0], means[-1], steps=5)
    ends = model.decode(torch.stack([means[0], means[-1]]))
    assert model.texts(line)[0] == model.texts(ends)[0]
    assert model.texts(line)[-1] == model.texts(ends)[1]
    assert model.texts(model.reconstruct(batch)) == model.texts(model.decode(means))
    assert model.texts(model.read(["The RED car!"])["tokens"]) == ["the red car <unk>"]
    with pytest.raises(ValueError, match=r"beam=2 looks for likely sentences, and temperature=1\.0 draws: choose one"):
        model.decode(means, temperature=1.0, beam=2)
    with pytest.raises(RuntimeError, match="the model knows no words yet"):
        make().model.texts(line)
    (prediction, *_) = Trainer(**QUIET).predict(vae, datamodule=data)  # type: ignore[misc]
    assert prediction.keys() == {"mean", "log_variance", "tokens"}


# What is reported


def test_property_12_planted_units_are_active() -> None:
    torch.manual_seed(0)
    n, planted = 400, 5
    mean = torch.cat([torch.randn(n, planted), 0.05 * torch.randn(n, 32 - planted)], 1)
    metrics = LatentLanguageMetrics()
    for part in mean.split(100):
        one, draw = torch.ones(len(part)), torch.ones(len(part), 1)
        metrics.add(-draw, 0 * draw, one, one, part, torch.zeros_like(part), part + torch.randn_like(part))
    figures = metrics.compute()
    assert figures["au"].item() == planted
    assert figures["n"].item() == n
    assert 0.5 < figures["mi"].item() < math.log(n)


def test_property_13_more_draws_give_a_lower_bound() -> None:
    vae, batch = make(), batch_of(rows=20)
    with torch.no_grad():
        mean, log_variance, _ = vae.model(batch)
        tokens, log_variance = batch["tokens"], log_variance - 1.0  # a posterior that is far from right
        reconstruction = torch.stack(
            [
                vae.model.reconstruction(mean + (log_variance / 2).exp() * torch.randn_like(mean), tokens)
                for _ in range(20)
            ]
        ).mean(0)
        posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
        kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)

        def nll(samples: int) -> float:
            draws = vae.model.importance_weighted(tokens, mean, log_variance, samples, generator_of(5), rows=64)
            return float(importance_weighted_nll(*draws).mean())

        elbo, few, many = float((reconstruction + kl).mean()), nll(5), nll(100)
    assert many < few < elbo
    assert nll(100) == many


def test_parts_of_draws_are_one_estimate() -> None:
    vae, batch = make(), batch_of()
    mean, log_variance, _ = vae.model(batch)
    one, many = (
        vae.model.importance_weighted(batch["tokens"], mean, log_variance, 7, generator_of(1), rows=rows)
        for rows in (1000, 13)
    )
    torch.testing.assert_close(one, many)


def test_perplexity_counts_words_and_ends(data: SentenceData) -> None:
    vae = make()
    (found,) = Trainer(**QUIET).test(vae, datamodule=data, verbose=False)
    words = sum(int(batch["lengths"].sum()) for batch in data.test_dataloader())
    sentences = len(data._split("test"))
    assert (found["test/n"], found["test/words"]) == (sentences, words)
    assert found["test/ppl"] == pytest.approx(math.exp(found["test/nll"] * sentences / words), rel=1e-4)
    assert found.keys() >= {"test/kl", "test/mi", "test/au", "test/reconstruction", "test/loss"}


def test_board_shows_texts_and_the_latent_space(data: SentenceData, tmp_path: Any) -> None:
    vae = make(kl_weight=LinearAnnealing(), free_bits=FreeBits(0.1))
    logger = TensorBoardLogger(tmp_path, log_graph=False)
    fit(vae, data, logger=logger, val_check_interval=2, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = events.Tags()
    assert "latent/means" in tags["images"]
    texts = {"text/samples", "text/reconstructions", "text/interpolation"}
    assert {tag.removesuffix("/text_summary") for tag in tags["tensors"]} >= texts
    assert {"val/mi", "val/n", "train/beta", "train/kl"} <= set(tags["scalars"])


def test_picture_tells_a_point_from_a_cloud() -> None:
    collapsed = latent_picture(1e-3 * torch.randn(50, 3)).axes[0]
    assert collapsed.get_xlim() == (-3.0, 3.0)
    labelled = latent_picture(torch.randn(4, 3), ["a", "b", "a", "b"]).axes[0]
    assert [text.get_text() for text in labelled.get_legend().get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match="a picture needs the means of at least 2 sentences"):
        latent_picture(torch.zeros(1, 3))


# Information


def test_property_14_information_reaches_the_encoder_only_through_z() -> None:
    vae = make(information=LatentInformation(critic=partial(ConcatCritic, hidden=16)))
    information, batch = vae.information, batch_of()
    assert information is not None
    assert information.critic is not None
    nn.init.normal_(information.critic.last.weight)  # type: ignore[union-attr,arg-type]
    mean, _, encoded = vae.model(batch)
    h = information.features(encoded)
    assert not h.requires_grad
    encoder = list(vae.model.encoder.parameters())
    through_z = torch.autograd.grad(
        information.objective(information.scores(h, mean)), encoder, allow_unused=True, retain_graph=True
    )
    assert all(g is not None and g.abs().sum() > 0 for g in through_z)
    through_h = information.objective(information.scores(h, mean.detach()))
    assert torch.autograd.grad(through_h, encoder, allow_unused=True) == (None,) * len(encoder)


@pytest.mark.parametrize("estimator", ["dv", "jsd", "nwj"])
def test_the_term_is_what_is_written_by_hand(estimator: Any, data: SentenceData) -> None:
    plain, seen = Losses(), Losses()
    fit(make(lr=0.0), data, plain, steps=2)
    # Both with weights that do not move, so the difference is the term alone.
    information = LatentInformation(0.7, estimator=estimator, critic=partial(SeparableCritic, hidden=8), warmup=1.0)
    vae = make(information=information, lr=0.0)
    assert information.critic is not None
    information.lr = 1e-12
    nn.init.normal_(information.critic.g[-1].weight)  # type: ignore[union-attr,index,operator,arg-type]
    trainer = fit(vae, data, seen, steps=2)
    batch = list(data.train_dataloader())[1]
    mean, log_variance, encoded = vae.model(batch)
    z = mean + (log_variance / 2).exp() * normal_rows(len(mean), LATENT, generator_of(0, 0, 1, 0))
    h = encoded.state
    scores = information.critic((h - h.mean(0)) / h.std(0, correction=0), z)
    n = len(scores)
    joint, other = scores.diagonal(), scores[~torch.eye(n, dtype=torch.bool)]
    value = {
        "dv": joint.mean() - torch.exp(other.logsumexp(0) - math.log(n * (n - 1)) - first_log_moving(vae, data)),
        "jsd": -nn.functional.softplus(-joint).mean() - nn.functional.softplus(other).mean(),
        "nwj": 1 + joint.mean() - other.exp().mean(),
    }[estimator]
    weight = 0.7  # at the last of two steps, of which warm-up takes all
    assert seen.values[1] - plain.values[1] == pytest.approx(-weight * value.item(), rel=1e-3, abs=1e-4)
    reported = dv(scores) if estimator == "dv" else 1 + joint.mean() - other.exp().mean()
    assert trainer.callback_metrics["mi/estimate"].item() == pytest.approx(reported.item(), rel=1e-3, abs=1e-4)
    assert trainer.callback_metrics["mi/n"].item() == n


def first_log_moving(vae: TextVAE, data: SentenceData) -> Tensor:
    """ln m after the first batch: its own log-mean-exp."""
    assert vae.information is not None
    batch = next(iter(data.train_dataloader()))
    mean, log_variance, encoded = vae.model(batch)
    z = mean + (log_variance / 2).exp() * normal_rows(len(mean), LATENT, generator_of(0, 0, 0, 0))
    scores = vae.information.scores(encoded.state, z)
    other = scores[~torch.eye(len(scores), dtype=torch.bool)]
    return other.logsumexp(0) - math.log(len(other))


def test_one_sentence_left_over_is_trained_on_without_the_term(write: Any) -> None:
    source = write("t.csv", [(f"the {word} is red", "a") for word in ("car", "sky", "tree", "sea", "road")])

    def trained(batch_size: int) -> dict[str, Tensor]:
        data = SentenceData(source, cut=Sentences(fewest=2), vocabulary_size=WORDS, batch_size=batch_size, val_share=0)
        vae = make(information=LatentInformation(critic=GaussianCritic, critic_steps=2))
        return fit(vae, data, steps=2, max_epochs=1).callback_metrics

    figures = trained(4)
    assert figures["mi/n"].item() == 4
    assert figures["train/loss"].isfinite()
    with pytest.raises(ValueError, match=r"information compares each sentence .* Give SentenceData a batch_size of 2"):
        trained(1)


def test_it_trains_and_writes_in_half_precision(data: SentenceData) -> None:
    vae = make(information=LatentInformation(critic=GaussianCritic, critic_steps=2))
    trainer = fit(vae, data, steps=2, precision="bf16-true", val_check_interval=1)
    assert vae.model.posterior.weight.dtype == torch.bfloat16
    assert math.isfinite(trainer.callback_metrics["val/nll"])
    assert vae.model.decode(torch.zeros(2, LATENT), beam=2).shape[0] == 2


def test_the_critics_own_steps_move_nothing_else(data: SentenceData) -> None:
    """Three steps of the critic beside one of all, in one optimizer: the critic's count is its own."""
    vae = make(information=LatentInformation(critic=partial(ConcatCritic, hidden=8), critic_steps=4))
    trainer = fit(vae, data, steps=2)
    (optimizer,) = trainer.optimizers
    counts = {
        group["name"]: {int(optimizer.state[p]["step"]) for p in group["params"]} for group in optimizer.param_groups
    }
    assert counts == {"encoder": {2}, "decoder": {2}, "critic": {8}}
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates["critic"] == (1e-4, 0.0)


def test_norms_are_clipped_apart(data: SentenceData) -> None:
    class Norms(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            found = {
                group["name"]: [p.grad.flatten() for p in group["params"] if p.grad is not None]
                for group in optimizer.param_groups
            }
            if all(found.values()):
                model = torch.cat([*found["encoder"], *found["decoder"]])
                self.norms = float(model.norm()), float(torch.cat(found["critic"]).norm())

    norms = Norms()
    vae = make(information=LatentInformation(5.0, critic=partial(ConcatCritic, hidden=8), clip=1e-3, warmup=0.0))
    fit(vae, data, norms, steps=3, gradient_clip_val=0.5)
    assert norms.norms[0] == pytest.approx(0.5, rel=1e-3)
    assert norms.norms[1] == pytest.approx(1e-3, rel=1e-2)


# Lagging


def test_turns_of_encoder_and_decoder() -> None:
    lagging, turns = Lagging(inner=10, every=2), []
    losses = iter([9.0, 9.0, 8.0, 8.0, 8.5, 8.5, 1.0, 7.0, 7.0])
    for loss in losses:
        turns.append(lagging.turn)
        lagging.done(torch.tensor(loss), torch.tensor(1.0))
        again = Lagging(inner=10, every=2)
        again.load_state_dict(lagging.state_dict())
        assert again.state_dict() == lagging.state_dict()
    assert turns == [*["encoder"] * 6, "decoder", "encoder", "encoder"]  # 8.5 is not below 8.0
    for information, active in ((0.5, True), (0.7, True), (0.6, False), (0.9, False)):
        lagging.validated(information)
        assert lagging.active == active
    assert lagging.turn == "both"


def test_who_rests_does_not_move(data: SentenceData) -> None:
    class Moved(Callback):
        def __init__(self) -> None:
            self.who: list[str] = []

        def on_train_batch_start(self, trainer: Any, pl_module: TextVAE, *args: Any) -> None:
            self.before = {name: p.detach().clone() for name, p in pl_module.model.named_parameters()}

        def on_train_batch_end(self, trainer: Any, pl_module: TextVAE, *args: Any) -> None:
            moved = {
                n.split(".")[0] for n, p in pl_module.model.named_parameters() if not torch.equal(p, self.before[n])
            }
            self.who.append("+".join(sorted(moved)))

    moved = Moved()
    fit(make(lagging=Lagging(inner=2, every=5)), data, moved, steps=4, limit_val_batches=0)
    assert moved.who == ["encoder+posterior", "encoder+posterior", "decoder", "encoder+posterior"]


# Other parts


def test_a_frozen_encoder_with_adapters(data: SentenceData, write: Any, rows: Any, tiny_bert: str) -> None:
    own = SentenceData(
        write("t.csv", rows), cut=Sentences(fewest=2), vocabulary_size=WORDS, tokenizer=tiny_bert, batch_size=8
    )
    torch.manual_seed(0)
    vae = TextVAE(
        WORDS,
        LATENT,
        encoder=partial(PretrainedEncoder, backbone=tiny_bert),
        decoder=partial(TransformerDecoder, width=8, layers=1, heads=2, dropout=0.2),
        information=LatentInformation(critic=partial(ConcatCritic, hidden=8), of="tokens"),
    )
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    train = ["model.decoder", "model.posterior", "information"]
    adapters = AdapterInjection(partial(LoRA, rank=2), targets=[r"encoder\.backbone\.encoder\..*"], train=train)
    trainer = fit(vae, own, adapters, steps=3, val_check_interval=1)
    assert math.isfinite(trainer.callback_metrics["val/nll"])
    moved = {n for n, p in vae.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert moved
    assert not any("backbone" in name for name in moved)
    # Both factors have moved: A only once B is not 0, which it is at the start.
    factors = [p for n, p in vae.named_parameters() if n.endswith((".A", ".B"))]
    assert factors
    assert all(p.abs().sum() > 0 for p in factors)
    with pytest.raises(ValueError, match="PretrainedEncoder reads subwords, and the batch has none"):
        vae.model(next(iter(_ready(data).val_dataloader())))


def _ready(data: SentenceData) -> SentenceData:
    data.setup("fit")
    return data


def test_the_encoder_does_not_look_at_filling() -> None:
    encoder, batch = LSTMEncoder(WORDS, embedding=6, hidden=8), batch_of()
    short: Any = {"tokens": batch["tokens"][:1, :5], "lengths": batch["lengths"][:1]}
    whole, alone = encoder(batch), encoder(short)  # type: ignore[arg-type]
    assert isinstance(whole, Encoded)
    torch.testing.assert_close(whole.state[:1], alone.state)
    torch.testing.assert_close(whole.tokens[:1], alone.tokens)


@pytest.mark.parametrize(
    ("make_it", "sentence"),
    [
        (lambda: LatentInformation(0.0), r"weight=0\.0: information is maximised here, .* kl_weight"),
        (lambda: LatentInformation(-1.0), r"A lower bound cannot be minimised"),
        (lambda: LatentInformation(estimator="info_nce"), r"estimator='info_nce': choose one of 'dv', 'jsd', 'nwj'"),
        (lambda: LatentInformation(of="words"), r"of='words': choose 'state' or 'tokens'"),
        (lambda: LatentInformation(critic_steps=0), r"critic_steps=0: the critic has 1 step"),
        (lambda: LatentInformation(warmup=2), r"warmup=2: it is a share of the steps"),
        (lambda: LatentInformation(rate=0.0), r"rate=0\.0: it is the newest batch's share"),
        (lambda: LatentInformation(clip=0.0), r"clip=0\.0: the critic's rate and largest norm are above 0"),
        (lambda: FreeBits(0.0), r"nats=0\.0: it is what the divergence may be for nothing, above 0"),
        (lambda: FreeBits(1.0, over="all"), r"over='all': choose 'unit' or 'total'"),
        (lambda: LinearAnnealing(start=-1), r"start=-1, stop=1\.0: the weight of a divergence is 0 or above"),
        (lambda: LinearAnnealing(share=0), r"share=0: it is the share of the steps"),
        (lambda: Lagging(inner=0), r"inner=0: it is a number of turns, at least 1"),
        (lambda: make(kl_weight=-0.1), r"kl_weight=-0\.1: the weight of a divergence is 0 or above"),
        (lambda: make(samples=0), r"samples=0: it must be at least 1"),
        (lambda: LSTMDecoder(9, 2, dropout=1.0), r"dropout=1\.0: it is a share of the entries"),
        (lambda: TransformerDecoder(9, 2, width=9, heads=2), r"heads=2 do not divide width=9"),
        (lambda: make().model.interpolate(torch.zeros(4), torch.ones(4), steps=1), r"steps=1: a line has at least 2"),
        (
            lambda: make().model.decode(torch.zeros(2, 3)),
            r"z must be \(batch, 4\), one point in each row. Got \(2, 3\)",
        ),
        (lambda: make().model.read([]), r"sentences is empty: give at least one"),
        (lambda: make().model.sample(1, temperature=-1.0), r"temperature=-1\.0: it is 0 for the likeliest words"),
    ],
)
def test_bad_arguments(make_it: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_it()


@pytest.mark.parametrize(
    ("make_it", "error", "sentence"),
    [
        (lambda: LatentInformation(math.nan), ValueError, r"weight must be finite\. Got nan"),
        (lambda: LatentInformation(math.inf), ValueError, r"weight must be finite\. Got inf"),
        (lambda: LatentInformation(lr=math.nan), ValueError, r"lr must be finite\. Got nan"),
        (lambda: LatentInformation(clip=math.nan), ValueError, r"clip must be finite\. Got nan"),
        (lambda: LatentInformation(critic=None), TypeError, r"critic makes a critic from two widths, .* Got None"),
        (lambda: FreeBits(math.nan), ValueError, r"nats must be finite\. Got nan"),
        (lambda: LinearAnnealing(math.nan), ValueError, r"start must be finite\. Got nan"),
        (lambda: make(kl_weight=math.nan), ValueError, r"kl_weight must be finite\. Got nan"),
        (lambda: make(kl_weight="1"), TypeError, r"kl_weight must be a number\. Got '1'"),
        (lambda: make(lr=math.nan), ValueError, r"lr must be finite\. Got nan"),
        (lambda: make(lr=-1.0), ValueError, r"lr=-1\.0, weight_decay=0\.0: a rate and a decay are 0 or above"),
        (lambda: make(weight_decay=-1.0), ValueError, r"weight_decay=-1\.0: a rate and a decay are 0 or above"),
        (lambda: make(spread=math.nan), ValueError, r"spread must be finite\. Got nan"),
        (lambda: make(seed=0.5), TypeError, r"seed must be an integer\. Got 0\.5"),
        (lambda: make(free_bits=0.1), TypeError, r"free_bits must be a FreeBits, such as FreeBits\(\)\. Got 0\.1"),
        (lambda: make(information=0.5), TypeError, r"information must be a LatentInformation, such as"),
        (lambda: make(lagging=True), TypeError, r"lagging must be a Lagging, such as Lagging\(\)\. Got True"),
    ],
)
def test_arguments_that_are_no_such_numbers_or_parts(make_it: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        make_it()


def test_one_string_is_no_list_of_sentences() -> None:
    with pytest.raises(TypeError, match=r"sentences='the sky': give a list of sentences, \['the sky'\]"):
        make().model.read("the sky")


def test_one_critic_is_not_for_two(data: SentenceData) -> None:
    information = LatentInformation()
    make(information=information)
    with pytest.raises(RuntimeError, match="this LatentInformation belongs to a TextVAE already; give each its own"):
        make(information=information)


def test_vocabularies_must_fit(data: SentenceData, write: Any) -> None:
    small = TextVAE(6, LATENT, encoder=partial(LSTMEncoder, hidden=4), decoder=partial(LSTMDecoder, hidden=4))
    with pytest.raises(ValueError, match=r"the data has 12 words, and TextVAE has room for vocabulary_size=6"):
        Trainer(**QUIET).test(small, datamodule=data)
    vae = make()
    fit(vae, data, steps=1)
    other = SentenceData(write("o.csv", [("one two three", "a")] * 9), test="o.csv", cut=Sentences(fewest=2))
    with pytest.raises(
        ValueError, match=r"the data's vocabulary is not the one of training: word 4 of 12 and 7 differs"
    ):
        Trainer(**QUIET).test(vae, datamodule=other)
