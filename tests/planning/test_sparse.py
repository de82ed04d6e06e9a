"""Plans of sparse adapters on real models' shapes: the figures of the paper's card, from config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel, T5Model

from lightning_peft import SparseAdapter, SparseBudget, cli, inject, plan, to_hf_peft
from lightning_peft.planning.figures import Load

LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
         "vocab_size": 32000}  # fmt: skip
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
T5 = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}


def built(model: Any, config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        made: nn.Module = model(model.config_class(**config))
    return made


def state(load: Load) -> int:
    """Bytes that training takes for the adapters: deltas, gradients, Adam's averages, positions, originals."""
    return load.weights + load.gradients + load.optimizer + load.constants


@pytest.mark.parametrize(
    ("model", "config", "total", "sparsity", "count"),
    [
        (RobertaModel, ROBERTA, 124_645_632, 0.99, 1_246_456),
        (T5Model, T5, 222_903_552, 0.998, 445_807),
        (LlamaForCausalLM, LLAMA, 6_738_415_616, 0.99, 67_384_156),
        (LlamaForCausalLM, LLAMA, 6_738_415_616, 0.998, 13_476_831),
    ],
)
def test_counts_and_bytes_of_real_shapes(
    model: Any, config: dict[str, Any], total: int, sparsity: float, count: int
) -> None:
    net = built(model, config)
    inject(net, SparseBudget(sparsity=sparsity), train=[])
    planned = plan(net)
    k = planned.start.adapter_parameters
    assert planned.base_parameters == total
    assert abs(k - count) <= planned.layers  # one per layer at most, by rounding
    assert planned.start.optimizer == pytest.approx(8 * k, abs=4 * planned.layers)
    assert state(planned.start) == pytest.approx(24 * k, rel=1e-3)
    assert planned.start.pairs == pytest.approx(8 * k, rel=0.01)


def test_a_base_in_bfloat16_has_two_bytes_less_at_every_entry() -> None:
    net = built(RobertaModel, ROBERTA).to(torch.bfloat16)
    inject(net, SparseBudget(sparsity=0.99), train=[])
    load = plan(net).start
    assert state(load) == pytest.approx(22 * load.adapter_parameters, rel=1e-3)


def test_planned_files_are_those_that_are_written(tmp_path: Path) -> None:
    net = RobertaModel(
        RobertaConfig(**ROBERTA | {"vocab_size": 50, "max_position_embeddings": 20, "num_hidden_layers": 2,
                                   "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 64})
    )  # fmt: skip
    inject(net, SparseBudget(density=0.1), train=["pooler"])
    planned = plan(net)
    size = SparseAdapter.of(net).save(tmp_path / "adapter.safetensors")
    assert planned.start.pairs == pytest.approx(size, abs=64)
    written = to_hf_peft(net, tmp_path / "shira", check="files")
    assert planned.padded == pytest.approx(written.bytes, abs=64)
    assert planned.start.exported is None  # one number of entries for all: only padded
    assert "indices and deltas" in str(planned)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = LLAMA | {"num_hidden_layers": 2}
    LlamaConfig(**small, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)

    def figures(*options: str) -> dict[str, Any]:
        assert cli.main(["plan", str(tmp_path), "--method", "sparta", *options, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    found = figures("--sparsity", "0.998")
    assert found["layers"] == 4
    assert found["start"]["adapter_parameters"] == pytest.approx(0.002 * found["base_parameters"], abs=4)
    assert figures("--parameters", "64000")["start"]["adapter_parameters"] == 64_000
    assert figures("--density", "0.5", "--targets", "v_proj")["start"]["adapter_parameters"] == 2 * 4096**2 / 2
    for options, error in (
        (("--rank", "4"), "--method sparta has no rank; leave --rank out."),
        (("--sparsity", "0.5"), "give a sparsity of at least 0.8994, or more targets"),
    ):
        assert cli.main(["plan", str(tmp_path), "--method", "sparta", *options]) != 0
        assert error in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path), "--method", "lora", "--density", "0.1"]) != 0
    assert "--method lora takes no --density; it is for sparta." in capsys.readouterr().err
