"""Turns the roles and literal blocks of docstrings into Markdown, for the API reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

import gpu_bn

PUBLIC = {f"gpu_bn.{name}" for name in gpu_bn.__all__}


class Roles(griffe.Extension):
    """Links public names; shows others as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = re.sub(r":[a-z]+:`~?([\w.]+)`", _link, obj.docstring.value)
            obj.docstring.value = re.sub(r"::\n\n", ":\n\n", text)


def _link(role: re.Match[str]) -> str:
    name = role[1]
    target = name if "." in name else f"gpu_bn.{name}"
    return f"[`{name}`][{target}]" if target in PUBLIC else f"`{name}`"
