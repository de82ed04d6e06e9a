"""Mistakes with prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import LightningModule
from misuse.setups import Encoder, Rows, fit
from prompted import batch, plain, prompted
from torch import Tensor

from lightning_peft import (
    DPT,
    AdapterFileError,
    AdapterInjection,
    DePT,
    SoftPrompt,
    fold_offsets,
    from_hf_peft,
    load_prompt,
    presets,
    save_prompt,
    to_hf_peft,
)

SOFT, PRODUCT = partial(SoftPrompt, length=5), partial(DPT, length=6, rank=3)
OFFSETS: Any = partial(DePT, length=4, rank=3, reach=12)


class Answers(LightningModule):
    """A T5 whose answers are trained, at one rate for all."""

    def __init__(self) -> None:
        super().__init__()
        self.model = plain("t5").model.train()

    def training_step(self, rows: Tensor, batch_idx: int) -> Tensor:
        ids = rows.abs().mul(10).long().clamp(3, 39)
        loss: Tensor = self.model(input_ids=ids, labels=ids[:, :2].contiguous()).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.3)


def in_folder(mistake: Callable[[Path], object]) -> Callable[[], object]:
    def wrong() -> object:
        with TemporaryDirectory() as folder:
            return mistake(Path(folder))

    return wrong


def exported(factory: Any, kind: str = "llama", **options: Any) -> Callable[[], object]:
    return in_folder(lambda folder: to_hf_peft(prompted(kind, factory)[0], folder / "prompt", **options))


def into_a_bare_model(folder: Path) -> None:
    path = save_prompt(prompted("llama", SOFT)[0], folder / "prompt.safetensors")
    load_prompt(plain("llama").model, path)


def another_tools_folder() -> None:
    folder = Path("prefix")
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    from_hf_peft(plain("llama"), folder)


ROWS: Rows = {
    "more components than a prompt has tokens": (lambda: prompted("bert", partial(DPT, length=6)), ValueError),
    "a decomposed prompt for too few parameters": (
        lambda: prompted("bert", partial(DPT.within, parameters=20, length=6)),
        ValueError,
    ),
    "offsets of more components than they have places": (
        lambda: prompted("bert", partial(DePT, length=4, reach=12)),
        ValueError,
    ),
    "a prompt for too few parameters": (
        lambda: prompted("bert", partial(DePT.within, parameters=60, reach=12, length=4)),
        ValueError,
    ),
    "a rank and a number of parameters": (lambda: presets.dept(rank=4, parameters=100), ValueError),
    "a rank and a number of parameters of a product": (lambda: presets.dpt(rank=3, parameters=48), ValueError),
    "a schedule without a rank to fall to": (lambda: presets.dpt(interval=3, warmup=0.2), ValueError),
    "components to be cut that nothing closes": (lambda: presets.dept(compact="final"), ValueError),
    "a prompt of no tokens": (lambda: presets.prompt_tuning(length=0), ValueError),
    "a product of no components": (lambda: presets.dpt(rank=0), ValueError),
    "a start from a text without one": (lambda: prompted("bert", partial(OFFSETS, init="text")), ValueError),
    "a start from token ids of another vocabulary": (
        lambda: prompted("bert", partial(PRODUCT, init="svd", text_ids=[101, 7592])),
        ValueError,
    ),
    "a prompt in front of a module without a transformers model": (
        lambda: fit(Encoder(), *presets.dpt(length=6, rank=3)),
        ValueError,
    ),
    "a function around a prompt's class": (
        lambda: fit(Encoder(), AdapterInjection(lambda model: DPT(model, length=6, rank=3))),
        TypeError,
    ),
    "a text longer than the offsets reach": (
        lambda: prompted("llama", partial(OFFSETS, reach=5))[0](**batch("llama")),
        UserWarning,
    ),
    "one learning rate for a prompt and its offsets": (
        lambda: fit(Answers(), *presets.dept(length=4, rank=3, reach=12)),
        UserWarning,
    ),
    "offsets exported to PEFT": (exported(OFFSETS), TypeError),
    "a prompt behind the first token exported to PEFT": (
        exported(partial(SOFT, prompt_position="after_cls"), "bert"),
        TypeError,
    ),
    "a classifier's prompt exported without the head": (exported(SOFT, "bert", head=False), ValueError),
    "a layout of LoRA for a prompt": (exported(SOFT, mode="compact"), ValueError),
    "offsets folded into positions that are computed": (
        lambda: fold_offsets(prompted("llama", OFFSETS)[0]),
        TypeError,
    ),
    "a table of offsets of a prompt without any": (
        in_folder(lambda folder: save_prompt(prompted("llama", SOFT)[0], folder / "a", folded=True)),
        ValueError,
    ),
    "a prompt's file loaded into the model itself": (in_folder(into_a_bare_model), ValueError),
    "a PEFT folder of another kind of prompt": (another_tools_folder, AdapterFileError),
    "a start from a file that is not there": (
        lambda: fit(Answers(), *presets.prompt_tuning(length=4, init_from="first.safetensors")),
        FileNotFoundError,
    ),
}
