"""Code blocks of the documentation that are files."""

import re


def name_of(block: str) -> str | None:
    """Return the path in the first or second line of a block, `# my_conf/experiment/mine.yaml`, `None` without one."""
    found = [re.fullmatch(r"# ([\w/]+\.(?:yaml|py))", line) for line in block.splitlines()[:2]]
    return next((match.group(1) for match in found if match), None)
