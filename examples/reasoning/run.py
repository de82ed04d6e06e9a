"""Ask SmolLM2-135M arithmetic questions, behind examples that it writes itself and in ways that this is compared with.

python examples/reasoning/run.py [--questions 8] [--examples 2] [--tokens 64] [--seed 0] [--out DIR]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from questions import make
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft.reasoning import (
    Example,
    FewShotCoT,
    SelfConsistency,
    SelfGeneratedCoT,
    ZeroShot,
    ZeroShotCoT,
    evaluate,
)

sys.path.append(str(Path(__file__).resolve().parents[1] / "compress"))  # which finds the same model
from smollm import smollm_folder

# By hand, and about nothing that is asked.
EXAMPLES = (
    Example(
        "Gus has 15 cards and gives 6 to Hal. How many cards does Gus have left?", "Gus gives 6 of 15: 15 - 6 = 9.", "9"
    ),
    Example(
        "Ida has 4 bags with 5 nuts in each, and finds 3 more. How many nuts does Ida have?",
        "The bags hold 4 * 5 = 20. With 3 more, 20 + 3 = 23.",
        "23",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--questions", type=int, default=8, help="how many are made and asked (default: 8)")
    parser.add_argument("--examples", type=int, default=2, help="problems that the model writes for each (default: 2)")
    parser.add_argument("--tokens", type=int, default=64, help="of one solution, at most (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and of what is sampled (default: 0)")
    parser.add_argument(
        "--model", help="folder of another model; SmolLM2-135M-Instruct out of its package if not given"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reasoning"), help="folder for the model")
    options = parser.parse_args()
    folder = options.model or smollm_folder(options.out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = make(options.questions, options.seed)
    began = time.perf_counter()

    def tell(name: str) -> None:
        print(f"  {time.perf_counter() - began:6.0f} s  {name}", flush=True)

    def progress(written: int, of: int) -> None:
        tell(f"  {written} of {of} texts")

    shared = {"max_new_tokens": options.tokens, "seed": options.seed, "batch_size": 8, "progress": progress}
    own = {"n_examples": options.examples, "integrated_tokens": (options.examples + 1) * options.tokens}
    print(f"{len(asked)} questions, such as: {asked[0][0]} ({asked[0][1]})", flush=True)

    for mode in ("integrated", "staged"):
        print(f"\nself-generated examples, {mode}", flush=True)
        vote = SelfConsistency(model, tokenizer, chains=None, **shared)
        baselines = {"self-consistency, equal tokens": vote}
        if mode == "staged":  # the others are the same for both modes
            baselines |= {
                "zero-shot": ZeroShot(model, tokenizer, **shared),
                "zero-shot CoT": ZeroShotCoT(model, tokenizer, **shared),
                "few-shot CoT": FewShotCoT(model, tokenizer, EXAMPLES, **shared),
            }
        solver = SelfGeneratedCoT(model, tokenizer, mode=mode, **own, **shared)
        found = evaluate(asked, solver, baselines, report=tell)
        print(f"\n{found.table(f'self-generated, {mode}')}")
        if mode == "staged":
            print(f"asked without examples, because none was fit: {found.score.fallbacks:.2f}")
        first = found.score.results[0]
        for example in first.examples:
            print(f"an example that it wrote: {example.question} -> {example.answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
