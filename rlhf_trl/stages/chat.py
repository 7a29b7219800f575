"""Talking to policies in a terminal (`stage=chat`)."""

import contextlib
import functools
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TextIO

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import GenerationConfig, TextStreamer, set_seed
from transformers.utils.logging import disable_progress_bar

from rlhf_trl.build import load_policies, reward_functions
from rlhf_trl.data.messages import as_text
from rlhf_trl.data.tokenize import end_tokens
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.generation import TOO_LONG, Policy, Prompt, as_prompt, generation_config
from rlhf_trl.evaluation.rewards import combine_scores, score
from rlhf_trl.hints import did_you_mean
from rlhf_trl.models.sizes import check_rows, sizes_of
from rlhf_trl.report.text import number, side_by_side
from rlhf_trl.rewards.base import Reward
from rlhf_trl.rewards.combine import weighted_sum
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.terminal import printable

COMMANDS = {
    "/score": "what the rewards say of the last answers",
    "/again": "the last prompt once more, with other answers",
    "/new": "forget the conversation (with stage.remember=true)",
    "/help": "this list",
    "/quit": "leave; so do Ctrl-D, and Ctrl-C where nothing is being written",
}


def chat(cfg: DictConfig) -> None:
    """
    Reads prompts from the terminal (or a pipe) and shows the answers of the stage's policies.

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
    """What a policy wrote last, and after what."""

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
    The conversation: a prompt a line, until the lines end.

    One policy's answer is shown as it is written; those of several stand side by side. Each policy has its own
    tokenizer, its own template and its own memory.

    Args:
        policies (`Sequence[Policy]`), rewards (`Sequence[Callable]`):
            Who answers, and what can be asked for its score by `/score`.
        sampling (`dict`):
            Of `transformers.GenerationConfig`, see [`generation_config`].
        remember (`bool`):
            Whether earlier turns stay in the prompt (of policies with a chat template).
        always_score (`bool`):
            Whether every answer is scored.
        system_prompt (`str`, *optional*):
            What stands before everything.
        lines (`Iterator[str]`, *optional*), out (`TextIO`, *optional*):
            Where prompts come from and answers go; the terminal by default.
        combine (`Callable`):
            Makes one of several rewards, see `rlhf_trl.rewards.combine`.
    """
    out = out or sys.stdout
    said = "one prompt a line" if len(policies) == 1 else f"one prompt a line, {len(policies)} answers side by side"
    print(f"{', '.join(policy.name for policy in policies)}: {said}; /help for more.", file=out, flush=True)
    memory: dict[str, list[dict]] = {policy.name: [] for policy in policies}
    last: list[Answer] = []
    text, kept = None, False  # what was asked last; whether its turn is in the memory
    say = functools.partial(scored, rewards=rewards, combine=combine) if rewards else None
    for line in lines if lines is not None else typed(out):
        line = line.strip()
        if not line:
            continue
        if line == "/quit":
            break
        if line.startswith("/") and (line != "/again" or text is None):
            command(line, last, say, memory, out)
            continue
        if line != "/again":
            text, kept = line, False
        # The answer that another one is wanted for is forgotten when that one is there
        before = {name: turns[:-2] if kept else turns[:] for name, turns in memory.items()}
        try:
            last = [answer(policy, text, before[policy.name], sampling, system_prompt, out, len(policies) == 1)
                    for policy in policies]  # fmt: skip
        except KeyboardInterrupt:
            print("\n(stopped)", file=out, flush=True)
            continue
        except ConfigError as error:  # a prompt that one of them can't take
            print(printable(f"({error})"), file=out, flush=True)
            continue
        show(last, say if always_score else None, out)
        if remember:
            for given in last:
                if given.policy.chats:
                    turn = [{"role": "user", "content": text}, {"role": "assistant", "content": given.text}]
                    memory[given.policy.name] = before[given.policy.name] + turn
            kept = True


def typed(out: TextIO) -> Iterator[str]:
    """Lines of the standard input, with a mark to type after; ends at Ctrl-D and Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys, and the lines of before)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=out, flush=True)
            return
        if not sys.stdin.isatty():
            print(printable(line), file=out, flush=True)  # as it would stand in a terminal
        yield line


def command(line: str, last: list[Answer], say: Callable[[Answer], str] | None, memory: dict, out: TextIO) -> None:
    """Does what a line that begins with `/` asks for."""
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
    elif say is None:
        print("There is no reward to ask. Start with reward=model, or another option of it.", file=out, flush=True)
    else:
        scores = {given.policy.name: say(given) for given in last}
        alike = len(set(scores.values())) == 1  # such as a reward that doesn't know this prompt
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
) -> Answer:
    """One answer, shown as it is written if `stream`."""
    prompt = as_prompt(text, policy, system_prompt)
    if turns:
        prompt = [*prompt[:-1], *turns, prompt[-1]]
    ids = policy.ids(prompt)
    check_rows(sizes_of(policy.model), [ids], sampling["max_new_tokens"], TOO_LONG)
    ids = torch.tensor([ids], device=policy.model.device)
    tokenizer = policy.tokenizer
    streamer = Stream(tokenizer, out) if stream else None
    # The model's own generation config would fill what is left unset here
    policy.model.generation_config = GenerationConfig(
        **sampling, eos_token_id=end_tokens(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    written = policy.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer)
    return Answer(policy, prompt, written[0, ids.size(1) :].tolist())


class Stream(TextStreamer):
    """transformers' `TextStreamer`, to a file of one's own."""

    def __init__(self, tokenizer, out: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Shows a piece of text."""
        print(printable(text), file=self.out, flush=True, end="\n" if stream_end else "")


def show(answers: list[Answer], say: Callable[[Answer], str] | None, out: TextIO) -> None:
    """Answers side by side (a single one has been streamed), with what `say` says of them."""
    scores = {given.policy.name: say(given) for given in answers} if say else {}
    if len(answers) > 1:
        titles = [name + (f" ({scores[name]})" if name in scores else "") for name in (a.policy.name for a in answers)]
        texts = {title: given.text for title, given in zip(titles, answers, strict=True)}
        print(printable(side_by_side(texts, shutil.get_terminal_size((100, 24)).columns)), file=out, flush=True)
    else:
        for said in scores.values():
            print(printable(f"  ({said})"), file=out, flush=True)


def scored(given: Answer, rewards: Sequence[Reward], combine: Callable) -> str:
    """Return the reward of an answer in words: `1.25`, or with several rewards `1.25: 2.00 gold, -0.75 short`."""
    completion = given.policy.completion(given.prompt, given.ids)
    try:
        scores = score(rewards, [given.prompt], [completion], [given.ids], {}, given.policy.tokenizer)
        combined = combine_scores(scores, rewards, combine).item()
    except ConfigError as error:  # such as a reward that doesn't know this prompt: the conversation continues
        return f"no score: {error}"
    parts = [f"{'none' if value is None else f'{value:.2f}'} {name}" for name, (value,) in scores.items()]
    said = "none" if math.isnan(combined) else number(combined, "{:.2f}") if math.isfinite(combined) else "no number"
    return said if len(parts) == 1 else f"{said}: {', '.join(parts)}"
