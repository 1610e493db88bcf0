"""Tuning: which tactic of each GEMM serves which number of tokens, measured on what one rank really sees."""

from .plan import GemmChoice, PairTiming, Plan, PlanEntry, PlanKey, Timing, plan_lock
from .tuner import tune

__all__ = ["GemmChoice", "PairTiming", "Plan", "PlanEntry", "PlanKey", "Timing", "plan_lock", "tune"]
