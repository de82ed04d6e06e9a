"""The page that `prompts.py table` writes, from the lines of its results file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
Rates = Mapping[tuple[str, str], Sequence[float]]


def table(
    rows: Rows,
    titles: Mapping[str, str],
    jobs: Mapping[Any, Sequence[str]],
    seeds: Mapping[str, Sequence[int]],
    rates: Rates,
) -> str:
    """Markdown of all that is finished; what is missing is said.

    Args:
        rows: finished runs.
        titles: of the methods.
        jobs: their methods.
        seeds: of the final runs on R8, by method.
        rates: that are tried, by job and method.
    """
    return "\n".join(
        [
            "# Prompts, measured",
            "",
            "From `python benchmarks/prompts.py plan`, one thread of a CPU on which other work ran as well; written by "
            "`python benchmarks/prompts.py table --out docs/prompts.md`.",
            "Methods: [prompt tuning](methods/prompt-tuning.md), [DPT](methods/dpt.md), [DePT](methods/dept.md). "
            "Milliseconds are of CPU time, the median over a run's steps.",
            "",
            "## Reuters R8 with MiniLM-L6",
            "",
            "One epoch, texts of at most 48 tokens, a new head at its own rate for all; a method's rate is that "
            "of the lowest loss on a held-out tenth,",
            "of three in 60 steps or four where the best is at an end; then the test set once per seed. So short a "
            "training tells how fast a method learns, not how far it gets.",
            "",
            *_classification([row for row in rows if row["job"] == "r8"], titles, jobs["r8"], seeds),
            "",
            "## The topic as an answer of SmolLM2-135M",
            "",
            "60 steps of 8 texts in float32; the prompt is a text's first 30 words, the answer its topic. One seed; of "
            "three rates the one with the lowest perplexity of",
            "held-out answers, so that each row might do better with another. Right: answers that greedy decoding "
            "writes, of 160.",
            "",
            *_answers([row for row in rows if row["job"] == "smollm2"], titles, jobs["smollm2"], rates),
            "",
            "## What a shorter prompt saves",
            "",
            "A step of DePT ÷ a step of a plain prompt of 100 tokens with as many trained numbers: the median ratio "
            "within a round, with quartiles, beside the ratio of",
            "the inputs' lengths, (m + L) / (100 + L), and its square, which attention scores follow.",
            "",
            *_speed([row for row in rows if row["job"] == "speed"]),
            "",
        ]
    )


class _Ends:
    """Which methods' best rate stands at an end of those that were tried."""

    def __init__(self) -> None:
        self._at: dict[str, list[str]] = {"lowest": [], "highest": []}

    def look(self, title: str, tried: Sequence[float], best: float) -> None:
        """Note a method; `tried` ascends."""
        for end, rate in (("lowest", tried[0]), ("highest", tried[-1])):
            if len(tried) > 1 and best == rate:
                self._at[end].append(f"{title} ({rate:g})")

    def said(self) -> list[str]:
        """The sentence, as lines of the page; none if there is nothing to say."""
        found = [f"the {end} for {', '.join(names)}" for end, names in self._at.items() if names]
        if not found:
            return []
        return [
            "",
            f"The best rate stands at an end of those that were tried, {'; '.join(found)}: none was tried beyond it, "
            "so these rows may do better.",
        ]


def _classification(
    rows: Rows, titles: Mapping[str, str], methods: Sequence[str], seeds: Mapping[str, Sequence[int]]
) -> list[str]:
    lines = [
        "| method | accuracy | seeds | rates tried: held-out loss | rate | trained beside the head | ms per step | "
        "peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ends = _Ends()
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        tried = sorted((row["lr"], row["loss"]) for row in own if row["search"])
        best = min(tried, key=lambda pair: pair[1], default=(None, None))[0]
        found = [row for row in own if not row["search"] and row["lr"] == best]
        if not found:
            lines.append(f"| {titles[method]} | – | 0 of {len(seeds[method])} | – | – | – | – | – |")
            continue
        ends.look(titles[method], [rate for rate, _ in tried], found[0]["lr"])
        losses = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in tried)
        accuracies = [row["accuracy"] for row in found]
        spread = f" ± {statistics.stdev(accuracies):.4f}" if len(found) > 1 else ""
        lines.append(
            f"| {titles[method]} | {statistics.mean(accuracies):.4f}{spread} | {len(found)} of {len(seeds[method])} | "
            f"{losses} | {best:g} | {found[0]['adapter_parameters']:,} | {_median(found, 'cpu_ms_per_step'):.0f} | "
            f"{_median(found, 'peak_memory') / 1e6:.0f} |"
        )
    return lines + ends.said()


def _answers(rows: Rows, titles: Mapping[str, str], methods: Sequence[str], rates: Rates) -> list[str]:
    lines = [
        "| method | perplexity of test answers | right | rates tried: held-out perplexity | rate | trained | "
        "ms per step | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ends = _Ends()
    for method in methods:
        found = sorted((row for row in rows if row["method"] == method), key=lambda row: float(row["lr"]))
        missing = [rate for rate in rates["smollm2", method] if rate not in {row["lr"] for row in found}]
        to_come = "".join(f", {rate:g}: –" for rate in missing)
        if not found:
            lines.append(f"| {titles[method]} | – | – | {to_come[2:]} | – | – | – | – |")
            continue
        best = min(found, key=lambda row: float(row["val_perplexity"]))
        ends.look(titles[method], [row["lr"] for row in found], best["lr"])
        tried = ", ".join(f"{row['lr']:g}: {row['val_perplexity']:.3g}" for row in found)
        lines.append(
            f"| {titles[method]} | {best['test_perplexity']:.3f} | {best['accuracy']:.3f} | {tried}{to_come} | "
            f"{best['lr']:g} | {best['adapter_parameters']:,} | {best['cpu_ms_per_step']:.0f} | "
            f"{best['peak_memory'] / 1e6:.0f} |"
        )
    return lines + ends.said()


def _speed(rows: Rows) -> list[str]:
    if not rows:
        return ["Not measured yet."]
    return [
        "| model | text L | DePT's prompt m | 100 tokens, ms | ratio | lengths | squared |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['shape']} | {row['text']} | {row['prompt']} | {row['plain_ms']:.0f} | {row['ratio']:.3f} "
            f"[{row['quartiles'][0]:.3f}, {row['quartiles'][1]:.3f}] | {row['lengths']:.3f} | {row['attention']:.3f} |"
            for row in rows
        ),
    ]


def _median(rows: Rows, key: str) -> float:
    return statistics.median(row[key] for row in rows)
