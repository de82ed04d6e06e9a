"""Laws of policies: what is spent is what was said, everywhere alike, resumed as if never stopped, and for good."""

from __future__ import annotations

import torch

from lightning_peft.compaction import compact_training
from lightning_peft.rank.policy import RankPolicy
from lightning_peft.testing.case import Inapplicable, holds, same
from lightning_peft.testing.trial import FINAL, TOTAL, PolicyRun, PolicyTrial


def spends_what_it_says(trial: PolicyTrial) -> None:
    """After every event no more components are open than `budget_at` says, and a RankPolicy leaves exactly as many.

    Fix: choose a number of components, not a threshold; ties would close more or fewer.
    """
    run = trial.run()
    events = []
    for step in range(1, TOTAL + 1):
        run.step(step)
        if step in run.masks:
            events.append(step)
            said, spent = run.policy.budget_at(step, TOTAL), run.budget.spent
            right = spent == said if isinstance(run.policy, RankPolicy) else spent <= said
            holds(right, f"after the event of step {step} {spent} components are open, and it said {said}")
    holds(bool(events), f"there is no event in {TOTAL} steps")
    holds(run.policy.is_final(events[-1], TOTAL), f"its last event, at step {events[-1]}, is not its final one")


def ends_for_good(trial: PolicyTrial) -> None:
    """After its final event nothing closes, nothing comes back, and every layer has its minimum.

    Fix: write masks, not gains, at the final event: leave `apply` to RankPolicy, or end it with `budget.keep(masks)`.
    """
    run = trial.run()
    last = next(step for step in range(1, TOTAL + 1) if run.policy.is_final(step, TOTAL))
    for step in range(1, last + 1):
        run.step(step)
    final = {name: site.gate.mask.clone() for name, site in run.budget.items()}
    left, spent = sum(int(mask.sum()) for mask in final.values()), run.budget.spent
    holds(left == spent, f"after the final event the masks leave {left} components, and {spent} are open")
    least, minimum = min(int(mask.sum()) for mask in final.values()), getattr(run.policy, "minimum", 0)
    holds(least >= minimum, f"a layer is left with {least} components, and minimum={minimum}")
    for step in range(last + 1, TOTAL + 4):
        if step <= TOTAL:
            run.step(step)
        else:
            run.update(step, observe=False)
        for name, site in run.budget.items():
            same(site.gate.mask, final[name], f"at step {step}, after the final event, the mask of {name!r} changes")
            holds(int(site.gate.open().sum()) == int(final[name].sum()), f"a component of {name!r} opens or closes")


def decides_alike(trial: PolicyTrial) -> None:
    """Equal inputs give equal masks, as every process needs them; and to decide changes nothing.

    Fix: decide by scores, prices and the step alone; break ties by the layers' order; keep `decide` without effects.
    """
    run, other = trial.run(), trial.run()
    for step in range(1, TOTAL + 1):
        run.step(step)
        other.step(step)
        if run.policy.is_final(step, TOTAL):
            break
        asked, again = (run.policy.decide(step, TOTAL) for _ in range(2))
        for name in asked:
            same(again[name], asked[name], f"at step {step}, asked twice, it decides otherwise on {name!r}")
    holds(run.masks.keys() == other.masks.keys(), "two equal runs have other events")
    for step, masks in run.masks.items():
        for name, mask in masks.items():
            same(other.masks[step][name], mask, f"at step {step} two equal runs decide otherwise on {name!r}")


def ties_are_counted(trial: PolicyTrial) -> None:
    """Where nothing is known yet and all scores tie, exactly as many components stay as at any other time.

    Fix: sort stably and take a number, as `rank.allocation.close_lowest` does.
    """
    run = trial.run()
    _require_budget(run)
    masks = run.policy.decide(TOTAL, TOTAL)
    left, wanted = sum(int(mask.sum()) for mask in masks.values()), FINAL.amount(run.budget)
    holds(left == wanted, f"before any step it would leave {left} components, and the final budget is {wanted}")


def resumes(trial: PolicyTrial) -> None:
    """Stopped after any step and loaded from a file, it ends bit for bit where it ends uninterrupted.

    Fix: put into `state_dict` all that later decisions depend on, as tensors and plain values; masks are the model's.
    """
    through = trial.run()
    saved = {}
    for step in range(1, TOTAL + 1):
        through.step(step)
        saved[step] = through.saved()
    for stop in range(1, TOTAL):
        resumed = trial.run()
        resumed.load(saved[stop])
        resumed.train(stop + 1, TOTAL)
        for key, value in saved[TOTAL]["host"].items():
            same(resumed.host.state_dict()[key], value, f"stopped after step {stop} and resumed, {key} differs")


def keeps_what_is_closed(trial: PolicyTrial) -> None:
    """A second fit starts with what the first has left: what is closed stays closed and counts as spent.

    Fix: leave out in `track` what is closed already.
    """
    first = trial.run()
    _require_budget(first)
    first.train(1, TOTAL)
    left = {name: site.gate.mask.clone() for name, site in first.budget.items()}
    second = PolicyRun(first.host, trial.factory(FINAL))
    for name, site in second.budget.items():
        same(site.gate.mask, left[name], f"track changes the mask of {name!r}")
    second.train(1, TOTAL)
    for name, site in second.budget.items():
        back = (site.gate.mask != 0) & (left[name] == 0)
        holds(not bool(back.any()), f"a second fit opens components {back.nonzero().flatten().tolist()} of {name!r}")
    spent, wanted = second.budget.spent, FINAL.amount(second.budget)
    holds(spent == wanted, f"a second fit to the same budget of {wanted} ends with {spent}")


def follows_a_cut(trial: PolicyTrial) -> None:
    """With closed components cut away at every event it leaves the layers the same ranks as with masks.

    Fix: cut in `follow` all that is kept per component; count what was cut away as closed for good.
    """
    masked, cut = trial.run(), trial.run()
    if cut.policy.returning:
        raise Inapplicable(f"nothing is cut before the last event: {cut.policy.returning}")
    for step in range(1, TOTAL + 1):
        masked.step(step)
        cut.step(step)
        kept = {name: site.gate.mask.detach() != 0 for name, site in cut.budget.items()}
        if step in cut.masks and not all(bool(mask.all()) for mask in kept.values()):
            try:
                compact_training(cut.host, [cut.optimizer])
            except TypeError as error:
                raise Inapplicable(str(error)) from error
            cut.policy.follow(cut.budget, kept)
            if cut.settled:
                cut.policy.importance.release()
    ranks, wanted = cut.budget.ranks(), masked.budget.ranks()
    holds(ranks == wanted, f"cut at every event it leaves the ranks {ranks}, with masks {wanted}")
    with torch.no_grad():
        holds(all(bool(p.isfinite().all()) for p in cut.host.parameters()), "a parameter is not finite after the cuts")


def _require_budget(run: PolicyRun) -> None:
    if not isinstance(run.policy, RankPolicy):
        raise Inapplicable(f"{type(run.policy).__name__} is no RankPolicy, which closes a number of components")
