"""Every adapter x every law x every kind of layer. A new method adds a line."""

from __future__ import annotations

from functools import partial

from lightning_peft import AdaLoRA, DynamicDoRA, LoRA, SoRA, WeightDecomposed
from lightning_peft.testing import laws

DROPPED = ("linear", "conv1d", "convolution_2d", "convolution_3d", "attention_in")

test_lora = laws(partial(LoRA, rank=4))
test_lora_with_dropout = laws(partial(LoRA, rank=3, alpha=5.0, dropout=0.2), DROPPED)
test_dynamic_dora = laws(partial(DynamicDoRA, rank=4, dropout=0.0))
test_dynamic_dora_with_dropout = laws(partial(DynamicDoRA, rank=3, dropout=0.2), DROPPED)
test_sora = laws(partial(SoRA, rank=4))
test_adalora = laws(partial(AdaLoRA, rank=4))
test_adalora_with_dropout = laws(partial(AdaLoRA, rank=3, dropout=0.2), DROPPED)
test_weight_decomposed = laws(partial(WeightDecomposed, rank=4))
test_weight_decomposed_with_gains = laws(partial(WeightDecomposed, rank=4, components="dynamic_dora"))
test_weight_decomposed_with_dropout = laws(
    partial(WeightDecomposed, rank=3, dropout=0.2, components="dynamic_dora"), ("linear", "conv1d", "attention_in")
)
