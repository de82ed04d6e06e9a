"""Fine-tune a small pretrained encoder on Reuters news with dynamic DoRA; see where the rank goes; export the adapter.

Usage: python examples/reuters/run.py [--data r8|r52] [--method NAME] [--compare] [--quick] [--out DIR] [--seed N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from inputs import minilm_folder, reuters
from job import METHODS, Job, balanced, quiet, train
from table import table

from lightning_peft import RankBudget, rank_heat_map


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("r8", "r52"), default="r8", help="Reuters with 8 or 52 topics")
    known = [name for name, method in METHODS.items() if method.callbacks]
    parser.add_argument("--method", choices=known, default="dynamic-dora", help="default %(default)s")
    parser.add_argument("--compare", action="store_true", help="train LoRA of the same size and a head alone as well")
    parser.add_argument("--quick", action="store_true", help="fewer texts, as many of each topic as there are")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/reuters"), help="folder for results; default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        encoder, (texts, test) = minilm_folder(), reuters(options.data)
    except ModuleNotFoundError as missing:
        print(missing, file=sys.stderr)
        return 2

    quiet()
    out = options.out / options.data
    epochs = {"r8": 2, "r52": 4}[options.data]
    rates = {}
    if options.quick:  # few steps, so larger ones
        texts, epochs = balanced(texts, out / "quick.csv", rows=1600, seed=options.seed), epochs // 2
        rates = {"lr": 5e-3, "head_lr": 1e-2}
    job = Job(encoder, texts, test, epochs, options.seed, out, **rates)
    beside = ["frozen", "lora"] if options.compare else []
    chosen = [*(name for name in beside if name != options.method), options.method]
    results = [train(job, name) for name in chosen]

    ours = results[-1]
    picture = out / "rank-heatmap.png"
    ranks = RankBudget.of(ours.classifier).ranks()
    rank_heat_map(ranks, top=12, title=f"Rank per layer, {ours.title}").savefig(picture, dpi=200)

    passes = f"{epochs} epoch{'s' * (epochs > 1)}"
    print(f"\nReuters {options.data.upper()}, {passes}, seed {options.seed}, {job.precision}, one thread\n")
    print(table(results))
    print(f"\n{ours.export}")
    print(f"\nheat map     {picture}")
    print(f"TensorBoard  tensorboard --logdir {out / 'tensorboard'}")
    print(f"checkpoint   lightning-peft inspect {ours.checkpoint}")
    print(f"adapter      {ours.export.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
