"""Rows longer than a model's positions, tokenizers larger than its embedding: from configs and data, no weights."""

from typing import Any, NamedTuple

from datasets import DatasetDict
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from rlhf_trl.checks.values import at, section
from rlhf_trl.data.lengths import measure
from rlhf_trl.errors import ConfigError
from rlhf_trl.models import ensemble_members, load_tokenizer
from rlhf_trl.paths import find_policy, named_policies, resolve_path
from rlhf_trl.sizes import Sizes, empty_model, id_problem, length_problem, sizes_of, tokenizer_problem


class Model(NamedTuple):
    """
    A model that the config names.

    Attributes:
        key (`str`): where it is named.
        path (`str`), tokenizer (`str`, *optional*): folder or hub id; that of another tokenizer than its own.
        writes (`bool`): whether it generates completions.
    """

    key: str
    path: str
    task_type: str = "CAUSAL_LM"
    tokenizer: str | None = None
    writes: bool = False
    trust_remote_code: bool = False
    revision: str | None = None

    def sizes(self) -> Sizes:
        """Return its sizes."""
        return sizes_of(empty_model(self.path, self.task_type, self.trust_remote_code, self.revision), self.path)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer that it is used with."""
        path = next(iter(ensemble_members(self.path)), self.path)
        return load_tokenizer(path, self.tokenizer, None, self.trust_remote_code, self.revision)


def models_of(values: dict[str, Any], project_dir: str) -> list[Model]:
    """Return every model that the config names: the policy or policies, rewards, critic and judge."""
    found, stage, model = [], section(values, "stage"), section(values, "model")
    trusted = bool(model.get("trust_remote_code"))
    places = named_policies(stage.get("policies") or {})
    if stage.get("policy") is not None:
        places = {"policy": stage["policy"]}
    if model and not places:
        path = resolve_path(model["path"], model["run"], project_dir)
        task_type = stage.get("task_type") or "CAUSAL_LM"
        writes = stage.get("form", "prompt") == "prompt"
        options = {"trust_remote_code": trusted, "revision": model["revision"]}
        found.append(Model("model", path, task_type, model["tokenizer"], writes, **options))
    for name, place in places.items():
        key = "stage.policy" if stage.get("policy") is not None else f"stage.policies.{name}"
        found.append(Model(key, find_policy(place, project_dir), writes=True, trust_remote_code=trusted))
    for name, node in section(values, "reward").items():
        if isinstance(node, dict) and {"run", "path"} <= node.keys():
            path = resolve_path(node["path"], node["run"], project_dir)
            found.append(
                Model(f"reward.{name}", path, "SEQ_CLS", trust_remote_code=bool(node.get("trust_remote_code")))
            )
    critic = section(values, "critic")
    if critic.get("run") is not None or critic.get("path") is not None:
        found.append(Model("critic", resolve_path(critic["path"], critic["run"], project_dir), "SEQ_CLS"))
    if at(values, "judge.path") is not None:
        found.append(Model("judge", resolve_path(values["judge"]["path"], None, project_dir)))
    return found


def size_problems(values: dict[str, Any], project_dir: str) -> list[str]:
    """Return what is wrong with the sizes of the models before there are data."""
    problems = []
    key = "stage.args.max_completion_length" if "args" in section(values, "stage") else "stage.max_completion_length"
    more = at(values, key) or 0
    for model in models_of(values, project_dir):
        sizes = model.sizes()
        remedy = "Set `model.tokenizer`." if model.key == "model" else f"Give `{model.key}` a model with its own."
        found = [tokenizer_problem(sizes, model.load_tokenizer(), remedy)]
        if model.writes and sizes.is_table and more >= sizes.positions:
            found.append(
                f"`{key}` is {more}, and `{model.path}` has {sizes.positions} positions for prompt and completion. "
                f"Set it lower, for example `{key}={sizes.positions // 2}`."
            )
        problems += [problem for problem in found if problem]
    return list(dict.fromkeys(problems))


def check_rows_fit(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, dataset: DatasetDict) -> None:
    """
    Stop a run whose rows are longer than its models' positions, or hold ids that they have no embedding for. Rows are
    measured only where that could be.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with what to set.
    """
    values, args = OmegaConf.to_container(cfg, resolve=True), cfg.stage.args
    project_dir = f"{cfg.runs_dir}/{cfg.project}"
    vocabulary = tokenizer.get_vocab()
    # A model with another tokenizer (a reward model's) gets other ids: it measures its rows itself
    sizes = [
        model.sizes()
        for model in models_of(values, project_dir)
        if model.key in ("model", "critic") or model.load_tokenizer().get_vocab() == vocabulary
    ]
    generates = cfg.stage.form == "prompt"
    more = (args.max_completion_length or 0) if generates else 0
    limit = at(values, "stage.prepare.max_prompt_length") if generates else args.get("max_length")
    positions = min((each.positions for each in sizes if each.positions is not None), default=None)
    too_long = positions is not None and (limit is None or limit + more > positions)
    if not too_long and len(tokenizer) <= min(each.embeddings for each in sizes):
        return
    longest, largest = measure(dataset, tokenizer, limit)
    if not generates and args.get("packing") and args.get("packing_strategy") == "wrapped":
        longest = limit or longest
    for each in sizes:
        room = (each.positions or 0) - longest
        if not generates:
            remedy = f"Set `stage.args.max_length={each.positions}`."
        elif room > 0:
            remedy = (
                f"Set `stage.args.max_completion_length={room}`, or leave the longest prompts out with "
                "`stage.prepare.max_prompt_length=...`."
            )
        else:
            remedy = f"Leave long prompts out: `stage.prepare.max_prompt_length={max(each.positions - more, 1)}`."
        if problem := length_problem(each, longest, more, remedy) or id_problem(each, largest):
            raise ConfigError(problem)
