"""`lightning-peft ...` and `python -m lightning_peft ...`; what they do is in `lightning_peft.cli`."""

from __future__ import annotations

import os
import sys

from lightning_peft import cli


def main() -> int:
    """Run the command line; returns the exit code."""
    # A job may name classes of modules beside it. `python -m` looks there, a console script does not.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
