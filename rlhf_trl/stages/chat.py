"""Conversations with policies in a terminal (`stage=chat`)."""

import contextlib
import functools
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import GenerationConfig, TextStreamer, set_seed
from transformers.utils.logging import disable_progress_bar

from rlhf_trl.build import load_policies, reward_functions
from rlhf_trl.data.images import ImageStore, take_images
from rlhf_trl.data.messages import as_text
from rlhf_trl.data.multimodal import as_pil, extra_of, processor_of
from rlhf_trl.data.rows import RowError
from rlhf_trl.data.tokenize import end_tokens
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.generation import TOO_LONG, Policy, Prompt, as_prompt, generation_config
from rlhf_trl.evaluation.rewards import combine_scores, score
from rlhf_trl.hints import did_you_mean, names_of
from rlhf_trl.models.inputs import batch_inputs
from rlhf_trl.models.sizes import check_rows, sizes_of
from rlhf_trl.report.text import number, side_by_side
from rlhf_trl.rewards.base import Reward
from rlhf_trl.rewards.combine import weighted_sum
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.terminal import printable

COMMANDS = {
    "/image": "/image PATH: an image for the next prompt; once more for another",
    "/score": "the rewards of the last answers",
    "/again": "new answers to the last prompt",
    "/new": "forget the conversation (with stage.remember=true)",
    "/help": "this list",
    "/quit": "leave; so do Ctrl-D, and Ctrl-C where nothing is being written",
}


def chat(cfg: DictConfig) -> None:
    """
    Read prompts from the terminal (or a pipe) and show the answers of the stage's policies.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a policy or a reward model is missing.
    """
    OmegaConf.resolve(cfg)
    if not is_main_process():
        return  # one rank has the terminal
    disable_progress_bar()  # of loading weights
    policies = load_policies(cfg)
    rewards = reward_functions(cfg, policies[0].tokenizer)
    set_seed(cfg.seed)
    stage = cfg.stage
    with contextlib.suppress(KeyboardInterrupt):  # between an answer and the next prompt
        talk(
            policies,
            rewards,
            sampling=generation_config(stage.temperature, stage.max_completion_length),
            remember=stage.remember,
            always_score=stage.score,
            system_prompt=stage.system_prompt,
            combine=instantiate(cfg.combine),
        )


class Answer(NamedTuple):
    """An answer of a policy, and its prompt."""

    policy: Policy
    prompt: Prompt
    ids: list[int]

    @property
    def text(self) -> str:
        return as_text(self.policy.completion(self.prompt, self.ids))


def talk(
    policies: Sequence[Policy],
    rewards: Sequence[Reward],
    sampling: dict,
    remember: bool = False,
    always_score: bool = False,
    system_prompt: str | None = None,
    lines: Iterator[str] | None = None,
    out: TextIO | None = None,
    combine: Callable = weighted_sum,
) -> None:
    """
    Run a conversation: one prompt per line, until the lines end.

    The answer of a single policy is streamed; those of several stand side by side. Each policy has its own tokenizer,
    chat template and memory.

    Args:
        policies (`Sequence[Policy]`), rewards (`Sequence[Reward]`):
            Policies that answer, and rewards that `/score` shows.
        sampling (`dict`):
            Arguments of `transformers.GenerationConfig`, see [`~rlhf_trl.evaluation.generation.generation_config`].
        remember (`bool`):
            Whether earlier turns stay in the prompt (of policies with a chat template).
        always_score (`bool`):
            Whether every answer is scored.
        system_prompt (`str`, *optional*):
            System prompt of every conversation.
        lines (`Iterator[str]`, *optional*), out (`TextIO`, *optional*):
            Source of prompts and destination of answers; the terminal by default.
        combine (`Callable`):
            Combination of several rewards, see `rlhf_trl.rewards.combine`.
    """
    stream = out or sys.stdout
    said = "one prompt a line" if len(policies) == 1 else f"one prompt a line, {len(policies)} answers side by side"
    print(f"{', '.join(policy.name for policy in policies)}: {said}; /help for more.", file=stream, flush=True)
    memory: dict[str, list[dict]] = {policy.name: [] for policy in policies}
    last: list[Answer] = []
    text, is_remembered = "", False  # the last prompt; whether its turn is in the memory
    images: list = []  # of the last prompt
    waiting: list = []  # of the next one
    score_of = functools.partial(score_text, rewards=rewards, combine=combine) if rewards else None
    for line in lines if lines is not None else read_lines(stream):
        line = line.strip()
        if not line:
            continue
        if line == "/quit":
            break
        if line.split()[0] == "/image":
            waiting += read_image(line.removeprefix("/image").strip(), policies, stream)
            continue
        if line.startswith("/") and (line != "/again" or not text):
            run_command(line, last, score_of, memory, stream)
            continue
        if line != "/again":
            text, is_remembered = line, False
            images, waiting = waiting, []
        # `/again` replaces the last turn, once there is a new answer
        before = {name: turns[:-2] if is_remembered else turns[:] for name, turns in memory.items()}
        try:
            last = [
                answer(policy, text, before[policy.name], sampling, system_prompt, stream, len(policies) == 1, images)
                for policy in policies
            ]
        except KeyboardInterrupt:
            print("\n(stopped)", file=stream, flush=True)
            continue
        except ConfigError as error:  # a prompt that doesn't fit one of them
            print(printable(f"({error})"), file=stream, flush=True)
            continue
        show(last, score_of if always_score else None, stream)
        if remember:
            for each in last:
                if each.policy.chats:
                    turn = [each.prompt[-1], {"role": "assistant", "content": each.text}]
                    memory[each.policy.name] = before[each.policy.name] + turn
            is_remembered = True


def read_image(path: str, policies: Sequence[Policy], out: TextIO) -> list:
    """Return the image at a path in a list; none, with what is wrong, where it can't be read."""
    blind = [policy.name for policy in policies if processor_of(policy.tokenizer) is None]
    if blind:
        print(f"{names_of(blind)} can't read images.", file=out, flush=True)
        return []
    if not path:
        print(COMMANDS["/image"], file=out, flush=True)
        return []
    store = ImageStore()
    try:
        key = store.add(path, "image", Path())
    except RowError as error:
        print(printable(f"{path} {error.what}."), file=out, flush=True)
        return []
    print("(read; now the prompt)", file=out, flush=True)
    return [as_pil(store.images[key])]


def read_lines(out: TextIO) -> Iterator[str]:
    """Yield the lines of the standard input, after a prompt mark; ends at Ctrl-D and Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=out, flush=True)
            return
        if not sys.stdin.isatty():
            print(printable(line), file=out, flush=True)  # as a terminal would show it
        yield line


def run_command(
    line: str, last: list[Answer], score_of: Callable[[Answer], str] | None, memory: dict, out: TextIO
) -> None:
    """Execute a line that begins with `/`."""
    word = line.split()[0]
    if word == "/new":
        for turns in memory.values():
            turns.clear()
        print("(a new conversation)", file=out, flush=True)
    elif word == "/help":
        print("\n".join(f"  {name:<7} {what}" for name, what in COMMANDS.items()), file=out, flush=True)
    elif word not in COMMANDS:
        print(f"There is no {word}. {did_you_mean(word, COMMANDS)}", file=out, flush=True)
    elif not last:
        print("There is no answer yet.", file=out, flush=True)
    elif score_of is None:
        print("There is no reward to ask. Start with reward=model, or another option of it.", file=out, flush=True)
    else:
        scores = {each.policy.name: score_of(each) for each in last}
        alike = len(set(scores.values())) == 1  # such as that of a reward without an answer to this prompt
        for name, said in list(scores.items())[: 1 if alike else None]:
            print(printable(f"  {'' if alike else f'{name}: '}{said}"), file=out, flush=True)


@torch.inference_mode()
def answer(
    policy: Policy,
    text: str,
    turns: list[dict],
    sampling: dict,
    system_prompt: str | None,
    out: TextIO,
    stream: bool,
    images: Sequence = (),
) -> Answer:
    """Generate one answer, shown token by token if `stream`, to a prompt with images before its words."""
    prompt = as_prompt(text, policy, system_prompt)
    if images:  # which only policies with a chat template read
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        prompt = [*prompt[:-1], {"role": "user", "content": parts}]
    if turns:
        prompt = [*prompt[:-1], *turns, prompt[-1]]
    ids = policy.ids(prompt)
    check_rows(sizes_of(policy.model), [ids], sampling["max_new_tokens"], TOO_LONG)
    extra = extra_of([ids])
    ids = torch.tensor([ids], device=policy.model.device)
    tokenizer = policy.tokenizer
    streamer = Stream(tokenizer, out) if stream else None
    # The model's own generation config would fill in whatever is unset here
    policy.model.generation_config = GenerationConfig(
        **sampling, eos_token_id=end_tokens(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    options = {"attention_mask": torch.ones_like(ids), "streamer": streamer}
    options |= batch_inputs(extra, options["attention_mask"])
    written = policy.model.generate(input_ids=ids, **options)  # pyright: ignore[reportCallIssue] of GenerationMixin
    return Answer(policy, prompt, written[0, ids.size(1) :].tolist())


class Stream(TextStreamer):
    """`transformers.TextStreamer` with a file to write to."""

    def __init__(self, tokenizer, out: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text."""
        print(printable(text), file=self.out, flush=True, end="\n" if stream_end else "")


def show(answers: list[Answer], score_of: Callable[[Answer], str] | None, out: TextIO) -> None:
    """Print answers side by side (a single one has been streamed), with their scores if `score_of`."""
    scores = {each.policy.name: score_of(each) for each in answers} if score_of else {}
    if len(answers) > 1:
        titles = [name + (f" ({scores[name]})" if name in scores else "") for name in (a.policy.name for a in answers)]
        texts = {title: each.text for title, each in zip(titles, answers, strict=True)}
        print(printable(side_by_side(texts, shutil.get_terminal_size((100, 24)).columns)), file=out, flush=True)
    else:
        for said in scores.values():
            print(printable(f"  ({said})"), file=out, flush=True)


def score_text(given: Answer, rewards: Sequence[Reward], combine: Callable) -> str:
    """Return the reward of an answer in words: `1.25`, or with several rewards `1.25: 2.00 gold, -0.75 short`."""
    completion = given.policy.completion(given.prompt, given.ids)
    prompt, images = (given.prompt, []) if isinstance(given.prompt, str) else take_images(given.prompt)
    columns = {"images": [images]} if images else {}
    try:
        scores = score(rewards, [prompt], [completion], [given.ids], columns, given.policy.tokenizer)
        combined = combine_scores(scores, rewards, combine).item()
    except ConfigError as error:  # such as a reward that doesn't know this prompt: the conversation continues
        return f"no score: {error}"
    parts = [f"{'none' if value is None else f'{value:.2f}'} {name}" for name, (value,) in scores.items()]
    said = "none" if math.isnan(combined) else number(combined, "{:.2f}") if math.isfinite(combined) else "no number"
    return said if len(parts) == 1 else f"{said}: {', '.join(parts)}"
