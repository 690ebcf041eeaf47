"""Check the docstrings of public names: they describe every argument, and their examples run."""

import ast
import doctest
import inspect
import re

import pytest
from support.paths import ROOT

import gpu_bn

pytest.importorskip("torch", reason="gpu_bn.nn needs torch: pip install torch")

from gpu_bn import nn
from gpu_bn.activations import ROWS

RESULTS = {"BackendUnavailableError", "Grads", "Saved"}
"""Classes that calls return or raise; users do not construct them."""
ARRAYS = [(gpu_bn, name) for name in gpu_bn.__all__ if name not in RESULTS]
PUBLIC = [*ARRAYS, *((nn, name) for name in nn.__all__)]


def qualified_name(one):
    return f"{one[0].__name__}.{one[1]}"


def section(text, title):
    """Return the names of the entries in a section of a docstring."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE)
    return re.findall(r"^    (\*{0,2}\w+):", found[1], re.MULTILINE) if found else []


@pytest.mark.parametrize("one", PUBLIC, ids=qualified_name)
def test_every_argument_is_described(one):
    public = getattr(*one)
    text = inspect.getdoc(public)
    described = section(text, "Args") + (section(text, "Attributes") if inspect.isclass(public) else [])
    elsewhere = []
    others = r"arguments(?:, the call and its errors)? are those of :(?:class|func):`(?:gpu_bn\.nn\.)?(\w+)`"
    if (other := re.search(others, text)) is not None:
        elsewhere = [*section(inspect.getdoc(getattr(one[0], other[1])), "Args"), "arguments", "options"]
    parameters = inspect.signature(public).parameters
    missing = [name for name in parameters if name not in {entry.lstrip("*") for entry in described + elsewhere}]
    assert not missing
    if inspect.isfunction(public):
        unknown = {entry.lstrip("*") for entry in described} - set(parameters)
        assert not unknown
        assert "None" in str(inspect.signature(public).return_annotation) or "Returns:" in text or "Yields:" in text


@pytest.mark.parametrize("one", PUBLIC, ids=qualified_name)
def test_the_examples_run(one):
    public = getattr(*one)
    (test,) = doctest.DocTestFinder(recurse=False).find(public, qualified_name(one), globs={})
    assert test.examples, "an example is missing"
    failures = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(test, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize(
    "public", [gpu_bn.batch_norm, gpu_bn.Activation, nn.batch_norm], ids=lambda one: one.__qualname__
)
def test_all_activations_are_named(public):
    text = inspect.getdoc(public)
    assert [name for name in ROWS if not re.search(rf"``\"?{name}\"?``", text)] == []


NOT_VERBS = {
    "a", "all", "an", "another", "as", "how", "in", "its", "of", "one", "some", "the", "these", "this", "those", "two",
    "what", "where", "whether", "which", "why",
}  # fmt: skip
ATTRIBUTES = {"property", "cached_property", "setter"}


def test_docstrings_of_functions_open_with_a_verb():
    """Properties may open with a noun. The word is not looked up: the ones that cannot be verbs are excluded."""
    wrong = []
    for path in [*(ROOT / "gpu_bn").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                marks = {getattr(mark, "attr", getattr(mark, "id", "")) for mark in node.decorator_list}
                first = text.split()[0].lower().strip(",:")
                if not marks & ATTRIBUTES and (first in NOT_VERBS or not first.replace("-", "").isalpha()):
                    wrong.append(f"{path.relative_to(ROOT)}, {node.name}: {text.splitlines()[0]}")
    assert not wrong
