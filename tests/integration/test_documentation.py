"""The documentation: the site builds strictly and loads nothing from elsewhere, and its commands pass the checks."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_trl.checks import find_problems
from rlhf_trl.cli import overrides
from tests.helpers.blocks import name_of
from tests.helpers.chat_tokenizers import chatml_tokenizer
from tests.helpers.configs import CONF

ROOT = CONF.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
# What starts a stage in this process, and options of launchers before it
PROGRAM = re.compile(
    r"^(?:\w+=\S+ )*(?:python train\.py|rlhf-trl|accelerate launch .*?(?:train\.py|-m rlhf_trl\.cli))(?= |$)"
)
DATA_FILE = re.compile(r"[\w./]+\.(?:jsonl|json|csv|parquet)\b")
FETCHED = re.compile(
    r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["'](?:https?:)?//[^"']*|url\(["']?(?:https?:)?//"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed (`make docs`)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_has_all_pages_and_loads_nothing_from_elsewhere(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}
    fetched = {
        (path.name, match)
        for path in site.rglob("*")
        if path.suffix in (".html", ".css", ".svg")
        for match in FETCHED.findall(path.read_text(encoding="utf-8"))
    }
    assert not fetched
    # the theme's script would load the renderer of diagrams, if a page had one
    assert not [path.name for path in site.rglob("*.html") if 'class="mermaid"' in path.read_text(encoding="utf-8")]


def test_a_link_to_another_server_is_found():
    for text in (
        '<script defer src="https://a.b/c.js">',
        "<link rel=x href='//a.b/c.css'>",
        "url(https://a.b/c.woff)",
    ):
        assert FETCHED.search(text)
    assert not FETCHED.search('<a href="https://a.b"> <script src="assets/c.js">')


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    links = [
        link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text) for link in link if link
    ]
    assert links and not [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]


def test_the_pictures_are_small_and_say_how_they_were_made():
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "assets").iterdir()) < 1_000_000
    assert "python -m tests.helpers.gallery runs/demo" in (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")


def commands_of(page: Path) -> list[str]:
    """Return the commands of a page that start a stage."""
    blocks = [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == "sh"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if PROGRAM.search(line)]


def write_files(page: Path) -> None:
    """Write the files that a page shows, each with its path in the first line, and empty ones for data."""
    for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind in ("yaml", "python") and (name := name_of(text)):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text)


@pytest.fixture
def a_users_folder(tmp_path, monkeypatch):
    """Change to the folder of a user who has the earlier runs and the models that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("reviews", "smollm2"):
        Path(name).mkdir()
        monkeypatch.setenv(f"RLHF_TRL_{name.upper()}", name)
    Path("runs", "bench", "sentiment").mkdir(parents=True)  # of `python -m bench.sentiment`
    for folder in ("smollm2", "runs/bench/sentiment"):
        Path(folder, "config.json").write_text("{}")
    Path("vllm.py").touch()  # stands for the package
    yield tmp_path
    for name in [
        name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(str(tmp_path))
    ]:
        del sys.modules[name]


# Reward models with other names: those of `pipeline=iterated`, one trained longer, and a cost model
REWARDS = ("reward_0", "reward_1", "reward_2", "reward_long", "cost", "warm")


def add_runs(words: list[str], project: str) -> None:
    """Write records of the runs that a command may start from; the reward model is an ensemble if one is asked for."""
    policies = ("sft", "ppo", "ppo_positive", "dpo", "grpo", "rloo", "init")
    for name in (*policies, "reward", "heads", "collect", "label", *REWARDS):
        folder = Path("runs", project, name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"status": "done", "stage": name}))
    if any("ensemble=" in word for word in words):
        members = ["member_0", "member_1"]
        for member in members:
            (folder.parent / "reward" / member).mkdir(exist_ok=True)
            (folder.parent / "reward" / member / "adapter_config.json").write_text("{}")
        (folder.parent / "reward" / "ensemble.json").write_text(json.dumps({"members": members}))


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_pass_the_checks(page, a_users_folder):
    for each in (ROOT / "docs" / "your-own.md", page):
        write_files(each)
    wrong = {}
    for line in commands_of(page):
        words = shlex.split(line[PROGRAM.search(line).end() :], comments=True)
        args = overrides.parse_command_line(words)
        for name in DATA_FILE.findall(line):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()
        mine = [path for folder in args.config_dirs for path in Path(folder).rglob("*.yaml")]
        for name in DATA_FILE.findall("".join(path.read_text() for path in mine)):
            Path(name).touch()
        # The runs here have no checkpoints
        given = [word for word in args.overrides if not word.startswith("resume=")]
        cfg, problems = overrides.compose([*given, "overwrite=true"], args.config_dirs)
        if cfg:
            add_runs(args.overrides, cfg.project)
            problems = problems + find_problems(cfg)
        if problems:
            wrong[line] = problems
    assert not wrong


def test_the_shell_completes_options_and_keys():
    env = {**os.environ, "COMP_LINE": "python train.py stage=d"}
    found = subprocess.run(
        [sys.executable, "train.py", "-sc", "query=bash"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert found.stdout.split() == ["stage=dpo"]
    assert "-sc install=bash" in (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")


# ---- The image ----


def test_the_image_is_made_of_what_the_clone_has():
    """The image itself can't be built here: its steps are those of the Makefile, on files that are there."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    makefile, ignored = (ROOT / "Makefile").read_text(), (ROOT / ".dockerignore").read_text().split()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    assert copied and [name for name in copied if not (ROOT / name).exists() or f"!{name}" not in ignored] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extras,) = re.findall(r"/source\[([\w,]+)\]", text)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    installed = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*installed["packages"], *installed["force-include"], project["project"]["readme"], "LICENSE"]
    assert set(needed) <= set(copied)
    python = re.search(r"^FROM python:([\d.]+)-slim$", text, re.M)[1]
    assert (
        project["project"]["requires-python"] == f">={python}"
        and f"Python {python}" in (ROOT / "constraints.txt").read_text()
    )
    assert "grep '^torch==' /source/constraints.txt" in text and "grep '^torch==' constraints.txt" in makefile
    assert "-c /source/constraints.txt" in text and project["project"]["scripts"]["rlhf-trl"]


# ---- What the pages say is run ----


def run(words: list[str], folder: Path, **environment: str) -> str:
    """Run a command in a folder as a user would, and return what it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def quickstart() -> list[list[str]]:
    """Return the words of the quickstart's commands, without those that follow the program."""
    return [
        shlex.split(line[PROGRAM.search(line).end() :], comments=True)
        for line in commands_of(ROOT / "docs" / "quickstart.md")
    ]


@pytest.mark.slow
def test_the_commands_of_the_quickstart_run(tmp_path):
    """Each with the results of those before it, the training stages for a few steps."""
    trained = {"sft", "reward", "ppo", "dpo"}
    for words in quickstart():
        stage = next((word.removeprefix("stage=") for word in words if word.startswith("stage=")), "")
        short = ["stage.args.max_steps=8"] if stage in trained and "--cfg" not in words else []
        run([sys.executable, str(ROOT / "train.py"), *words, *short], tmp_path)
    runs = {path.parent.name for path in tmp_path.glob("runs/mine/*/run.json")}
    assert trained | {"evaluate"} <= runs and (tmp_path / "runs/mine/report/index.html").exists()


def test_the_first_command_runs_in_a_smoke_test(command, tmp_path):
    """`python train.py stage=ppo`, two steps of it; every number that it logs is in the glossary."""
    status, _, err = command("stage=ppo", "debug=smoke")
    assert status == 0, err
    metrics = json.loads((tmp_path / "runs/default/smoke_ppo/metrics.json").read_text())
    names = {name for row in metrics["history"] for name in row} | {*metrics["train"], *metrics["eval"]}
    glossary = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    known = {name for line in re.findall(r"^\|([^|]*)\|", glossary, re.M) for name in re.findall(r"`([^`]+)`", line)}
    known |= {f"completions/{name}" for name in known} | {f"rewards/{name}" for name in known}
    missing = {name.removeprefix("eval_") for name in names - known} - known
    assert {name for name in missing if not re.match(r"rewards/.*/(mean|std|frac_applied)|health/", name)} == set()


@pytest.mark.slow
def test_the_notebook_runs_with_a_tiny_model(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    save_tiny_chat_model(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("RLHF_TRL_NOTEBOOK_MODEL", str(tmp_path / "tiny"))
    monkeypatch.setenv("RLHF_TRL_NOTEBOOK_EPISODES", "512")
    notebook = json.loads((ROOT / "docs" / "notebooks" / "qlora_ppo.ipynb").read_text(encoding="utf-8"))
    names: dict = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("!"):
            for line in source.splitlines():  # as IPython does: a shell command with names of Python in braces
                words = shlex.split(re.sub(r"\{(\w+)\}", lambda match: str(names[match[1]]), line[1:]))
                assert words[0] == "rlhf-trl"
                run([sys.executable, "-m", "rlhf_trl.cli", *words[1:]], tmp_path)
        elif cell["cell_type"] == "code":
            exec(compile(source, "notebook", "exec"), names)
    assert (tmp_path / "runs/notebook/ppo/adapter_model.safetensors").exists()
    assert names["after"]["completion"] and len(names["points"]) == 4


def save_tiny_chat_model(folder: Path) -> None:
    """Write a Llama with random weights, its layers wide enough for 4 bits, and a tokenizer of bytes with ChatML."""
    tokenizer = chatml_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_the_python_of_the_pages_runs(tmp_path):
    """docs/your-own.md: the reward function and the trainer, with a tiny model for the hub's."""
    save_tiny_chat_model(tmp_path / "tiny")
    for kind, text in BLOCK.findall((ROOT / "docs" / "your-own.md").read_text(encoding="utf-8")):
        if kind == "python":
            head, _, body = text.partition("\n")
            (tmp_path / head[2:]).write_text(
                body.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "tiny"))
            )
    run([sys.executable, "my_ppo.py"], tmp_path)
