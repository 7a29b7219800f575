"""Reading of rows of feedback."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from rlhf_trl.data.dataset_types import ANNOTATED, contents
from rlhf_trl.data.feedback.convert import convert
from rlhf_trl.data.formats import PASSED_ON, repeats_prompt
from rlhf_trl.data.messages import CHATS, check_template, read_json_chats, to_chat
from rlhf_trl.data.reader import Reader, named
from rlhf_trl.data.rows import Problems, Row, RowError
from rlhf_trl.data.tables import BATCH_ROWS, as_array, concatenate, make_table
from rlhf_trl.errors import DataError


class FeedbackReader(Reader):
    """
    Reads feedback (pairs, rankings, ...), of which rows are checked one by one and converted a split at a time.

    Args:
        feedback (`rlhf_trl.data.feedback.base.Feedback`): the kind of the rows.
        dataset_type, problems, system_prompt, to_chat, split_by: as in [`Reader`].
    """

    def __init__(self, feedback, dataset_type, problems: Problems, **options):
        super().__init__(dataset_type, problems, format=None, columns=None, messages="last_turn", **options)
        self.feedback = feedback

    def read(self, name: str, rows: Iterable[Row]):
        """Checked rows of the source `name`, each with its `prompt` and as JSON; `None` if none can be used."""
        import pyarrow as pa

        rows = iter(rows)
        head, found = self._head(name, rows)
        mapping = self.feedback.mapping(name, found) if found else {}
        self.sources.setdefault(self.feedback.name, []).append(name)
        if self.dataset_type != "annotated":
            self.unused |= dict.fromkeys(column for column in found if column not in mapping.values())
        stream = self._checked(chain(head, rows), mapping)
        tables = []
        while batch := list(islice(stream, BATCH_ROWS)):
            tables.append(
                pa.table(
                    {
                        "prompt": as_array("prompt", [row["prompt"] for _, row in batch], batch),
                        "row": as_array("row", [json.dumps(row) for _, row in batch], batch),
                    }
                )
            )
        return concatenate(tables) if tables else None

    def _checked(self, rows: Iterable[Row], mapping: dict[str, str]) -> Iterator[tuple[str, dict]]:
        for place, row in rows:
            self.rows[self.feedback.name] += 1
            try:
                if isinstance(row, RowError):
                    raise row
                others = {name: value for name, value in row.items() if name not in (*mapping.values(), *ANNOTATED)}
                row = read_json_chats(named(row, mapping), self.changes)
                made = self.feedback.read(row, self.changes)
                repeated = (
                    "the prompt is repeated at the beginning of the completions, and stays there: leave it out of them"
                )
                self.changes[repeated] += repeats_prompt(made)
                if self.dataset_type == "annotated":
                    made["columns"] = self._extra(others, place)
                made = to_chat(made, self.changes) if self.to_chat else made
                made = self._add_system_prompt(made, place) if self.system_prompt else made
                self._check_kind(made, place)
                check_template(made)
            except RowError as error:
                root = (error.field or "").split("[")[0]
                self.problems.add(place, error, mapping.get(root, root) + (error.field or "")[len(root) :])
                self._know_malformed(row)
                continue
            self.keys.append(self._know(made["prompt"]))
            yield place, made

    def summary(self) -> list[str]:
        """Return the lines of [`Reader`], and which options have no effect in this stage."""
        idle = [f"`data.feedback.{name}`" for name in self.feedback.idle(self.dataset_type)]
        note = [f"note: {', '.join(idle)} changes nothing in rows of {self.dataset_type}"] if idle else []
        return super().summary() + note

    def convert(self, side: str, rows, seed: int, notes: list[str]):
        """The rows of a split as a `Dataset` of the stage's dataset type; what was made of them goes to `notes`."""
        from datasets import Dataset

        from rlhf_trl.patches.datasets import exact_json

        counts = Counter()
        try:
            made = convert(
                self.feedback, [json.loads(row) for row in rows["row"]], self.dataset_type, f"{seed}-{side}", counts
            )
        except DataError as error:
            raise DataError(f"{side}: {error}") from None
        notes.append(f"{side}: {len(rows):,} rows of {self.feedback.name} -> {contents(made, self.dataset_type)}")
        if any(counts.values()):
            notes.append("  " + "; ".join(f"{what}: {count:,}" for what, count in counts.items() if count))
        return exact_json(Dataset(make_table([(side, row) for row in made], (*CHATS, *PASSED_ON))))
