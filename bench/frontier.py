"""
PPO and DPO from the same labels at equal KL on the embedded world, and the limit that the reward model sets.

    python -m bench.frontier [--seeds 1 2 ...] [--quick] [--folder FOLDER] [--table]

The steps are those of `pipeline=demo`, with data, labels and training drawn anew by each seed. The limit of a reward r
is the gold reward of pi(y|x) exp(r(x, y) / b) / Z(x), which scores best by r at its KL to the SFT policy pi
(arXiv 2305.18290, equation 4): samples of the SFT policy are reweighted, at as many b as it takes to reach a KL.
A second call runs what is missing.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

# Read when the libraries are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import yaml

from bench.loop.driver import ROOT, drive, parser
from bench.loop.results import Point, at_kl, interval, markdown, pair_accuracy
from bench.loop.steps import Steps
from rlhf_trl.evaluation.generation import load_policy, sample, token_statistics
from rlhf_trl.rewards import ModelReward
from rlhf_trl.tasks.demo import gold_reward, load

PROMPTS = 42  # seed of the held-out prompts, the same for every seed
KLS = (0.25, 0.5, 0.75, 1.0)
EPOCHS = "stage.args.num_train_epochs"
BATCH = "stage.args.per_device_train_batch_size"
# Of the demo's step `reward`: changes
REWARDS = {"reward": [], "reward_long": [f"{EPOCHS}=5", f"{BATCH}=16"]}
LONG = ["reward.model.run=reward_long", "critic.run=reward_long"]
# Of the demo's steps: the step, and changes
POLICIES = {
    "dpo": ("dpo", []),
    "dpo_long": ("dpo", [f"{EPOCHS}=3", "stage.args.beta=1"]),
    "ppo": ("ppo", []),
    "ppo_long": ("ppo", [*LONG, "stage.args.beta=0.4"]),
    "ppo_gold": ("ppo", ["reward=demo"]),
}
TRAINED_ON = {"ppo": "reward", "ppo_long": "reward_long"}
RANKED = {
    "gold": "the gold reward itself",
    "reward": "reward model of the demo: 3 epochs in batches of 32",
    "reward_long": "reward model of 5 epochs in batches of 16",
    "dpo": "implicit reward of DPO",
    "dpo_long": "implicit reward of DPO, 3 epochs, beta 1",
}
TRAINED = {
    "dpo": "DPO of the demo",
    "dpo_long": "DPO, 3 epochs, beta 1",
    "ppo": "PPO of the demo",
    "ppo_long": "PPO, reward model of 5 epochs in batches of 16, beta 0.4",
    "ppo_gold": "PPO against the gold reward",
}


@dataclass(frozen=True)
class Setting:
    """Sizes: held-out prompts, completions of each by a policy and by the SFT policy, and checkpoints of DPO."""

    prompts: int = 256
    samples: int = 8
    drawn: int = 16
    points: int = 3
    policies: tuple[str, ...] = ("dpo", "ppo", "ppo_long")
    extra: tuple[str, ...] = ()  # overrides of every training

    @property
    def rewards(self) -> list[str]:
        """Return the reward models that the policies need."""
        return [name for name in REWARDS if name == "reward" or "ppo_long" in self.policies]

    @property
    def limits(self) -> list[str]:
        """Return the rewards whose limits are measured."""
        return [name for name in RANKED if name == "gold" or name in (*self.rewards, *self.policies)]


QUICK = Setting(prompts=8, samples=2, drawn=4, points=2, policies=tuple(POLICIES), extra=("stage.args.max_steps=8",))


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark of the command line."""
    seeds = [1, 2, 3, 4, 5]
    reader = parser("bench.frontier", seeds, "frontier")
    reader.add_argument("--study", action="store_true", help="also change one setting of the demo at a time")
    options = reader.parse_args(arguments)
    drive("frontier", Frontier(options.study), options, seeds)


@dataclass(frozen=True)
class Frontier:
    """See [`~bench.loop.driver.Benchmark`]. With `study`, of all `POLICIES`."""

    study: bool = False

    def settings_of(self, quick: bool) -> tuple[Setting, dict[str, Any]]:
        """Return the setting, and what stands of it in the file of results, the demo's steps among it."""
        setting = QUICK if quick else Setting(policies=tuple(POLICIES)) if self.study else Setting()
        steps = {name: demo_step(name) for name in ("sft", "reward", "ppo", "dpo")}
        lists = {"extra": list(setting.extra), "policies": list(setting.policies)}
        return setting, asdict(setting) | lists | {"steps": steps}

    def measure(self, steps: Steps, setting: Setting) -> dict[str, Any]:
        """
        Train reward models and policies.

        Returns:
            `dict[str, Any]`: `rewards`, of each reward its `accuracy` on pairs of completions of the SFT policy and
            `limit`, the gold reward at each of `KLS`; `policies`, of each policy its `path`, (KL, gold reward) from
            the SFT policy on (of DPO with checkpoints, so that it can be read at another policy's KL), and `accuracy`,
            that of the reward model which it was trained on, on its own completions.
        """
        steps.run("sft", *demo_step("sft"), *setting.extra)
        for name in setting.rewards:
            steps.run(name, *demo_step("reward"), *REWARDS[name], *setting.extra)
        for name in setting.policies:
            step, changes = POLICIES[name]
            saves = [f"stage.args.save_steps={1 / setting.points}", "stage.args.save_total_limit=null"]
            saves = saves if name == "dpo" else []
            few = ["data.max_eval_samples=16", "stage.args.eval_on_start=false"]
            health = ["health=none"] if step == "ppo" else []
            steps.run(name, *demo_step(step), *changes, *saves, *few, *health, *setting.extra)
        sft = steps.path("sft")
        written = steps.compute("written", functools.partial(written_by, sft, setting))
        limits = {
            name: steps.compute(
                f"{name}_limit", functools.partial(limit_of, sft, written, name, steps.path(name), setting)
            )
            for name in setting.limits
        }
        start: Point = (0.0, limits["gold"]["start"])
        policies = {}
        for name in setting.policies:
            reward = steps.path(TRAINED_ON[name]) if name in TRAINED_ON else None
            function = functools.partial(path_of, sft, steps.path(name), reward, setting)
            found = steps.compute(f"{name}_path", function)
            policies[name] = {"path": [start, *found["path"]], "accuracy": found["accuracy"]}
        return {"rewards": limits, "policies": policies}

    def report(self, found: Mapping[str, Mapping[str, Any]], setting: Setting) -> str:
        """Return both tables, from the results of each seed."""
        rows = []
        for name, text in [(name, RANKED[name]) for name in setting.limits]:
            each = [seed["rewards"][name] for seed in found.values()]
            cells = [interval([row["limit"][i] for row in each]) for i in range(len(KLS))]
            rows.append([text, f"{fmean(row['accuracy'] for row in each):.3f}", *cells])
        headers = ["samples of SFT, reweighted by", "accuracy on them", *(f"gold reward at KL {kl:g}" for kl in KLS)]
        lines = [markdown(headers, rows), ""]
        rows = []
        for name, text in [(name, TRAINED[name]) for name in setting.policies]:
            each = [seed["policies"][name] for seed in found.values()]
            ends = [row["path"][-1] for row in each]
            others = [seed["policies"]["dpo"]["path"] for seed in found.values()]
            gaps = [gold - at_kl(path, kl) for (kl, gold), path in zip(ends, others, strict=True)]
            rows.append(
                [
                    text,
                    interval([kl for kl, _ in ends]),
                    interval([gold for _, gold in ends]),
                    interval(gaps, sign=True) if name != "dpo" else "",
                    f"{fmean(row['accuracy'] for row in each):.3f}" if name in TRAINED_ON else "",
                ]
            )
        headers = [
            "policy",
            "KL",
            "gold reward",
            "minus DPO's at equal KL",
            "accuracy of its reward model on its completions",
        ]
        return "\n".join([*lines, markdown(headers, rows)])


def demo_step(name: str) -> list[str]:
    """Return the overrides of a step of `pipeline=demo`."""
    return yaml.safe_load((ROOT / "conf/pipeline/demo.yaml").read_text("utf-8"))["steps"][name]


@dataclass(frozen=True)
class Drawn:
    """
    Completions of a policy for held-out prompts.

    Attributes:
        prompts (`list`), ids (`list[list[int]]`): a prompt and its token ids for each completion.
        texts (`list`), completion_ids (`list[list[int]]`): the completions.
        gold (`np.ndarray` of shape (P, n)): gold rewards, by prompt.
        ratios (`np.ndarray` of shape (P, n)): log-probability minus that of the SFT policy.
    """

    prompts: list
    ids: list[list[int]]
    texts: list
    completion_ids: list[list[int]]
    gold: np.ndarray
    ratios: np.ndarray


def draw(
    path: Path | str, sft: Path | str, prompts: int, samples: int, seed: int, written: list[list[int]] | None = None
) -> Drawn:
    """Sample completions of held-out prompts from a policy, unless the ids of what it has `written` are given."""
    policy, reference = load_policy("policy", str(path), None), load_policy("sft", str(sft), None)
    rows = load("prompt", PROMPTS, max_eval_samples=prompts)["eval"]["prompt"]
    chosen = [prompt for prompt in rows for _ in range(samples)]
    ids = [policy.ids(prompt) for prompt in chosen]
    if written is None:
        written = sample(policy.model, policy.tokenizer, ids, 40, temperature=1.0, batch_size=512, seed=seed)
    texts = [policy.completion(prompt, row) for prompt, row in zip(chosen, written, strict=True)]
    ratios = log_probs(policy, ids, written) - log_probs(reference, ids, written)
    gold = np.array(gold_reward(chosen, texts)).reshape(-1, samples)
    return Drawn(chosen, ids, texts, written, gold, ratios.reshape(-1, samples))


def log_probs(policy: Any, ids: list[list[int]], written: list[list[int]]) -> np.ndarray:
    """Return the log-probability of each completion under a policy."""
    found = token_statistics(policy.model, ids, written, temperature=1.0, batch_size=256)
    return np.array([row.logps.double().sum().item() for row in found])


def scores_of(reward: Path, drawn: Drawn) -> np.ndarray:
    """Return the scores of a reward model, shape (P, n)."""
    model = ModelReward(str(reward))
    model.bind(model.tokenizer)
    scores = model(prompts=drawn.prompts, completions=drawn.texts, completion_ids=drawn.completion_ids)
    return np.array(scores, dtype=float).reshape(drawn.gold.shape)


def written_by(sft: Path, setting: Setting) -> list[list[int]]:
    """Return the ids of completions of the SFT policy."""
    return draw(sft, sft, setting.prompts, setting.drawn, seed=0).completion_ids


def limit_of(sft: Path, written: list[list[int]], name: str, path: Path, setting: Setting) -> dict[str, Any]:
    """Return accuracy and limit of a reward on completions of the SFT policy, and their mean gold reward (`start`)."""
    if name in POLICIES:  # its implicit reward, but for the scale
        drawn = draw(path, sft, setting.prompts, setting.drawn, 0, written)
        scores = drawn.ratios
    else:
        drawn = draw(sft, sft, setting.prompts, setting.drawn, 0, written)
        scores = drawn.gold if name == "gold" else scores_of(path, drawn)
    return {
        "accuracy": pair_accuracy(list(zip(drawn.gold.tolist(), scores.tolist(), strict=True))),
        "limit": limit(scores, drawn.gold, KLS),
        "start": float(drawn.gold.mean()),
    }


def limit(scores: np.ndarray, gold: np.ndarray, kls: Sequence[float]) -> list[float]:
    """
    Return the gold reward of the policy that scores best by a reward at each KL, by reweighted samples.

    Args:
        scores, gold (`np.ndarray` of shape (P, n)): reward and gold reward of n samples of P prompts.
        kls (`Sequence[float]`): in nats per completion, well below log n.
    """
    points = []
    for scale in np.geomspace(0.01, 100.0, 200) / max(float(scores.std()), 1e-9):
        logits = scale * (scores - scores.max(axis=1, keepdims=True))
        weights = np.exp(logits)
        weights /= weights.sum(axis=1, keepdims=True)
        kl = (weights * np.log(np.maximum(weights * scores.shape[1], 1e-300))).sum(axis=1).mean()
        points.append((kl, (weights * gold).sum(axis=1).mean()))
    distances, values = zip(*points, strict=True)
    return [float(value) for value in np.interp(kls, distances, values)]


def path_of(sft: Path, run: Path, reward: Path | None, setting: Setting) -> dict[str, Any]:
    """Return (KL, gold reward) of a run's checkpoints and its end, and a reward model's accuracy at the end."""
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    places = [*checkpoints[:-1], run]  # the last one is the end
    drawn = [draw(path, sft, setting.prompts, setting.samples, seed=1) for path in places]
    points = [(float(each.ratios.mean()), float(each.gold.mean())) for each in drawn]
    if reward is None:
        return {"path": points, "accuracy": None}
    rows = zip(drawn[-1].gold.tolist(), scores_of(reward, drawn[-1]).tolist(), strict=True)
    return {"path": points, "accuracy": pair_accuracy(list(rows))}


if __name__ == "__main__":
    main()
