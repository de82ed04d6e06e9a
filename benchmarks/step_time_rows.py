"""The rows of `step_time.py`: each makes one encoder trainable in its own way and gives its training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft import (
    DEM,
    AdaLoRA,
    Budget,
    DynamicDoRA,
    LoRA,
    Orthogonality,
    RankBudget,
    RankPolicy,
    WeightDecomposed,
    inject,
)
from lightning_peft.adapters import adalora, dynamic_dora
from lightning_peft.functional.low_rank import low_rank_linear, low_rank_linear_reference
from lightning_peft.regularizers import regularized

RANK, START_RANK, ALPHA, INTERVAL = 8, 12, 16.0, 10
ENCODER_LINEARS = r"encoder\.layer\..*"


@dataclass(frozen=True)
class Row:
    """A training step, given its number, counted from 1; and how many parameters it trains."""

    step: Callable[[int], None]
    trainable: int


_FROZEN: dict[tuple[Shape, str], Tensor] = {}


@dataclass(frozen=True)
class Shape:
    """An encoder and a batch."""

    layers: int
    width: int
    inner: int
    batch: int
    length: int

    def new_encoder(self) -> BertForSequenceClassification:
        """Random weights from a private seed. No dropout in the base: it would hide part of what adapters cost."""
        config = BertConfig(
            vocab_size=1000,
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_attention_heads=12,
            num_labels=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return BertForSequenceClassification(config).train()

    def encoder(self) -> BertForSequenceClassification:
        """One whose layers' tensors, frozen in every row, are the same in all rows.

        Else each row would find its weights thrown out of the cache by the others', as no training run does.
        """
        model = self.new_encoder()
        for name, parameter in model.bert.encoder.named_parameters():
            parameter.data = _FROZEN.setdefault((self, name), parameter.data)
        return model

    def inputs(self) -> dict[str, Tensor]:
        """One batch without padding."""
        generator = torch.Generator().manual_seed(1)
        return {
            "input_ids": torch.randint(0, 1000, (self.batch, self.length), generator=generator),
            "attention_mask": torch.ones(self.batch, self.length, dtype=torch.long),
            "labels": torch.randint(0, 8, (self.batch,), generator=generator),
        }


SHAPES = {"minilm": Shape(6, 384, 1536, 16, 64), "4x768": Shape(4, 768, 3072, 8, 128)}


@dataclass(frozen=True)
class Run:
    """What all rows share: the shape, how many steps the schedules are made for, and the adapters' dropout."""

    shape: Shape
    steps: int
    dropout: float


def floor(run: Run) -> Row:
    """Frozen forward and the gradient down to the inputs: nothing but the first LayerNorm's bias and the head train."""
    model = run.shape.encoder()
    return _step(run, model, train=("bert.embeddings.LayerNorm.bias", "classifier"))


def our_lora(run: Run) -> Row:
    """`LoRA`, rank 8."""
    model = run.shape.encoder()
    inject(model, partial(LoRA, rank=RANK, alpha=ALPHA, dropout=run.dropout), [ENCODER_LINEARS], ["classifier"])
    return _step(run, model)


def our_decomposed(run: Run) -> Row:
    """`WeightDecomposed`, rank 8."""
    model = run.shape.encoder()
    factory = partial(WeightDecomposed, rank=RANK, alpha=ALPHA, dropout=run.dropout)
    inject(model, factory, [ENCODER_LINEARS], ["classifier"])
    return _step(run, model)


def our_dora(run: Run, scoring: bool = True, dem: bool = True) -> Row:
    """`DynamicDoRA`, 12 to 8; scores after every step, DEM in every loss, a cut after every tenth step."""
    model = run.shape.encoder()
    factory = partial(DynamicDoRA, rank=START_RANK, alpha=ALPHA, dropout=run.dropout)
    inject(model, factory, [ENCODER_LINEARS], ["classifier"])
    term = DEM(0.3)
    policy: RankPolicy | None = None
    if scoring:
        # No warm-up and no tail: every timed step pays for scores, where a real run stops paying half-way.
        policy = dynamic_dora.policy(Budget(rank=RANK), warmup=0.0, tail=0.0, interval=INTERVAL)
        policy.track(RankBudget.of(model))

    def loss(inputs: Mapping[str, Tensor]) -> Tensor:
        task: Tensor = model(**inputs).loss
        return regularized(task, {"dem": term(model, inputs, task)}, {"dem": 0.3}) if dem else task

    def after(step: int) -> None:
        if policy is not None:
            policy.importance.update()
            if policy.is_event(step, run.steps):
                policy.apply(policy.decide(step, run.steps), step, run.steps)

    return _step(run, model, loss=loss, after=after)


def our_adalora(run: Run) -> Row:
    """`AdaLoRA`, 12 to 8; statistics after every backward, the penalty in every loss, a cut after every tenth step."""
    model = run.shape.encoder()
    factory = partial(AdaLoRA, rank=START_RANK, alpha=ALPHA, dropout=run.dropout)
    inject(model, factory, [ENCODER_LINEARS], ["classifier"])
    term = Orthogonality(form="norm")
    # After the step, as PEFT's allocator reads them. No warm-up and no tail: every timed step pays.
    policy = adalora.policy(Budget(rank=RANK), warmup=0.0, tail=0.0, interval=INTERVAL, mode="peft")
    policy.track(RankBudget.of(model))

    def loss(inputs: Mapping[str, Tensor]) -> Tensor:
        task: Tensor = model(**inputs).loss
        return regularized(task, {"orthogonality": term(model, inputs, task)}, {"orthogonality": 0.5})

    def after(step: int) -> None:
        if policy.observes(step, run.steps + 2):
            policy.importance.update()
        if policy.is_event(step, run.steps + 2):
            policy.apply(policy.decide(step, run.steps + 2), step, run.steps + 2)

    return _step(run, model, loss=loss, after=after)


def no_gate(run: Run, plainly: bool = False) -> Row:
    """Rank 12 with a constant for the gate's value: what the gate, scores and DEM are measured against."""
    model = run.shape.encoder().requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and ".encoder." in name:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, _NoGate(layer, run.dropout, plainly))
    model.classifier.requires_grad_(True)
    return _step(run, model)


class _NoGate(nn.Module):
    def __init__(self, base: nn.Linear, dropout: float, plainly: bool) -> None:
        super().__init__()
        d_out, d_in = base.weight.shape
        self.base, self.dropout = base, dropout
        self.A = nn.Parameter(torch.full((START_RANK, d_in), 0.01))
        self.B = nn.Parameter(torch.zeros(d_out, START_RANK))
        self.register_buffer("value", torch.full((START_RANK,), ALPHA / START_RANK))
        self.linear = low_rank_linear_reference if plainly else low_rank_linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.base.weight, self.base.bias, self.A, self.B, self.value, self.dropout)


def peft_lora(run: Run, weight_decomposed: bool = False) -> Row:
    """HF PEFT's LoRA, rank 8; with lengths of the weights' rows it is its DoRA."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=RANK,
        lora_alpha=int(ALPHA),
        lora_dropout=run.dropout,
        target_modules=rf".*{ENCODER_LINEARS}\.(query|key|value|dense)",
        use_dora=weight_decomposed,
    )
    return _step(run, get_peft_model(run.shape.encoder(), config))


def peft_adalora(run: Run) -> Row:
    """HF PEFT's AdaLoRA, 12 to 8; its penalty in every loss, its allocator after every step, a cut at every tenth."""
    from peft import AdaLoraConfig, TaskType, get_peft_model

    config = AdaLoraConfig(
        task_type=TaskType.SEQ_CLS,  # without a task type PEFT bypasses the forward that adds the penalty
        init_r=START_RANK,
        target_r=RANK,
        lora_alpha=int(ALPHA),
        lora_dropout=run.dropout,
        target_modules=rf".*{ENCODER_LINEARS}\.(query|key|value|dense)",
        total_step=run.steps + 2,
        tinit=0,
        tfinal=1,
        deltaT=INTERVAL,
    )
    model = get_peft_model(run.shape.encoder(), config)
    return _step(run, model, after=model.base_model.update_and_allocate)


ROWS: dict[str, tuple[str, Callable[[Run], Row]]] = {
    "floor": ("floor: frozen forward, gradient to the inputs", floor),
    "peft-lora": ("PEFT LoRA r=8", peft_lora),
    "lora": ("LoRA r=8", our_lora),
    "peft-decomposed": ("PEFT LoRA r=8 with use_dora", partial(peft_lora, weight_decomposed=True)),
    "decomposed": ("WeightDecomposed r=8", our_decomposed),
    "peft-adalora": ("PEFT AdaLoRA 12→8, allocator every step", peft_adalora),
    "adalora": ("AdaLoRA 12→8, statistics and penalty every step", our_adalora),
    "dora": ("DynamicDoRA 12→8, scores and DEM every step", our_dora),
    "dora-no-dem": ("DynamicDoRA 12→8, scores every step", partial(our_dora, dem=False)),
    "dora-gate": ("DynamicDoRA r=12, gate only", partial(our_dora, scoring=False, dem=False)),
    "no-gate": ("r=12 without a gate", no_gate),
    "plain": ("r=12 without a gate, composed of torch's functions", partial(no_gate, plainly=True)),
}


def _step(
    run: Run,
    model: nn.Module,
    train: tuple[str, ...] = (),
    loss: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    after: Callable[[int], None] | None = None,
) -> Row:
    """Forward, backward, AdamW and what comes `after`, with everything that is equal for all rows in one place."""
    if train:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(name.startswith(start) for start in train))
    inputs = run.shape.inputs()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)

    def step(number: int) -> None:
        value = model(**inputs).loss if loss is None else loss(inputs)
        value.backward()
        optimizer.step()
        if after is not None:
            after(number)  # AdaLoRA's allocator reads gradients
        optimizer.zero_grad(set_to_none=True)

    return Row(step, sum(parameter.numel() for parameter in trainable))
