"""The rows of `sparse.py`: ways to train a few entries of a weight, and what they are compared with.

Each way is given as a layer (forward and backward, the input's gradient included) and as a whole training step. Every
step has an encoder of its own: some rows write its weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from step_time_rows import Shape
from torch import Tensor, nn

from lightning_peft import LoRA, SpaRTA, inject
from lightning_peft.functional.sparse import draw_indices, share_of
from lightning_peft.surgery.refresh import follow

ENCODER = Shape(layers=4, width=768, inner=3072, batch=8, length=64)
"""RoBERTa-base's sizes in four layers."""
TARGETS = r"encoder\.layer\..*\.(query|key|value|dense)"
COUNTED = ENCODER.layers * (4 * 2 * ENCODER.width + 2 * (ENCODER.width + ENCODER.inner))
"""Parameters of one component of LoRA in all its linear layers; SHiRA has as many per unit of its r."""
LINEARS = ENCODER.layers * (4 * ENCODER.width**2 + 2 * ENCODER.width * ENCODER.inner)
"""Entries of their weights."""


@dataclass(frozen=True)
class Call:
    """What is timed, and how many scalars it trains, a head included."""

    call: Callable[[], object]
    trainable: int


class IndexPut(nn.Module):
    """Entries written into the weight in every forward, by autograd, as the authors' newer package does."""

    def __init__(self, base: nn.Linear, density: float, name: str) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        flat = draw_indices(base.weight.numel(), share_of(base.weight.numel(), density), 0, name).long()
        self.register_buffer("rows", flat // base.in_features)
        self.register_buffer("columns", flat % base.in_features)
        self.register_buffer("original", base.weight.detach()[self.rows, self.columns])
        self.delta = nn.Parameter(torch.zeros(len(flat)))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight.detach()
        weight.index_put_((self.rows, self.columns), self.original + self.delta)
        return F.linear(x, weight, self.base.bias)


def sparta(base: nn.Linear, density: float, kernel: str) -> nn.Module:
    """This package's adapter."""
    return SpaRTA(base, density=density, kernel=kernel)


def shira(base: nn.Linear, density: float) -> nn.Module:
    """PEFT's SHiRA with the nearest number of entries that it can have, at least r = 1."""
    return peft_shira(nn.Sequential(base), rank_of(base, density), ["0"])


def rank_of(base: nn.Linear, density: float) -> int:
    """r with the nearest r (m + n) to density m n."""
    return max(1, round(density * base.weight.numel() / sum(base.weight.shape)))


def peft_shira(model: nn.Module, rank: int, targets: Sequence[str] | str, **options: Any) -> Any:
    """A model with PEFT's SHiRA."""
    from peft import ShiraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, ShiraConfig(r=rank, target_modules=targets, random_seed=0, **options))


LAYERS: dict[str, tuple[str, Callable[[nn.Linear, float], nn.Module]]] = {
    "frozen": ("frozen layer, no gradient of a weight", lambda base, density: base.requires_grad_(False)),
    "full": ("full fine-tuning, keeps .grad", lambda base, density: base),
    "index-put": ("index_put in autograd, in place", lambda base, density: IndexPut(base, density, "layer")),
    "shira": ("SHiRA (HF PEFT): clone + sparse COO", shira),
    "dense": ("SpaRTA, dense product, then gather", partial(sparta, kernel="dense")),
    "chunked": ("SpaRTA, dense product in parts", partial(sparta, kernel="chunked")),
    "sampled": ("SpaRTA, sampled product", partial(sparta, kernel="sampled")),
}


def layer_call(kind: str, d_out: int, d_in: int, density: float, tokens: int) -> Call:
    """Forward and backward of one layer, the input's gradient included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = LAYERS[kind][1](nn.Linear(d_in, d_out), density)
        x, grad = torch.randn(tokens, d_in, requires_grad=True), torch.randn(tokens, d_out)
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def call() -> None:
        x.grad = None
        for p in parameters:
            p.grad = None
        layer(x).backward(grad)

    return Call(call, sum(p.numel() for p in parameters))


def full_step(density: float) -> Call:
    """Everything trains but the embeddings."""
    model = ENCODER.new_encoder()
    model.bert.embeddings.requires_grad_(False)
    return step_of(model)


def lora_step(density: float) -> Call:
    """This package's LoRA of the nearest number of parameters."""
    model = ENCODER.new_encoder()
    inject(model, partial(LoRA, rank=round(density * LINEARS / COUNTED), alpha=16.0), targets=[TARGETS])
    return step_of(model)


def shira_step(density: float) -> Call:
    """PEFT's SHiRA of the same number of parameters as LoRA's."""
    linears = [n for n, m in ENCODER.new_encoder().named_modules() if isinstance(m, nn.Linear) and ".layer." in n]
    return step_of(peft_shira(ENCODER.new_encoder(), round(density * LINEARS / COUNTED), linears, task_type="SEQ_CLS"))


def index_put_step(density: float) -> Call:
    """The weights put together in every forward."""
    model = ENCODER.new_encoder()
    model.bert.requires_grad_(False)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layer." in n]:
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], IndexPut(layer, density, name))
    return step_of(model)


def sparta_step(density: float, kernel: str = "auto") -> Call:
    """This package's adapter, its entries written into the weights after every step."""
    model = ENCODER.new_encoder()
    inject(model, partial(SpaRTA, density=density, kernel=kernel), targets=[TARGETS])
    return step_of(model)


def step_of(model: nn.Module) -> Call:
    """Forward, backward and AdamW."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    inputs, optimizer = ENCODER.inputs(), torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    follow(model, [optimizer])  # as under the Trainer

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Call(step, sum(p.numel() for p in trainable))


STEPS: dict[str, tuple[str, Callable[[float], Call]]] = {
    "full": ("full fine-tuning", full_step),
    "lora": ("LoRA of equal count", lora_step),
    "shira": ("SHiRA (HF PEFT) of equal count", shira_step),
    "index-put": ("index_put in autograd, in place", index_put_step),
    "dense": ("SpaRTA, dense product, then gather", partial(sparta_step, kernel="dense")),
    "sampled": ("SpaRTA, sampled product", partial(sparta_step, kernel="sampled")),
    "auto": ("SpaRTA, kernel as it chooses", sparta_step),
}
