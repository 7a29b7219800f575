"""Pages of results: what is written, that it is safe and self-contained, and that a browser shows it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure as MatplotlibFigure
from omegaconf import OmegaConf
from PIL import Image

from rlhf_trl.data.multimodal import beside, opened, thumbnail
from rlhf_trl.errors import ConfigError
from rlhf_trl.report import plots
from rlhf_trl.report.page import (
    Code,
    Details,
    Figure,
    Missing,
    Page,
    Section,
    SideBySide,
    Table,
    Text,
    to_html,
    to_markdown,
    write_page,
)
from rlhf_trl.report.plots import Series
from rlhf_trl.report.project import project_page, write_report
from rlhf_trl.report.records import load_evaluations
from rlhf_trl.report.seeds import t_quantile
from rlhf_trl.report.setup import describe_data
from rlhf_trl.report.sweep import sweep_page, write_sweep_report
from rlhf_trl.report.text import comparison_text
from rlhf_trl.report.verdicts import DONT, LOOK, OPEN, SHIP, policy_verdicts, verdict, verdict_blocks
from rlhf_trl.runs.record import read_comparison
from rlhf_trl.runs.results import Comparison
from rlhf_trl.stages.evaluate import sweep_runs
from rlhf_trl.stages.report import report

EVIL = "</p><script>alert(1)</script> | `a` \x00\ud800"


def page(*blocks, **options) -> Page:
    return Page("Title", "What came out.", [Section("A part", list(blocks))], **options)


def test_images_are_shown_small_beside_answers_and_are_part_of_the_page():
    small = thumbnail(Image.new("RGB", (640, 320), "red"))
    shown = re.findall('src="([^"]+)"', to_html(page(SideBySide("What color?", {"sft": "Red."}, images=[small]))))
    assert shown == [small] and opened(shown[0]).size == (160, 80)
    assert opened(shown[0]).getpixel((80, 40)) == (255, 0, 0)
    joined = beside([small, thumbnail(Image.new("RGB", (8, 200), "blue"))])
    assert joined.size == (166, 160) and joined.getpixel((165, 159)) == (0, 0, 255)
    noise = np.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=np.uint8)
    assert thumbnail(Image.fromarray(noise)).startswith("data:image/jpeg;base64,")
    with pytest.raises(ValueError, match="where a data URI"):
        SideBySide("What color?", {}, images=["https://example.org/a.png"])


def figures() -> list[str]:
    x = np.arange(5.0)
    points = [Series("best of n", x, x, x - 1, x + 1), Series("gold", [0, 1], [1, 2], [0, 1], [2, 3], line=False)]
    return [
        plots.curves([Series("train", x, x), Series("eval", x, [1, None, 2, 3, np.nan])], "curves", "step", "loss"),
        plots.frontier(points, "frontier", "KL", "reward", x_scale="sqrt"),
        plots.bars(["ppo", "dpo"], [0.6, 0.7], [0.5, 0.6], [0.7, 0.8], "bars", "wins", middle=0.5, form="{:.0%}"),
        plots.histogram({"sft": x, "ppo": x + 1, "none": [np.nan]}, "histogram", "reward"),
    ]


class Tags(HTMLParser):
    """The elements that a browser would see."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_a_page_escapes_what_models_write_and_fetches_nothing():
    blocks = [
        Text(EVIL),
        Missing(EVIL),
        Table([EVIL], [[EVIL]], EVIL, note=EVIL),
        SideBySide(EVIL, {EVIL: EVIL}, EVIL),
        Details(EVIL, [Code(EVIL)]),
        Figure(figures()[0], EVIL),
    ]
    html = to_html(Page(EVIL, EVIL, [Section(EVIL, blocks)], EVIL, {EVIL: EVIL}, EVIL, {EVIL: EVIL}))
    tags = Tags(html).found
    assert "script" not in {tag for tag, _ in tags} and html.count("&lt;script&gt;") > 10
    places = [value for _, attrs in tags for name, value in attrs.items() if name in ("src", "href", "xlink:href")]
    assert places and all(place.startswith(("#", "data:")) for place in places)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)
    assert "\x00" not in html and html.encode("utf-8")  # a half of a surrogate pair can't be written


def test_what_stands_between_backticks_is_code_everywhere_but_in_what_models_read_and_write():
    said, verbatim = "Set `a/b=<i>`.", "A `model` wrote `this`."
    blocks = [
        Text(said),
        Missing(said),
        Table([said], [[said], [said]], said, note=said),
        SideBySide(verbatim, {said: verbatim}, said),
        Details(said, [Code(verbatim)]),
        Figure(plots.bars(["a"], [0.5]), said),
    ]
    sections = [Section(f"{said} {i}", blocks if i == 0 else [Text(said)]) for i in range(3)]
    html = to_html(Page(said, said, sections, said, {said: said}, said, {said: said}))
    assert re.findall("[^`]`[^`]*`", html) == [" `model`", " `this`"] * 3
    shown = html.count("<code>a/b=&lt;i&gt;</code>") + html.count("<code>a/<wbr>b=&lt;i&gt;</code>")
    assert shown == 24 and "<i>" not in html
    assert 'aria-label="Set a/b=&lt;i&gt;."' in html and 'data-name="Set a/b=&lt;i&gt;."' in html


def test_the_text_has_the_same_tables(tmp_path):
    table = Table(["policy", "reward", "KL"], [["sft", "1.5 [1, 2]", None], ["a|b", "-2", 0.25]], "All.", marked=[1])
    assert table.numeric == [False, True, True]
    path = write_page(
        page(table, Code("x: 1\napi_key: abc"), Missing("No reward model.\nType this."), facts={"prompts": "256"}),
        tmp_path,
    )
    text = (tmp_path / "report.md").read_text()
    assert path.name == "index.html" and sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "report.md"]
    assert "| a\\|b * |         -2 | 0.25 |" in text and "| ------ | ---------: | ---: |" in text
    assert "> No reward model. Type this." in text and "- prompts: 256" in text and "x: 1" not in text
    html = path.read_text()
    assert "x: 1\napi_key: HIDDEN" in html
    assert re.search(r'<td class="n" data-name="KL">0.25</td>', html) and html.count('<tr class="marked">') == 1


def test_a_fence_is_longer_than_what_it_holds():
    text = to_markdown(page(SideBySide("Why ````?", {"sft": "so", "ppo": ""})))
    assert "`````\nWhy ````?" in text and "(empty)" in text


@pytest.mark.parametrize("place", range(4))
def test_figures_are_svg_in_the_colors_of_the_page(place):
    drawn = figures()[place]
    svgs = [part for part in re.split(r"(?=<svg )", drawn) if part.strip()]
    assert ['class="large-screen"' in svgs[0], 'class="small-screen"' in svgs[1]] == [True, True]
    for svg in svgs:
        root = ElementTree.fromstring(svg)  # well formed
        texts = ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]
        assert any(text in texts for text in ("step", "KL", "wins", "reward"))
        assert "currentColor" in svg and "var(--c0" in svg and plots.INK not in svg and "DejaVu" not in svg
    assert figures()[place] == drawn  # nothing of a clock or of chance in it


def test_names_of_clip_paths_are_a_figures_own():
    names = [set(re.findall(r'clipPath id="([^"]+)"', drawn)) for drawn in figures()]
    assert all(names) and sum(map(len, names)) == len(set().union(*names))


def test_nothing_to_draw_is_drawn_empty():
    assert plots.histogram({"sft": [np.nan]}, "none", "reward").startswith("<svg")
    assert plots.curves([Series("loss", [1], [None])], "none", "step").startswith("<svg")


NAMES = [
    "$x",
    "$\\frac{1}$ $",
    "_x",
    "a_b^c",
    "\\alpha",
    "%s {}",
    "<b>&amp;",
    "font-family: x; y",
    "#0072b2 #010203",
    "\ud800",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_and_values_are_drawn_as_they_are(name):
    x = np.arange(1, 6.0)
    labelled = Series(name, x, x, line=False, labels=[name] * 5)
    drawings = [
        plots.curves([Series(name, x, x), Series("b", x, x)], name, name, name),
        plots.frontier([labelled, Series("b", x, x)], name, name, name),
        plots.frontier([labelled, Series("b", np.arange(1, 20.0), np.arange(1, 20.0))], name, name, name, "log"),
        plots.bars([name, "b"], [0.6, 0.7], [0.5, 0.6], [0.7, 0.8], name, name),
        plots.histogram({name: x, "b": x + 1}, name, name),
    ]
    shown = name.replace("\ud800", "\ufffd")
    for drawing in drawings:
        for svg in re.split(r"(?=<svg )", drawing)[1:]:
            root = ElementTree.fromstring(svg)
            texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
            assert texts.count(shown) >= 2 and root.get("aria-label") == shown
            assert not any("mathdefault" in text for text in texts)
        assert drawing.pixels().shape[2] == 4  # its ticks too


# ---- The report of a project ----


def estimate(mean: float, half: float = 0.1) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def entry(mean: float, kl: float | None, model: float, difference: float | None = None, **changes) -> dict:
    other = difference is not None
    return {
        "path": "p",
        "family": "x",
        "reward": estimate(mean),
        "rewards": {"gold": mean, "model": model},
        "reward_intervals": {"gold": estimate(mean), "model": estimate(model)},
        "reward_std": {"gold": 1.0, "model": 2.0},
        "difference": estimate(difference) if other else None,
        "win_rate": estimate(0.6, 0.05) if other else None,
        "length_controlled_win_rate": estimate(0.55, 0.05) if other else None,
        "tie_rate": 0.2,
        "kl": estimate(kl) if kl else None,
        "completion_length": 10.0,
        "eos_rate": 1.0,
        "repetition": 0.0,
        "gaps": {},
    } | changes


def comparison(**policies) -> dict:
    policies = {"sft": entry(1.0, None, 0.0), **policies}
    rewards = np.random.default_rng(0).normal(1.0, 1.0, size=40)
    rewards = (rewards - rewards.mean()) / rewards.std() + 1.0
    return {
        "baseline": "sft",
        "prompts": 40,
        "left_out": 0,
        "judge": "the reward",
        "weights": {"gold": 1.0, "model": 0.0},
        "policies": policies,
        "bradley_terry": {},
        "best_of_n": None,
        "samples": [
            {
                "prompt": f"prompt {i}",
                "completions": {name: f"{name} {i if name == 'sft' else EVIL}" for name in policies},
                "rewards": {name: value + (i if name != "sft" else 0) for name in policies},
            }
            for i, value in enumerate(rewards)
        ],
    }


def make_run(project, name: str, stage: str, metrics: dict | None, **record) -> None:
    folder = project / name
    folder.mkdir(parents=True)
    record = {
        "stage": stage,
        "command": f"accelerate launch train.py stage={stage} project=mine",
        "status": "done",
        "started": "2026-01-01T10:00:00+00:00",
        "ended": "2026-01-01T10:01:05+00:00",
        "versions": {"rlhf_trl": "0.1.0", "torch": "2.13.0"},
        **record,
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(f"seed: 42\nstage:\n  name: {stage}\n  args:\n    beta: 0.05\n")
    if metrics:
        (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "mine"
    ppo = [{"step": i, "objective/scores": i / 4, "objective/kl": i / 8, "loss": 0.1} for i in range(1, 5)]
    make_run(folder, "ppo", "ppo", {"train": {}, "eval": {}, "history": ppo})
    pairs = [{"step": i, "eval_accuracy": 0.5 + i / 10, "eval_runtime": 3.0} for i in range(3)]
    make_run(folder, "reward", "reward", {"train": {}, "eval": pairs[-1], "history": pairs})
    make_run(folder, "dpo", "dpo", None, status="failed", ended=None)
    found = comparison(
        ppo=entry(1.8, 0.9, 2.0, 0.8, family="ppo"),
        far=entry(
            1.2, None, 1.0, 0.2, family="far", gaps={"kl": "`far` has another vocabulary."}, unclear=3, judgements=80
        ),
    )
    point = {"reward": estimate(1.5), "chosen_by": 1.0}
    points = [{"n": n, "kl": kl, **point} for n, kl in ((1, 0.0), (2, 0.19), (4, 0.64), (8, 1.2))]
    found["best_of_n"] = {"samples": 8, "curves": [{"by": "", "points": points}, {"by": "model", "points": points}]}
    make_run(folder, "evaluate", "evaluate", None, started="2026-01-01T11:00:00+00:00")
    (folder / "evaluate" / "comparison.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def plain_figures(monkeypatch):
    """Put what figures show on axes, without layout and SVG, which take the time: for tests that read the text."""

    def drawn(draw, title, size, name):
        if name == "large-screen":
            draw(MatplotlibFigure().add_subplot(), small=False)
        return ""

    monkeypatch.setattr(plots, "_drawn", drawn)
    monkeypatch.setattr(plots, "_labels", lambda axes, points, small: None)


def test_a_projects_report_shows_what_is_there_and_says_what_is_not(project):
    path = write_report(project)
    html, text = path.read_text(), (project / "report" / "report.md").read_text()
    assert path == project / "report" / "index.html"
    headings = re.findall(r"^## (.*)", text, re.M)
    assert headings == [
        *("Verdict", "Reward and KL", "Wins", "What it cost", "Rewards before and after", "Answers"),
        *("Training", "Reward model", "Runs"),
    ]
    assert text.count("rewards differ by") == 10
    for gap in (
        "`far` has another vocabulary.",
        "3 of 80 judgements of far named neither",
        "The run `dpo` left no metrics (its status is `failed`).",
        "stage=evaluate_reward project=mine",
    ):
        assert gap in text
    assert "`" not in re.sub("<pre.*?</pre>|<article.*?</article>", "", html, flags=re.S)
    assert re.search(r"\| accuracy +\| +0.500 \| +0.700 \|", text)
    assert re.search(r"\| ppo \*? *\| +1.80 \[1.70, 1.90\]", text)
    assert "1 min 05 s" in text and "accelerate launch train.py stage=ppo project=mine" in html
    assert "beta: 0.05" in html and "torch" in html
    assert "best of n by model" in html and "&lt;script&gt;" in html and "<script" not in html
    assert "explained variance" not in html  # what wasn't logged has no figure, and a PPO's loss says nothing
    captions = re.findall(r'aria-label="(ppo: [^"]*)"', html)
    assert set(captions) == {"ppo: reward", "ppo: KL to the start, nats per sequence"}
    assert comparison_text(read_comparison(project / "evaluate")).startswith("40 held-out prompts")


def test_what_the_health_monitor_saw_stands_at_the_training(plain_figures, project):
    assert "Health" not in (write_report(project).parent / "report.md").read_text()  # nothing watched these runs
    watched = [{"step": i, "objective/scores": i / 4, "health/level": 0} for i in range(1, 5)]
    make_run(project, "rloo", "rloo", {"train": {}, "eval": {}, "history": watched})
    assert "monitor saw no sign" in (write_report(project).parent / "report.md").read_text()
    watched[2] |= {"health/level": 2, "health/kl_high": 2}
    make_run(project, "grpo", "grpo", {"train": {}, "eval": {}, "history": watched})
    text = (write_report(project).parent / "report.md").read_text()
    assert re.search(r"\| warn +\| `kl_high` +\| +3 to 3 +\| Raise `stage.args.beta`", text)


def test_published_results_stand_beside_ours(plain_figures, project):
    assert "Published results" not in (write_report(project).parent / "report.md").read_text()
    source = "arXiv 2310.16944"
    published = {
        "eval_loss": {"value": [0.5, 0.506], "source": source},
        "eval_accuracy": {"value": 0.77, "source": source},
        "MT-Bench": {"value": 7.34, "source": source},
    }
    pairs = [{"step": i, "eval_accuracy": 0.5 + i / 10, "eval_loss": 0.6} for i in range(3)]
    metrics = {"train": {}, "eval": pairs[-1], "history": pairs}
    make_run(project, "zephyr", "dpo", metrics, published=published)
    text = (write_report(project).parent / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if source in line]
    assert rows == [
        ["zephyr", "eval_loss", "0.5 to 0.506", "0.6", source],
        ["zephyr", "eval_accuracy", "0.77", "0.7", source],
        ["zephyr", "MT-Bench", "7.34", "not measured", source],
    ]


def test_figures_for_loggers_are_those_of_the_page(project):
    found = project_page(project).figures()
    assert {"report/Reward against KL", "report/Win rates", "report/ppo: reward"} <= found.keys()
    html = write_report(project).read_text()
    assert all(drawing.split("\n")[-1].strip() in html for drawing in found.values())


def test_the_quality_of_the_reward_model_is_taken_over(plain_figures, project):
    make_run(project, "evaluate_reward", "evaluate_reward", None)
    assert "The run `evaluate_reward` left no results" in to_markdown(project_page(project))
    accuracy = {"mean": 0.71, "low": 0.65, "high": 0.77}
    reward = {
        "accuracy": accuracy,
        "slices": [{"slice": "like length", "n": 9, "accuracy": accuracy}],
        "top_one": accuracy,
        "calibration": {"ece": 0.031, "bins": []},
        "length": {"pearson": 0.2, "spearman": 0.2, "longer_preferred": 0.6, "curve": []},
        "ratings": None,
        "mistakes": [],
        "completions_without_score": 0,
        "comparisons_left_out": 0,
    }
    counts = dict.fromkeys(("rows", "prompts", "completions", "comparisons"), 9)
    quality = {**counts, "longer_preferred": 0.5, "gold": None, "rewards": {"model": reward}, "raters": None}
    (project / "evaluate_reward" / "reward_quality.json").write_text(json.dumps(quality))
    text = to_markdown(project_page(project))
    assert re.search(r"\| model +\| 0.710 .*\| +0.031 \|", text) and "were not measured" not in text


def test_the_stage_report_makes_it_anew(project, capsys):
    report(OmegaConf.create({"runs_dir": str(project.parent), "project": project.name, "stage": {"evaluation": None}}))
    assert (project / "report" / "index.html").exists() and "report/index.html" in capsys.readouterr().out


def estimates(value, path=()) -> list[tuple]:
    """Return the places of a comparison with an estimate, or with a number that can be missing."""
    if not isinstance(value, dict | list):
        return [path] if path[-1] in ("chosen_by", "gold", "model", "repetition", "tie_rate") else []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path] if isinstance(value, dict) and "mean" in value else []
    return found + [each for key, item in items for each in estimates(item, (*path, key))]


def remove(comparison: dict, place: tuple) -> None:
    """Write null for an estimate, as a file has NaN."""
    *path, last = place
    for key in path:
        comparison = comparison[key]
    comparison[last] = dict.fromkeys(("mean", "low", "high")) if isinstance(comparison[last], dict) else None


def test_a_missing_estimate_is_a_gap_in_the_page(plain_figures, project):
    whole = (project / "evaluate" / "comparison.json").read_text()
    places = estimates({key: json.loads(whole)[key] for key in ("policies", "best_of_n")})
    assert len(places) > 40
    for place in places:
        found = json.loads(whole)
        remove(found, place)
        (project / "evaluate" / "comparison.json").write_text(json.dumps(found))
        assert "nan" not in to_markdown(project_page(project)).split(), place


def test_a_page_without_any_estimate(project):
    found = json.loads((project / "evaluate" / "comparison.json").read_text())
    for place in estimates({key: found[key] for key in ("policies", "best_of_n")}):
        remove(found, place)
    for row in found["samples"]:
        row["rewards"] = dict.fromkeys(row["rewards"])
    (project / "evaluate" / "comparison.json").write_text(json.dumps(found))
    assert "whether one is better is open" in write_report(project).read_text()


def test_each_evaluation_keeps_its_result_and_the_page_shows_the_newest_or_the_one_named(
    plain_figures, project, capsys
):
    make_run(project, "other", "evaluate", None, started="2026-01-02T10:00:00+00:00")
    found = comparison(far=entry(1.1, 0.4, 0.5, 0.1)) | {"prompts": 77}
    (project / "other" / "comparison.json").write_text(json.dumps(found))
    backup = project / "evaluate" / ".overwritten"  # of a run that is being overwritten
    backup.mkdir()
    shutil.copy(project / "other" / "comparison.json", backup)
    assert [each.name for each in load_evaluations(project)] == ["evaluate", "other"]
    assert "77 held-out prompts" in project_page(project).lead
    assert "40 held-out prompts" in project_page(project, "evaluate").lead
    cfg = {"runs_dir": str(project.parent), "project": project.name}
    report(OmegaConf.create(cfg | {"stage": {"evaluation": "evaluate"}}))
    text = (project / "report" / "report.md").read_text()
    assert re.search(r"^\| evaluate \* ", text, re.M) and re.search(r"^\| other +\| 2026-01-02", text, re.M)
    with pytest.raises(ConfigError, match="`stage.evaluation` is `none`.*`evaluate`, `other`"):
        report(OmegaConf.create(cfg | {"stage": {"evaluation": "none"}}))


def test_an_evaluation_without_runs_has_a_page(plain_figures, project):
    """Such as one of policies of the hub, or of a sweep, whose runs lie deeper."""
    for name in ("ppo", "reward", "dpo"):
        shutil.rmtree(project / name)
    (project / "evaluate" / "run.json").unlink()
    assert "better than sft on 40" in write_report(project).read_text()


def test_a_project_without_an_evaluation_says_how_to_make_one(tmp_path):
    make_run(tmp_path / "mine", "sft", "sft", None)
    page_ = project_page(tmp_path / "mine")
    assert "stage=evaluate project=mine" in page_.lead
    assert "`sft` left no metrics" in to_markdown(page_)
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path / "empty")


@pytest.mark.parametrize(
    ("policies", "parts"),
    [
        ({"ppo": entry(1.8, 0.9, 2.0, 0.8)}, ["ppo is better than sft on 40", "+0.80 [+0.70, +0.90]", "KL of 0.90"]),
        ({"ppo": entry(1.05, 0.9, 0.0, 0.05)}, ["No policy is better than sft", "ppo comes nearest"]),
        ({"ppo": entry(0.5, 0.9, 0.0, -0.5)}, ["No policy is better", "ppo is worse"]),
        ({"ppo": entry(1.1, 9.0, 4.0, 0.1)}, ["over-optimized", "+2.0 standard deviations by `model`", "beta"]),
        ({"ppo": entry(1.8, 0.9, 2.0, 0.8, eos_rate=0.5)}, ["ends 50% of its answers", "missing_eos_penalty"]),
        ({"ppo": entry(1.8, 0.9, 2.0, 0.8, completion_length=30.0)}, ["3.0 times as long", "length_penalty"]),
        ({"ppo": entry(1.8, 0.9, 2.0, 0.8, repetition=0.4)}, ["repeats itself"]),
        ({"a": entry(1.8, 0.9, 2.0, 0.8), "b": entry(2.0, None, 2.0, 1.0)}, ["a and b are better", "b most"]),
        ({}, ["Only the baseline `sft`"]),
    ],
)
def test_the_verdict_names_what_came_out_and_what_to_turn(policies, parts):
    text = verdict(Comparison.from_json(comparison(**policies)))
    assert all(part in text for part in parts), text
    assert len(re.findall(r"[.](?: |$)", text)) == 2  # two sentences


def test_below_the_best_of_n_is_said():
    found = comparison(ppo=entry(1.5, 0.9, 0.5, 0.5))
    points = [{"n": n, "kl": kl, "reward": estimate(2.0 + kl), "chosen_by": 1} for n, kl in ((1, 0.0), (8, 1.2))]
    found["best_of_n"] = {"samples": 8, "curves": [{"by": "model", "points": points}]}
    assert "ppo is below what the best of n samples of sft by `model` gets" in verdict(Comparison.from_json(found))
    call, reasons = policy_verdicts(Comparison.from_json(found))["ppo"]
    assert call == LOOK and reasons == ["the best of n samples of sft has more reward for the same KL"]
    (table_,) = verdict_blocks(Comparison.from_json(found))
    # At a KL of .9 best-of-n has 2 + 1.2 sqrt(.9 / 1.2) = 3.04 +- .1; the policy 1.5 +- .1
    assert table_.cells[0][2:5] == ["+0.50 [+0.40, +0.60]", "-1.54 [-1.68, -1.40]", "n = 1"]
    found["policies"]["ppo"]["kl"] = estimate(5.0)  # beyond what n samples reach: nothing to hold it against
    assert "best of n" not in verdict(Comparison.from_json(found))
    assert verdict_blocks(Comparison.from_json(found))[0].cells[0][3] == "further than n = 8"


ALONE = {"mean": 0.8, "low": None, "high": None}  # of a single prompt


@pytest.mark.parametrize(
    ("policies", "call", "why"),
    [
        ({"ppo": entry(1.8, 0.9, 2.0, 0.8)}, SHIP, "better than sft beyond chance"),
        ({"ppo": entry(0.5, 0.9, 0.0, -0.5)}, DONT, "less reward than sft"),
        ({"ppo": entry(1.05, 0.9, 0.0, 0.05)}, LOOK, "no difference to sft beyond chance on 40 prompts"),
        ({"ppo": entry(1.8, 0.9, 2.0, 0.8) | {"difference": ALONE}}, LOOK, "no difference to sft beyond chance"),
        ({"ppo": entry(1.05, 9.0, 4.0, 0.05)}, DONT, "over-optimized"),
        ({"ppo": entry(0.5, 9.0, 4.0, -0.5)}, DONT, "less reward than sft; ppo gained +2.0 standard deviations"),
        ({"ppo": entry(1.8, 0.9, 2.0, 0.8, eos_rate=0.5)}, LOOK, "ends 50% of its answers"),
        ({"ppo": entry(1.8, 0.9, 2.0, 0.8, win_rate=estimate(0.4, 0.05))}, LOOK, "the reward prefers sft"),
        ({"ppo": entry(1.8, 0.9, 2.0, None)}, OPEN, "could not be held beside"),
    ],
)
def test_each_policy_has_a_verdict(policies, call, why):
    found = policy_verdicts(Comparison.from_json(comparison(**policies)))["ppo"]
    assert found.call == call and why in "; ".join(found.reasons)


def of_rewards(base: np.ndarray, gain: float, half: float, learned: float, **changes) -> Comparison:
    """Return a comparison by the baseline's rewards, the gain in them, and in the proxy's standard deviations."""
    mean = float(base.mean())
    policy = entry(mean + gain, 4.0, learned * 2.0, gain) | {"difference": estimate(gain, half)} | changes
    found = comparison(ppo=policy)
    found["policies"]["sft"] |= {"reward": estimate(mean), "rewards": {"gold": mean, "model": 0.0}}
    rows = found["samples"][: len(base)]
    found["samples"] = [
        row | {"rewards": {"sft": float(value), "ppo": float(value)}} for row, value in zip(rows, base, strict=True)
    ]
    return Comparison.from_json(found)


SCORES = np.random.default_rng(0).normal(size=40)


@pytest.mark.parametrize(
    ("base", "gain", "half", "learned", "is_over_optimized"),
    [
        # A reward of 0 or 1, of which the baseline has .55: a gain of .26 is half a standard deviation
        (np.arange(40) < 22, 0.26, 0.09, 2.5, False),
        (np.arange(40) < 22, 0.10, 0.09, 2.5, False),  # it rises
        (np.arange(40) < 22, 0.05, 0.09, 2.5, True),  # .28 standard deviations at most
        (np.arange(40) < 22, 0.05, 0.09, 0.5, False),  # as much as the proxy, for all that is known
        (np.arange(40) < 22, 0.05, 0.40, 2.5, False),  # nothing is known
        (np.arange(40) < 22, -0.20, 0.09, 2.5, True),
        (np.arange(40) < 22, -0.20, 0.09, 0.2, False),  # worse, and not by the proxy
        # With .95 it has next to nothing left to gain
        (np.arange(40) < 38, 0.02, 0.03, 2.5, False),
        (np.arange(40) < 38, 0.00, 0.01, 2.5, True),
        (np.ones(40), -0.20, 0.09, 2.5, True),  # no standard deviation
        (np.zeros(40), 0.10, 0.20, 2.5, False),
        # Without bounds
        (SCORES, 0.8, 0.3, 2.5, False),
        (SCORES, 0.4, 0.3, 2.5, False),
        (SCORES, 0.2, 0.3, 2.5, True),
        (SCORES, 0.2, 2.0, 2.5, False),
        (SCORES, -0.5, 0.3, 2.5, True),
        (1000 * SCORES, 200.0, 300.0, 2.5, True),  # in any unit
    ],
)
def test_over_optimized_is_a_proxy_that_rises_alone(base, gain, half, learned, is_over_optimized):
    found = of_rewards(np.asarray(base, float), gain, half, learned)
    assert ("over-optimized" in "; ".join(policy_verdicts(found)["ppo"].reasons)) == is_over_optimized
    assert ("over-optimized" in verdict(found)) == is_over_optimized


def test_a_proxy_that_rises_within_chance_is_no_sign():
    wide = {"gold": estimate(0.55), "model": estimate(1.0, 2.0)}
    found = of_rewards(np.arange(40) < 22.0, -0.20, 0.09, 0.5, reward_intervals=wide)
    assert policy_verdicts(found)["ppo"].reasons == ["it has less reward than sft"]


@pytest.mark.parametrize(
    ("wins", "call", "why"),
    [
        (
            estimate(0.7, 0.05),
            SHIP,
            "a judge prefers it beyond chance, and nothing in its price is out of line; no reward",
        ),
        (estimate(0.52, 0.05), LOOK, "no difference to sft beyond chance on 40 prompts"),
        (estimate(0.4, 0.05), DONT, "a judge prefers sft"),
        (None, OPEN, "No reward counts and no judge preferred an answer"),
    ],
)
@pytest.mark.parametrize("weights", [{}, {"gold": 0.0, "model": 0.0}])
def test_without_a_reward_that_counts_the_judge_decides(plain_figures, project, wins, call, why, weights):
    """Such as `stage=evaluate reward=none judge=http` of `pipeline=nightly`."""
    found = comparison(ppo=entry(0.0, 0.9, 2.0, 0.0, win_rate=wins), dpo=entry(0.0, 0.9, 2.0, 0.0, win_rate=wins))
    found |= {"weights": weights, "judge": "a judge"}
    found["differences"] = [{"one": "ppo", "other": "dpo", "difference": None, "wins": estimate(0.3)}]
    for policy in found["policies"].values():
        nothing = {"rewards": {}, "reward_intervals": {}, "reward_std": {}}
        policy |= {"reward": None, "difference": None} | (nothing if not weights else {})
    for sample in found["samples"]:
        sample["rewards"] = dict.fromkeys(sample["rewards"])
    (project / "evaluate" / "comparison.json").write_text(json.dumps(found))
    page_ = project_page(project)
    text = to_markdown(page_)
    verdicts = policy_verdicts(Comparison.from_json(found))
    assert verdicts["ppo"].call == call and why in "; ".join(verdicts["ppo"].reasons)
    assert "Set `reward" in text and "nan" not in text and not page_.figures().keys() & {"report/Reward against KL"}
    assert "need a reward of a weight other than 0" in text and "prompts drawn at random." in text
    if wins is None:
        assert page_.lead.startswith("No reward counts and no judge preferred") and "`reward=...`" in page_.lead
        return
    lead = "ppo and dpo are better than sft" if call == SHIP else "No policy is better than sft beyond chance"
    assert page_.lead.startswith(f"{lead} on 40 held-out prompts by the verdicts of a judge")
    assert "over-optimization would not show. Set `reward=...`" in page_.lead
    assert re.search(r"wins vs sft \[95 %\] \| why", text) and "+30% [+20%, +40%] | ppo is better" in text
    if call == SHIP:
        more = ["ppo has more wins (+30% [+20%, +40%]), and no more KL beyond chance"]
        assert verdicts["dpo"] == (LOOK, more)


def test_the_policies_are_held_beside_each_other():
    found = comparison(ppo=entry(1.8, 0.9, 2.0, 0.8), dpo=entry(2.5, 0.8, 2.0, 1.5))
    found["differences"] = [{"one": "ppo", "other": "dpo", "difference": {"mean": -0.7, "low": -0.9, "high": -0.5}}]
    both = Comparison.from_json(found)
    verdicts = policy_verdicts(both)
    assert (verdicts["ppo"].call, verdicts["dpo"].call) == (LOOK, SHIP)
    assert verdicts["ppo"].reasons == ["dpo has more reward (+0.70 [+0.50, +0.90]), and no more KL beyond chance"]
    assert verdict_blocks(both)[1].cells == [["dpo - ppo", "+0.70 [+0.50, +0.90]", "dpo is better"]]
    found["policies"]["dpo"]["kl"] = estimate(3.0)  # a price
    assert policy_verdicts(Comparison.from_json(found))["ppo"].call == SHIP


def captions(page: Page) -> dict[str, str]:
    blocks = [block for section in page.sections for block in section.blocks if isinstance(block, Figure)]
    return {block.svg.title: block.caption for block in blocks}


def test_captions_say_what_is_drawn(plain_figures, project):
    found = captions(project_page(project))
    frontier = found["Reward against KL"]
    assert "Bars and bands are" in frontier and "The curves are" in frontier and "not drawn: far." in frontier
    assert found["Two rewards: model"].endswith("Lines: the best of n by `model`.")
    assert found["ppo: reward"] == "" and found["reward: accuracy"] == ""  # one line each
    whole = json.loads((project / "evaluate" / "comparison.json").read_text())
    whole["best_of_n"]["curves"].pop()
    (project / "evaluate" / "comparison.json").write_text(json.dumps(whole))
    found = captions(project_page(project))
    assert "The curve is" in found["Reward against KL"] and "best of n" not in found["Two rewards: model"]
    whole["best_of_n"] = None
    for policy in whole["policies"].values():  # of a single prompt
        policy["reward"] |= {"low": None, "high": None}
        policy["reward_std"]["model"] = 0.0
    whole["policies"]["ppo"]["win_rate"] = whole["policies"]["far"]["win_rate"] = ALONE
    (project / "evaluate" / "comparison.json").write_text(json.dumps(whole))
    history = [{"step": i, "accuracy": 0.9, "eval_accuracy": 0.5 + i / 10} for i in range(3)]
    make_run(project, "second", "reward", {"train": {}, "eval": {}, "history": history})
    page_ = project_page(project)
    found = captions(page_)
    assert not re.search("curve|band|interval", found["Reward against KL"]), found["Reward against KL"]
    assert "interval" not in found["Win rates"] and "Two rewards: model" not in found
    assert "Gains are shown in standard deviations over the answers of sft, and `model` is the same" in to_markdown(
        page_
    )
    assert found["second: accuracy"] == "Training far above held out is overfitting."


def colors_of(drawing: str) -> set[str]:
    return set(re.findall(r"var\(--(c\d)", drawing))


def test_a_policy_has_one_color_in_all_figures(project):
    """Sft has the first color, ppo the second, far the third; a run without policy one of the rest."""
    found = project_page(project).figures()
    assert colors_of(found["report/Win rates"]) == {"c1", "c2"}
    assert colors_of(found["report/Rewards of sft and ppo"]) == {"c0", "c1"}
    assert colors_of(found["report/Rewards of sft and far"]) == {"c0", "c2"}
    assert colors_of(found["report/ppo: reward"]) == {"c1"} and colors_of(found["report/reward: accuracy"]) == {"c3"}
    assert colors_of(found["report/Two rewards: model"]) == {"c0", "c1", "c6"}  # far has no KL
    assert colors_of(found["report/Reward against KL"]) == {"c0", "c1", "c6", "c7"}
    assert colors_of(plots.bars(["a", "b", "c"], [0.1, 0.2, 0.3])) == {"c0"}  # names tell bars apart


def test_answers_are_drawn_at_random_before_the_most_different_are_shown(plain_figures, project):
    blocks = next(part for part in project_page(project).sections if part.title == "Answers").blocks
    kinds = [block.kind for block in blocks]
    assert kinds == ["text", *["side_by_side"] * 5, "text", *["side_by_side"] * 10]
    numbers = [int(block.prompt.split()[1]) for block in blocks if block.kind == "side_by_side"]
    assert len(set(numbers)) == 15 and min(numbers[:5]) < 20  # not the widest
    left = [i for i in range(40) if i not in numbers[:5]]
    assert numbers[5:] == sorted(left, reverse=True)[:10]


def test_rewards_by_kind_of_prompt(plain_figures, project):
    whole = json.loads((project / "evaluate" / "comparison.json").read_text())
    whole["slices"] = [
        {
            "column": "kind",
            "value": kind,
            "prompts": count,
            "rewards": {"sft": estimate(1.0), "ppo": estimate(1.0 + gain), "far": estimate(1.0)},
            "differences": {"ppo": estimate(gain), "far": estimate(0.0)},
        }
        for kind, count, gain in (("fact", 30, 0.9), ("joke", 20, -0.5), ("poem", 20, -0.11), ("rare", 9, -0.5))
    ]
    (project / "evaluate" / "comparison.json").write_text(json.dumps(whole))
    text = to_markdown(project_page(project))
    assert re.search(r"\| joke +\| +20 \| +1.00 \[0.90, 1.10\] \| -0.50 \[-0.60, -0.40\] \|", text)
    # Of six differences, `poem` alone is no news; nine prompts are too few
    assert "Worse than sft beyond chance, one of 6 differences or not: ppo on `joke`." in text


def test_the_setup_says_what_was_compared(plain_figures, project):
    whole = json.loads((project / "evaluate" / "comparison.json").read_text())
    whole |= {"temperature": 1.0, "max_completion_length": 64}
    for result in whole["policies"].values():
        result["parameters"] = 134_515_008
    whole["policies"]["sft"]["path"] = "HuggingFaceTB/SmolLM2-135M"
    (project / "evaluate" / "comparison.json").write_text(json.dumps(whole))
    config = {"data": {"_target_": "rlhf_trl.data.load_hub", "path": "trl-lib/ultrafeedback_binarized"}}
    (project / "evaluate" / "config.yaml").write_text(json.dumps(config))
    setup = project_page(project).setup
    assert setup["Policies"] == (
        "sft (the baseline, from `HuggingFaceTB/SmolLM2-135M`), ppo and far; 135 M parameters each"
    )
    assert setup["Data"] == "40 held-out prompts of `trl-lib/ultrafeedback_binarized`"
    assert setup["Reward"].startswith("`gold`, sft 1.00 ± 1.00 (standard deviation); `model`, reported only, sft 0.00")
    assert setup["Judge"] == "the reward" and setup["Sampling"].endswith("temperature 1, up to 64 tokens")
    assert setup["Evaluation"] == "`evaluate`"
    files = {"_target_": "rlhf_trl.data.load_files", "paths": ["/data/a.jsonl", "b.jsonl"], "eval_paths": None}
    assert describe_data(files) == "`a.jsonl`, `b.jsonl`"
    assert describe_data({"sources": {"own": files, "demo": {"_target_": "rlhf_trl.tasks.demo.load"}}}).endswith(
        "`demo`"
    )


# ---- The report of a sweep ----


def jobs() -> list[dict]:
    made = [
        {
            "number": i,
            "overrides": {"stage": "ppo", "stage.args.beta": beta, "kl": kind},
            "status": "done",
            "seconds": 65.0,
            "objective": "eval_objective/scores",
            "value": value,
            "eval": {"eval_objective/scores": value, "eval_objective/kl": cost, "eval_runtime": 1.0},
            "message": None,
            "log": "log",
        }
        for i, (beta, kind, value, cost) in enumerate(
            [("0.02", "fixed", 2.0, 9.0), ("0.1", "fixed", 1.5, 2.0), ("0.5", "adaptive", 1.0, 4.0)]
        )
    ]
    failed = {"status": "failed", "value": None, "eval": {}, "message": "out of memory", "objective": None}
    return [*made, {**made[0], "number": 3, **failed}]


def test_a_sweeps_report_marks_the_pareto_set(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps(jobs()))
    for job in jobs()[:3]:
        history = [{"step": step, "eval_objective/scores": step * job["value"]} for step in range(3)]
        make_run(tmp_path, str(job["number"]), "ppo", {"train": {}, "eval": {}, "history": history})
    path = write_sweep_report(tmp_path)
    text, html = (tmp_path / "report" / "report.md").read_text(), path.read_text()
    marked = re.findall(r"^\| +(\S+) \*", text, re.M)
    shown = captions(sweep_page(tmp_path))["Objective against cost"]
    assert shown.endswith("against `eval_objective/kl`; filled: no other setting is as good for as little.")
    assert marked == ["0.02", "0.1"]  # job 2 has less reward for more KL than job 1
    assert "highest `eval_objective/scores` is that of beta=0.02, kl=fixed, 2;" in text and "No winner" in text
    assert "1 of 4 jobs failed" in text
    assert "Job 3 failed: out of memory" in text and "eval_runtime" not in text
    assert 'aria-label="curves of eval_objective/scores"' in html and 'aria-label="beta"' in html


def test_a_sweep_for_the_lowest_loss(plain_figures, tmp_path):
    made = [{**job, "objective": "eval_loss", "eval": {"eval_loss": job["value"]}} for job in jobs()[:3]]
    (tmp_path / "sweep.json").write_text(json.dumps(made))
    assert "lowest `eval_loss` is that of beta=0.5, kl=adaptive, 1;" in sweep_page(tmp_path).lead


def seeds(values: dict[str, list[float]], **changes) -> list[dict]:
    """Return the jobs of a sweep over beta and seeds with these values of the objective."""
    pairs = [(beta, seed, value) for beta, found in values.items() for seed, value in enumerate(found)]
    return [
        jobs()[0]
        | {"number": i, "value": value, "eval": {"eval_objective/scores": value, "eval_objective/kl": 1.0}}
        | {"overrides": {"stage": "ppo", "stage.args.beta": beta, "seed": str(seed)}}
        | changes
        for i, (beta, seed, value) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"0.02": [2.0, 2.1, 1.9], "0.1": [1.0, 1.1, 0.9]},
            "beta=0.02 has the highest `eval_objective/scores`, 2 [1.84, 2.16] over 3 seeds, beyond the noise",
        ),
        (
            {"0.02": [2.0, 1.4, 2.6], "0.1": [1.5, 2.3, 1.3], "0.5": [-9.0, -9.1, -9.2]},
            "No winner: the highest `eval_objective/scores`, 2 [1.342, 2.658] over 3 seeds of beta=0.02, differs by "
            "no more than the noise of the seeds from beta=0.1.",
        ),
        ({"0.02": [2.0], "0.1": [1.0]}, "No winner is named: every setting has one seed"),
        ({"0.02": [2.0, 2.2]}, "`eval_objective/scores` of all jobs: 2.1 [0.8294, 3.371] over 2 seeds."),
    ],
)
def test_a_sweep_names_no_winner_within_the_noise_of_its_seeds(plain_figures, tmp_path, values, said):
    (tmp_path / "sweep.json").write_text(json.dumps(seeds(values)))
    page_ = sweep_page(tmp_path)
    assert page_.lead.startswith(said), page_.lead
    (table_,) = [block for block in page_.sections[0].blocks if isinstance(block, Table)]
    assert [row[0] for row in table_.cells] == (list(values) if len(values) > 1 else ["all jobs"])
    assert [row[1] for row in table_.cells] == [str(len(found)) for found in values.values()]
    several = any(len(found) > 1 for found in values.values())
    shown = captions(page_)["Objective against cost"]
    assert ("means over seeds with 95 % intervals" in shown) == several and ("seed" in shown) == several


def test_a_sweep_without_a_known_direction_crowns_nobody(plain_figures, tmp_path):
    both = {"0.02": [2.0, 2.1], "0.1": [1.0, 1.1]}
    made = seeds(both, objective="eval_rewards/rejected")
    (tmp_path / "sweep.json").write_text(json.dumps(made))
    page_ = sweep_page(tmp_path)
    assert "no setting is named the best" in page_.lead and " \\* " not in to_markdown(page_)
    (tmp_path / "sweep.json").write_text(json.dumps([job | {"direction": "minimize"} for job in made]))
    assert sweep_page(tmp_path).lead.startswith("beta=0.1 has the lowest `eval_rewards/rejected`")


def test_a_sweep_shows_the_health_of_its_jobs_and_what_failed(plain_figures, tmp_path):
    made = seeds({"0.02": [2.0, 2.1, 1.9], "0.1": [1.0, 1.1, 0.9]}, health="ok")
    made[1] |= {"health": "warn kl_high"}
    made[5] |= {"status": "failed", "value": None, "health": ""}
    (tmp_path / "sweep.json").write_text(json.dumps(made))
    text = to_markdown(sweep_page(tmp_path))
    assert "The health monitor warned in 1 of 5 jobs (kl_high)." in text and "1 of 6 jobs failed" in text
    assert re.search(r"\| +0.02 \* \| +3 \|.*\| warn kl_high \(1 of 3\) \|", text)
    assert re.search(r"\| +0.1 +\| 2 of 3 \|.*\| ok +\|", text)


def test_jobs_with_other_objectives_are_not_held_beside_each_other(plain_figures, tmp_path):
    made = jobs()[:2]
    made[1] |= {"objective": "eval_loss", "value": 99.0, "eval": {"eval_loss": 99.0}}
    (tmp_path / "sweep.json").write_text(json.dumps(made))
    assert "`eval_objective/scores` of beta=0.02: 2." in sweep_page(tmp_path).lead


def test_parameters_of_a_search_are_rounded(tmp_path):
    made = jobs()[:2]
    for job, beta in zip(made, ("0.12345678901234567", "0.3000000000000004"), strict=True):
        job["overrides"]["stage.args.beta"] = beta
    (tmp_path / "sweep.json").write_text(json.dumps(made))
    page_ = sweep_page(tmp_path)
    for text in (page_.lead, to_markdown(page_), to_html(page_)):
        assert "0.1235" in text and "0.12345678" not in text
    assert sorted(sweep_runs(tmp_path)) == [f"{tmp_path.name} beta=0.1235", f"{tmp_path.name} beta=0.3"]
    made[1]["overrides"]["stage.args.beta"] = "0.12345678901234568"
    (tmp_path / "sweep.json").write_text(json.dumps(made))
    assert len(sweep_runs(tmp_path)) == 2  # two jobs, two names


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814)])
def test_quantiles_of_students_t(freedom, expected):
    assert t_quantile(0.975, freedom) == pytest.approx(expected, rel=1e-5)


def test_a_sweep_that_failed_has_a_report_too(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps(jobs()[3:]))
    assert "None of the 1 jobs" in sweep_page(tmp_path).lead


# ---- In a browser ----

PROBE = """
<script>
const wide = [...document.querySelectorAll('body *')].filter(node => {
  const clipped = node.closest('.table, pre, svg');
  return (!clipped || clipped === node) && node.getBoundingClientRect().right > innerWidth + 1;
});
document.title = JSON.stringify({
  width: innerWidth,
  scroll: document.documentElement.scrollWidth,
  wide: wide.map(node => node.tagName + '.' + node.className),
  shown: [...document.querySelectorAll('figure svg')].filter(node => node.getBoundingClientRect().height > 50).length,
  figures: document.querySelectorAll('figure').length,
  scrolled: [...document.querySelectorAll('.table')].filter(node => node.scrollWidth > node.clientWidth + 1).length,
  paper: getComputedStyle(document.body).backgroundColor,
});
</script>
"""


def browse(tmp_path, html: str, *options: str) -> tuple[str, str]:
    """Return the page after it was rendered, and what the browser's console said."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on PATH (Debian: `apt-get install chromium`)")
    (tmp_path / "page.html").write_text(html)
    command = [
        *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
        *(
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--hide-scrollbars",
            "--enable-logging=stderr",
        ),
        *(f"--user-data-dir={tmp_path / 'browser'}", *options, (tmp_path / "page.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def look(tmp_path, html: str, width: int, *options: str) -> tuple[dict, str]:
    """
    Return the findings of `PROBE` in a window of a given width, and the console's output. Headless Chromium has 500 px
    at least, so the page is looked at in a frame inside of it.
    """
    html = html.replace("</body>", PROBE.replace("document.title =", "parent.document.title =") + "</body>")
    srcdoc = html.replace("&", "&amp;").replace("'", "&#39;")
    frame = (
        f"<!doctype html><body style='margin:0'><iframe width={width} height=800 style='border:0' srcdoc='{srcdoc}'>"
    )
    dom, console = browse(
        tmp_path, frame + "</iframe>", "--dump-dom", f"--window-size={max(500, width)},800", *options
    )
    return json.loads(re.search(r"<title>(.*?)</title>", dom, re.S).group(1).replace("&quot;", '"')), console


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_report_on_a_phone_and_on_a_desk(project, tmp_path, dark):
    html = write_report(project).read_text()
    figures = html.count("<figure")
    assert figures >= 6
    for width in (390, 1280):
        found, console = look(tmp_path, html, width, *(["--blink-settings=preferredColorScheme=0"] if dark else []))
        assert console == ""
        assert found["width"] == width and found["scroll"] <= width and found["wide"] == []
        assert found["scrolled"] == 0  # wide tables are stacked on a phone
        assert found["shown"] == found["figures"] == figures  # one of the two sizes of each
        assert found["paper"] == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")


@pytest.mark.slow
def test_the_browser_would_tell_what_is_wrong(tmp_path):
    body = "<div class=broad style='width: 600px'>wide</div><script>console.error('broken')</script>"
    found, console = look(tmp_path, f"<!doctype html><body>{body}</body>", 390)
    assert found["scroll"] > 390 and found["wide"] == ["DIV.broad"] and "broken" in console


@pytest.mark.slow
def test_a_browser_prints_the_report(project, tmp_path):
    html = write_report(project).read_text()
    browse(tmp_path, html, f"--print-to-pdf={tmp_path / 'report.pdf'}", "--no-pdf-header-footer")
    pdf = (tmp_path / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", pdf)) >= 3
