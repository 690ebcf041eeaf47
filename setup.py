"""The package page: README.md with links that work where there is no clone. All else is in pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)")
"""A picture or a link to a file of the repository: the mark of a picture, the text, the path."""


def description(readme: str, repository: str | None) -> str:
    """Return a README for a package page.

    Args:
        readme: Markdown, whose links are relative.
        repository: its address, on a host that has GitHub's paths. Links become absolute. Without one, a link becomes
            its text and the file's name, and a picture its text.
    """

    def elsewhere(found: re.Match[str]) -> str:
        picture, text, path = found.groups()
        if repository is not None:
            return f"{picture}[{text}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/main/{path})"
        return text if picture or text == path else f"{text} ({path})"

    return LINK.sub(elsewhere, readme)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = description((ROOT / "README.md").read_text(), project.get("urls", {}).get("Repository"))
    setup(long_description=text, long_description_content_type="text/markdown")
