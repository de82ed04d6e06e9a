from __future__ import annotations

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_peft.certification.accounting import require_not_selected


@pytest.mark.parametrize(
    "name", ["val/loss", "val_loss", "valid-acc", "Validation/f1", "held_out/loss", "held_out_loss", "heldout", "dev"]
)
def test_figures_of_other_data_may_choose(name: str) -> None:
    require_not_selected([name], tried=1)


@pytest.mark.parametrize("name", ["train/loss", "loss", "value/loss", "developed", "held_in/loss", "loss/val"])
def test_figures_that_may_be_of_the_bound_set_may_not(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"checkpoints are kept by '{name}'"):
        require_not_selected([name], tried=1)
    require_not_selected([name], tried=2)
