from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

from lightning_peft import LoRA, SoftPrompt, inject
from lightning_peft.regularizers.probes import Probes, only_probed, probed, probed_width


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.peft_terms = nn.ModuleDict({"other": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(self.first(x))
        return y


def heard(module: nn.Module, pattern: str, x: Any, batch: Any = None, **options: Any) -> Tensor:
    name = only_probed(module, pattern, "layer")
    probes = Probes(module, [name], **options)
    with probes.listening():
        module(x)
    return probes.heard_once(batch)[name]


def test_layers_are_named_as_targets_are() -> None:
    net = Net()
    assert list(probed(net, ["first", r"block\.\d"])) == ["first", "block.0", "block.1"]
    inject(net, partial(LoRA, rank=2))
    assert list(probed(net, [".*"])) == ["first", "block", "block.0", "block.1"]  # no part of an adapter, no term
    assert probed_width(net, "block.0", None) == 6
    assert probed_width(net, "block.0", 5) == 5


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("second", r"layer='second' matches no layer of Net; there are 'first', 'block', 'block.0', 'block.1'\."),
        ("frist", r"layer='frist' matches no layer of Net; there are 'first', 'block', 'block.0', 'block.1'\."),
        (r"block.*", "layer='block.*' names 3 layers, 'block' and 'block.0' among them, and one is meant"),
    ],
)
def test_a_pattern_that_does_not_name_one_layer(pattern: str, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("block.*'", r"block\.\*'")):
        only_probed(Net(), pattern, "layer")


def test_features_of_an_adapted_layer_are_the_adapted_ones_and_have_a_gradient() -> None:
    net, x = Net(), torch.randn(3, 4)
    inject(net, partial(LoRA, rank=2))
    nn.init.normal_(net.first.B)  # type: ignore[arg-type]
    rows = heard(net, "first", x)
    assert torch.equal(rows, net.first(x))
    rows.sum().backward()
    assert net.first.B.grad is not None


def test_positions_are_pooled_as_the_mask_shows_them() -> None:
    net, x = Net(), torch.randn(2, 3, 4)
    y, mask = net.first(x), torch.tensor([[1, 1, 0], [0, 1, 1]])
    batch = {"attention_mask": mask}
    torch.testing.assert_close(heard(net, "first", x), y.mean(1))
    wanted = torch.stack([y[0, :2].mean(0), y[1, 1:].mean(0)])
    torch.testing.assert_close(heard(net, "first", x, batch), wanted)
    torch.testing.assert_close(heard(net, "first", x, (batch, torch.tensor([0, 1]))), wanted)  # inputs and labels
    assert torch.equal(
        heard(net, "first", x, batch, pool="first"), torch.stack([y[0, 0], y[1, 1]])
    )  # padded on the left
    assert torch.equal(heard(net, "first", x, pool="first"), y[:, 0])
    assert torch.equal(heard(net, "first", x, batch, pool="last"), torch.stack([y[0, 1], y[1, 2]]))
    assert torch.equal(heard(net, "first", x, pool="last"), y[:, -1])


def test_other_kinds_of_outputs() -> None:
    convolution = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU())
    image = torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(heard(convolution, "0", image), convolution[0](image).mean((2, 3)))
    inject(convolution, partial(LoRA, rank=2))
    assert heard(convolution, "0", image).shape == (3, 5)
    recurrent = nn.Sequential(nn.LSTM(4, 6))  # positions first
    states = recurrent[0](torch.ones(7, 3, 4))[0]
    torch.testing.assert_close(heard(recurrent, "0", torch.ones(7, 3, 4)), states.mean(0))
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=9)
    model = nn.Sequential(BertModel(config).eval())
    assert heard(model, r"layer\.1", torch.ones(3, 5, dtype=torch.int64)).shape == (3, 16)


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x)


class Silent(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(self.first.forward(x))
        return y


class Reentrant(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)  # type: ignore[assignment]
        return y


class Odd(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[None, None])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Twice, "'first' was called 2 times in this training_step"),
        (Silent, "'first' gave no tensor in this training_step, so it has no features. Name a layer that is called"),
        (Reentrant, "'first' ran without gradients, as re-entrant activation checkpointing runs layers"),
        (Odd, r"the output of 'first' is of shape \(1, 1, 2, 6\), and features are \(N, d\), or \(N, L, d\)"),
    ],
)
def test_what_cannot_be_heard_is_named(kind: type[Net], says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        heard(kind(), "first", torch.randn(2, 4))


def test_several_calls_can_be_asked_for() -> None:
    net, x = Twice(), torch.randn(2, 4)
    probes = Probes(net, ["first"])
    with probes.listening():
        net(x)
    net(x)  # not listened to
    assert [tuple(rows.shape) for rows in probes.heard(None)["first"]] == [(2, 6)] * 2
    probes.detach()
    assert not any(child._forward_hooks for child in net.modules())


def test_a_pool_is_known() -> None:
    with pytest.raises(ValueError, match="pool='max': choose 'mean', 'first' or 'last'."):
        Probes(Net(), ["first"], pool="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
@pytest.mark.parametrize("prompt_position", ["start", "after_cls"])
def test_padding_is_not_pooled_behind_a_prompt(prompt_position: Any, pool: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        net = nn.ModuleDict({"bert": BertModel(config).eval()})
        inject(net, partial(SoftPrompt, length=3, prompt_position=prompt_position))
    ids = torch.arange(5, 17).view(2, 6)
    found = []
    for padding in (0, 4):
        batch = {
            "input_ids": nn.functional.pad(ids, (0, padding)),
            "attention_mask": nn.functional.pad(torch.ones_like(ids), (0, padding)),
        }
        probes = Probes(net, [only_probed(net, r"encoder\.layer\.1", "layer")], pool)
        with probes.listening():
            net["bert"](**batch)
        (rows,) = probes.heard_once(batch).values()
        found.append(rows)
    torch.testing.assert_close(*found)
