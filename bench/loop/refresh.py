"""
Refreshed against static reward models, with as many labels and as many steps of PPO.

Both policies start at the embedded SFT model, and are trained in rounds, each from the policy of the round before
(`reference=previous`). The static reward model has all labels at once, of the first policy's completions. The
refreshed one has as many in the end: a part of them in each round, of the completions of the policy as it then is, and
is trained afresh on all so far. The gold rewards are compared at equal KL to the first policy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.loop.results import Point, compare_paths, interval, markdown, pair_accuracy
from bench.loop.steps import Steps
from rlhf_trl.tasks.demo import gold_reward

POLICY = "demo:sft"
ARMS = ("static", "refreshed")
# A checkpoint is no run, of which it is known that it is the embedded model
WRITER = ("model=hf", "model.dtype=float32", "stage.max_completion_length=64", "stage.batch_size=256")
ROLLOUT = 128  # completions of a rollout of PPO (`conf/model/_demo/ppo.yaml`)


@dataclass(frozen=True)
class Setting:
    """
    Sizes of the comparison.

    Attributes:
        rounds, labels: rounds, and labels of each; the static reward model has `rounds * labels`.
        noise: of the answers, see `conf/labeler/gold.yaml`.
        epochs: of a reward model over its labels.
        episodes: of PPO per round.
        beta, learning_rate: of PPO.
        prompts, accuracy_prompts: held-out prompts, of gold rewards and KL, and of the accuracy of reward models.
        points: of a round that are measured, its end included.
    """

    rounds: int = 3
    labels: int = 256
    noise: float = 0.5
    epochs: int = 5
    episodes: int = 768
    beta: float = 0.05
    learning_rate: float = 3e-4
    prompts: int = 256
    accuracy_prompts: int = 96
    points: int = 3


QUICK = Setting(rounds=2, labels=32, epochs=1, episodes=256, prompts=16, accuracy_prompts=16, points=1)


def measure(steps: Steps, setting: Setting) -> dict[str, Any]:
    """
    Run both arms.

    Returns:
        `dict[str, Any]`: for each arm `path`, (KL, gold reward) of its policies, and `accuracy`, of the reward
        model on the completions of the policy at the end of each round, from 0 on: of the refreshed one `before` its
        refresh with labels of this policy, and after it.
    """
    questions(steps, "all", POLICY, setting, setting.rounds * setting.labels, [])
    reward(steps, "reward_static", setting, ["all"])
    asked: list[str] = []
    for number in range(1, setting.rounds + 1):
        policy(steps, "static", number, "reward_static", setting)
        asked.append(f"asked_{number}")
        questions(steps, asked[-1], writer(steps, "refreshed", number - 1), setting, setting.labels, asked[:-1])
        reward(steps, f"reward_{number}", setting, asked)
        policy(steps, "refreshed", number, f"reward_{number}", setting)
    compare(steps, setting)
    return {arm: {"path": path(steps, arm)} | accuracies(steps, arm, setting) for arm in ARMS}


def writer(steps: Steps, arm: str, number: int) -> str:
    """Return the policy of an arm after some rounds."""
    return str(steps.path(f"{arm}_{number}")) if number else POLICY


def questions(steps: Steps, name: str, asked: str, setting: Setting, count: int, earlier: Sequence[str]) -> None:
    """Collect a pair of completions of each of `count` prompts, and let the gold reward label them, with noise."""
    labels = ",".join(f"label_{each}" for each in earlier)
    steps.run(
        name,
        *(
            "stage=collect",
            f"stage.policies={{writer: {asked}}}",
            "stage.n=4",
            "select=random",
            f"stage.labels=[{labels}]",
        ),
        *(f"stage.max_prompts={count}", f"stage.budget={count}"),
    )
    steps.run(
        f"label_{name}",
        *("stage=label", f"stage.candidates={name}", "labeler=gold", f"labeler.noise={setting.noise}"),
    )


def reward(steps: Steps, name: str, setting: Setting, asked: Sequence[str]) -> None:
    """Train a reward model on labels, from the first policy."""
    files = ",".join(str(steps.path(f"label_{each}") / "feedback.jsonl") for each in asked)
    steps.run(
        name,
        *("stage=reward", f"model.path={POLICY}", "data=files", "data/feedback=pairs", f"data.paths=[{files}]"),
        *("data.eval_size=null", f"stage.args.num_train_epochs={setting.epochs}"),
        *("stage.args.lr_scheduler_type=cosine", "stage.args.per_device_train_batch_size=16"),
    )


def policy(steps: Steps, arm: str, number: int, reward_model: str, setting: Setting) -> None:
    """Align a policy by PPO in a round, as `pipeline=iterated` does, but with a weaker KL penalty."""
    start = f"model.run={arm}_{number - 1}" if number > 1 else f"model.path={POLICY}"
    rollouts = setting.episodes // ROLLOUT
    steps.run(
        f"{arm}_{number}",
        *("stage=ppo", start, "reward=model", f"reward.model.run={reward_model}", "health=none"),
        *("critic=model", f"critic.run={reward_model}", "stage.args.critic_score_head=true"),
        *("stage.args.critic_learning_rate=1e-3", "stage.args.num_iterations=1", "stage.args.cliprange_value=10"),
        *("stage.args.missing_eos_penalty=1", f"stage.args.total_episodes={setting.episodes}"),
        *(f"stage.args.beta={setting.beta}", f"stage.args.learning_rate={setting.learning_rate}"),
        *("stage.args.warmup_steps=0", "stage.args.lr_scheduler_type=constant"),
        *("data.max_eval_samples=16", "stage.args.eval_on_start=false"),
        *(f"stage.args.save_steps={rollouts // setting.points}", "stage.args.save_total_limit=null"),
    )


def compare(steps: Steps, setting: Setting) -> None:
    """Measure the policies of all rounds and their checkpoints: gold reward, and KL to the first policy."""
    names = [f"{arm}_{number}" for arm in ARMS for number in range(1, setting.rounds + 1)]
    steps.run(
        "compare",
        *("stage=evaluate", "stage.policies={sft: null, ppo: null, dpo: null}", f"+stage.policies.first={POLICY}"),
        *(f"+stage.policies.{name}={name}" for name in names),
        *("stage.baseline=first", "stage.checkpoints=true", "stage.best_of_n=0", "stage.references=false"),
        *("stage.show=false", f"data.max_eval_samples={setting.prompts}"),
    )


def path(steps: Steps, arm: str) -> list[Point]:
    """Return KL and gold reward along the policies of an arm, the first policy in front."""
    found = steps.comparison("compare").policies
    names = sorted((name for name in found if name.startswith(f"{arm}_")), key=_place)
    results = [found[name] for name in names]
    assert found["first"].reward is not None
    points = [(each.kl.mean, each.reward.mean) for each in results if each.kl is not None and each.reward is not None]
    assert len(points) == len(names), "a policy without a KL"
    return [(0.0, found["first"].reward.mean), *points]


def _place(name: str) -> tuple[int, float]:
    """Return round and step of a policy or a checkpoint, such as `static_2@8`."""
    run, _, step = name.partition("@")
    return int(run.rpartition("_")[2]), float(step or "inf")


def accuracies(steps: Steps, arm: str, setting: Setting) -> dict[str, list[float | None]]:
    """Return the accuracy of the reward models on the completions of the policy of each round."""
    after: list[float | None] = []
    earlier: list[float | None] = []
    for number in range(setting.rounds):
        now = "reward_static" if arm == "static" else f"reward_{number + 1}"
        own = {"model": now} | ({"before": f"reward_{number}"} if arm == "refreshed" and number else {})
        name, policies = (
            f"held_out_{arm}_{number}",
            f"stage.policies={{writer: {writer(steps, arm, number)}}}",
        )
        steps.run(
            name,
            *("stage=collect", *WRITER, policies, "stage.split=eval", "stage.n=4"),
            *(f"stage.max_prompts={setting.accuracy_prompts}", "reward=model", f"reward.model.run={now}"),
            *(f"+reward.{key}={other(run)}" for key, run in own.items() if key != "model"),
        )
        rows = steps.candidates(name)
        gold = [
            gold_reward([row.prompt] * len(row.candidates), [c.completion for c in row.candidates]) for row in rows
        ]
        scores = {key: [[_score(c.scores[key]) for c in row.candidates] for row in rows] for key in own}
        found = {key: pair_accuracy(list(zip(gold, scores[key], strict=True))) for key in own}
        after.append(found["model"])
        earlier.append(found.get("before"))
    return {"accuracy": after} | ({"before": earlier} if arm == "refreshed" else {})


def other(run: str) -> str:
    """Return the override of a second reward model."""
    return f"{{_target_: rlhf_trl.rewards.ModelReward, run: {run}, path: null}}"


def _score(members: Sequence[float | None]) -> float:
    return sum(each for each in members if each is not None) / len(members)


def report(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> str:
    """Return the tables, from the results of each seed."""
    gaps = [compare_paths(each["refreshed"]["path"], each["static"]["path"]) for each in found.values()]
    rows = [
        [
            f"seed {seed}",
            f"{each['static']['path'][0][1]:.2f}",
            *(f"{each[arm]['path'][-1][1]:.2f} at {each[arm]['path'][-1][0]:.2f}" for arm in ARMS),
            f"{gap['kl']:.2f}",
            f"{gap['end']:+.2f}",
            f"{gap['mean']:+.2f}",
            f"{gap['last']:+.2f}",
        ]
        for (seed, each), gap in zip(found.items(), gaps, strict=True)
    ]
    means = [interval([gap[key] for gap in gaps], sign=True) for key in ("end", "mean", "last")]
    rows.append(["mean [95 %]", "", "", "", interval([gap["kl"] for gap in gaps]), *means])
    headers = [
        "",
        "start",
        "static: gold at KL",
        "refreshed: gold at KL",
        "equal KL",
        "difference there",
        "on the way",
        "of the last policies",
    ]
    lines = [markdown(headers, rows), ""]
    rounds = []
    for number in range(setting.rounds):
        cells = [
            interval([each[arm][key][number] for each in found.values()], 3)
            for arm, key in (("static", "accuracy"), ("refreshed", "before"), ("refreshed", "accuracy"))
        ]
        rounds.append([str(number), *cells])
    change = [
        interval([each[arm]["accuracy"][-1] - each[arm]["accuracy"][0] for each in found.values()], 3, sign=True)
        for arm in ARMS
    ]
    rounds.append(["last - first", change[0], "", change[1]])
    lines.append(markdown(["completions of policy", "static", "refreshed, before", "refreshed, after"], rounds))
    return "\n".join(lines)


def settings_of(quick: bool) -> tuple[Setting, dict[str, Any]]:
    """Return the setting, and what stands of it in the file of results."""
    setting = QUICK if quick else Setting()
    return setting, asdict(setting)
