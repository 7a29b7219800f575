"""
SmolLM2-135M as a labeler of review sentences, beside the people who rated them.

First the agreement with people on held-out pairs: by comparing both sentences of a pair, in both orders
(`labeler=judge`), and by rating each sentence alone (`labeler=shown`, a rubric of bench/loop/conf). Then PPO with as
many labels of one and of the other on the same pairs of training sentences: reward models of the small model of
`experiment=reviews/tiny`.
"""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench.loop.results import markdown
from bench.loop.smollm2 import need_folders
from bench.loop.steps import Steps
from rlhf_trl.evaluation.statistics import win_rate
from rlhf_trl.labels.candidates import CANDIDATES_FILE, Candidate, Candidates, prompt_id, write_candidates
from rlhf_trl.runs.record import LABELS_FILE, read_quality
from rlhf_trl.tasks.reviews.data import pairs, read

PROMPT = "Review:"
PEOPLE = ("labeler=gold", "labeler.name=people", "labeler.function=bench.loop.judge.people")
JUDGE = ("--config-dir", str(Path(__file__).parent / "conf"), "judge=shown")
LABELERS = ("people", "judge")


@dataclass(frozen=True)
class Setting:
    """
    Sizes of the comparison.

    Attributes:
        held_out: pairs of the 2,000 held-out ones that both are asked about.
        labels: pairs of training sentences, each with a label of people and one of the judge.
        sft_epochs, epochs: of the policy over all sentences, and of a reward model over its labels.
        episodes: of PPO.
        prompts: held-out prompts.
    """

    held_out: int = 100
    labels: int = 150
    sft_epochs: int = 1
    epochs: int = 8
    episodes: int = 1280
    prompts: int = 300


QUICK = Setting(held_out=4, labels=16, sft_epochs=1, epochs=1, episodes=128, prompts=16)


def people(prompts: Sequence[str], completions: Sequence[str], path: str, **columns: Any) -> list[float | None]:
    """Return the mean rating of each sentence by the people who rated it; `None` for another text."""
    found = read(path)
    rated = {row["text"]: row["mean"] for row in (*found.train, *found.judge, *found.test)}
    return [rated.get(str(completion).strip()) for completion in completions]


def questions(asked: Sequence[tuple[str, str]], seed: int) -> Candidates:
    """Return pairs of sentences as questions, with both sentences in a random order."""
    rng, texts = random.Random(seed), list(dict.fromkeys(text for pair in asked for text in pair))
    place = {text: number for number, text in enumerate(texts)}
    return Candidates(
        id=prompt_id(PROMPT),
        prompt=PROMPT,
        candidates=[Candidate(completion=f" {text}", policy="people") for text in texts],
        questions=[(place[a], place[b]) for a, b in (rng.sample(pair, 2) for pair in asked)],
    )


def measure(steps: Steps, setting: Setting) -> dict[str, Any]:
    """
    Run both parts.

    Returns:
        `dict[str, Any]`: `comparison` and `rating`, how the judge answers about held-out pairs in both ways, and
        `labels`, about training pairs; `policies`, for each labeler its reward model and policy.
    """
    need_folders()
    path, judge = os.environ["RLHF_TRL_REVIEWS"], f"judge.path={without_template(steps.folder)}"
    found, seed = read(path), int(steps.project.split("_")[1])
    text = {row["id"]: row["text"] for row in found.test}
    held_out = [(text[pair["chosen_id"]], text[pair["rejected_id"]]) for pair in found.pairs[: setting.held_out]]
    train = [(a["text"], b["text"]) for a, b in pairs(list(found.train), 1, 0.5, seed)[: setting.labels]]
    files = {}
    for name, asked in (("held_out", held_out), ("train", train)):
        files[name] = steps.folder / "runs" / steps.project / f"{name}.{CANDIDATES_FILE}"
        write_candidates(files[name], [questions(asked, seed)])
        label(steps, f"people_{name}", files[name], *PEOPLE, f"+labeler.kwargs.path={path}")
    label(steps, "comparison", files["held_out"], *JUDGE, judge, "labeler=judge", "labeler.name=judge")
    label(steps, "rating", files["held_out"], *JUDGE, judge, "labeler=shown", "labeler.name=judge")
    label(steps, "judge_train", files["train"], *JUDGE, judge, "labeler=shown", "labeler.name=judge")
    return {
        "comparison": answers(steps, "comparison", "people_held_out"),
        "rating": answers(steps, "rating", "people_held_out"),
        "labels": answers(steps, "judge_train", "people_train"),
        "policies": policies(steps, setting),
    }


def without_template(folder: Path) -> Path:
    """
    Return a folder with SmolLM2 as a model without a chat template, which continues a text: as a chat model of this
    size it replies to every such question with a sentence that begins with "The", or with the first answer.
    """
    source, made = Path(os.environ["RLHF_TRL_SMOLLM2"]), folder / "without_template"
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(made)
    for file in (*source.glob("*.safetensors"), source / "config.json"):
        if not (made / file.name).exists():
            (made / file.name).symlink_to(file.resolve())
    return made


def label(steps: Steps, name: str, candidates: Path, *labeler: str) -> None:
    """Let a labeler answer the questions of a file."""
    steps.run(name, *labeler, "stage=label", f"stage.candidates={candidates}")


def answers(steps: Steps, name: str, people_name: str) -> dict[str, Any]:
    """Return how the answers of a run agree with those of people on the same questions."""

    def answered(run: str) -> dict[tuple[int, ...], Any]:
        rows = steps.rows(run, LABELS_FILE)
        return {tuple(sorted(row["question"])): chosen(row) for row in rows}

    found = agreement(answered(name), answered(people_name))
    metrics = steps.metrics(name)
    kept = {key: metrics.get(f"eval_judge/{key}") for key in ("position_bias", "order_agreement", "unreadable", "cut")}
    return found | {key: value for key, value in kept.items() if value is not None}


def chosen(row: Mapping[str, Any]) -> int | str | None:
    """Return the candidate that a label prefers, `tie`, or `None` for a skipped question."""
    answer = row.get("answer")
    return row["question"][answer] if isinstance(answer, int) else answer


def agreement(judge: Mapping[Any, Any], truth: Mapping[Any, Any]) -> dict[str, int]:
    """Return counts of the questions that people decided: `same`, `other`, `tie` and `none` by the judge."""
    counts: dict[str, int] = dict.fromkeys(("same", "other", "tie", "none"), 0)
    for question, right in truth.items():
        if isinstance(right, int):
            said = judge.get(question)
            counts["none" if said is None else "tie" if said == "tie" else "same" if said == right else "other"] += 1
    return counts


def policies(steps: Steps, setting: Setting) -> dict[str, Any]:
    """Train a reward model and a policy by the labels of each labeler, and compare the policies."""
    steps.run("init", "experiment=reviews/tiny/init")
    steps.run("sft", "experiment=reviews/tiny/sft", f"stage.args.num_train_epochs={setting.sft_epochs}", *NO_EVAL)
    for who in LABELERS:
        file = steps.path(f"{who}_train") / "feedback.jsonl"
        steps.run(
            f"reward_{who}",
            *(
                "stage=reward",
                "model=hf",
                "model.run=sft",
                "data=files",
                "data/feedback=pairs",
                f"data.paths=[{file}]",
            ),
            *("data.eval_size=null", f"stage.args.num_train_epochs={setting.epochs}", "stage.args.learning_rate=2e-3"),
            *("stage.args.per_device_train_batch_size=16", "stage.args.gradient_checkpointing=false"),
        )
        steps.run(f"quality_{who}", "experiment=reviews/tiny/quality", f"reward.model.run=reward_{who}")
        steps.run(
            f"ppo_{who}",
            *("experiment=reviews/tiny/ppo", f"reward.model.run=reward_{who}", f"critic.run=reward_{who}"),
            *(f"stage.args.total_episodes={setting.episodes}", "data.max_eval_samples=32"),
        )
    steps.run(
        "compare",
        *("experiment=reviews/tiny/compare", "stage.policies={sft: sft, ppo: null, dpo: null}"),
        *(f"+stage.policies.{who}=ppo_{who}" for who in LABELERS),
        *("reward.model.run=reward_people", "stage.best_of_n=0", "stage.show=false"),
        f"data.max_eval_samples={setting.prompts}",
    )
    compared = steps.comparison("compare").policies
    assert compared["sft"].reward is not None
    found: dict[str, Any] = {"sft": {"positive": list(compared["sft"].reward)}}
    for who in LABELERS:
        quality, policy = read_quality(steps.path(f"quality_{who}")), compared[who]
        assert quality is not None and policy.reward is not None and policy.kl is not None
        accuracy = list(quality.rewards["model"].accuracy)
        found[who] = {"accuracy": accuracy, "positive": list(policy.reward), "kl": policy.kl.mean}
    return found


NO_EVAL = ("stage.args.eval_on_start=false", 'stage.args.eval_strategy="no"')


def report(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> str:
    """Return the tables, from the result of the first seed."""
    result = next(iter(found.values()))
    rows = []
    for name, what in (
        ("comparison", f"{setting.held_out} held-out pairs, both sentences in both orders"),
        ("rating", f"{setting.held_out} held-out pairs, each sentence by itself"),
        ("labels", f"{setting.labels} training pairs, each sentence by itself"),
    ):
        each = result[name]
        decided = [1.0] * each["same"] + [0.0] * each["other"]
        share = _estimate(list(win_rate(decided))) if decided else "-"
        bias = [f"{each[key]:.2f}" if key in each else "" for key in ("position_bias", "order_agreement")]
        rows.append([what, *(str(each[key]) for key in ("same", "other", "tie", "none")), share, *bias])
    headers = ["", "as people", "other", "tie", "no answer", "agreement where it decides [95 %]"]
    headers += ["names the first", "same winner in both orders"]
    policies = [["SFT", "", _estimate(result["policies"]["sft"]["positive"]), ""]]
    for who in LABELERS:
        each = result["policies"][who]
        policies.append([f"PPO, {who}", _estimate(each["accuracy"]), _estimate(each["positive"]), f"{each['kl']:.1f}"])
    heads = ["", "reward model on people's 2,000 held-out pairs", "positive endings", "KL"]
    return f"{markdown(headers, rows)}\n\n{markdown(heads, policies)}"


def _estimate(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def settings_of(quick: bool) -> tuple[Setting, dict[str, Any]]:
    """Return the setting, and what stands of it in the file of results."""
    setting = QUICK if quick else Setting()
    return setting, asdict(setting)
