"""Certificate: everything that a risk certificate follows from, as a file from which anyone can recompute it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_peft.archive import AdapterFileError
from lightning_peft.atomic import write_whole
from lightning_peft.functional.risk_bounds import certified_risk, effective_units

Unit = Literal["pass", "batch", "example"]
"""What shares one draw of the noise."""
VERSION = 1
_SCHEME = (
    "bound = kl^-1(q, (kl + ln(2 sqrt(examples) tried / delta)) / examples); "
    "q = kl^-1(errors / (examples passes), ln(2 tried / delta_prime) / units)"
)


@dataclass(frozen=True)
class Certificate:
    """A bound on the risk of the networks drawn from Q, and what it follows from; print it.

        e = errors / (examples passes)
        q = kl^-1( e, ln(2 tried / delta') / units )
        bound = kl^-1( q, (kl + ln(2 sqrt(examples) tried / delta)) / examples )

    With probability at least 1 - delta - delta', over the bound set and the noise, a network drawn from Q errs on new
    data of the same kind with probability at most `bound`. It says nothing of the mean of Q, which is usually better.

    Attributes:
        bound: the certificate; 0-1 risk.
        monte_carlo: q, the largest risk on the bound set that the draws leave possible.
        errors: wrong predictions of all passes; of sequences, the shares of wrong places.
        cross_entropy: mean bounded cross-entropy, in [0, 1]; reported, not bounded.
        p_min: the probability at which that is bounded.
        examples: n, of the bound set.
        passes: how often the bound set was gone through.
        unit: what shares one draw of the noise: a whole pass, a batch, or nothing ("example").
        batch_size: examples per batch at most.
        kl: KL(Q || P) in nats, in float64, from the final parameters; with the cost of prior scales that were learnt.
        parameters: entries of Q.
        delta: probability that the bound fails over the choice of the bound set.
        delta_prime: probability that the draws mislead.
        tried: distributions among which this one was chosen by looking at the bound set.
        seed: of the noise.
        precision: what the network was run in, as the Trainer names it.
        hashes: SHA-256 of what was certified: "mean", "sigma", "prior_mean", "prior_sigma", "bound_set", "base".
        prior: what is known of how the prior was chosen: plain values by name.
        versions: of the packages that did it.
    """

    bound: float
    monte_carlo: float
    errors: float
    cross_entropy: float
    p_min: float
    examples: int
    passes: int
    unit: Unit
    batch_size: int
    kl: float
    parameters: int
    delta: float
    delta_prime: float
    tried: int
    seed: int
    precision: str
    hashes: Mapping[str, str]
    prior: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, **inputs: Any) -> Certificate:
        """The certificate that follows from what was counted: all attributes by name but `bound` and `monte_carlo`."""
        monte_carlo, bound = cls(bound=1.0, monte_carlo=1.0, **inputs).recompute()
        return cls(bound=bound, monte_carlo=monte_carlo, **inputs)

    @property
    def risk(self) -> float:
        """Empirical Gibbs risk: errors over predictions."""
        return self.errors / (self.examples * self.passes)

    @property
    def confidence(self) -> float:
        """1 - delta - delta'."""
        return 1 - self.delta - self.delta_prime

    @property
    def units(self) -> float:
        """As how many independent draws the errors count."""
        shared = {"pass": self.examples, "batch": min(self.batch_size, self.examples), "example": 1}[self.unit]
        return effective_units(self.examples * self.passes, shared)

    def recompute(self) -> tuple[float, float]:
        """Monte-Carlo bound and certificate, from the attributes that they follow from."""
        numbers = (self.examples, self.delta, self.delta_prime, self.tried)
        return certified_risk(min(self.risk, 1.0), self.units, self.kl, *numbers)

    def rows(self) -> list[tuple[str, str]]:
        """The table: what, and its value."""
        draws = {"pass": "one draw a pass", "batch": f"a draw for each batch of {self.batch_size}"}
        return [
            ("certified risk", f"{self.bound:.4f}" + (" (says nothing)" if self.bound >= 1 else "")),
            ("confidence", f"{self.confidence:.4g}" + (f", of {self.tried} tried" if self.tried > 1 else "")),
            ("empirical Gibbs risk", f"{self.risk:.4f}"),
            ("with its sampling error", f"{self.monte_carlo:.4f}"),
            ("KL(Q || P)", f"{self.kl:,.1f} nats, {self.parameters:,} parameters"),
            ("bound set", f"{self.examples:,} examples"),
            ("noise", f"{self.passes} passes, {draws.get(self.unit, 'a draw for each example')}"),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            OSError: it could not be written.
        """
        content = {"version": VERSION, "scheme": _SCHEME, **asdict(self)}
        text = json.dumps(content | {"digest": _digest(content)}, indent=2, ensure_ascii=False, allow_nan=False)
        write_whole(path, f"{text}\n".encode())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Certificate:
        """Read what :meth:`save` wrote, and recompute it.

        Raises:
            FileNotFoundError: there is no such file.
            AdapterFileError: it is no certificate, it was changed, or what it claims does not follow from its figures.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no certificate {str(path)!r}.")
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise AdapterFileError(f"{path} cannot be read: it is cut short or no JSON ({error}).") from error
        if not isinstance(content, dict) or content.get("version") != VERSION:
            version = content.get("version") if isinstance(content, dict) else None
            raise AdapterFileError(
                f"{path} is no certificate of format version {VERSION}, which this release reads. Got {version!r}."
            )
        claimed = content.pop("digest", None)
        if claimed != _digest(content):
            raise AdapterFileError(
                f"{path} was changed after it was written: its contents do not match their digest. Use another copy."
            )
        del content["version"]
        content.pop("scheme", None)
        _check(content, path)
        found = cls(**content)
        try:
            follows = found.recompute()
        except ValueError as error:
            raise AdapterFileError(f"{path} holds figures that cannot be: {error}") from error
        # Another processor's logarithm may differ in its last digit.
        if not all(map(_is_close, follows, (found.monte_carlo, found.bound))):
            raise AdapterFileError(
                f"{path} claims a risk of {found.bound!r}, and {follows[1]!r} follows from its figures. Use another "
                "copy, or certify again."
            )
        return found


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


def _check(content: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Check that a file has the fields of a certificate, each of its type.

    Raises:
        AdapterFileError: one is missing, unknown or of another type.
    """
    known = {each.name: str(each.type) for each in fields(Certificate)}
    odd = sorted(content.keys() ^ known.keys())
    if odd:
        raise AdapterFileError(f"{path} is no certificate as we write it: {odd[0]!r} is missing or unknown.")
    for name, kind in known.items():
        value = content[name]
        if kind == "float":
            good = type(value) in (int, float) and math.isfinite(value)
        elif kind == "int":
            good = type(value) is int and value >= (0 if name == "seed" else 1)
        elif kind == "Unit":
            good = value in get_args(Unit)
        elif kind == "str":
            good = type(value) is str
        else:
            good = isinstance(value, dict) and (name == "prior" or all(type(item) is str for item in value.values()))
        if not good:
            raise AdapterFileError(f"{path} says that {name} is {value!r}, which it cannot be. Use another copy.")


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the fields. No signature: it finds accidents, and whoever writes the file writes it too."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
