"""What the site takes from the code as it is built: the commands' options, and a report of the shipped model."""

import os
import subprocess
import sys
from html import unescape
from pathlib import Path

MARKER = "<!-- the commands -->"


def on_page_markdown(markdown, page, **_):
    """Put every command with its arguments and options where docs/cli.md asks for them."""
    if page.file.src_uri != "cli.md":
        return markdown
    assert MARKER in markdown
    command = [sys.executable, "-m", "typer", "attnlens.cli.app", "utils", "docs", "--name", "attnlens"]
    plain = {**os.environ, "TERMINAL_WIDTH": "200", "NO_COLOR": "1"}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=plain).stdout
    commands = found[found.index("\n## ") :]
    return markdown.replace(MARKER, unescape(commands).replace("<", "&lt;").replace("[default", "\\[default"))


def on_post_build(config, **_):
    """Write the report that the gallery links to."""
    from attnlens import reports

    reports.report(output=Path(config.site_dir) / "gallery" / "report.html", command="attnlens report")
