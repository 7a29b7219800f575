"""Rules of the options of models. Imports no torch."""

from pathlib import Path

from rlhf_trl.config.ranges import COUNT

# Templates that come with the package, by name
CHAT_TEMPLATES = {path.stem: path for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))}

RULES = {
    "rlhf_trl.models.scratch.word_tokenizer": {"vocab_size": COUNT, "min_frequency": COUNT, "lowercase": "bool"},
}


def template_file(name: str) -> Path:
    """Return the file of a chat template: one that comes with the package, or the file of that name."""
    return CHAT_TEMPLATES.get(name) or Path(name).expanduser()
