"""Laws of a life: an adapter is copied, saved, trained, compiled, merged, cut and taken out again."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.surgery.removal import eject
from lightning_peft.testing.case import Case, Inapplicable, close, holds, same


def survives_copies(case: Case) -> None:
    """deepcopy, pickle and state_dict give the same outputs, and a copy is one of its own.

    Fix: keep tensors in parameters and registered buffers, and nothing else that the output depends on.
    """
    host, x = case.host(), case.inputs()
    if (gate := case.adapter(host).gate) is not None:
        gate.keep(torch.arange(len(gate)) != 0)
    expected = host(x).detach()
    for way, twin in (("deepcopy", copy.deepcopy(host)), ("pickle", pickle.loads(pickle.dumps(host)))):
        same(twin(x), expected, f"the output changes through {way}")
        with torch.no_grad():
            for _, parameter in case.adapter(twin).own_parameters():
                parameter.zero_()
        same(host(x), expected, f"a {way} shares parameters with the original")
    twin = case.host(start=True, seed=5)
    twin.load_state_dict(host.state_dict())
    same(twin(x), expected, "the output changes through state_dict")


def survives_casts(case: Case) -> None:
    """`.to(dtype)` keeps the adapter working, and its mask a float32 leaf that may require grad.

    Fix: cast `gate.value()` to the dtype of what it multiplies, and return the output in the base's dtype.
    """
    host = case.host()
    gate = case.adapter(host).gate
    if gate is not None:
        gate.mask.requires_grad_(True)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        y = host.to(dtype)(case.inputs(dtype))
        holds(y.dtype == dtype, f"the output in {dtype} is of {y.dtype}")
        holds(bool(y.isfinite().all()), f"the output in {dtype} is not finite")
        if gate is not None:
            holds(gate.mask.dtype == torch.float32, f"the mask in {dtype} is of {gate.mask.dtype}")
            holds(gate.mask.is_leaf and gate.mask.requires_grad, f"the mask in {dtype} no longer measures its gradient")


def arguments_rebuild(case: Case) -> None:
    """`type(adapter)(base, **adapter.arguments())` is an adapter of the same structure.

    Fix: keep every argument of the constructor but `base` unchanged, as an attribute of its own name.
    """
    adapter = case.adapter(case.host())
    arguments = adapter.arguments()
    other = type(adapter)(case.adapter(case.host(start=True, seed=5)).base, **arguments)
    holds(other.arguments() == arguments, f"rebuilt with {arguments}, it says {other.arguments()}")
    shapes = [{key: value.shape for key, value in a.state_dict().items()} for a in (adapter, other)]
    holds(shapes[0] == shapes[1], f"rebuilt with {arguments}, its tensors differ: {shapes}")
    other.load_state_dict(adapter.state_dict())
    x = case.inputs()
    same(case.output(other.eval(), x), case.output(adapter.eval(), x), "rebuilt and loaded, its output differs")


def same_seed_same_start(case: Case) -> None:
    """The start depends on the global seed alone.

    Fix: draw with torch's global generator, or from a seed that is an argument; not from time, ids or other modules.
    """
    first, second = (case.host(start=True, seed=9).state_dict() for _ in range(2))
    for key, value in first.items():
        same(value, second[key], f"two adapters from one seed differ in {key}")


def merges(case: Case) -> None:
    """Merged into its base, the adapter is gone and the output stays.

    Fix: make `effective_weight` the whole of what the adapter does, or set `mergeable = False`.
    """
    from lightning_peft.export import merge

    host, x = case.host(), case.inputs()
    case.mergeable(host)
    if (gate := case.adapter(host).gate) is not None:
        gate.keep(torch.arange(len(gate)) != 0)
    expected = host(x).detach()
    merge(host)
    holds(not _adapted(host), "an adapter is left after merge")
    close(host(x), expected, "the output changes through merge")
    holds(list(host.state_dict()) == list(case.plain().state_dict()), "merge leaves another model than there was")


def compacts(case: Case) -> None:
    """Cut to its open components, the adapter is smaller and the output stays.

    Without any, the base is back, if that is how the adapter then acts; one that does more than its components do is
    left with a single closed one.

    Fix: let `compacted` keep the scale that components were trained with, and return `None` if none is left.
    """
    from lightning_peft.export import compact

    host, x = case.host(), case.inputs()
    gate, adapter = case.gated(host), case.adapter(host)
    if type(adapter).compacted is Adapter.compacted:
        raise Inapplicable(f"{type(adapter).__name__} has no compacted()")
    if len(gate) > 1:
        gate.keep(torch.arange(len(gate)) != 0)
        expected = host(x).detach()
        size = sum(p.numel() for _, p in adapter.own_parameters())
        compact(host)
        small = case.adapter(host)
        holds(len(case.gated(host)) == len(gate) - 1, "compact keeps closed components")
        holds(sum(p.numel() for _, p in small.own_parameters()) < size, "compact makes nothing smaller")
        close(host(x), expected, "the output changes through compact", rtol=1e-6, atol=1e-6)
    case.gated(host).keep(torch.zeros(len(case.gated(host))))
    expected = host(x).detach()
    with torch.no_grad():  # an attention takes another path where parameters require grad
        plain = case.plain()(x)
        acts_as_base = torch.equal(host(x), plain)
        compact(host)
        if acts_as_base:
            holds(not _adapted(host), "an adapter without components is left after compact")
            same(host(x), plain, "without components, compact does not bring back the base")
            return
    holds(len(case.gated(host)) == 1, "compact keeps more than one component that is closed")
    holds(not bool(case.gated(host).open().any()), "compact opens a component that is closed")
    close(host(x), expected, "without open components, the output changes through compact", rtol=1e-6, atol=1e-6)


def ejects(case: Case) -> None:
    """Taken out again, nothing is left of the adapter: weights, structure and requires_grad are the base's.

    Fix: do not write into the base's tensors or attributes, and add no hook to it; keep what you need in the adapter.
    """
    host, plain, x = case.host(), case.plain(), case.inputs()
    if case.adapter(host).releases_base:
        raise Inapplicable("releases_base is True")
    eject(host)
    holds(list(host.state_dict()) == list(plain.state_dict()), "eject leaves other parameters than there were")
    same(host(x), plain(x), "eject changes the output")
    holds(all(p.requires_grad for p in host.parameters()), "eject leaves a parameter frozen")


def compiles(case: Case) -> None:
    """Compiled as one graph it gives the same outputs and gradients, and a mask written in place recompiles nothing.

    Fix: do not read tensors in Python on the way (`if`, `.item()`, `float()`, indexing by a mask); multiply instead.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    if case.is_model:
        raise Inapplicable("what listens to a model's parts comes and goes with every call, so it runs outside graphs")
    torch._dynamo.reset()
    host, x = case.host(), case.inputs()
    own = [p for _, p in case.adapter(host).own_parameters() if p.requires_grad]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(host, backend=counter, fullgraph=True)
    gate = case.adapter(host).gate
    for closed in (None, 0):
        if closed is not None and gate is not None:
            gate.keep(torch.arange(len(gate)) != closed)
        try:
            expected, actual = host(x), compiled(x)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise AssertionError(f"it cannot be compiled as one graph: {str(error).splitlines()[0]}.") from error
        close(actual, expected, "the compiled output differs")
        wanted = torch.autograd.grad(expected.square().sum(), own)
        for one, other in zip(torch.autograd.grad(actual.square().sum(), own), wanted, strict=True):
            close(one, other, "a compiled gradient differs", rtol=1e-4, atol=1e-4)
    holds(counter.frame_count == 1, f"a mask written in place recompiles: {counter.frame_count} graphs")


def resumes(case: Case) -> None:
    """Training that is stopped, saved, built anew and loaded ends bit for bit where training through ends.

    Fix: register all that changes in training as parameter or buffer, a step count or a random state included.
    """

    def train(host: nn.Module, steps: range, saved: dict[str, Any] | None = None) -> dict[str, Any]:
        optimizer = torch.optim.AdamW([p for p in host.parameters() if p.requires_grad], lr=0.01)
        if saved is not None:
            host.load_state_dict(saved["host"])
            optimizer.load_state_dict(saved["optimizer"])
        for step in steps:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(step)  # dropout
                loss = (host(case.inputs(seed=step)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == 1 and (gate := case.adapter(host).gate) is not None:
                gate.keep(torch.arange(len(gate)) != 0)
        return {"host": host.state_dict(), "optimizer": optimizer.state_dict()}

    through = train(case.host().train(), range(5))
    file = io.BytesIO()
    torch.save(train(case.host().train(), range(3)), file)
    file.seek(0)
    resumed = train(case.host(start=True, seed=5).train(), range(3, 5), torch.load(file, weights_only=True))
    for key, value in through["host"].items():
        same(resumed["host"][key], value, f"after a stop and resume {key} differs")


def _adapted(host: nn.Module) -> bool:
    return any(isinstance(child, Adapter) for child in host.modules())
