"""A posterior as a checkpoint has it, beside a module that was built anew."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from lightning.pytorch.trainer.connectors.accelerator_connector import _PRECISION_INPUT_STR
from torch import nn

from lightning_peft.archive import AdapterFileError
from lightning_peft.certification.accounting import PriorData
from lightning_peft.checkpoint import ENTRY
from lightning_peft.regularizers.posterior import Posterior
from lightning_peft.validation import check_plain

_CLASS = f"{Posterior.__module__}:{Posterior.__qualname__}"


def posterior_from(module: nn.Module, checkpoint: Mapping[str, Any], source: str) -> Posterior:
    """Build the posterior that a checked checkpoint has, with its tensors.

    Args:
        module: has been loaded from the same checkpoint.
        checkpoint: what was read and checked.
        source: what to call it.

    Raises:
        AdapterFileError: it has none or several, or one that does not fit the module.
    """
    found = [each for each in checkpoint[ENTRY]["recipe"].get("beside", []) if each["class"] == _CLASS]
    if len(found) != 1:
        raise AdapterFileError(
            f"{source} has {len(found) or 'no'} posteriors, and a certificate is of one. Train with a PACBayes term: "
            "Regularization({'pac_bayes': PACBayes()})."
        )
    prefix, arguments = f"{found[0]['path']}.", found[0]["arguments"]
    state = checkpoint["state_dict"]
    tensors = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    try:
        names, settings = list(arguments["names"]), {key: arguments[key] for key in ("speed", "prior", "seed")}
        posterior = Posterior(module, over=[re.escape(name) for name in names], **settings)
        own = posterior.state_dict()
        if list(posterior.names) != names or own.keys() != tensors.keys():
            raise ValueError("it is over other parameters than the model trains")
        for name, tensor in tensors.items():
            # A scale is one number, or one per entry or parameter.
            sizes = (own["offset"].shape, (len(names),), ()) if "start" in name else (own[name].shape,)
            if tensor.shape not in sizes or tensor.dtype != own[name].dtype:
                raise ValueError(f"{name!r} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}")
            if name == "prior_offset" or tensor.shape == own[name].shape:
                continue
            setattr(posterior, name, tensor.clone())
        if posterior.prior_offset is not None and tensors["prior_start"].shape != tensors["prior_offset"].shape:
            raise ValueError("its learnt prior scales are not as many as they began with")
        posterior.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise AdapterFileError(f"{source} has a posterior that does not fit this model: {error}.") from error
    return posterior


def prior_data_from(checkpoint: Mapping[str, Any], source: str) -> PriorData | None:
    """The examples that chose the prior, as the callback of the run has noted them; none if there were none.

    Raises:
        AdapterFileError: the note is not as we write it.
    """
    facts = _noted(checkpoint, "RiskCertificate", "prior_data")
    if facts is None:
        return None
    check_plain(facts, source)
    try:
        return PriorData.read(facts)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{source} {error}.") from error


def precision_from(checkpoint: Mapping[str, Any], source: str) -> Any:
    """What the run computed in, as the Trainer names it; full where the checkpoint is older than such a note.

    Raises:
        AdapterFileError: there is no such precision.
    """
    found = _noted(checkpoint, "AdapterCheckpoint", "precision")
    if found is not None and found not in get_args(_PRECISION_INPUT_STR):
        raise AdapterFileError(f"{source} names the precision {found!r}, which Lightning does not know.")
    return found or "32-true"


def tried_from(checkpoint: Mapping[str, Any], source: str) -> int:
    """Among how many distributions the run says that this one was chosen; 1 if it says nothing.

    Raises:
        AdapterFileError: it says no such number.
    """
    found = _noted(checkpoint, "RiskCertificate", "tried")
    if found is not None and (type(found) is not int or found < 1):
        raise AdapterFileError(f"{source} says that {found!r} distributions were tried, which is no number of them.")
    return 1 if found is None else found


def _noted(checkpoint: Mapping[str, Any], callback: str, name: str) -> Any:
    """What a callback's state has by this name; ``None`` if there is nothing."""
    states = checkpoint.get("callbacks")
    held = states.items() if isinstance(states, dict) else ()
    found = [state.get(name) for key, state in held if str(key).startswith(callback) and isinstance(state, dict)]
    return next((each for each in found if each is not None), None)


def monitors_of(checkpoint: Mapping[str, Any]) -> list[str]:
    """The figures that checkpoints of the run were kept by."""
    states = checkpoint.get("callbacks")
    held = states.values() if isinstance(states, dict) else ()
    found = [state.get("monitor") for state in held if isinstance(state, dict)]
    return [monitor for monitor in found if isinstance(monitor, str)]
