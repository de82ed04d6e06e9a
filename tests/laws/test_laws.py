"""Every adapter x every law x every kind of layer; importances and policies. A new method adds a line."""

from __future__ import annotations

from functools import partial

from lightning_peft import (
    DPT,
    AdaLoRA,
    Cubic,
    DePT,
    DynamicDoRA,
    Factorized,
    GroupImportance,
    KeepProbability,
    LoRA,
    ModuleSensitivity,
    NormShare,
    PartlyOpen,
    RankPolicy,
    RLoRA,
    SoftPrompt,
    SoRA,
    SpaRTA,
    Taylor,
    WeightDecomposed,
)
from lightning_peft.adapters import adalora, dynamic_dora, elalora, increlora, rankdyna, sora
from lightning_peft.adapters.entry_gradients import EntryGradients
from lightning_peft.testing import importance_laws, laws, policy_laws

MODELS = ("encoder_model", "decoder_model", "encoder_decoder_model")
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
test_weight_decomposed_with_triplets = laws(
    partial(WeightDecomposed, rank=3, components="adalora"), ("linear", "convolution_1d")
)
test_factorized = laws(Factorized)
test_factorized_at_a_rank = laws(partial(Factorized, rank=4), ("linear", "conv1d", "convolution_2d"))
test_factorized_from_the_weight_itself = laws(partial(Factorized, start="exact"))
test_factorized_to_break_even = laws(partial(Factorized, rank="breakeven"), ("linear_no_bias", "attention_out"))
test_rlora = laws(partial(RLoRA, rank=4))
test_rlora_of_its_own = laws(partial(RLoRA, rank=4, path="kron", share_projection=False, scaling=0.5), ("linear",))
test_rlora_in_blocks = laws(partial(RLoRA, rank=20, path="kron"), ("linear", "attention_in"))
test_rlora_io = laws(partial(RLoRA, rank=4, mode="io"), ("conv1d", "attention_in"))
test_rlora_core = laws(partial(RLoRA, rank=4, mode="core"), ("linear_no_bias", "attention_out"))
test_rlora_half = laws(partial(RLoRA, rank=4, mode="half"), ("linear", "attention_in"))
test_soft_prompt = laws(partial(SoftPrompt, length=4))
test_soft_prompt_after_the_first_token = laws(
    partial(SoftPrompt, length=3, init="random", prompt_position="after_cls"), ("encoder_model",)
)
test_dpt = laws(partial(DPT, length=5, rank=3), MODELS)
test_dpt_in_the_papers_other_form = laws(partial(DPT, length=5, rank=3, form="relu", init="svd"), ("decoder_model",))
test_dept = laws(partial(DePT, length=3, rank=3, reach=9), MODELS)
test_dept_without_offsets = laws(partial(DePT, length=3, rank=0, init="random"), ("encoder_model",))
test_sparta = laws(partial(SpaRTA, density=0.25, block=24))
test_sparta_entry_by_entry = laws(partial(SpaRTA, k=12, seed=1, scaling=2.0), ("linear", "attention_in"))

test_taylor = importance_laws(Taylor)
test_taylor_of_lora = importance_laws(Taylor, partial(LoRA, rank=4))
test_taylor_of_rlora = importance_laws(Taylor, partial(RLoRA, rank=4, mode="core"))
test_norm_share = importance_laws(NormShare)
test_norm_share_of_rlora = importance_laws(NormShare, partial(RLoRA, rank=4))
test_triplet_importance = importance_laws(adalora.TripletImportance, partial(AdaLoRA, rank=4))
test_module_sensitivity = importance_laws(ModuleSensitivity, partial(AdaLoRA, rank=4))
test_gain_magnitude = importance_laws(sora.GainMagnitude, partial(SoRA, rank=4))
test_keep_probability = importance_laws(KeepProbability, partial(LoRA, rank=4))
test_group_importance = importance_laws(GroupImportance, partial(Factorized, rank=4))
test_group_importance_by_entries = importance_laws(
    partial(GroupImportance, "elementwise_sum", uncertainty=True), partial(Factorized, rank=4)
)

test_entry_gradients = importance_laws(partial(EntryGradients, 0.3), partial(SpaRTA, density=0.3))

test_dynamic_doras_policy = policy_laws(partial(dynamic_dora.policy, interval=2))
test_dynamic_doras_policy_of_rlora = policy_laws(partial(dynamic_dora.policy, interval=2), partial(RLoRA, rank=4))
test_hard_policy_by_taylor = policy_laws(
    lambda final: RankPolicy(Cubic(0.1, 0.2), Taylor(), final, 3), partial(LoRA, rank=4)
)
test_hard_policy_with_a_minimum = policy_laws(lambda final: RankPolicy(Cubic(), NormShare(), final, 2, minimum=1))
test_adaloras_policy = policy_laws(partial(adalora.policy, interval=2), partial(AdaLoRA, rank=4))
test_soras_policy = policy_laws(lambda final: sora.policy(0.05, tail=0.3, interval=2), partial(SoRA, rank=4))
test_increloras_policy = policy_laws(
    partial(increlora.policy, interval=2), PartlyOpen(partial(AdaLoRA, rank=4), rank=1)
)
test_rankdynas_policy = policy_laws(partial(rankdyna.policy, interval=2), partial(Factorized, rank=4))
test_elaloras_policy = policy_laws(partial(elalora.policy, interval=2), PartlyOpen(partial(AdaLoRA, rank=4), rank=2))
