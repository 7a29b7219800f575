"""Checks of the composed config before any model loads, one module for each kind of problem."""

from rlhf_trl.checks.problems import check, find_problems

__all__ = ["check", "find_problems"]
