"""The plan beside the peaks that `python -m bench.gpu` measured on an NVIDIA H200 (docs/benchmarks.md, "On a GPU")."""

from statistics import mean

from bench.gpu.configurations import CONFIGURATIONS
from bench.gpu.cost import planned_memory
from bench.gpu.models import SIZES

# `torch.cuda.max_memory_allocated` in GiB, with torch 2.11.0, transformers 5.23.0, TRL 1.16.0, PEFT 0.21.2
MEASURED = {
    ("0.5B", "PPO, critic=head"): 16.3,
    ("0.5B", "GRPO of TRL"): 16.3,
    ("0.5B", "PPO, critic=head, LoRA"): 13.5,
    ("0.5B", "PPO, critic=model"): 28.7,
    ("0.5B", "PPO, critic=adapter, LoRA"): 24.9,
    ("0.5B", "PPO, four roles on one base, LoRA"): 24.0,
    ("0.5B", "RLOO of TRL"): 16.3,
    ("0.5B", "GRPO of TRL, LoRA"): 13.5,
    ("1.5B", "PPO, critic=head"): 27.0,
    ("1.5B", "GRPO of TRL"): 27.0,
    ("1.5B", "PPO, critic=model"): 45.5,
}


def rows() -> list[tuple[str, str, float, float]]:
    """Return size, name, planned and measured GiB of each configuration that was measured."""
    found = []
    for each in CONFIGURATIONS:
        measured = MEASURED.get((each.size, each.name))
        if measured is not None:
            planned = planned_memory(SIZES[each.size], each.setting("", False), each.critic, each.options)["peak"]
            found.append((each.size, each.name, planned, measured))
    return found


def table() -> str:
    """Return the rows as Markdown, in GiB."""
    lines = ["| | | planned | measured | difference |", "|---|---|---:|---:|---:|"]
    found = rows()
    for size, name, planned, measured in found:
        lines.append(f"| {size} | {name} | {planned:.1f} | {measured:.1f} | {planned / measured - 1:+.1%} |")
    off = [abs(planned / measured - 1) for *_, planned, measured in found]
    lines += ["", f"{len(found)} configurations: off by {mean(off):.1%} on average and {max(off):.1%} at most."]
    return "\n".join(lines)
