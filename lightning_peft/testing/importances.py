"""Laws of importances: a worth for every component that is finite, resumes, follows a cut and disturbs nothing."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lightning_peft.compaction import compact_training
from lightning_peft.rank.budget import RankBudget
from lightning_peft.testing.case import Inapplicable, close, holds, same
from lightning_peft.testing.trial import ImportanceTrial, Run, net, through_file


def scores_every_component(trial: ImportanceTrial) -> None:
    """Every component of every layer has a score, finite and not negative, and not all are zero.

    Fix: return (L, n) float32 from `measure`; worth is at least 0, for what is worth least is closed first.
    """
    run = trial.run()
    run.train(1, 3)
    scores, budget = trial.of(run).scores(), run.budget
    holds(set(scores) == set(budget), f"it scores {sorted(scores)}, and the adapted layers are {sorted(budget)}")
    for name, row in scores.items():
        wanted = (len(budget[name].gate),)
        holds(tuple(row.shape) == wanted, f"layer {name!r} has scores of shape {tuple(row.shape)}, not {wanted}")
        holds(bool(row.isfinite().all() and (row >= 0).all()), f"layer {name!r} has the scores {row.tolist()}")
    holds(any(bool(row.any()) for row in scores.values()), "all scores are zero")


def leaves_training_alone(trial: ImportanceTrial) -> None:
    """Training that is watched ends bit for bit where it ends without, and `release` leaves nothing behind.

    Fix: read weights and gradients without writing them, and undo in `release` what `track` did to the adapters.
    """
    watched, alone = trial.run(), Run(net(trial.adapter))
    watched.train(1, 3)
    alone.train(1, 3)
    for key, value in alone.host.state_dict().items():
        same(watched.host.state_dict()[key], value, f"watched, {key} becomes another")
    before = _copied(trial.of(watched).scores())
    trial.of(watched).release()
    for name, site in watched.budget.items():
        holds(not site.gate.mask.requires_grad, f"after release the mask of layer {name!r} still requires a gradient")
        holds(site.gate.mask.grad is None, f"after release the mask of layer {name!r} still has a gradient")
    _equal(trial.of(watched).scores(), before, "after release")


def layers_are_measured_alone(trial: ImportanceTrial) -> None:
    """A layer's scores do not depend on which other layers are measured with it.

    Fix: reduce over the last dimensions of a stacked group only, never over its first, the layers.
    """
    together = trial.run()
    together.train(1, 3)
    for name, scores in trial.of(together).scores().items():
        alone = trial.run()
        trial.of(alone).release()
        trial.of(alone).track(RankBudget({name: alone.budget[name]}))
        alone.train(1, 3)
        close(trial.of(alone).scores()[name], scores, f"alone, layer {name!r} has other scores", atol=1e-7)


def survives_a_state_dict(trial: ImportanceTrial) -> None:
    """Its state is tensors and plain values, and another importance goes on from it bit for bit.

    Fix: put all that `scores` depends on into `state_dict`, and copy it back in `load_state_dict`.
    """
    run = trial.run()
    run.train(1, 3)
    state = through_file(trial.of(run).state_dict())
    host, optimizer = copy.deepcopy((run.host, run.optimizer))
    other = trial.run(host)
    other.optimizer = optimizer
    trial.of(other).load_state_dict(state)
    _equal(trial.of(other).scores(), trial.of(run).scores(), "loaded")
    for each in (run, other):
        each.train(4, 5)
    _equal(trial.of(other).scores(), trial.of(run).scores(), "loaded and trained on")


def starts_anew(trial: ImportanceTrial) -> None:
    """Tracked a second time, as by a second fit, it knows nothing of the first.

    Fix: make all running state in `track`, none in the constructor.
    """
    run = trial.run()
    run.train(1, 3)
    trial.of(run).release()
    fresh = trial.run(copy.deepcopy(run.host))
    run = Run(run.host, run.importance)
    trial.of(run).track(run.budget)
    for each in (run, fresh):
        each.train(4, 5)
    _equal(trial.of(run).scores(), trial.of(fresh).scores(), "tracked again")


def follows_a_cut(trial: ImportanceTrial) -> None:
    """When components are cut away, the others keep their scores and go on as they would have.

    Fix: cut in `cut` all that is kept per component, along the components' dimension.
    """
    run, masked = trial.run(), trial.run()
    kept = {name: torch.arange(len(site.gate)) != 0 for name, site in run.budget.items()}
    for each in (run, masked):
        each.train(1, 3)
        each.budget.keep(kept)
    before = {name: row[kept[name]].clone() for name, row in trial.of(run).scores().items()}
    try:
        compact_training(run.host, [run.optimizer])
    except TypeError as error:
        raise Inapplicable(str(error)) from error
    trial.of(run).cut(run.budget, kept)
    after = trial.of(run).scores()
    for name, row in before.items():
        close(after[name], row, f"after a cut layer {name!r} has other scores", rtol=1e-6, atol=1e-12)
    for each in (run, masked):
        each.train(4, 5)
    for name, row in trial.of(run).scores().items():
        wanted = trial.of(masked).scores()[name][kept[name]]
        close(row, wanted, f"some steps after a cut, layer {name!r} has other scores", rtol=1e-3)


def leaves_out_what_is_not_finite(trial: ImportanceTrial) -> None:
    """A step that is not finite changes no score, and `diverged` names its layers once.

    Fix: let `measure` pass on what is not finite, and fold it in with `Importance.fold`, which leaves it out.
    """
    run = trial.run()
    importance = trial.of(run)
    run.train(1, 2)
    before = _copied(importance.scores())
    run.backward(3)
    if importance.reads == "nothing":
        raise Inapplicable("it reads nothing at a step")
    with torch.no_grad():
        if importance.reads == "gradients":
            grads = [p.grad for _, p in _adapters_parameters(run) if p.grad is not None]
            for gradient in [*grads, *importance.gradients()]:
                gradient.fill_(torch.nan)
        else:
            for _, parameter in _adapters_parameters(run):
                parameter.fill_(torch.nan)
    importance.update()
    _equal(importance.scores(), before, "after a step that is not finite")
    named, again = importance.diverged(), importance.diverged()
    holds(set(named) == set(run.budget), f"diverged() names {named}, and it was {sorted(run.budget)}")
    holds(not again, f"asked again, diverged() still names {again}")


def _adapters_parameters(run: Run) -> list[tuple[str, torch.nn.Parameter]]:
    return [pair for site in run.budget.values() for pair in site.adapter.own_parameters()]


def _copied(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: row.clone() for name, row in scores.items()}


def _equal(scores: dict[str, Tensor], wanted: dict[str, Tensor], when: str) -> None:
    holds(scores.keys() == wanted.keys(), f"{when} it scores {sorted(scores)}, not {sorted(wanted)}")
    for name, row in wanted.items():
        same(scores[name], row, f"{when} layer {name!r} has other scores")
