"""Write a summary of pytest's report (``--junitxml REPORT -o junit_family=xunit1``) as JSON.

python bench/tests_json.py REPORT JSON
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


def summary(report: Path) -> dict[str, Any]:
    """Return the numbers of tests that passed, failed and were skipped, and the name and message of each failure.

    A file that cannot be collected counts as a failed test.
    """
    numbers: Counter[str] = Counter()
    failures = []
    for test in ElementTree.parse(report).iter("testcase"):
        fault = next((part for part in test if part.tag in ("failure", "error")), None)
        if fault is not None:
            name = "::".join(filter(None, [test.get("file"), test.get("name")]))
            failures.append({"test": name, "message": fault.get("message", "")})
        outcome = "skipped" if test.find("skipped") is not None else "passed"
        numbers["failed" if fault is not None else outcome] += 1
    return {outcome: numbers[outcome] for outcome in ("passed", "failed", "skipped")} | {"failures": failures}


def main() -> None:
    """Run the command."""
    report, path = map(Path, sys.argv[1:])
    path.write_text(json.dumps(summary(report), indent=1) + "\n")


if __name__ == "__main__":
    main()
