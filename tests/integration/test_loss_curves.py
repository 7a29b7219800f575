"""A change that is not meant to change a number changes none: ten steps of every training stage."""

import json

import pytest

from tests.helpers.loss_curves import CURVES, STEPS, STORED, curve


@pytest.mark.parametrize("name", CURVES)
def test_ten_steps_give_the_stored_numbers(name, tmp_path):
    stored = json.loads(STORED.read_text())[name]
    measured = curve(name, str(tmp_path))
    assert set(measured) == set(stored)
    for metric, values in stored.items():
        assert len(values) == STEPS
        # Absolute: RLOO's loss, and the KL of the first rollout, are 0 but for rounding
        assert measured[metric] == pytest.approx(values, rel=1e-3, abs=1e-5), metric
