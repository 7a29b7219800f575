"""
Labels on the command line: `python -m rlhf_trl.labels export`, `import`, `agreement`, `config`.

`export` writes questions and labels to the file of another tool, `import` reads them back, `agreement` prints how well
labelers agree, also across files, and `config` prints the labeling config of a Label Studio project.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rlhf_trl.data.file_rows import resolve_paths
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import count_of
from rlhf_trl.labels.agreement import LEVELS, agreement, quality
from rlhf_trl.labels.candidates import Candidates, read_candidates, write_candidates, write_rows
from rlhf_trl.labels.exchange import FORMATS, Notes, export_text, import_file
from rlhf_trl.labels.feedback import write_feedback
from rlhf_trl.labels.formats.label_studio import labeling_config
from rlhf_trl.labels.store import FORMS, LabelStore, read, withdrawn
from rlhf_trl.report.text import table
from rlhf_trl.runs.record import LABELS_FILE, RUN_FILE
from rlhf_trl.terminal import printable, say


def main(words: list[str] | None = None) -> None:
    """Run a command, and exit with 2 after an error of the user's."""
    args = parser().parse_args(words)
    try:
        args.run(args)
    except ConfigError as error:
        sys.stderr.write(f"Error: {printable(str(error))}\n")
        raise SystemExit(2) from None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m rlhf_trl.labels", description="Labels, and files of other tools.")
    commands = made.add_subparsers(required=True, metavar="export|import|agreement|config")
    candidates = "candidates.jsonl of stage=collect"
    one = commands.add_parser("export", help="write questions and labels to the file of another tool")
    one.add_argument("--to", choices=FORMATS, required=True, help="the tool")
    one.add_argument("--candidates", required=True, help=candidates)
    one.add_argument("--labels", help="labels.jsonl of stage=label; without: the questions alone")
    one.add_argument("--form", choices=FORMS, help="form of the answers (default: that of the labels, or pair)")
    one.add_argument("--output", required=True, help="the file")
    one.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    one.set_defaults(run=run_export)
    one = commands.add_parser("import", help="read labels from the file of another tool")
    one.add_argument("--from", dest="tool", choices=FORMATS, required=True, help="the tool")
    one.add_argument("file", help="the file")
    one.add_argument("--candidates", required=True, help=f"{candidates}; it is made where there is none")
    one.add_argument("--labels", required=True, help="labels.jsonl, which is appended to")
    one.add_argument("--add", action="store_true", help="add prompts and answers that the candidates don't have")
    one.add_argument("--labeler", help="name for answers that name no labeler")
    one.set_defaults(run=run_import)
    one = commands.add_parser("agreement", help="print how well labelers agree")
    one.add_argument("labels", nargs="+", help="files of labels")
    one.set_defaults(run=run_agreement)
    one = commands.add_parser("config", help="print the labeling config of a Label Studio project")
    one.add_argument("--form", choices=FORMS, default="pair")
    one.add_argument("--answers", type=int, default=2, help="number of answers")
    one.add_argument("--attributes", nargs="*", default=[], help="attributes of a rating")
    one.set_defaults(run=lambda args: say(labeling_config(args.form, args.answers, args.attributes).rstrip()))
    return made


def run_export(args: argparse.Namespace) -> None:
    """Write the file of a tool."""
    output, notes = Path(args.output), Notes()
    if output.exists() and not args.overwrite:
        raise ConfigError(f"`{output}` exists. Name another file, or replace it with `--overwrite`.")
    if args.labels and not Path(args.labels).is_file():
        raise ConfigError(f"There is no file of labels `{args.labels}`.")
    rows = read_candidates(args.candidates)
    text, count = export_text(rows, read(args.labels) if args.labels else [], args.to, args.form, notes)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8", errors="backslashreplace")
    say("\n".join([f"{count_of(count, 'label')} for {args.to}: {output}", *notes.lines()]))


def run_import(args: argparse.Namespace) -> None:
    """Append the labels in the file of a tool."""
    resolve_paths(args.file, "file")
    store, notes = LabelStore(args.labels), Notes()
    is_new = not Path(args.candidates).exists()
    rows = [] if is_new else read_candidates(args.candidates)
    made = import_file(
        args.file, args.tool, rows, store.read(), notes, args.add or is_new, args.labeler, withdrawn(store.path)
    )
    if made.added:
        write_candidates(args.candidates, made.rows)
    store.extend(made.labels)
    written = _write_feedback(store, made.rows)
    people = len({label.labeler for label in made.labels})
    lines = [f"{count_of(len(made.labels), 'label')} of {count_of(people, 'labeler')}: {args.labels}"]
    if made.added:
        lines.append(f"  prompts and answers that were added to `{args.candidates}`: {made.added:,}")
    if made.rejected:
        rejected = f"{args.labels}.rejected.jsonl"
        earlier = [json.loads(line) for line in _lines(rejected)]
        write_rows(rejected, earlier + [row for row in made.rejected if row not in earlier])
        lines.append(f"  what was not imported is in {rejected}")
    lines += [f"  rows for `data/feedback={kind}`, of all labels there: {file}" for kind, file in written.items()]
    say("\n".join([*lines, *notes.lines()]))


def _write_feedback(store: LabelStore, rows: Sequence[Candidates]) -> dict[str, Path]:
    """Write the feedback of all labels of a run into its directory, as `stage=label` does at its end."""
    labels = store.read()
    forms = Counter(label.form for label in labels)
    if not forms or store.path.name != LABELS_FILE or not store.path.with_name(RUN_FILE).exists():
        return {}
    asked = max(forms, key=lambda form: (form != "edit", forms[form]))  # edits may stand beside any form
    return write_feedback(store.path.parent, rows, labels, asked, Counter())


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def run_agreement(args: argparse.Namespace) -> None:
    """Print the agreement and the quality of the labelers."""
    if missing := [path for path in args.labels if not Path(path).is_file()]:
        raise ConfigError(f"There is no file of labels `{missing[0]}`.")
    labels = [label for path in args.labels for label in read(path)]
    for form in LEVELS:
        if not (own := [label for label in labels if label.form == form]):
            continue
        found = agreement(own, form)
        say(f"{form}: Krippendorff's alpha {found.alpha:.3f} ({found.level}, {count_of(found.units, 'shared value')})")
        rows = [
            [f"{a}, {b}", count, f"{same:.0%}", f"{kappa:.3f}"] for (a, b), (count, same, kappa) in found.pairs.items()
        ]
        if rows:
            say(table(["labelers", "shared", "equal", "kappa"], rows))
        rows = [
            [name, one.labels, one.skipped, f"{one.consistency:.0%} of {one.repeats}", f"{one.seconds:.1f}"]
            for name, one in quality(own).items()
        ]
        say(table(["labeler", "answers", "skipped", "repeats, same", "seconds, median"], rows))


if __name__ == "__main__":
    main()
