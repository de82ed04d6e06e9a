"""The laws of every adapter, on this one."""

from functools import partial

from method import SingularValues

import lightning_peft.testing

test_singular_values = lightning_peft.testing.laws(partial(SingularValues, rank=4))
