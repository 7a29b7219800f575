"""The texts of `--help` and `--version`. Imports nothing heavy."""

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rlhf_trl import __version__
from rlhf_trl.config.groups import WHOLE_RUNS, option_groups, summary
from rlhf_trl.config.program import App, program
from rlhf_trl.runs.paths import conf_dir
from rlhf_trl.runs.record import versions

WIDTH = 110
# In the order in which they are used. Others, such as the user's own, come after them
STAGES = (
    *("sft", "reward", "ppo", "grpo", "rloo", "online_dpo", "dpo", "modpo", "orpo", "kto"),
    *(
        "evaluate",
        "evaluate_reward",
        "collect",
        "label",
        "generate",
        "paraphrase",
        "chat",
        "report",
        "merge",
        "soup",
        "push",
        "serve_reward",
        "init",
    ),
)
EXAMPLES: dict[App, tuple[tuple[str, str], ...]] = {
    "train": (
        ("stage=ppo", "PPO of the embedded model, a minute on a CPU"),
        ("stage=ppo debug=dry_run", "Check everything, print the plan, and write nothing"),
        (
            "stage=dpo model=hf model.path=Qwen/Qwen3-0.6B adapter=lora data=files data.paths=pairs.jsonl",
            "Your model and your pairs",
        ),
        (
            "stage=ppo model=hf model.path=Qwen/Qwen3-0.6B reward=function reward.function.function=my_rewards.score",
            "Your reward, a function in my_rewards.py",
        ),
        ("stage=chat model.run=ppo", "Chat with what a run trained"),
    ),
    "pipeline": (
        ("", "SFT, reward model, PPO, DPO and their comparison, on the embedded model"),
        ("pipeline=reviews/tiny", "A file of conf/pipeline"),
        ("project=mine", "The same steps once more, beside the first"),
        ("accelerate=ddp", "Each step on all GPUs"),
        ("'overrides=[\"logger=wandb\"]'", "An override for every step"),
    ),
    "sweep": (
        ("-m stage=ppo stage.args.beta=0.02,0.05,0.1", "One run for each value"),
        ("-m stage=dpo stage.args.beta=0.05,0.1 seed=1,2,3", "Every combination, averaged over the seeds"),
        ("-m stage=ppo sweep=optuna 'stage.args.beta=interval(0.01,0.2)'", "A search"),
        ("-m stage=ppo stage.args.beta=0.02,0.1 accelerate=ddp", "Each run on all GPUs"),
        ("-m stage=ppo stage.args.beta=0.02,0.1 hydra/launcher=joblib", "Several runs at a time"),
    ),
}
TITLES: dict[App, str] = {
    "train": "RLHF on Hugging Face TRL, configured with Hydra: choose a stage and options, set any key.",
    "pipeline": "Stages one after another, each in a process of its own. Finished steps are skipped.",
    "sweep": "One run for each value of a key, and a report that compares them. Finished jobs are skipped.",
}


def version_text() -> str:
    """Return the version of this package and of those that a result depends on."""
    found = {"rlhf_trl": __version__, **versions()}
    first, *others = (f"{name} {version}" for name, version in found.items())
    return f"{first} ({', '.join(others)})"


def help_text(app: App, folders: Sequence[str]) -> str:
    """
    Return the text of `--help`.

    Args:
        app (`str`): `train`, `pipeline` or `sweep`.
        folders (`Sequence[str]`): folders with options of the user's own, beside ours.
    """
    groups = option_groups([str(conf_dir()), *folders])
    start = shlex.join(program(app))
    usage = {"train": "stage=STAGE [GROUP=OPTION ...] [KEY=VALUE ...]", "pipeline": "[pipeline=FILE] [KEY=VALUE ...]"}
    lines = [TITLES[app], f"  {start} {usage.get(app, '-m stage=STAGE [KEY=VALUE,VALUE ...]')}", ""]
    if app == "train":
        lines += ["Stages", *_stages(groups["stage"], folders), ""]
    lines.append("Examples")
    for words, why in EXAMPLES[app]:
        lines += _example(f"{start} {words}".strip(), why)
    shown = [group for group in sorted(groups) if _is_read(group, app)]
    lines += ["", "Groups (GROUP=OPTION)", *(line for group in shown for line in _group(group, groups[group]))]
    cfg = f"{start} {'stage=ppo ' if app == 'train' else ''}--cfg job"
    lines += [
        "",
        "Keys (KEY=VALUE; +KEY=VALUE adds one)",
        f"  {cfg} prints the composed config, every key with its value.",
        "  --config-dir FOLDER adds options of your own; --hydra-help lists Hydra's options; --version.",
        f'  Completion with Tab: eval "$({start} -sc install=bash)"',
    ]
    return "\n".join(lines)


def _is_read(group: str, app: App) -> bool:
    own = {"sweep": ("sweep", "hydra/launcher"), "pipeline": ("pipeline",)}
    if app == "train":
        return group not in ("stage", *own["sweep"], *own["pipeline"])
    return group in own[app]


def _stages(names: set[str], folders: Sequence[str]) -> list[str]:
    ordered = [name for name in STAGES if name in names] + sorted(names - set(STAGES))
    files = {path.stem: path for folder in [conf_dir(), *folders] for path in Path(folder, "stage").glob("*.yaml")}
    return [f"  {name:<16} {summary(files[name])}".rstrip() for name in ordered]


def _example(command: str, why: str) -> list[str]:
    if len(command) + len(why) + 6 <= WIDTH:
        return [f"  {command}  # {why}"]
    return [f"  # {why}", f"  {command}"]


def _group(group: str, options: set[str]) -> list[str]:
    """Return the lines of a group: its options or, where they stand in folders, those with the number of files."""
    folders = [name.partition("/")[0] for name in sorted(options) if "/" in name and group in WHOLE_RUNS.values()]
    loose = [name for name in sorted(options) if name.partition("/")[0] not in folders]
    text = ", ".join([*loose, *(f"{name}/...\xa0({folders.count(name)})" for name in dict.fromkeys(folders))])
    lines = textwrap.wrap(text, WIDTH, initial_indent=f"  {group:<16} ", subsequent_indent=" " * 19)
    return [line.replace("\xa0", " ") for line in lines]
