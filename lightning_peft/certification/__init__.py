"""Risk certificates: what is counted, what must be accounted for, and the file that it can be recomputed from."""

from lightning_peft.certification.record import Certificate

__all__ = ["Certificate"]
