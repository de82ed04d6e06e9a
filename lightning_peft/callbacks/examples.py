"""How many examples a Trainer trains on."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler


def count_examples(trainer: Trainer) -> int:
    """The length of the training set, over all processes; never batches, and not fewer where a run is cut short.

    Raises:
        MisconfigurationException: it cannot be told.
    """
    trainer.fit_loop.setup_data()  # which nobody has asked for yet where only steps are counted
    # A loader with an order of its own may offer one that reads every example once, as those of TextData do.
    loaders = [loader.once() if hasattr(loader, "once") else loader for loader in tree_leaves(trainer.train_dataloader)]
    reason = ""
    if len(loaders) != 1:
        reason = f"there are {len(loaders)} training dataloaders"
    elif not isinstance(loaders[0], DataLoader):
        reason = f"the training dataloader is a {type(loaders[0]).__name__}"
    elif not hasattr(loaders[0].dataset, "__len__"):
        reason = f"the training set, a {type(loaders[0].dataset).__name__}, has no length"
    elif not isinstance(loaders[0].sampler, RandomSampler | SequentialSampler | DistributedSampler):
        reason = f"{type(loaders[0].sampler).__name__} may leave examples out or weigh them"
    if reason:
        raise MisconfigurationException(
            f"a term needs the number of training examples, and {reason}. Give it: PACBayes(examples=...)."
        )
    return len(loaders[0].dataset)
