"""The record of a certificate: its figures follow from it, and whatever is changed in it is noticed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_peft import AdapterFileError
from lightning_peft.certification import Certificate

INPUTS: dict[str, Any] = {
    "errors": 6000.0,
    "cross_entropy": 0.01,
    "p_min": 1e-4,
    "examples": 30_000,
    "passes": 10,
    "unit": "batch",
    "batch_size": 2,
    "kl": 100.0,
    "parameters": 1000,
    "delta": 0.025,
    "delta_prime": 0.01,
    "tried": 1,
    "seed": 0,
    "precision": "32-true",
    "hashes": {"mean": "aa", "bound_set": "bb"},
    "prior": {"chosen by": "no data"},
    "versions": {"torch": "2.13.0"},
}


def made(**changes: Any) -> Certificate:
    return Certificate.of(**{**INPUTS, **changes})


def test_golden_values() -> None:
    """Card of PAC-Bayes, property 6: an error of 0.02 over 150,000 draws, KL 100, n 30,000."""
    found = made()
    assert found.units == 150_000
    assert found.risk == 0.02
    assert found.monte_carlo == pytest.approx(0.021199, abs=1e-6)
    assert found.bound == pytest.approx(0.035915, abs=1e-6)
    few = made(unit="pass", passes=1000, errors=600_000.0)
    assert few.units == 1000
    assert few.monte_carlo == pytest.approx(0.037935, abs=1e-6)
    assert few.bound == pytest.approx(0.056548, abs=1e-6)


def test_units() -> None:
    assert made(unit="example").units == 300_000
    assert made(unit="pass").units == 10
    assert made(batch_size=7).units == pytest.approx(300_000 / 7)  # the last batch is smaller
    assert made(batch_size=40_000).units == 10  # one batch is all there is


@pytest.mark.parametrize(
    "harder",
    [
        {"kl": 200.0},
        {"errors": 7000.0},
        {"delta": 0.01},
        {"delta_prime": 0.001},
        {"tried": 5},
        {"batch_size": 200},
    ],
)
def test_the_bound_grows_with_what_speaks_against_it(harder: dict[str, Any]) -> None:
    assert made().risk < made().monte_carlo < made().bound < made(**harder).bound <= 1


def test_never_below_the_empirical_risk() -> None:
    for errors in (0.0, 1.0, 299_999.0, 300_000.0):
        found = made(errors=errors, kl=0.0)
        assert found.risk <= found.monte_carlo <= found.bound <= 1
    assert made(kl=1e9).bound == 1


def test_a_file_gives_the_same_certificate(tmp_path: Path) -> None:
    found = made(kl=123.456789012345, errors=6000 + 1 / 3)
    found.save(tmp_path / "certificate.json")
    again = Certificate.load(tmp_path / "certificate.json")
    assert again == found
    assert again.recompute() == (found.monte_carlo, found.bound)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(Certificate)])
def test_any_change_is_noticed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    made().save(path)
    content = json.loads(path.read_text())
    value = content[name]
    if isinstance(value, dict):
        content[name] = {**value, next(iter(value)): "changed"}
    else:
        content[name] = {"unit": "example", "precision": "64-true"}.get(name) or value + 1
    path.write_text(json.dumps(content))
    with pytest.raises(AdapterFileError, match="was changed after it was written"):
        Certificate.load(path)


FIGURES = ["errors", "examples", "passes", "unit", "batch_size", "kl", "delta", "delta_prime", "tried"]


@pytest.mark.parametrize("name", ["bound", "monte_carlo", *FIGURES])
def test_a_claim_that_does_not_follow_is_noticed(name: str, tmp_path: Path) -> None:
    """Whoever writes a digest as well cannot claim another risk."""
    value = getattr(made(), name)
    other = {"unit": "example", "delta": 0.05, "delta_prime": 0.02, "bound": 0.01, "monte_carlo": 0.01}.get(name)
    forged = dataclasses.replace(made(), **{name: value + 1 if other is None else other})
    forged.save(tmp_path / "certificate.json")
    with pytest.raises(AdapterFileError, match="follows from its figures"):
        Certificate.load(tmp_path / "certificate.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"examples": 0}, "says that examples is 0"),
        ({"delta": 2.0}, "holds figures that cannot be"),
        ({"passes": "10"}, "says that passes is '10'"),
        ({"unit": "token"}, "says that unit is 'token'"),
        ({"hashes": ["aa"]}, r"says that hashes is \['aa'\]"),
    ],
)
def test_figures_that_cannot_be(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    dataclasses.replace(made(), **changes).save(tmp_path / "certificate.json")
    with pytest.raises(AdapterFileError, match=says):
        Certificate.load(tmp_path / "certificate.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cut short or no JSON"),
        ("[]", "is no certificate of format version 1"),
        ('{"version": 2}', "Got 2"),
        ('{"version": 1, "bound": NaN}', "NaN is no number"),
    ],
)
def test_other_files_are_told(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(text)
    with pytest.raises(AdapterFileError, match=says):
        Certificate.load(path)
    with pytest.raises(FileNotFoundError, match="there is no certificate"):
        Certificate.load(tmp_path / "none.json")


def test_it_is_printed_as_a_table() -> None:
    shown = str(made(tried=3))
    assert "certified risk           0.03" in shown
    assert "0.965, of 3 tried" in shown
    assert "100.0 nats, 1,000 parameters" in shown
    assert "(says nothing)" in str(made(kl=1e9))
