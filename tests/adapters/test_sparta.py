"""SpaRTA: what the paper's method promises, on plain layers and plain loops; the laws are in tests/laws."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    Cubic,
    RankBudget,
    RankMonitor,
    RankPolicy,
    RankPruning,
    SpaRTA,
    Taylor,
    adapter_state_dict,
    compact,
    eject,
    follow,
    inject,
    load,
    merge,
    refresh,
)
from lightning_peft.checkpoint import ENTRY, describe
from lightning_peft.functional.sparse import draw_indices
from lightning_peft.surgery import adapters


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


class Words(nn.Module):
    """An embedding, and what reads it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.words = nn.Embedding(10, 6, padding_idx=0)
            self.out = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.out(self.words(ids))
        return y


def adapted(model: nn.Module, targets: list[str] | None = None, **options: Any) -> nn.Module:
    inject(model, partial(SpaRTA, **({"density": 0.2} | options)), targets, train=[])
    return model


def data(rows: int = 5, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).float() - 1).square().mean()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3, **kwargs: Any) -> None:
    dtype = next(p for p in model.parameters() if not p.requires_grad).dtype
    for step in range(count):
        optimizer.zero_grad()
        loss_of(model, data(dtype=dtype, seed=step)).backward()
        optimizer.step()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def move_off(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(model).values():
            assert isinstance(adapter, SpaRTA)
            adapter.delta.copy_(torch.randn(adapter.delta.shape, generator=generator))
    return model


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone().view(torch.int16 if p.element_size() == 2 else torch.int32) for p in model.parameters()]


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, bits(one), bits(other)))


def test_property_1_without_a_delta_it_is_the_base_bit_for_bit() -> None:
    x = data()
    model = adapted(net())
    assert torch.equal(model(x), net()(x))
    assert torch.equal(model.eval()(x), net()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_property_2_nothing_but_the_chosen_entries_changes(dtype: torch.dtype) -> None:
    model, plain = adapted(net(dtype)), net(dtype)
    steps(model, torch.optim.AdamW(trained(model), lr=0.1))
    model(data(dtype=dtype))
    for name, adapter in adapters(model).items():
        now, before = adapter.base.weight.flatten(), plain.get_parameter(f"{name}.weight").flatten()  # type: ignore[operator]
        chosen = torch.zeros(len(now), dtype=torch.bool)
        chosen[adapter.indices.long()] = True
        assert torch.equal(now[~chosen], before[~chosen])
        assert bool((now[chosen] != before[chosen]).any())
        assert torch.equal(adapter.original, before[chosen])


@pytest.mark.parametrize("kernel", ["auto", "sampled", "dense", "chunked"])
def test_property_4_a_step_of_sgd_is_a_masked_step_of_full_fine_tuning(kernel: str) -> None:
    """Property 13 too: whatever the kernel."""
    model, full = adapted(net(torch.float64), kernel=kernel), net(torch.float64)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    masks = {f"{name}.weight": torch.zeros(a.dense_parameters) for name, a in adapters(model).items()}
    for name, adapter in adapters(model).items():
        masks[f"{name}.weight"][adapter.indices.long()] = 1
    for seed in range(3):
        x = data(dtype=torch.float64, seed=seed)
        full.zero_grad()
        loss_of(full, x).backward()
        with torch.no_grad():
            for name, p in full.named_parameters():
                if name in masks:
                    p -= 0.1 * p.grad * masks[name].view(p.shape)
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    model(x)
    for name, adapter in adapters(model).items():
        torch.testing.assert_close(adapter.base.weight, full.get_parameter(f"{name}.weight"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_property_5_a_thousand_merges_leave_every_bit(dtype: torch.dtype) -> None:
    model, plain = net(dtype), net(dtype)
    with torch.no_grad():
        for each in (model, plain):
            each[0].weight[0, :3] = torch.tensor([-0.0, 1e-30, float("inf")])  # type: ignore[index]
    adapted(model, density=0.7)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        with torch.no_grad():
            for p in trained(model):
                p.copy_(torch.randn(p.shape, generator=generator))
        refresh(model)
    assert not torch.equal(model[2].base.weight, plain[2].weight)  # type: ignore[union-attr]
    eject(model)
    assert same_bits(model, plain)


def test_closing_every_entry_brings_back_every_bit() -> None:
    model = move_off(adapted(net(), block=2))
    for site in RankBudget.of(model).values():
        site.gate.keep(torch.zeros(len(site.gate)))
    model(data())
    assert all(torch.equal(a.base.weight, net().get_parameter(f"{n}.weight")) for n, a in adapters(model).items())
    compact(model)
    assert same_bits(model, net())


def test_property_6_entries_depend_on_seed_and_name_alone() -> None:
    one, other = adapted(net()), adapted(net(), ["4", "2", "0"])
    for name, adapter in adapters(one).items():
        assert torch.equal(adapter.indices, adapters(other)[name].indices)
        assert torch.equal(adapter.indices, draw_indices(adapter.dense_parameters, len(adapter.indices), 0, name))
    alike = adapted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)))
    assert not torch.equal(alike[0].indices, alike[1].indices)  # type: ignore[arg-type, union-attr]
    assert not torch.equal(adapted(net(), seed=1)[0].indices, one[0].indices)  # type: ignore[arg-type, union-attr]


def test_property_7_and_8_as_many_entries_as_wanted_in_order() -> None:
    model = adapted(net(), density=0.1)
    assert {n: len(a.indices) for n, a in adapters(model).items()} == {"0": 5, "2": 6}
    exact = SpaRTA(nn.Linear(8, 8), k=7)
    assert len(exact.indices) == exact.delta.numel() == len(exact.gate) == 7
    assert exact.indices.dtype == torch.int32
    blocks = SpaRTA(nn.Linear(8, 8), density=0.3, block=4)
    assert (tuple(blocks.delta.shape), len(blocks.gate), blocks.gate.cost) == ((5, 4), 5, 4)
    some = [len(SpaRTA(nn.Linear(40, 40), density=0.1, sampling="bernoulli", seed=s).indices) for s in range(5)]
    assert len(set(some)) > 1
    assert 100 < min(some) < max(some) < 220


def gradient(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, trained(model)))


def close(ones: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_property_9_many_forwards_before_one_backward() -> None:
    model = move_off(adapted(net()))
    x, y = data(seed=1), data(seed=2)
    apart = [a + b for a, b in zip(gradient(model, loss_of(model, x)), gradient(model, loss_of(model, y)), strict=True)]
    close(gradient(model, loss_of(model, x) + loss_of(model, y)), apart)
    # A backward, and then a forward, while an earlier graph is still to be used.
    first = loss_of(model, x)
    gradient_of_first = torch.autograd.grad(first, trained(model), retain_graph=True)
    second = loss_of(model, y)
    close(gradient(model, first + second), apart)
    close(list(gradient_of_first), gradient(model, loss_of(model, x)))


def test_property_9_checkpointing_and_accumulation() -> None:
    model = move_off(adapted(net()))
    x = data(rows=6)
    whole = gradient(model, loss_of(model, x))
    recomputed = (checkpoint(model, x, use_reentrant=False) - 1).square().mean()
    close(gradient(model, recomputed), whole)
    for half in x.chunk(2):
        (loss_of(model, half) / 2).backward()
    close([p.grad for p in trained(model) if p.grad is not None], whole)


def test_a_change_between_a_forward_and_its_backward_is_refused() -> None:
    model = move_off(adapted(net()))
    loss = loss_of(model, data())
    move_off(model, seed=1)
    model(data())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def behind_autograd(parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """An optimizer that leaves no trace of its step, as many did when `p.data` was usual."""

    class Silent(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-group["lr"])

    return Silent(parameters, **options)


@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.AdamW, lr=0.1, fused=True),
        partial(torch.optim.AdamW, lr=0.1, foreach=True),
        partial(torch.optim.AdamW, lr=0.1, foreach=False),
        partial(behind_autograd, lr=0.1),
    ],
    ids=["fused", "foreach", "for-loop", "silent"],
)
def test_property_10_every_optimizer_updates_the_weight(make: Any, followed: bool) -> None:
    model = adapted(net())
    optimizer = make(trained(model))
    undo = follow(model, [optimizer]) if followed else None
    steps(model, optimizer)
    if not followed:
        model(data())
    for adapter in adapters(model).values():
        assert torch.equal(adapter.base.weight, adapter.effective_weight())
        assert not torch.equal(adapter.base.weight.flatten()[adapter.indices.long()], adapter.original)  # type: ignore[operator]
    if undo is not None:
        undo()
        assert not optimizer._optimizer_step_post_hooks


def test_property_11_no_base_weight_ever_has_a_gradient() -> None:
    model = adapted(net())
    steps(model, torch.optim.AdamW(trained(model)))
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["0.delta", "2.delta"]


def test_property_12_saved_and_loaded_it_gives_the_same(tmp_path: Path) -> None:
    model = move_off(adapted(net(), ["0", "2", "3"]))
    x = data()
    expected = model(x)
    state = adapter_state_dict(model)
    assert sorted(state) == sorted(f"{n}.{t}" for n in "023" for t in ("delta", "gate.mask", "indices", "original"))
    torch.save({"state_dict": state, ENTRY: describe(model, state)}, tmp_path / "a.ckpt")
    assert torch.equal(model(x), expected)  # the base was looked at, and is adapted again
    twin = load(net(), tmp_path / "a.ckpt")
    assert torch.equal(twin(x), expected)
    eject(twin)
    assert same_bits(twin, net())


@pytest.mark.parametrize("assign", [False, True])
def test_a_full_checkpoint_has_the_weight_that_acts_and_brings_back_the_base(assign: bool) -> None:
    model = adapted(net())
    steps(model, torch.optim.SGD(trained(model), lr=0.1))
    state = copy.deepcopy(model.state_dict())
    for name, adapter in adapters(model).items():
        assert torch.equal(state[f"{name}.base.weight"], adapter.effective_weight())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        other = adapted(nn.Sequential(*[copy.deepcopy(m) for m in net()]), seed=5)  # other entries
        for p in other.parameters():
            nn.init.normal_(p)
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(data()), model(data()))
    eject(other)
    assert same_bits(other, net())


def test_loading_other_entries_gives_the_old_ones_back() -> None:
    model, other = move_off(adapted(net())), move_off(adapted(net(), seed=5), seed=1)
    own = {k: v for k, v in other.state_dict().items() if "base" not in k and k.split(".", 1)[1] in OWN}
    model(data())
    model.load_state_dict(own, strict=False)
    assert torch.equal(model(data()), other(data()))
    with pytest.raises(RuntimeError, match="0.indices are no positions in the layer's weight: they do not ascend"):
        model.load_state_dict({"0.indices": torch.zeros(10, dtype=torch.int32)}, strict=False)


OWN = ("delta", "gate.mask", "indices", "original")


def test_property_14_the_optimizer_holds_two_numbers_for_each_entry() -> None:
    model = adapted(net())
    optimizer = torch.optim.AdamW(trained(model))
    steps(model, optimizer, 1)
    held = sum(v.numel() for entry in optimizer.state.values() for k, v in entry.items() if k != "step")
    assert held == 2 * sum(len(a.indices) for a in adapters(model).values())


def test_property_16_without_gradients_it_is_the_base_alone() -> None:
    model = move_off(adapted(net()))
    with torch.no_grad():
        y = model(data())
    assert y.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(model(data()), y)
    move_off(model, seed=1)
    with torch.inference_mode():  # written here, and trained on afterwards
        there = model(data())
    steps(model, torch.optim.SGD(trained(model), lr=0.0), 1)
    assert torch.equal(model(data()), there)


def test_a_normalisation_is_trained_where_it_is_named() -> None:
    model, full = adapted(net(torch.float64), ["3"], density=0.5), net(torch.float64)
    x = data(dtype=torch.float64)
    loss_of(model, x).backward()
    loss_of(full, x).backward()
    norm = adapters(model)["3"]
    assert isinstance(norm, SpaRTA)
    torch.testing.assert_close(norm.delta.grad, full[3].weight.grad[norm.indices.long()])  # type: ignore[index, union-attr]
    assert "3" not in adapters(adapted(net()))
    move_off(model)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    merge(model)
    assert torch.equal(model(x), expected)


def test_a_padding_vector_is_not_trained() -> None:
    model, full = adapted(Words(), ["words"], density=0.5), Words()
    ids = torch.tensor([[0, 3, 3], [9, 0, 1]])
    for each in (model, full):
        each(ids).square().sum().backward()
    words = adapters(model)["words"]
    assert isinstance(words, SpaRTA)
    wanted = full.words.weight.grad.flatten()[words.indices.long()]  # type: ignore[union-attr]
    torch.testing.assert_close(words.delta.grad, wanted)
    assert bool((words.indices < 6).any())  # some of its entries are drawn, and get nothing


def test_somebody_may_listen_to_the_base() -> None:
    model, heard = move_off(adapted(net())), []
    x = data()
    wanted = gradient(model, loss_of(model, x))
    for adapter in adapters(model).values():
        adapter.base.register_forward_hook(lambda m, a, y: heard.append(y.square().sum()))
    loss = loss_of(model, x)
    close(gradient(model, loss), wanted)
    assert len(heard) == 2


def test_noise_in_the_place_of_delta_writes_nothing() -> None:
    model = move_off(adapted(net()))
    x = data()
    model(x)
    before = [a.base.weight.clone() for a in adapters(model).values()]  # type: ignore[operator]
    swapped = {f"{n}.delta": a.delta + 1 for n, a in adapters(model).items()}  # type: ignore[operator]
    noisy = [torch.func.functional_call(model, swapped, (x,)) for _ in range(2)]
    loss = (noisy[0] + noisy[1] + model(x)).square().mean()
    assert all(torch.equal(b, a.base.weight) for b, a in zip(before, adapters(model).values(), strict=True))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in trained(twin):
            p.add_(1)
    y = twin(x)
    torch.testing.assert_close(noisy[0], y)
    loss.backward()  # nothing was written under any of the three graphs


def test_entries_move_with_what_they_have_learnt() -> None:
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    adapter = SpaRTA(layer, k=4)
    with torch.no_grad():
        adapter.delta.copy_(torch.arange(1.0, 5))
    adapter(torch.ones(1, 4))
    old = adapter.indices.tolist()
    new = sorted({old[1], old[3], *[i for i in range(16) if i not in old][:2]})
    was = adapter.move(torch.tensor(new))
    assert [old[i] if i >= 0 else None for i in was.tolist()] == [i if i in old else None for i in new]
    assert adapter.delta.tolist() == [float(old.index(i) + 1) if i in old else 0.0 for i in new]
    adapter(torch.ones(1, 4))
    changed = (layer.weight != before).flatten().nonzero().flatten().tolist()
    assert changed == [old[1], old[3]]
    adapter.restore_base()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("indices", "options", "says"),
    [
        ([1, 2, 3], {"k": 4}, "move takes 4 positions, as many as there are. Got 3."),
        ([1, 2, 3, 16], {"k": 4}, "move takes ascending positions in a weight of 16 entries, and they run from 1 to"),
        ([0, 1, 2, 3], {"k": 4, "block": 2}, "entries that are gated in blocks of 2 cannot move: use block=1."),
    ],
)
def test_entries_that_cannot_move_are_told(indices: list[int], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says.replace(".", r"\.")):
        SpaRTA(nn.Linear(4, 4), **options).move(torch.tensor(indices))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"density": 0}, "density=0 trains nothing: give a share above 0"),
        ({"density": 2.0}, r"density is a share of a tensor's entries, in \[0, 1\]. Got 2.0."),
        (
            {"k": 17},
            "k=17 entries cannot be trained of a weight that has 16, in blocks of 1: give a multiple",
        ),
        ({"k": 5, "block": 2}, "in blocks of 2: give a multiple of 2 from 2 to 16."),
        ({"block": 0}, "block is a number of entries, from 1 to the 16 of this weight. Got 0."),
        ({"sampling": "all"}, "sampling='all': choose 'exact', 'bernoulli'."),
        ({"sampling": "bernoulli", "k": 3}, "draws a random number of entries, so it goes neither with k nor with"),
        ({"kernel": "fast"}, "kernel='fast': choose 'sampled', 'dense', 'chunked'."),
        ({"scaling": float("inf")}, "scaling multiplies delta and must be finite. Got inf."),
    ],
)
def test_arguments_that_cannot_be_are_told(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SpaRTA(nn.Linear(4, 4), **options)


def test_a_weight_that_others_have_is_not_written() -> None:
    model = Words()
    tied = nn.Linear(6, 10)
    tied.weight = model.words.weight
    model.tied = tied
    with pytest.raises(ValueError, match="layer 'words': its weight is one parameter with 'tied.weight', which would"):
        adapted(model, ["words"])
    with pytest.raises(ValueError, match="layer 'tied': its weight is one parameter with that of 'words', and both"):
        adapted(model, ["words", "tied"])
    assert all(p.requires_grad for p in model.parameters())


def test_it_cannot_be_drawn_anew() -> None:
    with pytest.raises(RuntimeError, match="SpaRTA keeps what its layer's entries were, so the layer can neither"):
        SpaRTA(nn.Linear(4, 4)).reset_parameters()
    with pytest.raises(TypeError, match="SpaRTA cannot adapt this layer: Tanh is not a Linear"):
        SpaRTA(nn.Tanh())


def test_a_change_of_scale_acts_at_the_next_forward() -> None:
    model = move_off(adapted(net()))
    once, base = model(data()), net()(data())
    for adapter in adapters(model).values():
        adapter.scaling = 0.0  # type: ignore[assignment]
    assert torch.equal(model(data()), base)
    for adapter in adapters(model).values():
        adapter.scaling = 1.0  # type: ignore[assignment]
    assert torch.equal(model(data()), once)


def test_delta_stays_wide_and_exact_through_casts() -> None:
    model = move_off(adapted(net()))
    before = [p.detach().clone() for p in trained(model)]
    model.to(torch.bfloat16)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, trained(model), strict=True))
    model(data(dtype=torch.bfloat16))
    eject(model)
    assert same_bits(model, net(torch.bfloat16))


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (2, 2, 3, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_what_follows_may_change_the_output_in_place(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(6, 4, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = layer(x).detach()
    adapter = SpaRTA(layer, density=0.5)
    y = adapter(x)
    assert torch.equal(y, expected)
    y.mul_(2).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * layer.weight.sum(0).expand(shape))
    rows = x.detach().reshape(-1, 6).sum(0)
    torch.testing.assert_close(adapter.delta.grad, 2 * rows[(adapter.indices % 6).long()])


class Net(L.LightningModule):
    """Dropout and an adaptive optimizer that leaves no trace: all that a resumed run could get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for p in self.parameters():
                nn.init.normal_(p, std=0.3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(trained(self), lr=0.05, fused=True)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(data(rows=32)), batch_size=4)


class SaveAt(L.Callback):
    """Writes a checkpoint in mid-run."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(path: Path, compact: bool, block: int, *more: L.Callback, **options: Any) -> Net:
    torch.manual_seed(3)
    policy = RankPolicy(Cubic(0.1, 0.2), Taylor(), Budget(share=0.5), 4)
    module = Net()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
        callbacks=[
            AdapterInjection(partial(SpaRTA, density=0.3, block=block), verbose=False),
            RankPruning(policy, compact="final" if compact else "never"), RankMonitor(), AdapterCheckpoint(), *more,
        ],
    )  # fmt: skip
    trainer.fit(module, **options)
    trainer.save_checkpoint(path)
    return module


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("compact", [False, True])
def test_a_run_that_is_pruned_stopped_and_resumed_is_the_run_through(tmp_path: Path, compact: bool, block: int) -> None:
    stopped = tmp_path / "stopped.ckpt"
    through = fit(tmp_path / "through.ckpt", compact, block, SaveAt(11 if compact else 7, stopped))  # cut in step 10
    resumed = fit(tmp_path / "resumed.ckpt", compact, block, ckpt_path=stopped)
    one, other = adapter_state_dict(through), adapter_state_dict(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    budget = RankBudget.of(through)
    assert 0 < budget.spent < budget.capacity
    sizes = [len(a.indices) for a in adapters(through).values()]
    assert (sum(sizes) == block * budget.spent) is compact
    assert all(size % block == 0 for size in sizes)
    loaded = load(Net(), tmp_path / "through.ckpt")
    assert torch.equal(loaded.eval().net(data()), through.eval().net(data()))  # type: ignore[operator, union-attr]
    eject(resumed)
    assert same_bits(resumed, Net()) is False  # the head was trained
    assert all(torch.equal(resumed.net[i].weight, Net().net[i].weight) for i in (0, 2))


@pytest.mark.parametrize("change", ["vector", "data", "parameter", "functional"])
def test_a_delta_that_is_replaced_acts_at_the_next_forward(change: str) -> None:
    net, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(5, 6)
    inject(net, partial(SpaRTA, density=0.3), ["0"], train=[])
    adapter: Any = net[0]
    before, new = net(x), torch.randn_like(adapter.delta)
    if change == "vector":
        nn.utils.vector_to_parameters(new, [adapter.delta])
    elif change == "data":
        adapter.delta.data = new
    elif change == "parameter":
        adapter.delta = nn.Parameter(new)
    if change == "functional":
        found = torch.func.functional_call(net, {"0.delta": nn.Parameter(new)}, (x,))
        torch.testing.assert_close(net(x), before)
        adapter.delta = nn.Parameter(new)
    else:
        found = net(x)
    weight = adapter.effective_weight()
    torch.testing.assert_close(found, x @ weight.t() + adapter.base.bias)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_hooks_that_change_what_goes_in_or_out_have_their_share_in_the_gradient(kind: str) -> None:
    torch.manual_seed(0)
    base: Any = nn.Linear(6, 8) if kind == "linear" else nn.Embedding(10, 8)
    x: Any = torch.randn(5, 6) if kind == "linear" else torch.tensor([1, 2, 2, 3])
    base.register_forward_pre_hook(lambda layer, args: (args[0] * 3 if kind == "linear" else (args[0] + 1) % 10,))
    base.register_forward_hook(lambda layer, args, y: 2 * y)
    full = copy.deepcopy(base)
    adapter = SpaRTA(base, density=0.5)
    mine, theirs = adapter(x), full(x)
    assert torch.equal(mine, theirs)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(adapter.delta.grad, full.weight.grad.flatten()[adapter.indices.long()])


def test_a_file_of_a_narrow_base_leaves_a_wide_one_its_numbers(tmp_path: Path) -> None:
    def net(dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(6, 8)).to(dtype)
        inject(made, partial(SpaRTA, density=0.3), ["0"], train=[])
        return made

    narrow, wide = net(torch.bfloat16), net(torch.float32)
    before = wide[0].base.weight.detach().clone()
    nn.init.ones_(narrow[0].delta)
    wide.load_state_dict(adapter_state_dict(narrow), strict=False)
    adapter = wide[0]
    assert torch.equal(adapter.original, before.flatten()[adapter.indices.long()])
    x = torch.randn(5, 6)
    torch.testing.assert_close(wide(x), x @ adapter.effective_weight().t() + adapter.base.bias)
    eject(wide)
    assert torch.equal(wide[0].weight, before)


@pytest.mark.parametrize("missing", ["indices", "original"])
def test_a_state_without_one_of_its_halves_changes_nothing(missing: str) -> None:
    torch.manual_seed(0)
    net, other = (nn.Sequential(nn.Linear(6, 8)) for _ in range(2))
    before = net[0].weight.detach().clone()
    inject(net, partial(SpaRTA, density=0.3), ["0"], train=[])
    inject(other, partial(SpaRTA, density=0.3, seed=1), ["0"], train=[])
    state = {name: value for name, value in other.state_dict().items() if name != f"0.{missing}" and "base" not in name}
    with pytest.raises(RuntimeError, match=rf"0\.indices and 0\.original go together, and 0\.{missing} is not there"):
        net.load_state_dict(state, strict=False)
    eject(net)
    assert torch.equal(net[0].weight, before)


def test_a_cast_takes_a_waiting_gradient_along() -> None:
    net: Any = nn.Sequential(nn.Linear(6, 8))
    inject(net, partial(SpaRTA, density=0.3), ["0"], train=[])
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    net(torch.randn(5, 6)).sum().backward()
    net.to(torch.bfloat16)
    optimizer.step()
    assert net[0].delta.grad.dtype == net[0].delta.dtype == torch.float32


def test_gradients_that_are_scaled_by_frequency_are_refused() -> None:
    with pytest.raises(TypeError, match=r"it scales gradients by how often a token is there \(scale_grad_by_freq\)"):
        SpaRTA(nn.Embedding(10, 6, scale_grad_by_freq=True))
