"""What a certificate has to account for: all that the bound set may have decided is in Q, or is paid for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lightning_peft.certification.bound_set import BoundSet, example_hash, form, root
from lightning_peft.distributed import fingerprint, is_shard, whole
from lightning_peft.rank.budget import clean_name
from lightning_peft.regularizers.posterior import Posterior
from lightning_peft.surgery.layers import adapters

_VALIDATION = ("val", "valid", "validation", "test", "dev", "heldout", "held_out")
"""What the names of figures begin with that are not of the training set."""


def posterior_of(module: nn.Module) -> Posterior:
    """The Gaussian over a module's parameters that one of its terms holds.

    Raises:
        MisconfigurationException: there is none, or several.
    """
    found = [child for child in module.modules() if isinstance(child, Posterior)]
    if len(found) != 1:
        raise MisconfigurationException(
            f"a certificate is of a distribution over what is trained, and {type(module).__name__} has "
            f"{len(found) or 'none'}. Have one PACBayes term: Regularization({{'pac_bayes': PACBayes()}})."
        )
    return found[0]


def in_q(module: nn.Module, posterior: Posterior) -> dict[str, nn.Parameter]:
    """The parameters that Q is over, by name, in its order."""
    named = {clean_name(n): p for n, p in module.named_parameters(remove_duplicate=False)}
    return {name: named[name] for name in posterior.names}


def buffers(module: nn.Module) -> dict[str, int]:
    """A number for the bits of every buffer, by name; the terms' own are left out."""
    named = {clean_name(name): buffer for name, buffer in module.named_buffers()}
    return _prints({name: buffer for name, buffer in named.items() if name.split(".")[0] != "peft_terms"})


def sha256(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors' dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        value = whole(tensor.detach()).cpu().contiguous()
        total.update(f"{value.dtype}|{tuple(value.shape)}|".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@torch.no_grad()
def outside(module: nn.Module, posterior: Posterior) -> dict[str, int]:
    """A number for the bits of every parameter and buffer that is not in Q, by name; of a shard, its own part's.

    The terms' own tensors are left out: they take no part in a prediction.
    """
    held = {id(p) for p in in_q(module, posterior).values()}
    found: dict[str, Tensor] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        clean = clean_name(name)
        if id(tensor) in held or clean.split(".")[0] == "peft_terms":
            continue
        found[clean] = tensor
    return _prints(found)


def _prints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    own: Any = {name: tensor.detach() for name, tensor in tensors.items()}
    local: dict[str, Tensor] = {n: t.to_local() if is_shard(t) else t for n, t in own.items()}
    local = {name: tensor for name, tensor in local.items() if tensor.numel() and not tensor.is_complex()}
    prints = [fingerprint(tensor.contiguous()).cpu() for tensor in local.values()]
    return dict(zip(local, torch.stack(prints).tolist() if prints else [], strict=True))


def require_unchanged(before: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Check that what is outside Q is what it was before the bound set was looked at.

    Raises:
        MisconfigurationException: it is not.
    """
    for name, value in now.items():
        if before.get(name, value) != value:
            raise MisconfigurationException(
                f"{name!r} was changed while training and is not in Q, so the certificate would not account for what "
                "it learnt from the bound set. Take it into Q, or keep it as it was."
            )


def require_in_q(module: nn.Module, posterior: Posterior, trained: Iterable[str]) -> None:
    """Check that all that is being trained is in Q.

    Args:
        module: the module.
        posterior: Q.
        trained: names of what an optimizer changes.

    Raises:
        MisconfigurationException: a parameter is not.
    """
    missing = [name for name in trained if name not in posterior.names]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MisconfigurationException(
            f"{missing[0]!r}{others} is trained and not in Q, so the certificate would not account for what it learns "
            "from the bound set. Let PACBayes take it in (leave `over` out), or freeze it: "
            "AdapterInjection(..., train=[])."
        )


def require_drawn(posterior: Posterior, unit: str) -> None:
    """Check that every example can have noise of its own, where that is what is counted.

    Raises:
        MisconfigurationException: some parameters share a draw within a batch.
    """
    if unit == "example" and posterior.shared():
        raise MisconfigurationException(
            f"unit='example' counts every example as a draw of its own, and {posterior.shared()[0]!r} has one draw for "
            "a batch: only vectors that multiply elementwise and linear layers on (batch, d) can have one each. Use "
            "unit='batch'."
        )


def require_apart_in_batches(module: nn.Module) -> None:
    """Check that what is predicted of an example is a matter of that example.

    Raises:
        MisconfigurationException: a layer normalizes by other examples too.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            raise MisconfigurationException(
                f"{clean_name(name)!r} normalizes by the statistics of a batch, also in eval mode, so that an "
                "example's error depends on others, and a certificate needs them independent. Use "
                "track_running_stats=True, or LayerNorm."
            )


def require_no_running_statistics(module: nn.Module) -> None:
    """Check that no layer, in the mode that it is in, will learn statistics of the batches that it is given.

    Raises:
        MisconfigurationException: one will.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _NormBase) and layer.training and layer.running_mean is not None:
            raise MisconfigurationException(
                f"{clean_name(name)!r} keeps running statistics of the batches that it is trained on, which are not in "
                "Q, so the certificate would not account for what they learn from the bound set. Keep them as they "
                "are: put it into eval mode in on_train_epoch_start; or use LayerNorm or GroupNorm."
            )


def require_not_selected(monitors: Sequence[str], tried: int) -> None:
    """Check that nothing was chosen by looking at the bound set, or that it is said among how many.

    Args:
        monitors: figures that checkpoints are kept by.
        tried: distributions that were compared.

    Raises:
        MisconfigurationException: a figure may be of the bound set.
    """
    if tried > 1:
        return
    for monitor in monitors:
        head = monitor.replace("-", "/").split("/")[0].lower()
        if not f"{head}_".startswith(tuple(f"{name}_" for name in _VALIDATION)):
            raise MisconfigurationException(
                f"checkpoints are kept by {monitor!r}, which may be a figure of the bound set, so the best of several "
                "would be certified as if it were the only one. Say how many were compared (tried=...), or monitor a "
                "figure of other data, such as 'val/loss'."
            )


def first_trained(module: nn.Module) -> str | None:
    """The first adapted layer whose adapter has learned something; none if all give their base's weight."""
    for name, adapter in adapters(module).items():
        base = getattr(adapter.base, "weight", None)
        if not adapter.identity_at_start or adapter.releases_base or not adapter.mergeable:
            continue
        if not isinstance(base, Tensor) or is_shard(base) or getattr(base, "_fsdp_flattened", False):
            continue
        with torch.no_grad():
            if not torch.equal(adapter.weight, base):
                return name
    return None


@torch.no_grad()
def first_trained_prior(module: nn.Module, posterior: Posterior) -> str | None:
    """The first adapted layer whose adapter has learned something by the prior's mean; none if no one has."""
    parameters = list(in_q(module, posterior).values())
    before = [p.detach().clone() for p in parameters]
    means = posterior.prior_mean.split([p.numel() for p in parameters])
    try:
        for p, mean in zip(parameters, means, strict=True):
            p.copy_(mean.view_as(p))
        return first_trained(module)
    finally:
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)


def require_untaught_prior(module: nn.Module, posterior: Posterior, advice: str) -> None:
    """Check that the prior has learned nothing, for where nobody says what it may have learned from.

    Args:
        module: the module.
        posterior: Q, with its prior, of this run or of the one that it continues.
        advice: what to do about it.

    Raises:
        MisconfigurationException: an adapter is no longer at its start, or the module had been trained.
    """
    adapter = first_trained_prior(module, posterior)
    if adapter is not None:
        raise MisconfigurationException(
            f"the adapter at {adapter!r} had learned something before the prior was taken from it, and what it had "
            f"learned from must not certify. {advice}"
        )
    if posterior.after_training:
        raise MisconfigurationException(
            f"{type(module).__name__} had been trained before the prior was taken from it, and what it had learned "
            f"from must not certify. {advice}"
        )


def require_finite(module: nn.Module, posterior: Posterior) -> float:
    """KL(Q || P), as :meth:`Posterior.divergence` has it; at least 0, below which rounding may take it.

    Raises:
        MisconfigurationException: it is no number.
    """
    kl = posterior.divergence()
    if isfinite(kl):
        return max(kl, 0.0)
    odd = [name for name, p in in_q(module, posterior).items() if not bool(whole(p.detach()).isfinite().all())]
    raise MisconfigurationException(
        f"KL(Q || P) is {kl}: training has diverged; {repr(odd[0]) if odd else 'a sigma or a lambda'} is no longer "
        "finite, and there is nothing to certify. Train with a lower learning rate, or clip gradients."
    )


@dataclass(frozen=True)
class PriorData:
    """The examples that the prior was chosen by: plain values, for a checkpoint.

    Attributes:
        dataset: SHA-256 of the whole data set that they are a part of.
        size: examples of that data set.
        places: where they stand in it.
        hashes: a number for each of them, by its content.
        form: how its first example is built, see :func:`~lightning_peft.certification.bound_set.form`.
    """

    dataset: str
    size: int
    places: tuple[int, ...]
    hashes: tuple[int, ...]
    form: str

    @classmethod
    def of(cls, data: Any) -> PriorData:
        """Of a data set, a part of one (`torch.utils.data.Subset`), or a loader of either."""
        dataset, places = root(BoundSet(data).dataset)
        every = [example_hash(dataset[i]) for i in range(len(dataset))]
        hashes = tuple(_number(every[i]) for i in places)
        return cls(_joint(every), len(every), tuple(places), hashes, form(dataset[places[0]]))

    @classmethod
    def read(cls, facts: Any) -> PriorData:
        """Of what :meth:`facts` has given.

        Raises:
            ValueError: it was not.
        """
        if not isinstance(facts, dict) or facts.keys() != {each.name for each in fields(cls)}:
            raise ValueError("does not say which examples chose the prior as we write it")
        return cls(**facts | {"places": tuple(facts["places"]), "hashes": tuple(facts["hashes"])})

    def facts(self) -> dict[str, Any]:
        """What a checkpoint holds: text and numbers."""
        return {**asdict(self), "places": list(self.places), "hashes": list(self.hashes)}

    def rest(self, data: BoundSet) -> list[int]:
        """Places in the bound set that are none of these examples, where the data set is the same one.

        Raises:
            MisconfigurationException: it is another data set and holds examples of the same content, or of a form in
                which that cannot be told.
        """
        dataset, places = root(data.dataset)
        every = [example_hash(dataset[i]) for i in range(len(dataset))]
        if (_joint(every), len(every)) == (self.dataset, self.size):
            taken = set(self.places)
            return [i for i, place in enumerate(places) if place not in taken]
        here = form(dataset[places[0]])
        if here != self.form:
            raise MisconfigurationException(
                f"prior_data has other forms of examples than the bound set, {self.form} and {here}, so there is no "
                "telling whether they are the same ones. Give it as the bound set's loader reads it: "
                "Subset(loader.dataset, places)."
            )
        known = set(self.hashes)
        equal = sum(_number(every[place]) in known for place in places)
        if equal:
            raise MisconfigurationException(
                f"{equal} of the bound set's {len(places)} examples are among those that chose the prior, by their "
                "content. Give the data set that the prior's part was taken from, whose other part is the bound set, "
                "or data that the prior never saw."
            )
        return list(range(len(places)))


def require_apart(prior: PriorData, data: BoundSet) -> None:
    """Check that the bound set has no example that chose the prior.

    Raises:
        MisconfigurationException: it has.
    """
    shared = len(data) - len(prior.rest(data))
    if shared:
        raise MisconfigurationException(
            f"{shared} of the bound set's {len(data)} examples chose the prior, so they cannot certify. Leave data out "
            "to certify on the other examples of the training set, or give those."
        )


def _joint(hashes: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for each in hashes:
        total.update(each)
    return total.hexdigest()


def _number(each: bytes) -> int:
    return int.from_bytes(each[:8], "big") >> 1
