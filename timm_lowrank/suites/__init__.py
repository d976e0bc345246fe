"""Evaluations behind `timm-lowrank evaluate`: what is measured on which images, shared among processes, written down.

>>> from accelerate import PartialState
>>> from timm_lowrank.suites import Options, evaluate
>>> evaluation = evaluate(Options("runs/digits", suites=("quick",)), PartialState())  # doctest: +SKIP
"""

from .evaluation import Options, evaluate
from .runner import join_processes

__all__ = ["Options", "evaluate", "join_processes"]
