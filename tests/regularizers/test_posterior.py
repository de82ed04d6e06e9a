from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

from lightning_peft import LoRA, RLoRA, inject
from lightning_peft.adapters.base import Adapter
from lightning_peft.functional.dziugaite_roy import prior_sigma_cost, prior_sigma_neighbours
from lightning_peft.functional.perturbation import log_sigma
from lightning_peft.regularizers.posterior import Posterior

HUGE = -12.0  # log sigma at its lower limit


class Scaled(Adapter):
    """A vector that multiplies the layer's output, and says so."""

    elementwise = ("g",)

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.g = nn.Parameter(torch.ones(base.out_features))  # type: ignore[arg-type]

    def effective_weight(self) -> Tensor:
        return self.base.weight * self.g[:, None]  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        # (examples, n) in place of (n,): broadcast over the places between
        g = self.g if self.g.dim() == 1 else self.g.view(len(self.g), *(1,) * (y.dim() - 2), -1)
        return y * g


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        inject(module, partial(LoRA, rank=2), targets=["0", "2"], train=["4"])
        for parameter in module.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    return module


def x(rows: int = 7) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_in_q_is_what_is_trained() -> None:
    module = net()
    posterior = Posterior(module)
    assert posterior.names == tuple(name for name, p in module.named_parameters() if p.requires_grad)
    assert posterior.missing(module) == ()
    part = Posterior(module, over=["4"])
    assert part.names == ("4.weight", "4.bias")
    assert part.missing(module) == ("0.A", "0.B", "2.A", "2.B")
    assert Posterior(module, over=[r"\d.A", "4.bias"]).names == ("0.A", "2.A", "4.bias")


def test_noise_is_in_its_places_inside_and_nowhere_outside() -> None:
    module = net()
    posterior = Posterior(module, sigma=0.1)
    before, objects = bits(module), {id(p) for p in module.parameters()}
    plain = module(x())
    with posterior.sampled(module, generator()):
        inside = module(x())
        assert module[0].A is not before["0.A"]
        assert not isinstance(module[0].A, nn.Parameter)
    assert not torch.equal(inside, plain)
    assert torch.equal(module(x()), plain)
    assert same(bits(module), before)
    assert objects == {id(p) for p in module.parameters()}


def test_an_error_inside_leaves_nothing_behind() -> None:
    module = net()
    posterior = Posterior(module)
    before = bits(module)
    with pytest.raises(ZeroDivisionError), posterior.sampled(module, unit="example", examples=7):
        raise ZeroDivisionError
    assert same(bits(module), before)
    assert not module[4]._forward_hooks
    with posterior.sampled(module):
        pass


def test_noise_has_the_standard_deviation_it_says() -> None:
    module = net()
    posterior = Posterior(module, sigma=lambda name, value: 0.5 if name == "0.A" else 0.01 * value.abs())
    draws: dict[str, list[Tensor]] = {"0.A": [], "4.weight": []}
    for _ in range(2000):
        with posterior.sampled(module), torch.no_grad():
            draws["0.A"].append(module[0].A.clone())
            draws["4.weight"].append(module[4].weight.clone())
    for name, wanted in (("0.A", torch.full((2, 6), 0.5)), ("4.weight", 0.01 * module[4].weight.abs())):
        drawn = torch.stack(draws[name])
        parameter = dict(module.named_parameters())[name]
        # 5 standard errors of a mean and of a standard deviation, of 2000 draws
        assert bool(((drawn.mean(0) - parameter).abs() < 5 * wanted / 2000**0.5).all())
        assert bool(((drawn.std(0) - wanted).abs() < 5 * wanted / 4000**0.5).all())


def test_sigma_at_its_lower_limit_is_the_deterministic_module() -> None:
    module = net()
    posterior = Posterior(module)
    plain = module(x())
    with torch.no_grad():
        posterior.offset.fill_(-1e6)
    with posterior.sampled(module, generator()):
        torch.testing.assert_close(module(x()), plain, rtol=0, atol=1e-4)
    # large, and finite: 12 nats per parameter, and what lambda adds
    k = posterior.offset.numel()
    assert posterior.kl().item() == pytest.approx(k * (12 + math.log(0.1) - 0.5), rel=1e-4)


def test_gradients_are_those_of_the_perturbed_point_and_of_finite_differences() -> None:
    """d/d mu equals the plain gradient there; d/d v is what differences give with eps fixed."""
    module = net().double()
    posterior = Posterior(module, sigma=0.1, speed=3.0).double()

    def loss() -> Tensor:
        with posterior.sampled(module, generator()):
            value: Tensor = module(x().double()).square().sum()
        return value

    loss().backward()
    own = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    point = copy.deepcopy(module)
    with posterior.sampled(module, generator()):
        noisy = {name: module.get_submodule(name[0])._parameters[name[2:]] for name in posterior.names}
    with torch.no_grad():
        for name, p in point.named_parameters():
            p.grad = None
            if name in noisy:
                p.copy_(noisy[name])  # type: ignore[arg-type]
    point(x().double()).square().sum().backward()
    for name, p in point.named_parameters():
        assert p.grad is None or torch.equal(p.grad, own[name]), name
    assert own.keys() == {name for name, p in point.named_parameters() if p.grad is not None} == set(posterior.names)
    found = posterior.offset.grad
    assert found is not None
    for i in range(0, posterior.offset.numel(), 5):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                posterior.offset[i] += step
                values.append(loss().item())
                posterior.offset[i] -= step
        assert float(found[i]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_beyond_its_limits_log_sigma_has_no_gradient() -> None:
    module = net()
    posterior = Posterior(module)
    with torch.no_grad():
        posterior.offset[:10] = 1e3
    with posterior.sampled(module, generator()):
        loss = module(x()).square().sum()
    (loss + posterior.kl()).backward()
    assert posterior.offset.grad is not None
    assert not posterior.offset.grad[:10].any()
    assert posterior.offset.grad[10:].all()
    assert posterior.sigma()[0].item() == 1.0


@pytest.mark.parametrize("prior", ["fixed", "learned", "per_tensor"])
def test_kl_is_that_of_torch_distributions(prior: Any) -> None:
    module = net()
    posterior = Posterior(module, prior_sigma=0.2, sigma=0.05, prior=prior)
    with torch.no_grad():
        posterior.offset.normal_(generator=generator(), std=0.1)
        for p in module.parameters():
            p.add_(0.1)
    scale = torch.full_like(posterior.offset, 0.2)
    if prior != "fixed":
        assert posterior.prior_offset is not None
        with torch.no_grad():
            posterior.prior_offset.copy_(torch.linspace(-0.1, 0.02, posterior.prior_offset.numel()).squeeze())
        factors = (10 * posterior.prior_offset.detach()).exp()
        sizes = [dict(module.named_parameters())[name].numel() for name in posterior.names]
        if prior == "per_tensor":
            factors = torch.cat([factor.repeat(size) for factor, size in zip(factors, sizes, strict=True)])
        scale = scale * factors
    mean = torch.cat([dict(module.named_parameters())[name].detach().reshape(-1) for name in posterior.names])
    q = Normal(mean.double(), posterior.sigma().double())
    p = Normal(posterior.prior_mean.double(), scale.double())
    wanted = kl_divergence(q, p).sum()
    torch.testing.assert_close(posterior.kl(torch.float64), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(posterior.kl(), wanted.float(), rtol=1e-5, atol=0)
    by_name = posterior.kl_by_name()
    assert tuple(by_name) == posterior.names
    torch.testing.assert_close(torch.stack(list(by_name.values())).sum(), wanted, rtol=1e-6, atol=0)


def test_kl_is_zero_where_q_is_the_prior() -> None:
    module = net()
    posterior = Posterior(module, prior_sigma=0.1, sigma=0.1)
    assert posterior.kl().item() == 0 == posterior.divergence()
    with torch.no_grad():
        module[0].A[0, 0] += 1e-3
    assert posterior.kl().item() == pytest.approx(0.5e-4, rel=1e-3)


def test_a_learnt_prior_is_paid_for_on_its_grid() -> None:
    module = net()
    posterior = Posterior(module, prior_sigma=0.15, sigma=0.05, prior="per_tensor")
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1)
    scales = posterior.prior_scales()
    assert scales.shape == (6,)
    torch.testing.assert_close(posterior.prior_cost(), prior_sigma_cost(scales))
    # Of the grid's two members beside each scale, the one for which its parameter pays less.
    parameters = dict(module.named_parameters())
    total = 0.0
    for i, name in enumerate(posterior.names):
        both = []
        for side in prior_sigma_neighbours(scales[i].item()):
            size = parameters[name].numel()
            start = sum(parameters[n].numel() for n in posterior.names[:i])
            q = Normal(parameters[name].detach().reshape(-1).double(), torch.full((size,), 0.05).double())
            p = Normal(posterior.prior_mean[start : start + size].double(), torch.full((size,), side).double())
            both.append(float(kl_divergence(q, p).sum()) + float(prior_sigma_cost(side)))
        total += min(both)
    assert posterior.divergence() == pytest.approx(total, rel=1e-5)
    assert Posterior(module).prior_cost() == 0


def test_gradients_of_kl_reach_means_offsets_and_prior() -> None:
    module = net()
    posterior = Posterior(module, prior_sigma=0.1, prior="learned")
    with torch.no_grad():
        module[0].A.add_(0.1)
    (posterior.kl() + posterior.prior_cost()).backward()
    assert posterior.prior_offset is not None
    for tensor in (module[0].A, posterior.offset, posterior.prior_offset):
        assert tensor.grad is not None
        assert bool(tensor.grad.any())


def blocks(module: nn.Sequential, value: Tensor, reentrant: bool | None) -> Tensor:
    if reentrant is None:
        return module(value)  # type: ignore[no-any-return]
    value = checkpoint(module[:2], value, use_reentrant=reentrant)
    value = checkpoint(module[2:4], value, use_reentrant=reentrant)
    return module[4](value)  # type: ignore[no-any-return]


@pytest.mark.parametrize("unit", ["batch", "example"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_has_the_same_noise(reentrant: bool, unit: Any) -> None:
    found = []
    for kind in (None, reentrant):
        module = net()
        posterior = Posterior(module, sigma=0.2)
        with posterior.sampled(module, generator(), unit, 7):
            blocks(module, x().requires_grad_(), kind).square().sum().backward()
        found.append([p.grad for p in [*module.parameters(), posterior.offset] if p.requires_grad])
    for plain, again in zip(*found, strict=True):
        assert plain is not None
        assert again is not None
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


def test_noise_can_be_held_again_for_backward() -> None:
    grads = []
    for again in (False, True):
        module = net()
        posterior = Posterior(module, sigma=0.2)
        posterior.draw(module, generator())
        with posterior.held():
            loss = blocks(module, x(), False).square().sum()
            if not again:
                loss.backward()
        if again:
            before = bits(module)
            with posterior.held():
                loss.backward()
            assert same(bits(module), before)
        posterior.forget()
        assert module[0].A.grad is not None
        grads.append(module[0].A.grad)
    assert torch.equal(*grads)


def scaled(head: bool = True) -> nn.Sequential:
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    inject(module, Scaled, targets=["0"], train=["2"] if head else [])
    return module


def test_every_example_has_a_draw_of_its_own() -> None:
    """Of an elementwise vector, exactly: the same numbers, example by example."""
    module = scaled(head=False)
    posterior = Posterior(module, sigma=0.5)
    same_rows = x(1).expand(3, 6)
    with posterior.sampled(module, generator(), "example", 3):
        many = module(same_rows)
    eps = torch.randn(3 * 5, generator=generator()).view(3, 5)
    wanted = module[2](torch.tanh(module[0].base(same_rows) * (1 + 0.5 * eps)))
    torch.testing.assert_close(many, wanted)
    assert float(torch.nn.functional.pdist(many.detach()).min()) > 1e-2
    with posterior.sampled(module, generator()):
        one = module(same_rows)
    torch.testing.assert_close(one, one[:1].expand_as(one))  # not to the bit: a kernel need not round all rows alike


def test_an_adapter_may_hold_such_a_vector_in_its_gate() -> None:
    module = nn.Sequential(nn.Linear(6, 8))
    inject(module, partial(RLoRA, rank=4), targets=["0"])
    nn.init.normal_(module[0].b)  # type: ignore[arg-type]
    posterior = Posterior(module, sigma=0.5)
    assert not posterior.shared()
    same_rows = x(1).expand(3, 6)
    with torch.no_grad(), posterior.sampled(module, generator(), "example", 3):
        many = module(same_rows)
    b, gain = torch.randn(3 * 12, generator=generator()).view(3, 12).split((8, 4), 1)
    for row, (more_b, more_gain) in enumerate(zip(b, gain, strict=True)):
        alone = copy.deepcopy(module)
        with torch.no_grad():
            alone[0].b.add_(0.5 * more_b)  # type: ignore[operator,union-attr]
            alone[0].gate.gain.add_(0.5 * more_gain)  # type: ignore[operator,union-attr]
            torch.testing.assert_close(many[row], alone(same_rows)[row])


def test_gradients_of_draws_for_every_example() -> None:
    module = scaled(head=False).double()
    posterior = Posterior(module, sigma=0.5, speed=2.0).double()
    tokens = torch.randn(3, 4, 6, generator=generator(), dtype=torch.float64)  # (examples, tokens, d)
    with posterior.sampled(module, generator(), "example", 3):
        module(tokens).square().sum().backward()
    eps = torch.randn(3 * 5, generator=generator(), dtype=torch.float64).view(3, 5)
    g, v = (
        torch.ones(5, dtype=torch.float64, requires_grad=True),
        torch.zeros(5, dtype=torch.float64, requires_grad=True),
    )
    drawn = g + (math.log(0.5) + 2 * v).exp() * eps
    module[2](torch.tanh(module[0].base(tokens) * drawn[:, None])).square().sum().backward()
    torch.testing.assert_close(module[0].g.grad, g.grad)
    torch.testing.assert_close(posterior.offset.grad, v.grad, rtol=1e-6, atol=1e-8)


def test_a_linear_head_has_the_distribution_of_weights_of_its_own() -> None:
    head = nn.Sequential(nn.Linear(3, 2))
    posterior = Posterior(head, sigma=lambda name, value: 0.3 * value.abs() + 0.05)
    value = torch.randn(2, 3, generator=generator())
    with torch.no_grad(), posterior.sampled(head, generator(), "example", 40000):
        out = head(value.repeat(20000, 1)).view(20000, 2, 2)
    with torch.no_grad():
        weight, bias = 0.3 * head[0].weight.abs() + 0.05, 0.3 * head[0].bias.abs() + 0.05
        wanted = (value.square() @ weight.square().T + bias.square()).sqrt()
        torch.testing.assert_close(out.std(0), wanted, rtol=0.03, atol=0)
        torch.testing.assert_close(out.mean(0), head(value), rtol=0, atol=float(5 * wanted.max() / 20000**0.5))
    # rows and outputs are independent: correlations of 20000 draws, within 5 standard errors
    corr = torch.corrcoef(out.view(20000, 4).T) - torch.eye(4)
    assert float(corr.abs().max()) < 5 / 20000**0.5


def test_what_examples_share_is_told() -> None:
    assert Posterior(net()).shared() == ("0.A", "0.B", "2.A", "2.B")
    assert Posterior(scaled()).shared() == ()


def test_a_head_that_is_not_called_or_sees_tokens_is_told() -> None:
    module = scaled()
    posterior = Posterior(module)
    block = partial(posterior.sampled, module, unit="example", examples=3)
    with pytest.raises(RuntimeError, match=r"'2.weight' is in Q and was not called, so it had no noise"), block():
        module[:2](x(3))
    with pytest.raises(RuntimeError, match=r"'2.weight' got \(3, 4, 5\) for an input, and noise for every"), block():
        module(torch.ones(3, 4, 6))


def test_a_head_that_is_called_twice_is_told() -> None:
    """Noise at the output is that of one weight for each row at one input, and not at two."""
    module = scaled()
    posterior = Posterior(module)
    with (
        pytest.raises(RuntimeError, match=r"'2.weight' was called twice, .* Use unit='batch'"),
        posterior.sampled(module, unit="example", examples=3),
    ):
        module(x(3))
        module(2 * x(3))
    module(x(3)).sum().backward()
    for _ in range(2):  # another draw, another call
        with posterior.sampled(module, unit="example", examples=3):
            module(x(3))


def test_a_tied_parameter_is_one_and_has_one_noise() -> None:
    module = nn.Module()
    module.one, module.other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    module.other.weight = module.one.weight
    posterior = Posterior(module)
    assert posterior.names == ("one.weight",)
    assert posterior.offset.numel() == 9
    with posterior.sampled(module):
        assert module.one.weight is module.other.weight
    assert module.one.weight is module.other.weight
    assert isinstance(module.other.weight, nn.Parameter)


def test_draws_go_on_where_a_checkpoint_was_written() -> None:
    def outputs(module: nn.Module, posterior: Posterior, count: int) -> list[Tensor]:
        found = []
        for _ in range(count):
            with posterior.sampled(module):
                found.append(module(x()))
        return found

    module = net()
    posterior = Posterior(module, sigma=0.1)
    whole = outputs(module, posterior, 5)
    assert len({out.sum().item() for out in whole}) == 5
    first = Posterior(net(), sigma=0.1)
    outputs(module, first, 2)
    later = Posterior(net(), sigma=0.1)
    later.load_state_dict(first.state_dict())
    for one, other in zip(outputs(module, later, 3), whole[2:], strict=True):
        assert torch.equal(one, other)
    other_seed = outputs(module, Posterior(module, sigma=0.1, seed=1), 1)[0]
    assert not torch.equal(other_seed, whole[0])


def test_processes_draw_differently() -> None:
    posteriors = [Posterior(net()) for _ in range(2)]
    first, second = (torch.randn(4, generator=p.generator(i)) for i, p in enumerate(posteriors))
    assert not torch.equal(first, second)


def test_noise_needs_no_random_numbers_of_the_caller() -> None:
    module = net()
    posterior = Posterior(module)
    state = torch.get_rng_state()
    with posterior.sampled(module, unit="example", examples=7):
        module(x())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_has_a_module_of_its_own(copied: Callable[[Any], Any]) -> None:
    module = net()
    posterior = Posterior(module, sigma=0.3)
    with posterior.sampled(module):
        plain = module(x())
    module_copy, copy_of = copied((module, posterior))
    copy_of._count = 0
    with torch.no_grad():
        module[0].A.zero_()
    with copy_of.sampled(module_copy):
        assert torch.equal(module_copy(x()), plain)


def test_offsets_and_the_prior_stay_wide() -> None:
    module = net()
    posterior = Posterior(module)
    with torch.no_grad():
        posterior.offset.fill_(0.0123456)
    both = nn.ModuleList([module, posterior]).to(torch.bfloat16)
    assert posterior.offset.dtype == posterior.prior_mean.dtype == torch.float32
    assert posterior.offset[0].item() == pytest.approx(0.0123456, rel=1e-6)
    mean = torch.cat([p.reshape(-1) for p in module.parameters() if p.requires_grad])
    assert torch.equal(posterior.prior_mean, mean.float())  # rounded alike: no divergence comes of it
    with posterior.sampled(module):
        assert module[0].A.dtype == torch.bfloat16
        module(x().bfloat16()).sum().backward()
    assert module[0].A.grad is not None
    assert posterior.offset.grad is not None
    assert both[1].double().offset.dtype == torch.float64


def test_what_is_the_terms_own_is_not_in_q() -> None:
    module = net()
    module.add_module("peft_terms", nn.Linear(2, 2))
    assert not [name for name in Posterior(module).names if "peft_terms" in name]


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda m: Posterior(m, sigma=0), ValueError, "sigma is a standard deviation, a positive number. Got 0."),
        (
            lambda m: Posterior(m, prior_sigma=-1.0),
            ValueError,
            "prior_sigma is a standard deviation, a positive number",
        ),
        (lambda m: Posterior(m, sigma=2.0), ValueError, r"sigma begins within \(0, 1\]"),
        (lambda m: Posterior(m, sigma="a"), TypeError, "sigma must be a number. Got 'a'."),
        (lambda m: Posterior(m, sigma=lambda n, v: -1.0), ValueError, "sigma gave '0.A' a standard deviation that is"),
        (lambda m: Posterior(m, speed=-1), ValueError, "speed multiplies the learning rate of log sigma"),
        (lambda m: Posterior(m, prior="best"), ValueError, "prior='best': choose 'fixed', 'learned'"),
        (lambda m: Posterior(m, prior="learned", prior_sigma=0.5), ValueError, "a learnt lambda lies below 0.316"),
        (lambda m: Posterior(m, prior="learned", prior_sigma=lambda n, v: 1), TypeError, "learns one lambda for all"),
        (
            lambda m: Posterior(m, prior="per_tensor", prior_sigma=lambda n, v: v.abs()),
            ValueError,
            "prior_sigma gave 12 numbers for '0.A', and prior='per_tensor' has one for each.",
        ),
        (lambda m: Posterior(m, over="4"), TypeError, r"over must be a list of patterns, not one string"),
        (lambda m: Posterior(m, over=["nope"]), ValueError, r"over=\['nope'\] matches no trained parameter; there are"),
        (lambda m: Posterior(m.requires_grad_(False)), RuntimeError, "nothing of Sequential requires a gradient"),
        (lambda m: Posterior(m.to("meta")).draw(m), RuntimeError, "'0.A' had no values"),
        (lambda m: Posterior(m.to("meta")).to_empty(device="cpu").draw(m), RuntimeError, "'0.A' had no values"),
        (lambda m: Posterior(m.to("meta"), sigma=lambda n, v: v.abs()).require_values(), RuntimeError, "no values"),
        (lambda m: Posterior(nn.LSTM(2, 2)), RuntimeError, "'weight_ih_l0' is held by a LSTM, which computes with a"),
        (lambda m: Posterior(m).draw(m, unit="step"), ValueError, "unit='step': choose 'batch' or 'example'."),
        (lambda m: Posterior(m).draw(m, unit="example"), ValueError, "unit='example' draws for every example: say"),
        (lambda m: Posterior(m).draw(nn.Linear(1, 1)), RuntimeError, "Linear does not have all parameters that this"),
        (lambda m: Posterior(m).held().__enter__(), RuntimeError, r"held\(\) comes after draw\(module\)"),
    ],
)
def test_mistakes_are_named(make: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        make(net())


def test_blocks_are_not_nested_and_kl_is_asked_for_outside() -> None:
    module = net()
    posterior = Posterior(module)
    with posterior.sampled(module):
        with pytest.raises(RuntimeError, match="this posterior is being sampled already"):
            posterior.draw(module)
        with pytest.raises(RuntimeError, match="the divergence was asked for inside sampled"):
            posterior.kl()


def test_log_sigma_is_what_it_says() -> None:
    offset = torch.tensor([0.0, 0.1, 10.0, -10.0])
    assert log_sigma(offset, torch.tensor(-2.0), 5.0).tolist() == [-2.0, -1.5, 0.0, HUGE]
