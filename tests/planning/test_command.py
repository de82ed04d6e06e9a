"""`lightning-peft plan` on a config.json: what it prints, what it refuses, and how little it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM

from lightning_peft import cli
from lightning_peft.planning import command
from lightning_peft.planning.skeleton import skeleton

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A small model's folder, without weights."""
    config = LlamaConfig(vocab_size=99, architectures=["LlamaForCausalLM"], dtype="bfloat16", **SMALL)
    config.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def figures(capsys: pytest.CaptureFixture[str], *options: Any) -> dict[str, Any]:
    assert cli.main(["plan", *map(str, options), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_folder_or_its_file(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, llama)
    assert found == figures(capsys, llama / "config.json")
    assert (found["model"], found["layers"]) == ("LlamaForCausalLM", 14)
    real = LlamaForCausalLM(LlamaConfig(vocab_size=99, **SMALL))
    assert found["base_parameters"] == sum(p.numel() for p in real.parameters())
    assert found["base"] == 2 * found["base_parameters"]  # bfloat16, as the config has it
    assert found["start"]["adapter_parameters"] == 2 * 8 * (4 * 128 + 3 * 160)  # rank 8
    assert found["start"]["weights"] == 4 * found["start"]["adapter_parameters"]
    assert figures(capsys, llama, "--dtype", "float32")["base"] == 2 * found["base"]


def test_every_option_acts(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = figures(capsys, llama)
    assert figures(capsys, llama, "--rank", 4)["start"]["components"] == plain["start"]["components"] / 2
    assert figures(capsys, llama, "--targets", "q_proj", "v_proj")["layers"] == 4
    trained = figures(capsys, llama, "--train", "lm_head")
    assert trained["start"]["trained_parameters"] == 64 * 99
    assert figures(capsys, llama, "--optimizer", "sgd")["start"]["optimizer"] == 0
    assert figures(capsys, llama, "--precision", "bf16-true")["start"]["gradients"] == plain["start"]["gradients"] / 2
    assert plain["start"]["step"] == 0
    four = figures(capsys, llama, "--world-size", 4, "--nodes", 2)
    assert (four["world_size"], four["nodes"]) == (4, 2)
    assert four["start"]["all_reduce"] == 1.5 * plain["start"]["gradients"]
    sharded = figures(capsys, llama, "--world-size", 4, "--strategy", "fsdp2", "--accumulate", 2)
    assert sharded["gather_forward"] == pytest.approx(2 * 3 * sharded["base"])
    dynamic = figures(capsys, llama, "--method", "dynamic-dora")
    assert dynamic["start"]["components"] == 14 * 12
    assert dynamic["final"]["components"] == 14 * 8
    own = figures(capsys, llama, "--method", "dynamic-dora", "--final-rank", 2.5, "--rank", 4)
    assert (own["start"]["components"], own["final"]["components"]) == (14 * 4, 14 * 2.5)
    headed = figures(capsys, llama, "--architecture", "LlamaForSequenceClassification")
    assert headed["start"]["trained_parameters"] == 2 * 64


@pytest.mark.parametrize("method", command._methods())
def test_every_method_is_planned(method: str, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, llama, "--method", method)
    load = found["start"]
    parts = (load[part] for part in ("weights", "gradients", "optimizer", "statistics", "constants"))
    assert load["memory"] == found["base"] + sum(parts)
    assert cli.main(["plan", str(llama), "--method", method]) == 0
    printed = capsys.readouterr().out
    assert ("statistics of importance" in printed) == (load["statistics"] > 0)
    assert "what calibration holds before the first step" in printed


def test_the_text_is_the_plan(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(llama), "--method", "dynamic-dora", "--world-size", "16", "--nodes", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("LlamaForCausalLM, 14 adapted layers: 16 processes on 2 nodes, DDP, 32-true, adamw.\n")
    rows = {line[:32].strip(): line[32:].split("  ") for line in printed.splitlines() if line.startswith("  ")}
    cells = {name: [cell.strip() for cell in found if cell.strip()] for name, found in rows.items()}
    assert cells["components"] == ["168", "112"]
    assert cells["pruning event: masks"][0] == cells["pruning event: masks"][1]
    found = figures(capsys, llama, "--method", "dynamic-dora", "--world-size", 16, "--nodes", 2)
    assert cells["adapter parameters"] == [f"{found[stage]['adapter_parameters']:,}" for stage in ("start", "final")]
    assert cells["optimizer state"] == [f"{found[stage]['optimizer'] / 1e3:.2f} kB" for stage in ("start", "final")]


# In a process of its own, whose peak nothing else raises. CPU seconds since its start, imports included: a busy machine
# does not add to them.
MEASURE = """
import json, resource, sys, time
from lightning_peft import cli
for method in (["--rank", "16"], ["--method", "dynamic-dora", "--final-rank", "8"]):
    assert cli.main(["plan", *sys.argv[1:], *method, "--json"]) == 0
    print(",")
seconds, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "bytes": peak}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux alone")
def test_seven_billion_parameters_take_seconds_and_no_memory(tmp_path: Path) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "llama-7b")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "llama-7b"), "--world-size", "16", "--nodes", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(cli.__file__).parents[1])
    assert run.returncode == 0, run.stderr
    lora, dynamic, used = json.loads(f"[{run.stdout}]")
    # 32 layers of four 4096 x 4096 and three 4096 x 11008 matrices with two norms, 2 x 32000 x 4096, and a norm
    size = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    cost = 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # of one component in every layer
    for found, trained in ((lora, 16 * cost), (dynamic, 12 * (cost + 224))):  # dynamic DoRA's have a gain each
        assert found["base_parameters"] == size
        assert found["start"]["adapter_parameters"] == trained
        assert found["start"]["all_reduce"] == 2 * 15 / 16 * 4 * trained
    assert dynamic["final"]["adapter_parameters"] == 8 * (cost + 224)
    assert used["seconds"] < 10, used  # both plans, and transformers' import
    assert used["bytes"] < 2e9, used


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["none"], "there is no config.json at 'none'; give a model's folder or its config.json."),
        (["{llama}/broken.json"], "{llama}/broken.json is no JSON file: Expecting"),
        (["{llama}/list.json"], "{llama}/list.json is no model's config.json: it holds a list."),
        (["{llama}/own.json"], "{llama}/own.json is of model_type 'mine', which transformers "),
        (["{llama}/bare.json"], "{llama}/bare.json names no architecture; say which class is meant, such as"),
        (["{llama}", "--architecture", "Llama"], "architecture 'Llama' is no model class of transformers"),
        (["{llama}", "--architecture", "BertModel"], "architecture 'BertModel' is no class for model_type 'llama'"),
        (["{llama}/odd.json"], "dtype='int8': choose float32, bfloat16, float16, float64."),
        (["{llama}", "--targets", "query"], "targets=['query'] matches no layer; the nearest names are"),
        (["{llama}", "--final-rank", "4"], "--method lora keeps the rank that --rank gives it; --final-rank is for "),
        (["{llama}", "--method", "dynamic-dora", "--final-rank", "0"], "a budget's rank must be positive and finite"),
        (["{llama}", "--method", "dynamic-dora", "--final-rank", "8", "--rank", "4"], "Budget(rank=8.0) is 112 comp"),
        (["{llama}", "--rank", "65"], "layer 'model.layers.0.self_attn.q_proj': rank=65 is not possible"),
        (["{llama}", "--world-size", "6", "--nodes", "4"], "world_size=6 counts the processes of all nodes, and 4"),
    ],
)
def test_errors_are_one_sentence(
    options: list[str], sentence: str, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (llama / "broken.json").write_text("{")
    (llama / "list.json").write_text("[]")
    (llama / "own.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}')
    (llama / "bare.json").write_text('{"model_type": "llama"}')
    (llama / "odd.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "int8"}'
    )
    assert cli.main(["plan", *(option.format(llama=llama) for option in options)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"lightning-peft: {sentence.format(llama=llama)}")
    assert printed.err.count("\n") == 1


def test_a_skeleton_has_shapes_and_no_numbers(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=99, architectures=["BertForMaskedLM"], **SMALL)
    config.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    model = skeleton(tmp_path, "BertForSequenceClassification", "float16")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_what_a_method_trains_beside_its_adapters_is_planned(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = figures(capsys, llama, "--method", "rankdyna")
    factors = figures(capsys, llama, "--method", "rankdyna", "--train")
    assert everything["start"]["trained_parameters"] > 0
    assert factors["start"]["trained_parameters"] == 0


def test_what_a_term_trains_is_planned(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = figures(capsys, llama, "--method", "lora")["start"]
    bayes = figures(capsys, llama, "--method", "blob")["start"]
    down = 8 * (4 * 64 + 3 * 64 - 64 + 96)  # a number for every entry of A, of seven layers, one of which has 96 inputs
    assert bayes["trained_parameters"] - plain["trained_parameters"] == 2 * down


def test_what_a_term_puts_into_the_head_is_planned(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = ("--architecture", "LlamaForSequenceClassification")
    vib = figures(capsys, llama, *classifier, "--method", "vib")
    between, width, features = 80, 96, 128  # of 64 inputs: (64 + 96) / 2, (64 + 128) / 2, the default
    sizes = [(64, between), (between, width), (width, features), (width, features), (features, 2)]
    head = sum((inner + 1) * outer for inner, outer in sizes) + 2 * features
    assert vib["start"]["trained_parameters"] == head
    assert vib["start"]["exported"] is None  # to_hf_peft refuses it, as stock PEFT could not build the head
    assert figures(capsys, llama, *classifier, "--method", "lora")["start"]["exported"] is not None
