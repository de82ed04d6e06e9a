"""An exported folder is read back before it takes its name; what it says is not believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_peft import LoRA, inject
from lightning_peft.interop import to_hf_peft
from lightning_peft.interop.targets import Target, find_targets
from lightning_peft.interop.verify import CONFIG, WEIGHTS, by_reading


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, list[Target]]:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    inject(net, lambda layer: LoRA(layer, rank=2), targets=["0"], train=[])
    to_hf_peft(net, tmp_path / "adapter", check="files")
    return tmp_path / "adapter", find_targets(net)


@pytest.mark.parametrize(("change", "sentence"), [
    ({"rank_pattern": {"(a+)+$": 2}}, r"the pattern '\(a\+\)\+\$' is no name"),
    ({"rank_pattern": []}, "cannot be read. AttributeError"),
    ({"r": 0}, "0 is no rank or scale"),
    ({"r": "2"}, "'2' is no rank or scale"),
    ({"lora_alpha": 10**400}, "is no rank or scale"),
    ({"r": 3}, "is of shape .* not of rank 3 as configured"),
])  # fmt: skip
def test_a_config_that_was_not_written_by_us_is_refused(exported: Any, change: dict[str, Any], sentence: str) -> None:
    folder, targets = exported
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(RuntimeError, match=f"the export was checked and is not right.*{sentence}"):
        by_reading(folder, targets, {})


def test_factors_of_a_giant_product_are_not_multiplied(exported: Any) -> None:
    folder, targets = exported
    tensors = load_file(folder / WEIGHTS)
    wide = {name: torch.zeros((2, 10**6) if "lora_A" in name else (10**6, 2)) for name in tensors}
    save_file(wide, folder / WEIGHTS)  # their product would have 10^12 numbers
    with pytest.raises(RuntimeError, match="is of shape"):
        by_reading(folder, targets, {})


def test_a_folder_is_never_named_by_what_it_says(tmp_path: Path, exported: Any) -> None:
    # Names of a base model are written down and not followed: the check opens two files of the folder, no other.
    folder, targets = exported
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(
        json.dumps(config | {"base_model_name_or_path": "../../etc", "auto_mapping": {"a": 1}})
    )
    before = sorted(tmp_path.rglob("*"))
    assert by_reading(folder, targets, {})[0] == 0.0
    assert sorted(tmp_path.rglob("*")) == before
