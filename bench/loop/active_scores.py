"""The comparison of selections of `active`, with those that a single reward model suffices for."""

from dataclasses import replace
from typing import Any

from bench.loop import active
from bench.loop.active import RANDOM, Setting

measure, report = active.measure, active.report


def settings_of(quick: bool) -> tuple[Setting, dict[str, Any]]:
    """Return the setting, and what stands of it in the file of results."""
    arms = (RANDOM, "bernoulli", "best_worst")
    return active.identified(replace(active.QUICK if quick else active.FULL, arms=arms))
