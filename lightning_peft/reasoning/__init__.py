"""Self-generated in-context chains of thought, and what they are compared with: inference alone, nothing is trained.

A frozen causal language model, with adapters or without, writes questions that are like the one it is asked, solves
them, and then answers in the context of its own solutions.
"""

from __future__ import annotations

from lightning_peft.reasoning.baselines import FewShotCoT, SelfConsistency, ZeroShot, ZeroShotCoT
from lightning_peft.reasoning.evaluation import Comparison, Score, evaluate
from lightning_peft.reasoning.extraction import letter, number, same_answer
from lightning_peft.reasoning.record import load_solver, save_solver
from lightning_peft.reasoning.result import Example, Result, Solver
from lightning_peft.reasoning.self_generated import SelfGeneratedCoT
from lightning_peft.reasoning.statistics import mcnemar, wilson
from lightning_peft.reasoning.templates import Templates

__all__ = [
    "Comparison",
    "Example",
    "FewShotCoT",
    "Result",
    "Score",
    "SelfConsistency",
    "SelfGeneratedCoT",
    "Solver",
    "Templates",
    "ZeroShot",
    "ZeroShotCoT",
    "evaluate",
    "letter",
    "load_solver",
    "mcnemar",
    "number",
    "same_answer",
    "save_solver",
    "wilson",
]
