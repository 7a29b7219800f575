"""Reading of rows of feedback."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, islice

from rlhf_trl.data.columns import Theirs, rename_columns, roots_of
from rlhf_trl.data.dataset_types import ANNOTATED, contents
from rlhf_trl.data.feedback.base import Feedback
from rlhf_trl.data.feedback.convert import convert
from rlhf_trl.data.messages import CHATS, check_template, check_words, read_json_chats
from rlhf_trl.data.options import LoadOptions
from rlhf_trl.data.reader import Reader
from rlhf_trl.data.row_types import PASSED_ON, repeats_prompt
from rlhf_trl.data.rows import Problems, Row, RowError
from rlhf_trl.data.tables import BATCH_ROWS, as_dataset, concatenate, make_table
from rlhf_trl.errors import DataError

REPEATED = "the prompt is repeated at the beginning of the completions, and stays there: remove it from them"


class FeedbackReader(Reader):
    """
    Reader of feedback, whose rows are checked one by one and converted one split at a time.

    Args:
        feedback (`Feedback`): reads a row of its kind.
        dataset_type, options, problems: as in [`~rlhf_trl.data.reader.Reader`].
    """

    def __init__(self, feedback: Feedback, dataset_type: str, options: LoadOptions, problems: Problems):
        super().__init__(dataset_type, options, problems)
        self.feedback = feedback

    def _read_source(self, name: str, rows: Iterable[Row]):
        """Return checked rows, each with its `prompt` and as JSON, as a `pyarrow.Table`; `None` if there is none."""
        rows = iter(rows)
        head, found = self._head(name, rows)
        mapping = self.feedback.mapping(name, found) if found else {}
        self.sources.setdefault(self.feedback.name, []).append(name)
        used = {root for theirs in mapping.values() for root in roots_of(theirs, found)}
        if self.dataset_type != "annotated":
            self.unused |= dict.fromkeys(column for column in found if column not in used)
        stream = self._check(chain(head, rows), mapping, used)
        tables = []
        while batch := list(islice(stream, BATCH_ROWS)):
            made = [(place, {"prompt": row["prompt"], "row": json.dumps(row)}) for place, row in batch]
            tables.append(make_table(made, ("prompt",)))
        return concatenate(tables) if tables else None

    def _check(self, rows: Iterable[Row], mapping: dict[str, Theirs], used: set[str]) -> Iterator[tuple[str, dict]]:
        """Yield place and checked row of every row, and note malformed ones."""
        for place, row in rows:
            self.rows[self.feedback.name] += 1
            try:
                if isinstance(row, RowError):
                    raise row
                others = {name: value for name, value in row.items() if name not in (*used, *ANNOTATED)}
                row = read_json_chats(rename_columns(row, mapping, PASSED_ON), self.changes)
                made = dict(self.feedback.read(row, self.changes))
                self.changes[REPEATED] += repeats_prompt(made)
                if self.dataset_type == "annotated":
                    made["columns"] = self._extra(others, place)
                made = self._with_images(made, row, place)
                made = self._apply_chat_options(made, place)
                self._check_kind(made, place)
                check_words(made)
                check_template(made)
            except RowError as error:
                self._note_malformed(place, row, error, mapping)
                continue
            self.side.keys.append(self._note_key(made["prompt"]))
            yield place, made

    def summary(self) -> list[str]:
        """Return the lines of the base class, and which options have no effect in this stage."""
        idle = [f"`data.feedback.{name}`" for name in self.feedback.idle(self.dataset_type)]
        note = [f"note: {', '.join(idle)} changes nothing in rows of {self.dataset_type}"] if idle else []
        return super().summary() + note

    def convert(
        self,
        side: str,
        rows,
        seed: int,
        notes: list[str],
        held_out: Collection[bytes] = (),
        limit: Callable[[int], Sequence[int]] | None = None,
    ):
        """
        Convert the rows of a split to a dataset of the stage's type; `notes` gets what was made of them, `held_out`
        has the keys of the held-out prompts, and `limit` is as in [`~rlhf_trl.data.feedback.convert.convert`].
        """
        counts = Counter()
        try:
            made = convert(
                self.feedback,
                [json.loads(row) for row in rows["row"]],
                self.dataset_type,
                f"{seed}-{side}",
                counts,
                None if side == "eval" else held_out,
                limit,
            )
        except DataError as error:
            raise DataError(f"{side}: {error}") from None
        notes.append(f"{side}: {len(rows):,} rows of {self.feedback.name} -> {contents(made, self.dataset_type)}")
        if any(counts.values()):
            notes.append("  " + "; ".join(f"{what}: {count:,}" for what, count in counts.items() if count))
        return as_dataset(make_table([(side, self.images.take(row)) for row in made], (*CHATS, *PASSED_ON)))
