"""Learning rates far off what a training stands, and the published ones that aren't."""

from types import SimpleNamespace

import pytest

from rlhf_trl.checks.learning_rates import RANGES, learning_rate_problem, learning_rate_warnings


@pytest.mark.parametrize(
    ("dataset_type", "learning_rate", "parameters"),
    [
        ("prompt_completion", 3e-4, 1.7e9),  # SmolLM2
        ("prompt_completion", 1e-3, 362e6),
        ("prompt_completion", 1e-3, 135e6),
        ("prompt_completion", 2e-5, 7e9),  # Zephyr
        ("comparisons", 5e-5, 0.6e9),  # RLHF book
        ("comparisons", 9e-6, 8e9),  # OpenRLHF
        ("preference", 5e-6, 1.5e9),  # RLHF book
        ("preference", 8e-6, 7e9),  # ORPO
        ("preference", 5e-7, 70e9),  # Tulu 2
        ("prompt", 3e-6, 6.9e9),  # N+
        ("prompt", 8e-6, 125e6),  # trlx
    ],
)
def test_published_learning_rates_are_fine(dataset_type, learning_rate, parameters):
    known = RANGES[dataset_type]
    assert learning_rate_problem("lr", learning_rate, known, int(parameters), has_adapter=False) is None


@pytest.mark.parametrize(
    ("dataset_type", "learning_rate"),
    [("prompt_completion", 2e-4), ("comparisons", 1e-4), ("preference", 5e-6), ("prompt", 1e-5)],
)
def test_an_adapter_takes_ten_times_and_needs_more_than_full_tuning(dataset_type, learning_rate):
    def problem(value: float, has_adapter: bool) -> str | None:
        return learning_rate_problem("stage.args.learning_rate", value, RANGES[dataset_type], 7 * 10**9, has_adapter)

    assert problem(learning_rate, has_adapter=True) is None
    assert "an adapter needs about ten times that" in str(problem(learning_rate / 100, has_adapter=True))
    assert problem(learning_rate / 100, has_adapter=False) is None
    for has_adapter, what in ((False, "full tuning of 7 B"), (True, "an adapter on 7 B")):
        assert f"`stage.args.learning_rate=0.01` is above what {what} parameters stands" in str(
            problem(1e-2, has_adapter)
        )


def test_a_larger_model_stands_less():
    known = RANGES["prompt"]
    assert learning_rate_problem("lr", 1e-3, known, 230_000, has_adapter=False) is None
    assert "full tuning of 135 M parameters" in str(learning_rate_problem("lr", 1e-3, known, 135 * 10**6, False))


@pytest.mark.parametrize(
    ("optim", "judged"),
    [
        ("adamw_torch_fused", True),
        ("paged_adamw_8bit", True),
        ("adamw_8bit", True),
        ("galore_adamw", False),
        ("sgd", False),
        ("lion_32bit", False),
        ("adafactor", False),
        ("rmsprop", False),
        ("muon", False),
    ],
)
def test_learning_rates_of_adamw_alone_are_judged(optim, judged):
    args = SimpleNamespace(optim=optim, learning_rate=0.1)
    assert bool(learning_rate_warnings(args, "prompt_completion", 7 * 10**9, 0, has_adapter=False)) == judged
