"""Test that the numbers in the pages are those of the code and the records, and that links have targets."""

import importlib
import re

import pytest
from support.paths import ROOT

TEXTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("docs/*/*.md")])


@pytest.fixture
def pages():
    """Return the module that writes the pages' parts."""
    for package in ("torch", "triton", "ml_dtypes"):
        pytest.importorskip(package, reason=f"the pages' numbers need {package}: pip install -e '.[test]'")
    return importlib.import_module("pages")


def test_every_generated_part_is_current(pages):
    assert pages.stale() == [], "python tests/pages.py"


def test_a_changed_number_is_noticed(pages):
    text = "the suite has <!-- cases -->0<!-- /cases --> cases"
    assert pages.update_parts(text) != text
    assert pages.update_parts(pages.update_parts(text)) == pages.update_parts(text)


def anchors(path):
    """Return the anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_link_leads_to_a_file_and_a_heading(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        other = path.parent / file if file else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target
