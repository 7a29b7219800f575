"""
The reference pages, docs/reference, from the files of conf/ and the dataclasses that check them, and conf/schema.json.

`python -m tests.helpers.reference` writes them; `tests/integration/test_reference.py` fails where they are stale.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import yaml

from rlhf_trl.config.argument_names import BASE
from rlhf_trl.config.groups import head_of
from rlhf_trl.config.groups import summary as first_sentence
from rlhf_trl.ppo.options import REFUSED
from tests.helpers.config_keys import (
    MISSING,
    Key,
    brought_files,
    class_default,
    field_help,
    files_of,
    groups_of,
    keys_of,
    located,
    type_of,
)
from tests.helpers.config_schema import SCHEMA, schema
from tests.helpers.configs import CONF, GROUPS, STAGES

FOLDER = CONF.parent / "docs" / "reference"
ARGS = "stage.args."
GENERATED = "<!-- Written by `python -m tests.helpers.reference` -->\n"
# Whole runs have pages of their own, written by hand or from their heads
LISTED = ("experiment", "pipeline")

INTRO = """# Reference

Every group, option and key of `conf/`, with the default, the type and the comment of the file that sets it.

- `GROUP=OPTION` chooses an option, `KEY=VALUE` sets a key. A plus adds a key that the config doesn't list:
  `+stage.args.weight_decay=0.01`.
- `required` means that the key has no default. `null` is no value. `${...}` is the value of another key.
- Ranges are intervals: `[0, 1)` is from 0 to below 1, `int [1, inf)` an integer of at least 1.

## Editors

`conf/schema.json` is a JSON schema of the composed config and of experiments. An editor with a YAML language server
completes keys, options and values, shows their comments, and marks what is misspelt. The first line of a file names
the schema, relative to the file:

```yaml
# yaml-language-server: $schema=../../conf/schema.json
```

For all experiments of a folder at once, in the settings of VS Code:
`"yaml.schemas": {"conf/schema.json": "my_conf/experiment/**/*.yaml"}`. The path in an installed package is printed by
`python -c "from rlhf_trl.runs.paths import conf_dir; print(conf_dir() / 'schema.json')"`.

"""

LEARNING_RATES = """# Learning rates

What `stage.args.learning_rate` and `stage.args.critic_learning_rate` are unless they are set. Their sources are in the
comments of the files; what others published is in [Troubleshooting](../troubleshooting.md#learning-rates).
"""


def pages() -> dict[str, str]:
    """Return the reference pages, by their path in docs/reference."""
    groups = [group for group in sorted(GROUPS) if group not in ("stage", *LISTED)]
    found = {"config.md": config_page(), "training-arguments.md": training_arguments_page()}
    found["learning-rates.md"] = learning_rates_page()
    found["recipes.md"] = recipes_page()
    found |= {f"stage-{stage}.md": stage_page(stage) for stage in STAGES}
    found |= {f"{slug(group)}.md": group_page(group) for group in groups}
    lines = ["## Stages", "", "| | |", "|---|---|"]
    lines += [f"| [`stage={stage}`](stage-{stage}.md) | {summary(option('stage', stage))} |" for stage in STAGES]
    lines += ["", "## Groups", "", "| | options |", "|---|---|"]
    for group in groups:
        names = ", ".join(f"[`{name}`]({slug(group)}.md#{slug(f'{group}={name}')})" for name in sorted(GROUPS[group]))
        lines.append(f"| [`{group}`]({slug(group)}.md) | {names} |")
    lines += ["", "## The run itself", "", "[The keys of a run, of a pipeline and of a sweep](config.md)", ""]
    lines += ["## Whole runs", "", "[The recipes, with what others published of them](recipes.md)", ""]
    found["index.md"] = INTRO + "\n".join(lines)
    return {name: GENERATED + text for name, text in found.items()}


def option(group: str, name: str) -> Path:
    return CONF / group / f"{name}.yaml"


def summary(file: Path) -> str:
    """Return the first sentence of the comment at the top of a file."""
    return cell(first_sentence(file))


def config_page() -> str:
    parts = ["# Runs, pipelines and sweeps\n"]
    for name in ("train", "pipeline", "sweep"):
        file = CONF / f"{name}.yaml"
        parts += [f"## `conf/{name}.yaml`\n", paragraphs(head_of(file)), table(keys_of(file)), ""]
    for group in LISTED:
        lines = [f"| `{group}={name}` | {summary(option(group, name))} |" for name in sorted(GROUPS[group])]
        parts += [f"## `{group}=`\n", "| | |\n|---|---|", *lines, ""]
    return "\n".join(parts)


def recipes_page() -> str:
    """Return a table of the experiments, what was published of them, and the head of each file."""
    contents = {name: yaml.safe_load(option("experiment", name).read_text()) for name in sorted(GROUPS["experiment"])}
    parts = [
        "# Recipes\n",
        "Whole runs, from `conf/experiment`: each file is the difference from the stage's defaults.\n",
        "| `experiment=` | start | data |\n|---|---|---|",
    ]
    published = [
        "\n## Published results\n",
        "Of others, with the same settings. The report of a project shows them beside those of its own runs.\n",
        "| `experiment=` | metric | value | source |\n|---|---|---|---|",
    ]
    for name, values in contents.items():
        model, data = values.get("model", {}), values.get("data", {})
        start = model.get("path") or (f"run `{model['run']}`" if "run" in model else "")
        sources = [node["path"] for node in (data, *data.get("sources", {}).values()) if "path" in node]
        link = f"[`{name}`](#{slug(f'experiment={name}')})"
        parts.append(f"| {link} | {cell(start)} | {cell(', '.join(dict.fromkeys(sources)))} |")
        for metric, entry in values.get("published", {}).items():
            value = " to ".join(map(str, entry["value"])) if isinstance(entry["value"], list) else entry["value"]
            published.append(f"| {link} | {cell(metric)} | {value} | {cell(entry['source'])} |")
    heads = [f"## `experiment={name}`\n\n{paragraphs(head_of(option('experiment', name)))}" for name in contents]
    return "\n".join([*parts, *published, "", *heads])


def group_page(group: str) -> str:
    parts = [f"# `{group}`\n"]
    for name in sorted(GROUPS[group]):
        file = option(group, name)
        keys = keys_of(file)
        parts += [f"## `{group}={name}`\n", paragraphs(head_of(file)), based_on(file), table(keys), brought(file), ""]
    return "\n".join(part for part in parts if part is not None)


def based_on(file: Path) -> str | None:
    names = ", ".join(f"`{each.stem}`" for each in files_of(file)[:-1])
    return f"On {names}: its keys are here as well.\n" if names else None


def brought(file: Path) -> str | None:
    """Return a table of the values that an option brings to each stage, `None` where it brings none."""
    lines = [
        f"| `stage={each.stem}` | {', '.join(f'`{key.path}={key.text}`' for key in keys_of(each))} |"
        for each in brought_files(file)
    ]
    return "\n".join(["\nIts values for a stage:\n", "| | |\n|---|---|", *lines, ""]) if lines else None


def arguments_set_by(group: str, name: str, stage: str) -> dict[str, str]:
    """Return the arguments that an option of a group sets for a stage, as the files have them."""
    file = option(group, name)
    files = [file, *(each for each in brought_files(file) if each.stem == stage)]
    values = {key.path: key.text for each in files for key in keys_of(each)}
    found = {path.removeprefix(ARGS): text for path, text in values.items() if path.startswith(ARGS)}
    if rate := values.get(f"{group}.learning_rates.{stage}"):
        found["learning_rate"] = rate
    return found


def set_by_options(stage: str) -> str | None:
    """Return a table of the arguments that options of the stage's groups set, `None` where they set none."""
    lines = []
    for group in groups_of(option("stage", stage)):
        for name in sorted(GROUPS[group]):
            if values := arguments_set_by(group, name, stage):
                words = ", ".join(f"`{key}={text}`" for key, text in values.items())
                lines.append(f"| [`{group}={name}`]({slug(group)}.md#{slug(f'{group}={name}')}) | {words} |")
    return "\n".join(["Options that set arguments:\n", "| | |\n|---|---|", *lines, ""]) if lines else None


def learning_rates_page() -> str:
    """Return the page of the learning rates that each training stage starts with."""
    lines = []
    for stage in STAGES:
        args = {key.name: key.text for key in keys_of(option("stage", stage)) if key.path.startswith(ARGS)}
        if "learning_rate" in args:
            others = [arguments_set_by("adapter", name, stage)["learning_rate"] for name in ("lora", "qlora")]
            demo = arguments_set_by("model", "demo", stage)["learning_rate"]
            lines.append(f"| [`{stage}`](stage-{stage}.md) | {' | '.join([args['learning_rate'], *others, demo])} |")
    critics = []
    for name in sorted(GROUPS["critic"]):
        if rate := arguments_set_by("critic", name, "ppo").get("critic_learning_rate"):
            (demo,) = [
                key.text
                for key in keys_of(CONF / "critic" / "_values" / "demo" / f"{name}.yaml")
                if key.name == "critic_learning_rate"
            ]
            critics.append(f"| [`critic={name}`](critic.md#{slug(f'critic={name}')}) | {rate} | {demo} |")
    head = (
        "| `stage=` | full | `adapter=lora`, `dora` | `adapter=qlora` | `model=demo`, full or adapter |\n"
        "|---|---|---|---|---|"
    )
    return "\n".join(
        [LEARNING_RATES, head, *lines, "\n| PPO's critic | | `model=demo` |\n|---|---|---|", *critics, ""]
    )


def stage_page(stage: str) -> str:
    file = option("stage", stage)
    keys = keys_of(file)
    args = [key for key in keys if key.path.startswith(ARGS)]
    groups = ", ".join(f"[`{group}={name}`]({slug(group)}.md)" for group, name in groups_of(file).items())
    parts = [f"# `stage={stage}`\n", paragraphs(head_of(file)), f"Groups and their defaults: {groups}.\n"]
    parts += ["## The stage\n", table(key for key in keys if key not in args), ""]
    target = next((key.value for key in args if key.name == "_target_"), None)
    if target is None:
        return "\n".join(parts)
    parts += ["## Arguments\n", f"Fields of `{target}`.\n", arguments_table(args), "", set_by_options(stage) or ""]
    parts += ["## Further arguments\n"]
    base = {field.name for field in dataclasses.fields(located(BASE))}
    listed = {key.name for key in args} | base
    refused = REFUSED if target.endswith("PPOConfig") else {}
    fields = [each for each in dataclasses.fields(located(target)) if each.name not in listed]
    parts += [
        "With a plus: `+stage.args.NAME=VALUE`. Besides these, the [training arguments](training-arguments.md) of "
        "transformers.\n",
        fields_table(target, (each for each in fields if each.name not in refused)),
        "",
    ]
    if refused:
        lines = [f"| `{name}` | {cell(reason)} |" for name, (_, reason) in refused.items()]
        parts += ["## Refused arguments\n", "| | why |\n|---|---|", *lines, ""]
    return "\n".join(parts)


def training_arguments_page() -> str:
    head = "# Training arguments\n\nFields of `transformers.TrainingArguments`, which all training stages have.\n"
    return f"{head}\n{fields_table(BASE, dataclasses.fields(located(BASE)))}\n"


def table(keys: Iterable[Key]) -> str:
    """Return a table of keys: what is typed, the default, the type, the comment."""
    lines = [f"| `{key.path}` | {default(key)} | {cell(type_of(key))} | {cell(key.help)} |" for key in keys]
    return "\n".join(["| key | default | type | |", "|---|---|---|---|", *lines]) if lines else "No keys.\n"


def arguments_table(keys: Iterable[Key]) -> str:
    """Return a table of the arguments of a stage, with the defaults of their class beside ours."""
    lines = ["| `stage.args.` | default | of the class | type | |", "|---|---|---|---|---|"]
    for key in keys:
        if key.name != "_target_":
            note = key.help or field_help(key.target, key.name)
            theirs = code(class_default(key.target, key.name))
            lines.append(f"| `{key.name}` | {default(key)} | {theirs} | {cell(type_of(key))} | {cell(note)} |")
    return "\n".join(lines)


def fields_table(target: str, fields: Iterable[dataclasses.Field]) -> str:
    lines = ["| `stage.args.` | default | type | |", "|---|---|---|---|"]
    for field in fields:
        kind = type_of(Key(f"stage.args.{field.name}", None, "", "", target))
        cells = [f"`{field.name}`", code(class_default(target, field.name)), cell(kind)]
        lines.append(f"| {' | '.join([*cells, cell(field_help(target, field.name))])} |")
    return "\n".join(lines)


def default(key: Key) -> str:
    if key.text == "":
        return ""
    if key.value == MISSING:
        return "required"
    return "a text" if "\n" in key.text else code(key.text)


def code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def cell(text: str) -> str:
    """Return text for a cell of a table: one line, without what Markdown or HTML would read."""
    return re.sub(r"<(?=[\w/])", "&lt;", " ".join(text.split())).replace("|", "\\|")


def paragraphs(head: str) -> str:
    """Return the comment at the top of a file, with its commands and indented lines as blocks."""
    parts = re.split(r"(?m)((?:^ {2,}.*\n?)+)", head)
    blocks = [f"```\n{_dedented(part)}\n```" if i % 2 else part.strip() for i, part in enumerate(parts)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _dedented(text: str) -> str:
    lines = text.rstrip("\n").split("\n")
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(line[margin:] for line in lines)


def slug(text: str) -> str:
    """Return the anchor of a heading, as the site makes it; the name of a group's page."""
    return re.sub(r"[^\w-]", "", text.replace("/", "-" if "=" not in text else "")).lower()


def write() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    SCHEMA.write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
