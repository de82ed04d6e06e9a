"""RiskCertificate: when training ends, how often a network drawn from the posterior can err, at most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_peft.callbacks.board import KLPictures, boards
from lightning_peft.callbacks.calibration import Calibration
from lightning_peft.callbacks.order import callbacks_of, require_before
from lightning_peft.callbacks.placement import COPIERS, AdapterPlacement
from lightning_peft.callbacks.preflight import Preflight, optimized
from lightning_peft.callbacks.pruning import RankPruning
from lightning_peft.callbacks.regularization import Regularization
from lightning_peft.callbacks.undisturbed import undisturbed
from lightning_peft.certification.accounting import (
    PriorData,
    buffers,
    outside,
    posterior_of,
    require_apart,
    require_apart_in_batches,
    require_drawn,
    require_in_q,
    require_no_running_statistics,
    require_not_selected,
    require_unchanged,
    require_untaught_prior,
)
from lightning_peft.certification.bound_set import BoundSet, example_hash
from lightning_peft.certification.certify import Settings, certify
from lightning_peft.certification.counting import read_logits
from lightning_peft.certification.record import Certificate, Unit
from lightning_peft.distributed import together
from lightning_peft.fingerprint import fingerprint
from lightning_peft.rank.budget import clean_name
from lightning_peft.regularizers.posterior import Posterior
from lightning_peft.seams import when_built, wrap_method
from lightning_peft.surgery.layers import is_flattened

Read = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""Logits and labels of a batch, by a forward of the module."""
FILE = "certificate.json"


class RiskCertificate(Preflight):
    """When training ends, certify the posterior that a :class:`lightning_peft.PACBayes` term has trained.

        bound = kl^-1( kl^-1( e, ln(2 tried / delta') / units ), (KL(Q || P) + ln(2 sqrt(n) tried / delta)) / n )

    With probability at least 1 - delta - delta', a network drawn from Q errs on new data of the same kind with
    probability at most `bound`. e is counted over the bound set, with dropout off and fresh noise, KL is recomputed in
    float64 from the final parameters. No test set is needed, and nothing is said of the mean of Q or of other data.

    It is refused, with a sentence, where it would not hold: something is trained outside Q, the bound set chose the
    prior, or examples are dropped or repeated. Most of that is seen before the first step.

    The file `certificate.json` holds what the figure follows from, see :class:`lightning_peft.Certificate`. Loggers get
    `certificate/bound`, `certificate/risk`, `certificate/monte_carlo` and `certificate/kl`; TensorBoard a picture of KL
    per layer after every epoch. Random numbers, modes and metrics are left as they were.

    Several processes share the bound set, each example on one of them, and come to the figure that one process has.

    Args:
        data: the bound set: a DataLoader, a Dataset, or a sequence of examples, each of which is read once a pass;
            ``None`` for the training data, without those of `prior_data`.
        passes: how often the bound set is gone through.
        unit: what shares a draw of the noise: "batch", "example" (for vectors that multiply elementwise), or a "pass".
        delta: probability that the bound fails over the choice of the bound set.
        delta_prime: probability that the draws mislead.
        tried: distributions among which this one was chosen by looking at the bound set: checkpoints, runs, settings. A
            run that is continued keeps its own number, if that is larger.
        seed: of the noise.
        p_min: of the bounded cross-entropy, which is reported beside the errors.
        batch_size: examples per batch, of all processes alike; ``None`` for the loader's own.
        prior_data: the examples that the values at the start of this fit were trained on, if there were any: a Dataset,
            a part of one (`torch.utils.data.Subset`), or a loader of it.
        read: gets logits (batch, *places, classes) and labels (batch, *places) of a batch by a forward of the module.
            ``None`` calls it with the batch that has `labels`, or with the first of two.
        path: the file to write; ``None`` for `certificate.json` in the folder of checkpoints, or of logs.

    Attributes:
        certificate: what was found, once there is something.

    Raises:
        TypeError, ValueError: an argument is out of range or of another kind.
        MisconfigurationException: there is no posterior, the callbacks are in the wrong order, or the certificate would
            not hold.

    Reference:
        Perez-Ortiz et al., Tighter risk certificates for neural networks, JMLR 22(227), 2021, arXiv 2007.12911;
        Langford and Caruana, 2001, for the two inversions. Departures: noise per batch or example, where the paper
        draws one network per pass; KL from the final parameters, where its code keeps that of the last forward.

    Example:
        >>> RiskCertificate(passes=5).settings.unit
        'batch'
    """

    def __init__(
        self,
        data: Any = None,
        passes: int = 10,
        unit: Unit = "batch",
        delta: float = 0.025,
        delta_prime: float = 0.01,
        tried: int = 1,
        seed: int = 0,
        p_min: float = 1e-4,
        batch_size: int | None = None,
        prior_data: Any = None,
        read: Read | None = None,
        path: str | Path | None = None,
    ) -> None:
        self.settings = self._asked = Settings(passes, unit, delta, delta_prime, tried, seed, p_min)
        self.data, self.batch_size, self.read, self.path = data, batch_size, read or read_logits, path
        self._given = None if prior_data is None else PriorData.of(prior_data)
        self.prior_data = self._given
        self.certificate: Certificate | None = None
        self._base: Mapping[str, Tensor] = {}
        self._start: dict[str, int] = {}
        self._restored: dict[str, int] = {}
        self._built: dict[str, int] = {}
        self._continues = False  # whether it goes on from a run that was to be certified
        self._pictures: KLPictures | None = None
        self._stepping = False
        self._seen: BoundSet | None = None  # from the fit's start to the training's

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        require_before(trainer, self, AdapterPlacement, Regularization, *COPIERS)
        if stage == "fit":
            self._restored, self.certificate = {}, None
            self._continues, self.prior_data, self.settings = False, self._given, self._asked
            when_built(pl_module, self._print_base)

    def _print_base(self, module: LightningModule) -> None:
        self._built = {} if any(buffer.is_meta for buffer in module.buffers()) else buffers(module)
        if not any(map(is_flattened, module.parameters())):
            self._base = fingerprint(module)  # FSDP1 keeps no process's values in a shape where they could be found

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._seen = together(lambda: self._require_sound(trainer, pl_module))
        self._start = outside(pl_module, posterior_of(pl_module))

    def _require_sound(self, trainer: Trainer, module: LightningModule) -> BoundSet:
        """Check all that can be checked before training; gives the bound set.

        Raises:
            MisconfigurationException: the certificate would not hold.
        """
        posterior, held = posterior_of(module), optimized(trainer)
        terms = {id(p) for p in module.get_submodule("peft_terms").parameters()} if _has_terms(module) else set()
        named = {clean_name(n): p for n, p in module.named_parameters()}
        require_in_q(module, posterior, [n for n, p in named.items() if p.requires_grad and id(p) in held - terms])
        for callback in callbacks_of(trainer):
            if isinstance(callback, RankPruning):
                raise MisconfigurationException(
                    "RankPruning closes components by what it sees of the training data, and masks are not in Q, so "
                    "the certificate would not account for the choice. Train without RankPruning."
                )
            if isinstance(callback, Calibration):
                raise MisconfigurationException(
                    "Calibration chooses ranks by what it sees of the training data, and masks are not in Q, so the "
                    "certificate would not account for the choice. Train without Calibration, or calibrate in a fit "
                    "before this one, on examples that are then given as prior_data."
                )
        require_apart_in_batches(module)
        require_drawn(posterior, self.settings.unit)
        kept = [getattr(c, "monitor", None) for c in callbacks_of(trainer) if isinstance(c, Checkpoint)]
        require_not_selected([monitor for monitor in kept if monitor], self.settings.tried)
        return self._bound_set(trainer)

    def _require_known_prior(self, trainer: Trainer, module: LightningModule) -> None:
        """Check that what the prior has learned from is known, of this run or of the one that it continues.

        Raises:
            MisconfigurationException: it is not, or that run had chosen something that is not in Q.
        """
        if not self._continues and trainer.ckpt_path is not None:
            # Nobody noted what was outside Q when that run began: this module, as it was built, has to say so.
            now = buffers(module)
            require_unchanged(self._built, {name: value for name, value in now.items() if name in self._built})
        if self.prior_data is None:
            advice = "Say what it was: RiskCertificate(prior_data=<a Dataset>)."
            require_untaught_prior(module, posterior_of(module), advice)

    def _require_steady(self, trainer: Trainer, module: LightningModule, data: BoundSet) -> None:
        """Check that a batch is the same each time that it is brought to the device.

        Raises:
            MisconfigurationException: it is not.
        """
        with undisturbed(trainer, module), _as_predicting(trainer, module):
            batches = [_transferred(trainer, module, batch) for batch in data.read([0, 0])]
        try:
            same = example_hash(batches[0]) == example_hash(batches[1])
        except TypeError:
            return  # of a class whose contents cannot be told
        if not same:
            raise MisconfigurationException(
                f"on_before_batch_transfer or on_after_batch_transfer of {type(module).__name__}, or of its data, "
                "gives another batch each time: something is drawn in it (augmentation, mixing), and a certificate "
                "counts examples as they are. Draw only where self.trainer.training is true."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Here, because a strategy that shards restores after our on_fit_start.
        together(lambda: self._require_known_prior(trainer, pl_module))
        data, self._seen = self._seen, None
        assert data is not None
        together(lambda: self._require_steady(trainer, pl_module, data))
        self._stepping = False
        self._start |= self._restored  # of the run that this one continues
        self._restored = {}
        if trainer.is_global_zero and boards(trainer):
            self._pictures = KLPictures(posterior_of(pl_module).names)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Here, because by now whoever keeps a layer in eval mode has put it there.
        if not self._stepping:
            self._stepping = True
            together(lambda: require_no_running_statistics(pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._pictures is not None:
            found = {name: float(kl) for name, kl in posterior_of(pl_module).kl_by_name().items()}
            self._pictures.draw(boards(trainer), found, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not on_fit_end: by then the strategy has taken the module off its device and out of its wrapper.
        posterior = posterior_of(pl_module)
        data = together(lambda: self._require_still_sound(trainer, pl_module, posterior))
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        steps = self.settings.passes * -(-len(data.batches) // trainer.world_size)
        with (
            undisturbed(trainer, pl_module),
            self._predicting(trainer, pl_module) as predict,
            Tqdm(total=steps, desc="Certificate", disable=not shown, leave=False) as bar,
        ):
            self.certificate = found = certify(
                pl_module, posterior, data, predict, self.settings,
                base=self._base, prior_data=self.prior_data, precision=str(trainer.precision), advance=bar.update,
            )  # fmt: skip
        if trainer.is_global_zero:
            figures = {"bound": found.bound, "risk": found.risk, "monte_carlo": found.monte_carlo, "kl": found.kl}
            for logger in trainer.loggers:
                logger.log_metrics({f"certificate/{k}": v for k, v in figures.items()}, trainer.global_step)
        path = self._path(trainer)
        together(lambda: found.save(path) if trainer.is_global_zero else None)
        rank_zero_info(f"{found}\nWrote {path}.")

    def _require_still_sound(self, trainer: Trainer, module: LightningModule, posterior: Posterior) -> BoundSet:
        require_unchanged(self._start, outside(module, posterior))
        return self._bound_set(trainer)

    @contextmanager
    def _predicting(
        self, trainer: Trainer, module: LightningModule
    ) -> Iterator[Callable[[Any], tuple[Tensor, Tensor]]]:
        """What gives logits and labels of a batch, run by the strategy in its precision."""
        strategy = trainer.strategy

        def read(call: Callable[..., Any], owner: nn.Module, batch: Any, *args: Any) -> Any:
            return self.read(owner, batch)

        def predict(batch: Any) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = strategy.predict_step(_transferred(trainer, module, batch), 0)
            return found

        with _as_predicting(trainer, module), ExitStack() as back:
            back.callback(wrap_method(module, "predict_step", read))
            yield predict

    def _bound_set(self, trainer: Trainer) -> BoundSet:
        """The examples to count over.

        Raises:
            MisconfigurationException: they cannot be counted once each, or have chosen the prior.
        """
        try:
            if self.data is not None:
                data = BoundSet(self.data, self.batch_size)
            else:
                data = BoundSet(_training_loader(trainer), self.batch_size)
                if self.prior_data is not None:
                    data.keep(self.prior_data.rest(data))
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if self.prior_data is not None and self.data is not None:
            require_apart(self.prior_data, data)
        return data

    def _path(self, trainer: Trainer) -> Path:
        if self.path is not None:
            return Path(self.path)
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.log_dir or trainer.default_root_dir
        return Path(folder) / FILE

    def state_dict(self) -> dict[str, Any]:
        facts = None if self.prior_data is None else self.prior_data.facts()
        # Of the base each process may have a part of its own, and nothing of it is in the checkpoint.
        start = {name: value for name, value in self._start.items() if name not in self._base}
        tried = self.settings.tried
        return {"start": start, "prior_data": facts, "tried": tried}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict.get("start", {}))
        self._continues = True
        tried = max(self._asked.tried, int(state_dict.get("tried", 1)))  # what was compared has been
        self.settings = replace(self._asked, tried=tried)
        facts = state_dict.get("prior_data")
        if facts is None:
            return
        noted = PriorData.read(facts)
        if self._given is not None and self._given != noted:
            raise MisconfigurationException(
                f"{len(noted.places)} of {noted.size} examples had chosen the prior of the run that this one "
                f"continues, and prior_data names {len(self._given.places)} of {self._given.size}. Leave prior_data "
                "out, or give the same examples."
            )
        self.prior_data = noted


@contextmanager
def _as_predicting(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Inside, a hook that asks is told that this is no training; inside of `undisturbed`, which puts modes back."""
    stage = trainer.state.stage
    trainer.predicting = True
    module.eval()
    try:
        yield
    finally:
        trainer.state.stage = stage


def _transferred(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """A batch in the run's precision and on its device, with the hooks around it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _training_loader(trainer: Trainer) -> Any:
    """The loader of the training data.

    Raises:
        ValueError: there are several.
    """
    trainer.fit_loop.setup_data()  # which does nothing where it was done
    combined = trainer.fit_loop._combined_loader
    loaders = [] if combined is None else combined.flattened
    if len(loaders) != 1:
        raise ValueError(
            f"there are {len(loaders)} training loaders, and no telling which of them has the bound set: give it, "
            "RiskCertificate(data=...)."
        )
    return loaders[0]


def _has_terms(module: nn.Module) -> bool:
    return "peft_terms" in dict(module.named_children())
