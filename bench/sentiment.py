"""
Judges of review sentences beside the people who rated them: the classifier of words, and an encoder that is fitted.

    python -m bench.sentiment ENCODER [--path REVIEWS] [--output FOLDER] [--epochs 2] [--quick]

ENCODER is a folder or hub id such as sentence-transformers/all-MiniLM-L6-v2. It is fitted to the ratings that the
judge `rlhf_trl.tasks.reviews.judges.sentiment` has too, of sentences that no policy or reward model of `data=reviews`
trains on, and is saved to FOLDER for `reward=classifier`. Both are measured on the 1,000 test sentences.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

# Read when the libraries are imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bench.loop.results import markdown
from rlhf_trl.rewards import ClassifierReward
from rlhf_trl.tasks.reviews.data import Reviews, Row, read
from rlhf_trl.tasks.reviews.judges import NgramClassifier, positive_share

TOKENS = 64  # of a sentence; a hundredth is longer
LABEL = "positive"


def main(arguments: list[str] | None = None) -> None:
    """Fit an encoder, unless it is there, and print the table of both judges."""
    reader = argparse.ArgumentParser(prog="python -m bench.sentiment")
    reader.add_argument("encoder", help="folder or hub id")
    reader.add_argument("--path", default=os.environ.get("RLHF_TRL_REVIEWS"), help="default: RLHF_TRL_REVIEWS")
    reader.add_argument("--output", type=Path, default=Path("runs/bench/sentiment"), help="folder of the judge")
    reader.add_argument("--epochs", type=float, default=2.0)
    reader.add_argument("--quick", action="store_true", help="two steps, to see that it runs")
    options = reader.parse_args(arguments)
    reviews = read(options.path)
    if not (options.output / "config.json").is_file():
        steps = 2 if options.quick else -1
        fit(options.encoder, reviews.judge + reviews.products, options.output, options.epochs, steps)
    words = NgramClassifier(reviews.judge + reviews.products)
    encoder = ClassifierReward(str(options.output), output="probability", dtype="float32")
    texts = [row["text"] for row in reviews.test]
    found = {"words and pairs of words": [words(text) for text in texts], "encoder": encoder(texts, texts)}
    print(report(reviews, found))


def fit(
    encoder: str, rows: Sequence[Row], output: Path, epochs: float, max_steps: int = -1, rate: float = 8e-5
) -> None:
    """
    Train an encoder to the share of positive ratings among those that aren't 0 (cross-entropy), and save it.

    Args:
        encoder (`str`): folder or hub id.
        rows (`Sequence[dict]`): sentences with `text` and `ratings`.
        output (`Path`): folder to save it to.
        epochs (`float`): passes over the sentences, in batches of 32.
        max_steps (`int`): optimizer steps in place of `epochs`; -1: `epochs` counts.
        rate (`float`): learning rate.
    """
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    # The loss of several labels takes targets between 0 and 1, one of a single label doesn't
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=1, id2label={0: LABEL}, label2id={LABEL: 0}, problem_type="multi_label_classification"
    )
    rows = [row for row in rows if any(row["ratings"])]
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=TOKENS)
    dataset = Dataset.from_dict(dict(encoded) | {"labels": [[positive_share(row["ratings"])] for row in rows]})
    args = TrainingArguments(
        str(output),
        per_device_train_batch_size=32,
        num_train_epochs=epochs,
        max_steps=max_steps,
        learning_rate=rate,
        weight_decay=0.01,
        warmup_steps=0.05,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    Trainer(model, args, DataCollatorWithPadding(tokenizer), dataset).train()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def report(reviews: Reviews, found: dict[str, list[float]]) -> str:
    """
    Return the table of the judges' agreement with people on the test sentences.

    Args:
        reviews (`Reviews`): the sentences.
        found (`dict[str, list[float]]`): by judge, the probability that each test sentence is positive.
    """
    rows = []
    for name, values in found.items():
        of = dict(zip((row["id"] for row in reviews.test), values, strict=True))
        mean = {row["id"]: row["mean"] for row in reviews.test}
        right = {i: (of[i] > 0.5) == (mean[i] > 0) for i in of if mean[i] != 0}
        called = {i: of[i] > 0.5 for i in of}
        rows.append(
            [
                name,
                share(right.values()),
                share(each for i, each in right.items() if abs(mean[i]) > 1),
                share(each for i, each in called.items() if mean[i] > 2),
                share(each for i, each in called.items() if mean[i] < -1.5),
                share(of[pair["chosen_id"]] > of[pair["rejected_id"]] for pair in reviews.pairs),
            ]
        )
    headers = ["judge", "right about the sign", "of means beyond 1", "calls those above 2 positive"]
    return markdown([*headers, "those below -1.5", "right about pairs"], rows)


def share(values: Iterable[bool]) -> str:
    """Return the share of true values."""
    known = list(values)
    return f"{sum(known) / len(known):.2f}" if known else "-"


if __name__ == "__main__":
    main()
