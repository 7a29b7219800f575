"""The comparison of selections of `active`, with labels without noise: whether noise keeps them from a gain."""

from dataclasses import replace
from typing import Any

from bench.loop import active
from bench.loop.active import Setting

measure, report = active.measure, active.report


def settings_of(quick: bool) -> tuple[Setting, dict[str, Any]]:
    """Return the setting, and what stands of it in the file of results."""
    arms = tuple(name for name, arm in active.ARMS.items() if not arm.is_noisy)
    return active.identified(replace(active.QUICK if quick else active.FULL, arms=arms))
