"""The plan of a model without numbers, held against the same model trained for real."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from presets.every import NAMES, adapts_models, small
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    DynamicDoRA,
    Factorized,
    LoRA,
    RankBudget,
    RankPruning,
    Regularization,
    SamplingPolicy,
    compact,
    inject,
    plan,
    to_hf_peft,
)
from lightning_peft.adapters import Adapter, AdapterFactory
from lightning_peft.planning.figures import Load, Optimizer, Precision, Strategy
from lightning_peft.surgery.layers import adapters

BERT = BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
LLAMA = LlamaConfig(
    vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, pad_token_id=0
)
MODELS: dict[str, Any] = {
    "bert": partial(BertForSequenceClassification, BERT),
    "llama": partial(LlamaForCausalLM, LLAMA),
}


class Job(L.LightningModule):
    """One model, one step."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__()
        self.model, self.kind = model, optimizer

    def train_dataloader(self) -> DataLoader[Any]:
        ids = torch.randint(99, (4, 8))
        labels = ids if isinstance(self.model, LlamaForCausalLM) else ids[:, 0] % 2
        return DataLoader([{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)], 2)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.kind == "adamw":
            return torch.optim.AdamW(trained, lr=1e-2)
        return torch.optim.SGD(trained, lr=1e-2, momentum=0.9 if self.kind == "sgd-momentum" else 0.0)


class Scales(L.Callback):
    """Weighs what is there right after the optimizer's step, before gradients are dropped."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.gradients = size(p.grad for p in pl_module.parameters() if p.grad is not None)
        self.optimizer = size(t for state in trainer.optimizers[0].state.values() for t in state.values())
        self.base = size(p for p in pl_module.parameters() if not p.requires_grad)
        self.trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)


def size(tensors: Iterable[Any]) -> int:
    """Bytes of tensors, one that is shared counted once."""
    return sum({t.data_ptr(): t.nbytes for t in tensors if isinstance(t, Tensor)}.values())


def train(module: Job, folder: Path, precision: Precision) -> tuple[Scales, dict[str, Any]]:
    scales = Scales()
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", precision=precision, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        strategy=SingleDeviceStrategy(), callbacks=[AdapterCheckpoint(), scales],
    )  # fmt: skip
    trainer.fit(module)
    trainer.save_checkpoint(folder / "job.ckpt")
    return scales, torch.load(folder / "job.ckpt", weights_only=True)


def agrees(load: Load, base: int, scales: Scales, checkpoint: dict[str, Any]) -> None:
    assert load.adapter_parameters + load.trained_parameters == scales.trainable
    assert base == scales.base
    assert load.gradients == load.weights == scales.gradients
    assert load.optimizer == scales.optimizer
    saved = checkpoint["optimizer_states"][0]["state"].values()
    assert load.optimizer == size(t for state in saved for t in state.values())
    assert load.checkpoint == size(checkpoint["state_dict"].values())


@pytest.mark.parametrize(
    ("model", "adapter", "precision", "optimizer"),
    [
        ("bert", partial(LoRA, rank=4), "32-true", "adamw"),
        ("bert", partial(DynamicDoRA, rank=6), "bf16-true", "sgd-momentum"),
        ("llama", partial(LoRA, rank=4), "bf16-mixed", "sgd"),
        ("llama", partial(DynamicDoRA, rank=6), "64-true", "adamw"),
    ],
    ids=["bert-lora", "bert-dora", "llama-lora", "llama-dora"],
)
@pytest.mark.filterwarnings("ignore:No device id is provided")
def test_a_plan_is_what_training_takes(
    model: str, adapter: AdapterFactory, precision: Precision, optimizer: Optimizer, tmp_path: Path
) -> None:
    with torch.device("meta"):
        shapes = MODELS[model]()
    inject(shapes, adapter)
    planned = plan(shapes, precision=precision, optimizer=optimizer)
    assert {t.device.type for t in [*shapes.parameters(), *shapes.buffers()]} == {"meta"}

    job = Job(MODELS[model](), optimizer)
    inject(job, adapter)
    agrees(planned.start, planned.base, *train(job, tmp_path, precision))
    assert planned.memory(planned.start) == planned.base + size(p for p in job.parameters() if p.requires_grad) + (
        planned.start.gradients + planned.start.optimizer
    )
    assert planned.start.trained_parameters == (0 if model == "llama" else 130)
    assert planned.step(planned.start) == planned.event == planned.startup == 0
    for mode in ("compact", "folded", "padded"):
        written = to_hf_peft(job.model, tmp_path / mode, mode, check="files")
        assert min(written.ranks.values()) == max(written.ranks.values())  # the step has opened every component
        assert (planned.padded if mode == "padded" else planned.start.exported) == pytest.approx(
            written.bytes, rel=2e-3
        )


@pytest.mark.parametrize("final", [Budget(rank=4), Budget(share=0.5), Budget(parameters=6000)], ids=str)
@pytest.mark.filterwarnings("ignore:No device id is provided")
def test_the_final_budget_is_what_training_takes_after_compaction(final: Budget, tmp_path: Path) -> None:
    adapter = partial(DynamicDoRA, rank=6)
    with torch.device("meta"):
        shapes = MODELS["llama"]()
    inject(shapes, adapter)
    planned = plan(shapes, final=final)
    assert planned.final is not None
    assert planned.most_parameters is not None

    job = Job(MODELS["llama"](), "adamw")
    inject(job, adapter)
    budget = RankBudget.of(job)
    share = final.amount(budget) / (budget.capacity if final.unit == "components" else budget.capacity_parameters)
    kept = round(6 * share)  # the same in every layer
    for site in budget.values():
        torch.nn.init.ones_(site.gate.gain)  # type: ignore[arg-type]
    budget.keep({name: torch.arange(6) < kept for name in budget})
    compact(job)
    scales, checkpoint = train(job, tmp_path, "32-true")
    # A share need not be a whole number of components; the plan is for the share.
    ratio = 6 * share / kept
    assert planned.final.adapter_parameters == pytest.approx(ratio * scales.trainable, rel=1e-3)
    assert planned.final.gradients == pytest.approx(ratio * scales.gradients, rel=1e-3)
    assert planned.final.optimizer == pytest.approx(ratio * scales.optimizer, rel=1e-2)
    assert planned.final.checkpoint == pytest.approx(ratio * size(checkpoint["state_dict"].values()), rel=1e-2)
    written = to_hf_peft(job.model, tmp_path / "out", "compact", check="files")
    assert planned.final.exported == pytest.approx(ratio * written.bytes, rel=0.01 + 0.1 * abs(ratio - 1))
    assert planned.base == scales.base
    assert planned.most_parameters >= planned.final.adapter_parameters


def test_the_dearest_components_are_the_most_that_a_budget_can_leave() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(10, 10), nn.Linear(100, 100), nn.Linear(10, 10))
    inject(net, partial(DynamicDoRA, rank=4), targets=["0", "1"])
    found = plan(net, final=Budget(rank=3))  # six components: four of 201 parameters, two of 21
    assert found.most_parameters == 4 * 201 + 2 * 21
    by_parameters = plan(net, final=Budget(parameters=800))  # gains come on top: the more, the more components
    assert by_parameters.most_parameters == round(4 * 21 + 3.6 * 201)
    assert by_parameters.final is not None
    assert by_parameters.final.adapter_parameters == round(800 / 880 * 888)


def two_layers(**options: Any) -> Any:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    inject(net, partial(LoRA, rank=2), targets=["0"], train=["2"])
    return plan(net, **options)


def test_what_crosses_the_network_under_ddp() -> None:
    found = two_layers(world_size=4, nodes=2)
    trained = 4 * (2 * (6 + 10) + 33)
    assert found.start.gradients == found.start.buckets == trained
    assert found.start.all_reduce == 2 * 3 / 4 * trained
    assert found.start.buffers == 4 * 2  # the mask
    assert found.gather_forward == found.gather_backward == 0
    assert found.base == 4 * 70
    assert found.startup == found.base + trained + 4 * 2
    assert found.step(found.start) == found.start.all_reduce + 8


def test_what_crosses_the_network_under_fsdp() -> None:
    found = two_layers(world_size=4, strategy="fsdp2", accumulate=3)
    assert found.base == 4 * 3 * (6 + 1)  # ten rows are three for each of four processes, and two of nothing
    assert found.gather_forward == found.gather_backward == 3 * 3 * found.base  # 3 others, 3 batches
    assert found.start.all_reduce == two_layers(world_size=4).start.all_reduce
    assert found.start.buffers == 0
    assert found.startup == found.start.weights + 4 * 2
    kept = two_layers(world_size=4, strategy="fsdp2", reshard_after_forward=False)
    assert kept.gather_forward == 3 * found.base
    assert kept.gather_backward == 0

    flat = two_layers(world_size=4, strategy="fsdp1", precision="bf16-mixed")
    assert flat.base == 4 * (15 + 3)  # 60 and 10 numbers over four
    assert flat.gather_forward == 3 * 2 * (15 + 3)  # in bfloat16 on the way


def test_sharded_adapters_are_cut_at_export_only() -> None:
    with torch.device("meta"):
        shapes = MODELS["llama"]()
    inject(shapes, partial(DynamicDoRA, rank=6))
    found = plan(shapes, 2, strategy="fsdp2", final=Budget(rank=4))
    alone = plan(shapes, 1, strategy="fsdp2", final=Budget(rank=4))
    assert found.final is not None
    assert alone.final is not None
    assert found.final.gradients == found.start.gradients
    assert found.final.exported == alone.final.exported
    assert found.final.exported is not None
    assert found.start.exported is not None
    assert found.final.exported < 0.7 * found.start.exported
    assert "cut at export" in str(found)
    assert "After compaction" in str(alone)


def test_an_attention_is_exported_with_both_projections(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2), "out": nn.Linear(32, 4)})

    with torch.device("meta"):
        shapes = build()
    inject(shapes, partial(LoRA, rank=3), targets=["attention.in_proj"], train=["out"])
    net = build()
    inject(net, partial(LoRA, rank=3), targets=["attention.in_proj"], train=["out"])
    written = to_hf_peft(net, tmp_path / "out", "compact", check="files")
    assert plan(shapes).start.exported == pytest.approx(written.bytes, rel=5e-3)


class Bias(Adapter):
    """Of a kind that PEFT's format cannot hold and that is not cut."""

    def __init__(self, base: nn.Module) -> None:
        from lightning_peft import Gate

        super().__init__(base)
        self.shift = nn.Parameter(torch.zeros(4, device=base.weight.device))  # type: ignore[arg-type]
        self.gate = Gate(4, cost=1).to(self.shift.device)

    def effective_weight(self) -> Tensor:
        return self.base.weight + self.shift[:, None]  # type: ignore[operator]


def test_other_adapters_have_no_export_and_no_final_budget() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(net, Bias, targets=["0"], train=[])
    found = plan(net)
    assert found.start.adapter_parameters == 4
    assert found.start.exported is None
    assert found.padded is None
    assert str(found).count("refused") == 2
    with pytest.raises(TypeError, match=r"layer '0': Bias cannot be compacted, .*: plan without a final budget"):
        plan(net, final=Budget(rank=1))


@pytest.mark.filterwarnings("ignore:No device id is provided")
def test_a_layer_in_another_form_is_planned_like_any_other(tmp_path: Path) -> None:
    """Its weight is gone, its bias is trained or frozen as it is named, and its components can be cut."""
    train_ = ["classifier", "query.bias"]
    with torch.device("meta"):
        shapes = MODELS["bert"]()
    inject(shapes, Factorized, train=train_)
    planned = plan(shapes, final=Budget(share=0.5))
    job = Job(MODELS["bert"](), "adamw")
    inject(job, Factorized, train=train_)
    assert planned.layers == 12  # the pooler is left as it is
    agrees(planned.start, planned.base, *train(job, tmp_path, "32-true"))
    assert planned.start.exported is None
    assert planned.final is not None
    budget = RankBudget.of(job)
    budget.keep({name: torch.arange(len(site.gate)) < len(site.gate) // 2 for name, site in budget.items()})
    compact(job)
    agrees(planned.final, planned.base, *train(job, tmp_path, "32-true"))
    with pytest.raises(TypeError, match="FSDP2 shards the factors of Factorized with the base, and a run that trains"):
        plan(shapes, 2, strategy="fsdp2")
    with torch.device("meta"):
        frozen = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3))
    inject(frozen, partial(Factorized, trained=False), targets=["0"], train=["1"])
    sharded = plan(frozen, 2, strategy="fsdp2")
    assert sharded.base == 4 * (5 * 6 + 3 * 6 + 10 + 6)  # half of U's ten rows and Vh's six; bias and s stay whole
    assert sharded.gather_forward == 4 * (5 * 6 + 3 * 6)
    assert sharded.startup == 4 * (33 + 6 + 6)  # what is trained, s, and the mask
    assert sharded.start.gradients == 4 * 33
    assert plan(shapes, 2, strategy="fsdp1").start.weights == planned.start.weights


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"world_size": 0}, "world_size=0: it is a count, at least 1."),
        ({"accumulate": -1}, "accumulate=-1: it is a count, at least 1."),
        ({"world_size": 4, "nodes": 3}, "world_size=4 counts the processes of all nodes, and 3 nodes cannot share"),
        ({"strategy": "deepspeed"}, "strategy='deepspeed': choose 'ddp', 'fsdp2', 'fsdp1'."),
        ({"precision": "fp8"}, "precision='fp8': choose '32-true',"),
        ({"optimizer": "lion"}, "optimizer='lion': choose 'adamw', 'sgd', 'sgd-momentum'."),
        ({"strategy": "fsdp1", "precision": "64-true"}, "FSDPStrategy does not take precision='64-true'"),
        ({"final": Budget(rank=9)}, "Budget(rank=9) is 9 components, more than the 2"),
    ],
)
def test_refusals(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        two_layers(**options)


def test_a_module_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="plan found no adapter in Linear; inject puts them in"):
        plan(nn.Linear(2, 2))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp1"])
def test_every_figure_is_in_the_text_or_the_dictionary(strategy: Strategy) -> None:
    found = two_layers(world_size=2, strategy=strategy)
    figures = found.as_dict()
    assert figures["start"]["memory"] == found.memory(found.start)
    assert figures["start"]["step"] == found.step(found.start)
    assert figures["final"] is None
    text = str(found)
    assert text.startswith(f"Sequential, 1 adapted layers: 2 processes, {strategy.upper()}")
    assert ("once: the whole module" in text) == (strategy == "ddp") != ("once: the trained weights" in text)
    assert ("step: frozen weights, backward" in text) == (strategy != "ddp")


class ScalesAtTheStart(Scales):
    """Weighs after the first step only, with what the choice of components is based on and what never changes."""

    statistics = constants = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == 1:
            super().on_train_batch_end(trainer, pl_module)
            self.checkpoint = trainer._checkpoint_connector.dump_checkpoint()
            (saved,) = [c.state_dict() for c in pruning(trainer.callbacks)] or [{}]  # type: ignore[attr-defined]
            state = saved.get("policy", {}).get("importance", {})
            self.statistics = size(row for rows in state.values() for row in rows.values())
            each = adapters(pl_module).values()
            self.constants = size(adapter.get_buffer(name) for adapter in each for name in adapter.constants)


def pruning(callbacks: Iterable[L.Callback]) -> list[RankPruning]:
    return [each for each in callbacks if isinstance(each, RankPruning)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:No device id is provided", "ignore:masks have learned to keep")  # a short run
def test_a_plan_of_every_preset_is_what_it_takes(name: str, tmp_path: Path) -> None:
    def preset() -> list[L.Callback]:
        cut: dict[str, Any] = {"compact": "final", "tail": 0.4} if pruning(small(name)) else {"compact": "never"}
        return list(small(name, **cut))

    (injection,) = [each for each in preset() if isinstance(each, AdapterInjection)]
    policy = next((each.policy for each in pruning(preset())), None)
    with torch.device("meta"):
        shapes = MODELS["bert"]()
    if adapts_models(name):
        shapes = nn.ModuleDict({"model": shapes})  # what is adapted is inside
    every = [each.terms for each in preset() if isinstance(each, Regularization)]
    for term in (term for terms in every for term in terms.values()):
        term.before_adapters(shapes)  # type: ignore[operator]
    inject(shapes, injection.adapter, injection.targets, injection.train)
    if isinstance(policy, SamplingPolicy):  # what draws masks is trained, too, and a plan counts what is in the module
        shapes.add_module("peft_masks", policy.build(RankBudget.of(shapes)))
    for terms in every:
        for term in terms.values():
            term.attach(shapes)  # type: ignore[operator]
        shapes.add_module("peft_terms", terms)
    planned = plan(
        shapes, final=policy.final_budget if policy else None, importance=policy.importance if policy else None
    )
    assert not any(site.gate.mask.requires_grad for site in RankBudget.of(shapes).values())

    job, scales, real = Job(MODELS["bert"](), "adamw"), ScalesAtTheStart(), preset()
    trainer = L.Trainer(
        max_epochs=5, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, strategy=SingleDeviceStrategy(), callbacks=[*real, scales],
    )  # fmt: skip
    trainer.fit(job)
    # The room for components counts from the start, whether they are open or not.
    agrees(planned.start, planned.base, scales, scales.checkpoint)
    assert (planned.start.statistics, planned.start.constants) == (scales.statistics, scales.constants)
    start = planned.start
    counted = (planned.base, start.weights, start.gradients, start.optimizer, scales.statistics, scales.constants)
    assert planned.memory(start) == sum(counted)
    assert ("statistics of importance" in str(planned)) == (scales.statistics > 0)
    if policy is not None:
        (mine,) = pruning(real)
        assert (planned.final is None) == (mine.policy.final_budget is None)
        if planned.final is not None:
            budget = RankBudget.of(job)
            assert planned.final.components == budget.spent == sum(len(site.gate) for site in budget.values())
            assert planned.final.statistics == mine.policy.importance.statistics_bytes()
            assert planned.most_parameters is not None
            left = sum(p.numel() for site in budget.values() for _, p in site.adapter.own_parameters())
            assert left <= planned.most_parameters
