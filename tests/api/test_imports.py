"""Which modules an import loads, the public names, and the order of layers: imports go down only."""

import ast
import importlib
from pathlib import Path

import pytest
from support.fresh import loaded_after, python
from support.paths import ROOT

import gpu_bn

PACKAGE = Path(gpu_bn.__file__).parent
FRAMEWORKS = ("torch", "cupy", "triton")


def test_importing_the_package_imports_none_of_its_parts():
    loaded = loaded_after("import gpu_bn")
    assert {name for name in loaded if name.startswith("gpu_bn.")} == set()
    assert not loaded & {*FRAMEWORKS, "numpy", "ml_dtypes"}


def test_normalising_numpy_arrays_imports_no_framework():
    code = "import gpu_bn, numpy as np; gpu_bn.batch_norm(np.ones((4, 3)), training=True); gpu_bn.BatchNorm(3)"
    loaded = loaded_after(code)
    assert "gpu_bn.backends.cpu.backend" in loaded
    assert not loaded & {*FRAMEWORKS, "ml_dtypes", "gpu_bn.testing"}


def test_the_proof_imports_no_framework():
    loaded = loaded_after("from gpu_bn.testing import cases, check; check(cases()[0])")
    assert not loaded & {*FRAMEWORKS, "pytest", "hypothesis", "scipy"}


@pytest.mark.parametrize("name", gpu_bn.__all__)
def test_public_name_resolves_in_a_fresh_interpreter(name):
    assert python(f"from gpu_bn import {name}; print({name}.__name__)") == [name]


def test_public_names_are_listed_once_everywhere():
    assert gpu_bn.__all__ == sorted(gpu_bn.__all__)
    assert set(gpu_bn.__all__) <= set(dir(gpu_bn))
    assert set(gpu_bn._MODULES) == set(gpu_bn.__all__)
    assert all(getattr(gpu_bn, name).__doc__ for name in gpu_bn.__all__)


@pytest.mark.parametrize("name", ["nn", "testing"])
def test_public_parts_are_loaded_when_they_are_asked_for(name):
    if name == "nn":
        pytest.importorskip("torch")
    assert python(f"import gpu_bn; print(gpu_bn.{name}.__name__)") == [f"gpu_bn.{name}"]


@pytest.mark.parametrize(
    "asked", ["gpu_bn.nn", "import gpu_bn.nn", "from gpu_bn import nn", "from gpu_bn.nn import convert"]
)
def test_without_torch_its_extra_is_named(asked):
    code = f"""
import sys
sys.modules["torch"] = None
import gpu_bn
try:
    {asked}
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install -e '.[torch]'" in " ".join(python(code))


def test_dir_shows_public_names_only():
    names = python("import gpu_bn, gpu_bn.testing; print(*dir(gpu_bn))")
    assert names == sorted([*gpu_bn.__all__, "nn", "testing", "__version__"])


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gpu_bn' has no attribute 'batchnorm'"):
        gpu_bn.batchnorm  # noqa: B018


@pytest.mark.parametrize("name", ["gpu_bn.testing", "gpu_bn.kernels", "gpu_bn.nn"])
def test_public_modules_import_and_say_what_they_are(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert all(hasattr(module, public) for public in getattr(module, "__all__", ()))


LAYERS = [
    {"call", "activation_values"},
    {"spec", "activations", "merge", "aliasing", "gpu_model", "tiling", "interrupts"},
    {"kernels", "plan"},
    {"backends"},
    {"algorithm", "registry"},
    {"functional", "folding", "explanation"},
    {"testing", "nn", "layers"},
    {"cli", "demo", "bench", "__main__"},
]
"""The layers from the bottom up. A part may import itself, parts of lower layers, and the exceptions in ``BESIDE``."""
BESIDE = {("spec", "activations"), *((a, b) for a in LAYERS[-1] for b in LAYERS[-1])}


def modules():
    files = sorted(PACKAGE.rglob("*.py"))
    return [path for path in files if path != PACKAGE / "__init__.py"]


def part_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(path):
    """Yield the parts of gpu_bn that a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" if node.module == "gpu_bn" else node.module for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("gpu_bn."))


def layer_of(part):
    found = [index for index, parts in enumerate(LAYERS) if part in parts]
    assert found, f"{part} belongs to no layer: name it in LAYERS"
    return found[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = part_of(path)
    for imported in imported_parts(path):
        if imported in gpu_bn.__all__ or imported == "__version__":  # a public name, imported from the package
            assert layer_of(part) == len(LAYERS) - 1, f"{part} imports gpu_bn.{imported} from above it"
        elif imported != part and (part, imported) not in BESIDE:
            assert layer_of(imported) < layer_of(part), f"{part} imports {imported}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_frameworks_are_imported_where_they_belong(path):
    owners = {
        "torch": (
            *(
                "backends/alike",
                "backends/cpu/doors",
                "backends/cpu/tensors",
                "backends/cpu/team",
                "backends/triton",
                "backends/cupy/tensors",
            ),
            "backends/torch_cpu",
            *("nn", "kernels", "testing/check", "bench"),
        ),
        "triton": ("backends/triton", "kernels"),
        "cupy": ("backends/cupy",),
    }
    where = path.relative_to(PACKAGE).as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                framework = name.split(".")[0]
                if framework in owners:
                    assert where.startswith(owners[framework]), f"{where} imports {name}"


@pytest.mark.parametrize("script", sorted((ROOT / "bench").glob("*.py")), ids=lambda script: script.stem)
def test_scripts_for_timings_import_nothing_that_tests_share(script):
    for node in ast.walk(ast.parse(script.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [name for name in names if name.split(".")[0] in ("support", "tests")]
