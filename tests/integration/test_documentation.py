"""The documentation: the site builds strictly and loads nothing from elsewhere, and its commands pass the checks."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_trl.checks import find_problems
from rlhf_trl.cli import overrides
from tests.helpers.configs import CONF

ROOT = CONF.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
# What starts a stage in this process, and options of launchers before it
PROGRAM = re.compile(r"(?:python train\.py|rlhf-trl|accelerate launch .*?(?:train\.py|-m rlhf_trl\.cli))(?= |$)")
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


def commands_of(page: Path) -> list[str]:
    """Return the commands of a page that start a stage."""
    blocks = [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == "sh"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if PROGRAM.search(line)]


def write_files(page: Path) -> None:
    """Write the files that a page shows, each with its path in the first line, and empty ones for data."""
    for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        head, _, body = text.partition("\n")
        if kind in ("yaml", "python") and re.fullmatch(r"# [\w/]+\.(yaml|py)", head):
            Path(head[2:]).parent.mkdir(parents=True, exist_ok=True)
            Path(head[2:]).write_text(body)


@pytest.fixture
def a_users_folder(tmp_path, monkeypatch):
    """Change to the folder of a user who has the earlier runs and the models that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("reviews", "smollm2"):
        Path(name).mkdir()
        monkeypatch.setenv(f"RLHF_TRL_{name.upper()}", name)
    Path("smollm2", "config.json").write_text("{}")
    yield tmp_path
    for name in [
        name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(str(tmp_path))
    ]:
        del sys.modules[name]


def add_runs(words: list[str]) -> None:
    """Write records of the runs that a command may start from; the reward model is an ensemble if one is asked for."""
    project = next((word.removeprefix("project=") for word in words if word.startswith("project=")), "default")
    for name in ("sft", "reward", "ppo", "dpo", "heads", "grpo", "rloo", "init"):
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
            Path(name).touch()
        mine = [path for folder in args.config_dirs for path in Path(folder).rglob("*.yaml")]
        for name in DATA_FILE.findall("".join(path.read_text() for path in mine)):
            Path(name).touch()
        add_runs(args.overrides)
        given = [word for word in args.overrides if word != "resume=true"]  # the runs here have no checkpoints
        cfg, problems = overrides.compose([*given, "overwrite=true"], args.config_dirs)
        problems = problems + (find_problems(cfg) if cfg else [])
        if problems:
            wrong[line] = problems
    assert not wrong
