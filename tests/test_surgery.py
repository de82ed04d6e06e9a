from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lightning_peft import Adapter, DynamicDoRA, LoRA, RankBudget, eject, inject
from lightning_peft.surgery import adaptable, adapters

LORA = partial(LoRA, rank=2)
ALL_LINEAR = [r"linear\d", "self_attn"]


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40, num_labels=3
    )
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)
    )


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(8, 2, batch_first=True, **options)


TOKENS, VECTORS = torch.arange(12).view(2, 6), torch.linspace(-1, 1, 96).view(2, 6, 8)

HOSTS: dict[str, tuple[Callable[[], nn.Module], list[str] | None, tuple[Tensor, ...]]] = {
    "bert": (bert, None, (TOKENS,)),
    "gpt2": (gpt2, None, (TOKENS,)),
    "gpt2_embedding": (gpt2, ["wte", "c_attn"], (TOKENS,)),
    "encoder": (encoder, ALL_LINEAR, (VECTORS,)),
    "attention": (attention, None, (VECTORS, VECTORS, VECTORS)),
    "mlp": (mlp, None, (VECTORS,)),
}


def output(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    out: Any = module(*inputs)
    if isinstance(out, tuple):
        out = out[0]
    tensor: Tensor = out if isinstance(out, Tensor) else out.logits
    return tensor


def fill(module: nn.Module) -> None:
    for adapter in adapters(module).values():
        nn.init.normal_(adapter.B)  # type: ignore[arg-type]


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Everything that must be as before: structure, values, identity and trainability of every parameter."""
    return {
        "text": repr(module),
        "classes": [type(child) for child in module.modules()],
        "modules": [id(child) for child in module.modules()],
        "modes": [child.training for child in module.modules()],
        "parameters": [(name, id(p), p.requires_grad, p._version) for name, p in module.named_parameters()],
        "state": list(module.state_dict()),
    }


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kind", [LORA, partial(DynamicDoRA, rank=2)], ids=["lora", "dynamic_dora"])
def test_inject_starts_at_the_base_acts_and_eject_brings_back_the_very_same(host: str, kind: Any) -> None:
    build, targets, inputs = HOSTS[host]
    module = build().eval()
    before, values = fingerprint(module), copy.deepcopy(module.state_dict())
    plain = output(module, inputs)
    done = inject(module, kind, targets)
    assert torch.equal(output(module, inputs), plain)
    assert set(done.adapted) == set(adapters(module))
    fill(module)
    for site in RankBudget.of(module).values():
        if site.gate.gain is not None:
            nn.init.ones_(site.gate.gain)
    assert not torch.allclose(output(module, inputs), plain)
    eject(module)
    assert fingerprint(module) == before
    assert torch.equal(output(module, inputs), plain)
    for name, value in module.state_dict().items():
        assert torch.equal(value, values[name])


@pytest.mark.parametrize("host", HOSTS)
def test_only_adapters_and_the_head_train(host: str) -> None:
    build, targets, inputs = HOSTS[host]
    module = build()
    done = inject(module, LORA, targets)
    fill(module)
    output(module, inputs).square().mean().backward()
    adapted = {f"{name}.{factor}" for name in done.adapted for factor in "AB"}
    assert {name for name, p in module.named_parameters() if p.grad is not None} == adapted | set(done.trained)
    own = [p for adapter in adapters(module).values() for _, p in adapter.own_parameters()]
    assert done.parameters == sum(p.numel() for p in own)
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trainable == done.parameters + done.trained_parameters
    assert done.total == sum(p.numel() for p in module.parameters())
    assert f"Trainable in all: {trainable / done.total:.2%}" in str(done)


def test_it_says_what_was_done() -> None:
    text = str(inject(bert(), LORA)).splitlines()
    assert text[0] == "Adapted 13 layers with 960 trainable parameters:"
    assert "  bert.encoder.layer.*.attention.self.query  (2 layers)" in text
    assert "  bert.pooler.dense" in text
    assert "Trained beside them: classifier (51 parameters)." in text
    assert inject(encoder(), LORA, ["self_attn"]).read == (
        "layers.0.self_attn.in_proj",
        "layers.0.self_attn.out_proj",
        "layers.1.self_attn.in_proj",
        "layers.1.self_attn.out_proj",
    )
    read = str(inject(attention(), LORA))
    assert "Read, never called, so that adapter dropout does not act there: 2 layers." in read


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["query"], {f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)}),
        ([r"layer\.1\..*\.(query|key)"], {f"bert.encoder.layer.1.attention.self.{n}" for n in ("query", "key")}),
        (
            ["output.dense"],
            {f"bert.encoder.layer.{i}.{o}.dense" for i in (0, 1) for o in ("output", "attention.output")},
        ),
        (["bert.pooler.dense", "classifier"], {"bert.pooler.dense", "classifier"}),
        (["word_embeddings"], {"bert.embeddings.word_embeddings"}),
    ],
)
def test_a_pattern_is_a_whole_name_or_its_end(targets: list[str], adapted: set[str]) -> None:
    assert set(inject(bert(), LORA, targets).adapted) == adapted


def test_a_pattern_is_not_a_part_of_a_word() -> None:
    module = nn.ModuleDict({"key": nn.Linear(4, 4), "turkey": nn.Linear(4, 4)})
    assert inject(module, LORA, ["key"]).adapted == ("key",)


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["self_attn"], {"in_proj", "out_proj"}),
        (["in_proj"], {"in_proj"}),
        (["out_proj"], {"out_proj"}),
        ([r"self_attn\.out_proj"], {"out_proj"}),
    ],
)
def test_an_attention_is_named_as_a_whole_or_by_its_projections(targets: list[str], adapted: set[str]) -> None:
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert set(inject(module, LORA, targets).adapted) == {f"self_attn.{name}" for name in adapted}


def test_adapters_act_in_an_encoders_fast_path() -> None:
    """In eval mode without gradients, TransformerEncoderLayer reads weights and calls no layer at all."""
    module = encoder().eval()
    inject(module, LORA, ALL_LINEAR, train=[])
    fill(module)
    calls: list[nn.Module] = []
    for adapter in adapters(module).values():
        adapter.register_forward_hook(lambda layer, args, out: calls.append(layer))
    slow = module(VECTORS)  # gradients are on: layers are called
    assert len(calls) == 4
    with torch.no_grad():
        fast = module(VECTORS)
    assert len(calls) == 4 + 4  # hooks keep the layers from the fast path ...
    twin = encoder().eval()
    inject(twin, LORA, ALL_LINEAR, train=[])
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        really_fast = twin(VECTORS)  # ... which is taken here
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(really_fast, slow, rtol=1e-5, atol=1e-5)
    eject(module)
    assert not torch.allclose(module(VECTORS), slow, atol=1e-2)


def test_the_fast_path_is_really_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = encoder().eval()
    inject(module, LORA, ALL_LINEAR, train=[])
    read: list[Tensor] = []
    real = torch._transformer_encoder_layer_fwd

    def spy(*args: Any) -> Tensor:
        read.append(args[3])
        return real(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", spy)
    fill(module)
    with torch.no_grad():
        module(VECTORS)
    weights = [layer.self_attn.in_proj.effective_weight() for layer in module.layers]  # type: ignore[union-attr, operator]
    assert len(read) == 2
    assert all(torch.equal(one, other) for one, other in zip(read, weights, strict=True))


@pytest.mark.parametrize("options", [{"kdim": 8, "vdim": 8}, {"bias": False}, {"add_bias_kv": True}], ids=str)
def test_other_kinds_of_attention(options: dict[str, Any]) -> None:
    module = attention(**options)
    plain = output(module, (VECTORS,) * 3)
    inject(module, LORA)
    assert torch.equal(output(module, (VECTORS,) * 3), plain)
    fill(module)
    output(module, (VECTORS,) * 3).sum().backward()
    assert all(adapter.B.grad.abs().sum() > 0 for adapter in adapters(module).values())  # type: ignore[union-attr, operator]


def test_an_attention_with_separate_projections_has_one_layer_to_adapt() -> None:
    module = attention(kdim=4, vdim=6)
    assert list(adaptable(module)) == ["out_proj"]
    inject(module, LORA, ["out_proj"])
    fill(module)
    out = module(VECTORS, VECTORS[..., :4], VECTORS[..., :6])[0]
    out.sum().backward()
    assert module.out_proj.B.grad is not None


def test_a_layer_that_parents_share_is_adapted_once_and_stays_shared() -> None:
    shared = nn.Linear(8, 8)
    module = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "head": nn.Linear(8, 2)})
    done = inject(module, LORA)
    assert done.adapted == ("a.0",)
    assert module["a"][0] is module["b"][0]  # type: ignore[index]
    assert isinstance(module["b"][0], LoRA)  # type: ignore[index]
    eject(module)
    assert module["a"][0] is module["b"][0] is shared  # type: ignore[index]


def test_a_layer_that_one_parent_holds_under_two_names_stays_shared() -> None:
    module = mlp()
    module.append(module[2])
    inject(module, LORA, ["2"])
    assert module[5] is module[2]
    assert isinstance(module[5], LoRA)
    eject(module)
    assert type(module[5]) is nn.Linear
    assert module[5] is module[2]


def test_layers_that_share_a_weight_keep_it_and_differ_in_their_adapters() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    module = nn.Sequential(first, second, nn.Linear(8, 2))
    inject(module, LORA)
    assert module[0].base.weight is module[1].base.weight
    assert module[0].A is not module[1].A
    eject(module)
    assert module[0].weight is module[1].weight
    assert all(p.requires_grad for p in module.parameters())


def test_an_adapted_embedding_leaves_the_tied_output_layer_alone() -> None:
    module = gpt2().eval()
    inject(module, LORA, ["wte"])
    weight = module.lm_head.weight
    assert weight is module.transformer.wte.base.weight  # type: ignore[union-attr]
    fill(module)
    hidden = torch.randn(3, 16)
    assert torch.equal(module.lm_head(hidden), F.linear(hidden, weight))  # type: ignore[operator, arg-type]


def test_what_stays_trainable_is_named() -> None:
    module = bert()
    done = inject(module, LORA, ["query"], train=["LayerNorm", r"pooler\.dense\.bias"])
    norms = {name for name, _ in module.named_parameters() if "LayerNorm" in name}
    assert set(done.trained) == norms | {"bert.pooler.dense.bias"}
    assert not any(p.requires_grad for name, p in module.named_parameters() if name.startswith("classifier"))
    assert inject(bert(), LORA, train=[]).trained == ()


def test_a_tied_parameter_can_be_named_by_either_name() -> None:
    module = gpt2()
    done = inject(module, LORA, train=["lm_head"])
    assert module.lm_head.weight.requires_grad  # type: ignore[union-attr]
    assert done.trained_parameters == 40 * 16
    eject(module)
    assert all(p.requires_grad for p in module.parameters())


def test_a_frozen_parameter_that_is_named_is_trained_and_frozen_again_by_eject() -> None:
    module = mlp()
    module[4].requires_grad_(False)
    assert inject(module, LORA, train=["4"]).trained == ("4.bias", "4.weight")
    assert module[4].weight.requires_grad
    eject(module)
    assert not module[4].weight.requires_grad


def test_an_adapted_attention_is_frozen_whatever_train_says() -> None:
    """Its input projection too, which becomes a layer with a name of its own on the way."""
    module = nn.ModuleDict({"attention": attention(), "head": nn.Linear(8, 2)})
    done = inject(module, LORA, ["in_proj"], train=[".*"])
    assert done.trained == ("attention.out_proj.bias", "attention.out_proj.weight", "head.bias", "head.weight")
    assert {n for n, p in module.named_parameters() if p.requires_grad and n.startswith("attention.in_proj")} == {
        "attention.in_proj.A",
        "attention.in_proj.B",
    }


def test_eject_thaws_exactly_what_was_frozen() -> None:
    module = mlp()
    module[0].bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    inject(module, LORA, train=[])
    assert not module[4].weight.requires_grad
    eject(module)
    assert {name: p.requires_grad for name, p in module.named_parameters()} == before


def test_an_adapter_keeps_what_it_froze_itself() -> None:
    class FrozenA(LoRA):
        def __init__(self, base: nn.Module) -> None:
            super().__init__(base, rank=2)
            self.A.requires_grad_(False)

    module = mlp()
    done = inject(module, FrozenA, ["0"], train=[])
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"0.B"}
    assert done.parameters == 16


def test_parts_of_a_model_can_have_methods_of_their_own() -> None:
    module = nn.ModuleDict({"one": mlp(), "two": mlp()})
    inject(module["one"], LORA)
    inject(module["two"], partial(DynamicDoRA, rank=2))
    assert {name: type(adapter) for name, adapter in adapters(module).items()} == {
        "one.0": LoRA,
        "one.2": LoRA,
        "two.0": DynamicDoRA,
        "two.2": DynamicDoRA,
    }
    eject(module)
    assert all(p.requires_grad for p in module.parameters())


def test_a_compiled_part_is_adapted_under_its_own_names() -> None:
    module = nn.Sequential(torch.compile(mlp(), backend="eager"))  # type: ignore[arg-type]
    done = inject(module, LORA, ["0.0", "0.2"], train=["0.4"])
    assert done.adapted == ("0.0", "0.2")
    assert done.trained == ("0.4.bias", "0.4.weight")
    assert list(adapters(module)) == ["0.0", "0.2"]
    fill(module)
    module(VECTORS).sum().backward()
    assert {name.replace("_orig_mod.", "") for name, p in module.named_parameters() if p.grad is not None} == {
        "0.0.A", "0.0.B", "0.2.A", "0.2.B", "0.4.weight", "0.4.bias",
    }  # fmt: skip
    eject(module)
    assert all(p.requires_grad for p in module.parameters())


def test_modes_are_kept() -> None:
    module = mlp()
    module[0].eval()
    inject(module, partial(LoRA, rank=2, dropout=0.5))
    assert not module[0].training
    assert not module[0].base.training
    assert module[2].training


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Fails:
    """A factory that refuses the second layer it gets, as a rank above a layer's limit does."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def __call__(self, layer: nn.Module) -> Adapter:
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return LoRA(layer, rank=2)


@pytest.mark.parametrize("build", [mlp, encoder, bert])
@pytest.mark.parametrize(
    "error",
    [ValueError("no"), TypeError("no"), RuntimeError("no"), UnicodeDecodeError("utf8", b"", 0, 1, "no")],
    ids=repr,
)
def test_a_factory_that_fails_leaves_the_module_untouched(build: Callable[[], nn.Module], error: Exception) -> None:
    module = build()
    next(module.parameters()).requires_grad_(False)
    before = fingerprint(module)
    with pytest.raises(type(error).__mro__[0] if not isinstance(error, UnicodeDecodeError) else ValueError, match="no"):
        inject(module, Fails(error))
    assert fingerprint(module) == before
    with pytest.raises(ValueError, match="eject found no adapter in .*; inject puts them in."):
        eject(module)


@pytest.mark.parametrize(
    ("build", "arguments", "error", "says"),
    [
        (
            bert,
            {"targets": ["qurey"]},
            ValueError,
            r"targets=\['qurey'\] matches no layer; the nearest names are 'query'",
        ),
        (
            bert,
            {"targets": ["query", "q_proj"]},
            ValueError,
            r"targets=\['q_proj'\] matches no layer; the nearest names",
        ),
        (
            bert,
            {"targets": ["LayerNorm"]},
            ValueError,
            "matches '.*LayerNorm', which cannot be adapted: LayerNorm is not a",
        ),
        (
            mlp,
            {"targets": ["(0"]},
            ValueError,
            r"targets=\['\(0'\] is not a regular expression: missing \), unterminated",
        ),
        (
            mlp,
            {"targets": []},
            ValueError,
            r"targets=\[\] names no layer; leave targets out to adapt all linear layers",
        ),
        (
            mlp,
            {"targets": "0"},
            TypeError,
            r"targets must be a list of patterns, not one string. Write targets=\['0'\].",
        ),
        (mlp, {"train": "4"}, TypeError, r"train must be a list of patterns, not one string. Write train=\['4'\]."),
        (bert, {"train": ["clasifier"]}, ValueError, r"train=\['clasifier'\] matches no module or .* are 'classifier'"),
        (
            mlp,
            {"targets": ["0"], "train": ["0"]},
            ValueError,
            r"train=\['0'\] matches no module or parameter that is not",
        ),
        (
            lambda: nn.Sequential(nn.ReLU()),
            {},
            ValueError,
            "Sequential has no linear layer or convolution to adapt. If it builds its",
        ),
        (
            lambda: nn.Linear(4, 4),
            {},
            TypeError,
            "inject replaces layers inside a module and got a single Linear; wrap it",
        ),
        (
            lambda: LoRA(nn.Linear(4, 4), 1),
            {},
            TypeError,
            "inject replaces layers inside a module and got a single LoRA",
        ),
        (
            lambda: nn.Sequential(Doubled(4, 4)),
            {"targets": ["0"]},
            ValueError,
            "matches '0', which cannot be adapted: Doub",
        ),
        (
            lambda: nn.Sequential(Doubled(4, 4)),
            {},
            ValueError,
            "Sequential has no linear layer or convolution to adapt",
        ),
    ],
)
def test_misuse(build: Callable[[], nn.Module], arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    module = build()
    before = fingerprint(module)
    with pytest.raises(error, match=says):
        inject(module, LORA, **arguments)
    assert fingerprint(module) == before


def test_a_rank_above_a_layers_limit_names_the_layer() -> None:
    with pytest.raises(
        ValueError, match=r"layer '0': rank=9 is not possible on a layer of 8 inputs and 8 outputs: give"
    ):
        inject(mlp(), partial(LoRA, rank=9))


def test_a_factory_must_return_an_adapter() -> None:
    wrong: Any = lambda layer: nn.Linear(2, 2)  # noqa: E731
    with pytest.raises(
        TypeError, match=r"layer '0': the factory returned a Linear; it must return an Adapter, as partial"
    ):
        inject(mlp(), wrong)


@pytest.mark.parametrize("targets", [None, ["0"], ["2"], ["4"]])
def test_a_second_inject_is_refused_and_leaves_the_first_alone(targets: list[str] | None) -> None:
    module = mlp()
    inject(module, LORA, ["0"])
    before = fingerprint(module)
    with pytest.raises(
        ValueError, match="Sequential has adapters already, the first at '0': call eject first, or inject"
    ):
        inject(module, LORA, targets)
    assert fingerprint(module) == before


def test_eject_of_nothing() -> None:
    with pytest.raises(ValueError, match="eject found no adapter in Sequential; inject puts them in."):
        eject(mlp())


def test_an_adapter_that_refuses_its_place_leaves_all_as_it_was() -> None:
    class Choosy(LoRA):
        def placed(self, name: str, others: Mapping[str, Adapter]) -> None:
            if others:
                raise ValueError(f"no room at {name!r}")

    module = attention()
    before = {name: (p, p.requires_grad) for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match=r"no room at 'out_proj'"):
        inject(module, partial(Choosy, rank=2))
    assert type(module) is nn.MultiheadAttention
    assert {name: (p, p.requires_grad) for name, p in module.named_parameters()} == before
