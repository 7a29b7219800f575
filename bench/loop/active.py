"""
Labels that the selections of `stage=collect` need for what random pairs reach, on the embedded world.

Each selection begins with the same labels of random pairs. In each round it chooses as many more, of fresh completions
of the first policy, by an ensemble of LoRA reward models of the labels so far, which is then trained again. The policy
of a number of labels is best-of-n of the first policy by the ensemble's mean, on held-out prompts that are drawn once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.loop.refresh import POLICY
from bench.loop.results import interval, labels_to_reach, markdown, pair_accuracy
from bench.loop.steps import Steps
from rlhf_trl.evaluation.rewards import score_members
from rlhf_trl.evaluation.statistics import best_of_n
from rlhf_trl.labels.candidates import Candidates
from rlhf_trl.rewards import ModelReward
from rlhf_trl.tasks.demo import gold_reward

SELECTIONS = {
    "random": ("select=random",),
    "uncertainty": ("select=uncertainty", "select.measure=probabilities"),
    "thompson": ("select=thompson",),
}
AIM = 0.6


@dataclass(frozen=True)
class Setting:
    """
    Sizes of the comparison.

    Attributes:
        rounds, labels: rounds, and labels of each.
        prompts, completions: that a selection chooses from in a round: prompts, and completions of each.
        noise: of the answers.
        members: of the ensemble.
        epochs: of a member over the labels.
        held_out, best_of: held-out prompts, and completions of each, of which the best is taken.
    """

    rounds: int = 4
    labels: int = 64
    prompts: int = 256
    completions: int = 4
    noise: float = 0.5
    members: int = 3
    epochs: int = 6
    held_out: int = 160
    best_of: int = 8


QUICK = Setting(rounds=2, labels=16, prompts=16, completions=3, members=2, epochs=1, held_out=8, best_of=4)


def measure(steps: Steps, setting: Setting) -> dict[str, Any]:
    """Return for each selection its `curve`, (labels, gold reward of best-of-n), and `accuracy` at each point."""
    steps.run(
        "held_out",
        *("stage=collect", f"model.path={POLICY}", "stage.split=eval", f"stage.n={setting.best_of}"),
        f"stage.max_prompts={setting.held_out}",
    )
    rows = steps.candidates("held_out")
    found = {}
    for name, select in SELECTIONS.items():
        asked: list[str] = []
        curve, accuracy, ensemble = [], [], ""
        for number in range(1, setting.rounds + 1):
            asked.append("first" if number == 1 else f"{name}_{number}")
            own = SELECTIONS["random"] if number == 1 else select
            by = () if number == 1 or name == "random" else ("reward=model", f"reward.model.run={ensemble}")
            questions(steps, asked, (*own, *by), setting)
            ensemble = f"ensemble_{asked[-1]}"
            train(steps, ensemble, asked, setting)
            labels = sum(steps.metrics(f"label_{each}")["eval_labels"] for each in asked)
            reached, right = quality(steps, ensemble, rows)
            curve.append((labels, reached))
            accuracy.append(right)
        found[name] = {"curve": curve, "accuracy": accuracy}
    return found


def questions(steps: Steps, asked: Sequence[str], select: Sequence[str], setting: Setting) -> None:
    """Collect completions, choose pairs of them, and let the gold reward label these, with noise."""
    name, labels = asked[-1], ",".join(f"label_{each}" for each in asked[:-1])
    steps.run(
        name,
        *("stage=collect", f"model.path={POLICY}", f"stage.n={setting.completions}", *select),
        *(f"stage.max_prompts={setting.prompts}", f"stage.budget={setting.labels}", f"stage.labels=[{labels}]"),
    )
    steps.run(
        f"label_{name}",
        *("stage=label", f"stage.candidates={name}", "labeler=gold", f"labeler.noise={setting.noise}"),
    )


def train(steps: Steps, name: str, asked: Sequence[str], setting: Setting) -> None:
    """Train an ensemble on all labels so far."""
    files = ",".join(str(steps.path(f"label_{each}") / "feedback.jsonl") for each in asked)
    steps.run(
        name,
        *("stage=reward", f"model.path={POLICY}", "adapter=lora", f"stage.members={setting.members}"),
        *("data=files", "data/feedback=pairs", f"data.paths=[{files}]", "data.eval_size=null"),
        *(f"stage.args.num_train_epochs={setting.epochs}", "stage.args.lr_scheduler_type=cosine"),
        *("stage.args.per_device_train_batch_size=16", "stage.args.learning_rate=5e-3"),
    )


def quality(steps: Steps, ensemble: str, rows: Sequence[Candidates]) -> tuple[float, float | None]:
    """Return the gold reward of the best of each row's candidates by an ensemble's mean, and its accuracy on them."""
    prompts = [row.prompt for row in rows for _ in row.candidates]
    texts = [candidate.completion for row in rows for candidate in row.candidates]
    reward = ModelReward(path=str(steps.path(ensemble)), dtype="float32", batch_size=256)
    scored = score_members([reward], prompts, texts, [[] for _ in texts], {})
    means = [float(np.mean([score for score in each[reward.__name__] if score is not None])) for each in scored]
    gold = gold_reward(prompts, texts)
    ends = np.cumsum([len(row.candidates) for row in rows])[:-1]
    by_prompt = list(zip(np.split(np.array(gold), ends), np.split(np.array(means), ends), strict=True))
    best = [float(best_of_n(scores[None], true[None], len(true))[0]) for true, scores in by_prompt]
    return float(np.mean(best)), pair_accuracy([(true.tolist(), scores.tolist()) for true, scores in by_prompt])


def report(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> str:
    """Return the tables, from the results of each seed."""
    seeds = list(found.values())
    rows = []
    for number in range(setting.rounds):
        labels = np.mean([each["random"]["curve"][number][0] for each in seeds])
        cells = [interval([each[name]["curve"][number][1] for each in seeds]) for name in SELECTIONS]
        right = [interval([each[name]["accuracy"][number] for each in seeds], 3) for name in SELECTIONS]
        rows.append([f"{labels:.0f}", *cells, *right])
    headers = ["labels", *SELECTIONS, *(f"accuracy, {name}" for name in SELECTIONS)]
    needed = []
    for name in list(SELECTIONS)[1:]:
        shares = [share(each, name) for each in seeds]
        mean = mean_share(seeds, name)
        needed.append(
            [
                name,
                "more than all" if mean is None else f"{mean:.0%}",
                ", ".join("more" if each is None else f"{each:.0%}" for each in shares),
                "met" if mean is not None and mean <= AIM else "missed",
            ]
        )
    heads = ["selection", "labels for random's final gold reward, of the mean curves", "by seed", f"aim: {AIM:.0%}"]
    return f"{markdown(headers, rows)}\n\n{markdown(heads, needed)}"


def share(result: Mapping[str, Any], name: str) -> float | None:
    """Return the share of the labels with which a selection reaches random's final gold reward, in one seed."""
    labels, target = result["random"]["curve"][-1]
    needed = labels_to_reach([tuple(point) for point in result[name]["curve"]], target)
    return None if needed is None else needed / labels


def mean_share(results: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the same of the curves' means over the seeds."""
    curves = {
        each: {"curve": np.mean([result[each]["curve"] for result in results], axis=0).tolist()}
        for each in ("random", name)
    }
    return share(curves, name)


def settings_of(quick: bool) -> tuple[Setting, dict[str, Any]]:
    """Return the setting, and what stands of it in the file of results."""
    setting = QUICK if quick else Setting()
    return setting, asdict(setting)
