"""The command line: Lightning's own commands for training, and one each for what is before, after and beside it.

    lightning-peft fit|validate|test|predict -c job.yaml
    lightning-peft plan MODEL --world-size N
    lightning-peft inspect CKPT
    lightning-peft export CKPT OUT --format hf-peft|merged
    lightning-peft compress MODEL OUT --data FILE --ratio 0.5
    lightning-peft certify CKPT --data FILE

A job names model, data and callbacks by class path, as LightningCLI has it. A whole method, which is several callbacks,
is named under `peft` by a function that returns a :class:`~lightning_peft.presets.Preset`; its callbacks come before
the trainer's own. What cannot be done is said in one sentence, with exit code 2.
"""

from __future__ import annotations

import argparse
import dis
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

import lightning_peft
from lightning_peft.certification import command as certification
from lightning_peft.checkpoint import load
from lightning_peft.compression import command as compression
from lightning_peft.inspection import report
from lightning_peft.planning import command
from lightning_peft.presets import Preset
from lightning_peft.rebuild import rebuild

PROGRAM = "lightning-peft"
# LightningCLI with signatures needs these; the extra brings them.
_NEEDED = ("jsonargparse", "docstring_parser", "typeshed_client")
_TRIED = ("Does not validate against any", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value")


class CLI(LightningCLI):
    """LightningCLI with `peft`, for a whole method, and with predictions that are kept.

    The command line's own `optimizer` option is off: such an optimizer is made before the adapters are there and would
    train nothing. The module's `configure_optimizers` makes it, or an `OptimizerCallable` among its arguments.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_subclass_arguments(
            Preset,
            "peft",
            required=False,
            help="A whole method, such as lightning_peft.presets.dynamic_dora; comes before trainer.callbacks.",
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        own = config.trainer.callbacks or []
        callbacks = [*(config.get("peft") or []), *(own if isinstance(own, list) else [own])]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Run `trainer.predict` and keep what it returns, which LightningCLI would drop."""
        predictions = self.trainer.predict(**kwargs)
        if any(isinstance(callback, BasePredictionWriter) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            return
        part = f"-{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = Path(self.trainer.log_dir or ".") / f"predictions{part}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(predictions, path)
        rank_zero_info(f"Predictions, one entry per batch: {path}")


TRAINER_COMMANDS = tuple(CLI.subcommands())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; ``None`` takes the process's own.

    Returns:
        The exit code: 0, or 2 with a sentence on stderr. An error that is not ours to explain is raised.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and given[0] in TRAINER_COMMANDS:
            _train(None if arguments is None else given)
        else:
            options = _parser().parse_args(given)
            print(_COMMANDS[options.command](options))
    except Exception as error:
        if not _explained(error):
            raise
        print(f"{PROGRAM}: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _train(arguments: list[str] | None) -> None:
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"fit, validate, test and predict read jobs with {missing[0]!r}, which is not installed: run "
            "`pip install 'lightning-peft[cli]'`."
        )
    raising = {"exit_on_error": False}  # so that `main` says what is wrong, without two pages of usage
    parser_kwargs = {"prog": PROGRAM, **raising, **{name: dict(raising) for name in TRAINER_COMMANDS}}
    CLI(args=arguments, auto_configure_optimizers=False, parser_kwargs=parser_kwargs)


def _export(options: argparse.Namespace) -> object:
    # Here, because the other commands do without them.
    from lightning_peft.interop.hf_peft import to_hf_peft
    from lightning_peft.interop.merged import save_merged

    if options.format == "merged" and (options.no_head or options.mode):
        raise ValueError("--mode and --no-head are for --format hf-peft; --format merged writes the whole model.")
    module: LightningModule = rebuild(options.checkpoint, options.model)
    load(module, options.checkpoint)
    module.eval()
    if options.format == "merged":
        return save_merged(module, options.out, overwrite=options.overwrite)
    return to_hf_peft(
        module, options.out, mode=options.mode or "padded", head=not options.no_head, overwrite=options.overwrite
    )


_COMMANDS: dict[str, Callable[[argparse.Namespace], object]] = {
    "plan": command.run,
    "compress": compression.run,
    "certify": certification.run,
    "inspect": lambda options: report(options.checkpoint),
    "export": _export,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM, description="Parameter-efficient fine-tuning with dynamic rank.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {lightning_peft.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in TRAINER_COMMANDS:  # for the help only: LightningCLI reads these
        commands.add_parser(name, help=f"Trainer.{name} as a job says: {PROGRAM} {name} -c job.yaml")

    command.add_arguments(commands.add_parser("plan", help=command.HELP, allow_abbrev=False))

    compression.add_arguments(commands.add_parser("compress", help=compression.HELP, allow_abbrev=False))

    certification.add_arguments(commands.add_parser("certify", help=certification.HELP, allow_abbrev=False))

    inspect = commands.add_parser("inspect", help="ranks, budget and size of a checkpoint", allow_abbrev=False)
    inspect.add_argument("checkpoint", metavar="CKPT", help="a checkpoint written with AdapterCheckpoint")

    export = commands.add_parser("export", help="a checkpoint as a folder that other tools load", allow_abbrev=False)
    export.add_argument("checkpoint", metavar="CKPT", help="a checkpoint written with AdapterCheckpoint")
    export.add_argument("out", metavar="OUT", type=Path, help="folder to write, whole or not at all")
    export.add_argument("--format", choices=("hf-peft", "merged"), required=True, help="adapters, or a model")
    export.add_argument(
        "--mode",
        choices=("padded", "compact", "folded", "adalora"),
        help="layout for PEFT (padded, which all servers read; adalora is PEFT's own format of that name)",
    )
    export.add_argument("--no-head", action="store_true", help="leave out what was trained beside the adapters")
    export.add_argument("--overwrite", action="store_true", help="write into a folder that holds other things")
    export.add_argument(
        "--model", metavar="CLASS", help="the LightningModule, as package.module.Class, where the checkpoint cannot say"
    )
    return parser


def _explained(error: BaseException) -> bool:
    """Whether a traceback would tell the user no more than the error's own sentence.

    So it is where a `raise` of this package said it, Lightning on how a Trainer was set up, the parser on a job, or the
    operating system. Anything else is a fault, here or in the user's code.
    """
    if isinstance(error, MisconfigurationException | OSError | argparse.ArgumentError):
        return True
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    origin = "" if place is None else str(place.tb_frame.f_globals.get("__name__", ""))
    if place is not None and origin.startswith("lightning_peft"):
        return place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    # What a constructor raises, the parser passes on as its own.
    return origin.startswith("jsonargparse") and (error.__cause__ is None or _explained(error.__cause__))


def _sentence(error: Exception) -> str:
    """The error's text in one line, without what the parser says of the types that it tried."""
    lines = (line.strip().removeprefix("- ") for line in str(error).splitlines())
    return " ".join(line for line in lines if line and not line.startswith(_TRIED))
