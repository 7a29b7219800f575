"""Model card of a run: base, data, rewards, results, command and versions, for the hub (`README.md`)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from PIL import Image

from rlhf_trl.config.shareable import shareable
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import adapter_config
from rlhf_trl.models.hub import CARD_FILE, FIGURE_FILE
from rlhf_trl.report.measures import known
from rlhf_trl.report.page import Page, Section, Table, Text, table_markdown, to_markdown
from rlhf_trl.report.policies import frontier_figure
from rlhf_trl.report.project import curve_figures
from rlhf_trl.report.records import NOT_OF_INTEREST, Evaluation, Run, load_evaluations, load_run
from rlhf_trl.report.setup import describe_data, model_origin
from rlhf_trl.report.text import compact_number, interval
from rlhf_trl.report.verdicts import policy_verdicts
from rlhf_trl.runs.record import RUN_FILE
from rlhf_trl.runs.results import Comparison

AUTO = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
}
# Of a metric that is measured in several ways the mean is shown
DETAILS = re.compile(r"/(min|max)_|terminated|[/_]std$")


def write_card(run_dir: str | Path, folder: str | Path | None = None, repo: str = "", figure: bool = False) -> Path:
    """
    Write the model card of a run, in place of the one that TRL drafts.

    Args:
        run_dir (`str` or `Path`):
            Directory of the run; what is missing there (metrics of a run that is under way) is left out.
        folder (`str` or `Path`, *optional*):
            Folder of the model; `None`: the run's.
        repo (`str`):
            Hub id of the model, in the example of its use.
        figure (`bool`):
            Whether to draw the card's figure too, as `report.png`: reward against KL of the evaluation, else a
            training curve.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there is no run.
    """
    run, folder = load_run(Path(run_dir)), Path(folder or run_dir)
    if run is None:
        raise ConfigError(f"`{run_dir}` holds no run, so there is nothing to write on a model card.")
    evaluation = _evaluation_of(run)
    drawing = _drawing(run, evaluation) if figure else None
    if drawing is not None:
        Image.fromarray(drawing.pixels()).save(folder / FIGURE_FILE)
    text = model_card(run, folder, evaluation, repo, has_figure=(folder / FIGURE_FILE).is_file())
    path = folder / CARD_FILE
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def model_card(run: Run, folder: Path, evaluation: Evaluation | None, repo: str, has_figure: bool) -> str:
    """Return the card of a run as Markdown with its metadata."""
    stage, start = run.record.stage, run.record.model or ""
    base, is_adapter = model_origin(start), adapter_config(str(folder)) is not None
    data = describe_data(run.config.get("data") or {})
    pipeline = _pipeline(run)
    metadata = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        datasets=_datasets(run.config.get("data") or {}) or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=pipeline,
        tags=["trl", "rlhf_trl", stage],
        model_name=run.name,
    )
    version = run.record.versions.get("rlhf_trl", "")
    setup = {
        "Base": f"`{base}`" + (f", by way of `{Path(start).name}`" if Path(start, RUN_FILE).is_file() else ""),
        "Data": data,
        "Reward": _rewards(run.config.get("reward") or {}),
        "Adapter": _adapter(run.config.get("adapter") or {}),
    }
    page = Page(
        title=run.name,
        lead=f"`{base}`, trained by {stage.upper() if len(stage) < 5 else stage}{f' on {data}' if data else ''} with "
        f"[TRL](https://github.com/huggingface/trl) and rlhf_trl {version}".rstrip()
        + ".",
        setup={name: text for name, text in setup.items() if text},
        sections=[part for part in (_evaluated(run, evaluation), _measured(run)) if part],
    )
    name, auto = repo or "FOLDER", AUTO[pipeline]
    imports = f"from transformers import {auto}, AutoTokenizer"
    if is_adapter:
        auto = auto.replace("Auto", "AutoPeft", 1)
        imports = f"from peft import {auto}\nfrom transformers import AutoTokenizer"
    code = f"{imports}\n\nname = {name!r}\nmodel = {auto}.from_pretrained(name)\n"
    code += "tokenizer = AutoTokenizer.from_pretrained(name)"
    parts = [f"---\n{metadata.to_yaml()}\n---", to_markdown(page).strip()]
    parts += [f"![Results of {run.name}]({FIGURE_FILE})"] if has_figure else []
    parts += [
        f"## Use\n\n```python\n{code}\n```",
        f"## How it was made\n\n```sh\n{shareable(run.record.command)}\n```",
    ]
    rows = [[package, found] for package, found in run.record.versions.items()]
    parts.append(f"## Versions\n\n{table_markdown(Table(['package', 'version'], rows))}")
    return "\n\n".join(parts) + "\n"


def _pipeline(run: Run) -> str:
    return "text-classification" if run.config.get("stage", {}).get("task_type") == "SEQ_CLS" else "text-generation"


def _evaluated(run: Run, evaluation: Evaluation | None) -> Section | None:
    """Return how the policy stood in an evaluation."""
    if evaluation is None:
        return None
    comparison = known(evaluation.comparison)
    name = _name_in(run, comparison)
    if name is None or name == comparison.baseline:
        return None
    result, base = comparison.policies[name], comparison.baseline
    measures = {
        f"reward ({comparison.prompts:,} held-out prompts)": interval(result.reward, "{:.2f}"),
        f"reward of {base}, the start of the comparison": interval(comparison.base.reward, "{:.2f}"),
        "difference": interval(result.difference, "{:+.2f}"),
        f"wins against {base}, judged by {comparison.judge}": interval(result.win_rate, "{:.0%}"),
        f"KL to {base}, nats per sequence": interval(result.kl, "{:.2f}"),
        "tokens per completion": f"{result.completion_length:.1f}",
        "completions that end by themselves": f"{result.eos_rate:.0%}",
    }
    rows = [[measure, value] for measure, value in measures.items() if value]
    verdict = policy_verdicts(comparison)[name]
    text = Text(f"Verdict of the report: {verdict.call}; {'; '.join(verdict.reasons)}.")
    return Section("Evaluation", [Table(["measure", "value [95 %]"], rows), text])


def _measured(run: Run) -> Section | None:
    """Return the metrics of the run's own evaluation on held-out rows, at its start and at its end."""
    last = run.metrics["eval"] if run.metrics else {}
    first: dict[str, Any] = {}
    for entry in run.history:
        for name, value in entry.items():
            first.setdefault(name, value)
    rows = [
        [name.removeprefix("eval_"), _number(first[name]), _number(value)]
        for name, value in last.items()
        if isinstance(value, int | float) and name.startswith("eval_") and not name.endswith(NOT_OF_INTEREST)
        if not DETAILS.search(name)
    ]
    if not rows:
        return None
    return Section("Training", [Table(["on held-out rows", "first", "last"], rows)])


def _number(value: float) -> str:
    return compact_number(0.0 if abs(value) < 1e-5 else value)  # such as the KL of a policy to itself


def _evaluation_of(run: Run) -> Evaluation | None:
    """Return the newest evaluation of the model that this run made: begun after the run had ended."""
    if run.record.ended is None:
        return None
    for evaluation in reversed(load_evaluations(run.folder.parent)):
        started = (evaluation.run.record.started if evaluation.run else None) or ""
        if started >= run.record.ended and _name_in(run, evaluation.comparison):
            return evaluation
    return None


def _name_in(run: Run, comparison: Comparison) -> str | None:
    folder = run.folder.resolve()
    found = (name for name, result in comparison.policies.items() if Path(result.path).resolve() == folder)
    return next(found, None)


def _drawing(run: Run, evaluation: Evaluation | None):
    if evaluation is not None:
        return frontier_figure(known(evaluation.comparison)).svg
    figures = curve_figures(run, 0)
    return figures[0].svg if figures else None


def _rewards(node: Mapping[str, Any]) -> str:
    told = []
    for name, reward in node.items():
        if not isinstance(reward, Mapping):
            continue
        where = reward.get("run") or reward.get("path") or str(reward.get("function") or reward.get("_target_") or "")
        where = Path(str(where)).name if str(where).startswith("/") else str(where)
        told.append(f"`{name}` ({where.removeprefix('rlhf_trl.')}; weight {reward.get('weight', 1):g})")
    return ", ".join(told)


def _adapter(node: Mapping[str, Any]) -> str:
    peft = node.get("peft")
    if not isinstance(peft, Mapping):
        return ""
    kind = str(peft.get("_target_", "")).rsplit(".", 1)[-1]
    bits = ", 4-bit base" if node.get("quantization") else ""
    return f"{kind} of rank {peft['r']}{bits}" if "r" in peft else f"{kind}{bits}"


def _datasets(node: Mapping[str, Any]) -> list[str]:
    nodes = node["sources"].values() if isinstance(node.get("sources"), Mapping) else [node]
    paths = [each.get("path") for each in nodes if str(each.get("_target_", "")).endswith("load_hub")]
    return [str(path) for path in paths if _is_hub_id(path)]


def _is_hub_id(name: Any) -> bool:
    return (
        isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()
    )
