"""Print a version's entry of CHANGELOG.md; fail where the package or the changelog does not have that version.

python scripts/release_notes.py 0.1.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def release_notes(wanted: str, changelog: str, package: str) -> str:
    """Return the entry of ``wanted``; raises `ValueError` saying what does not agree."""
    found = re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE)
    if found is None or found[1] != wanted:
        said = found and found[1]
        raise ValueError(f"attnlens/__init__.py says {said}, not {wanted}: set __version__ before tagging")
    pattern = rf"^## {re.escape(wanted)} - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)"
    entry = re.search(pattern, changelog, re.MULTILINE | re.DOTALL)
    if entry is None or not entry[1].strip():
        raise ValueError(f"CHANGELOG.md has no dated entry `## {wanted} - YYYY-MM-DD` with text: write it first")
    return entry[1].strip() + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/release_notes.py VERSION")
    try:
        sys.stdout.write(
            release_notes(
                sys.argv[1], (ROOT / "CHANGELOG.md").read_text(), (ROOT / "attnlens" / "__init__.py").read_text()
            )
        )
    except ValueError as error:
        sys.exit(f"release: {error}")
