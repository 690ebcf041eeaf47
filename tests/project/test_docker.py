"""Compare the container files with each other, with pyproject.toml and with the pages."""

import json
import os
import re
import tomllib

import pytest
from support.paths import ROOT

from gpu_bn.cli.commands import parser

yaml = pytest.importorskip("yaml", reason="needs PyYAML")

DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
GUIDE = (ROOT / "docs" / "containers.md").read_text()
COMMAND = "docker compose -f docker/compose.yaml run --rm"
SERVICES = {"test": "test", "bench": "bench", "bench-gpu": "bench"}
"""The image of each service."""


def instructions(text):
    """Return the instructions of a Dockerfile, with continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()


def stages(text):
    """Return the instructions of each stage, after those of the stage that it is built on."""
    found = {}
    for line in instructions(text):
        if line.startswith("FROM"):
            _, base, _, name = line.split()
            found[name] = list(found.get(base, [line]))
        elif found:
            found[name].append(line)
    return found


DOCKERFILE = (DOCKER / "Dockerfile").read_text()
STAGES = stages(DOCKERFILE)


def last(stage, instruction):
    """Return the argument of the last such instruction in a stage."""
    return [line.partition(" ")[2] for line in STAGES[stage] if line.startswith(instruction + " ")][-1]


def test_the_services_are_the_targets():
    assert set(COMPOSE["services"]) == set(SERVICES)
    assert COMPOSE["services"]["bench-gpu"]["extends"] == {"service": "bench"}
    for name in set(SERVICES.values()):
        build = COMPOSE["services"][name]["build"]
        assert (DOCKER / build["context"]).resolve() == ROOT
        assert (DOCKER / build["context"] / build["dockerfile"]).samefile(DOCKER / "Dockerfile")
        assert build["target"] == name
        assert name in STAGES


def test_only_one_service_asks_for_a_gpu():
    """Services that ask for no GPU start on a machine without one."""
    (device,) = COMPOSE["services"]["bench-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert not any("deploy" in COMPOSE["services"][name] for name in ("test", "bench"))


def test_the_benchmark_writes_to_the_mounted_folder():
    (volume,) = COMPOSE["services"]["bench"]["volumes"]
    source, target = volume.split(":")
    command = json.loads(last("bench", "CMD"))
    assert command[:2] == ["gpu-bn", "bench"]
    options = parser().parse_args(command[1:])
    assert str(options.out) == target == "/results"
    assert options.page.parent == options.out
    assert f"/{(DOCKER / source).resolve().relative_to(ROOT)}/" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("target", ["test", "bench"])
def test_an_image_is_not_roots(target):
    assert last(target, "USER") == "1000"


def test_every_base_has_a_tag():
    for base in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE):
        assert base in STAGES or ":" in base
    assert not re.search(r"\blatest\b", DOCKERFILE)


def test_the_extras_are_declared():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = [name for names in re.findall(r"-e ['\"]\.\[(.+)\]['\"]", DOCKERFILE) for name in names.split(",")]
    assert installed == ["test", "$GPU_EXTRA", "bench"]
    (chosen,) = re.findall(r"^ARG GPU_EXTRA=(\w+)$", DOCKERFILE, re.MULTILINE)
    documented = re.findall(r"--build-arg GPU_EXTRA=(\w+)", GUIDE)
    assert {"test", "bench", chosen, *documented} <= set(extras)
    assert documented


def test_the_test_image_runs_the_readmes_command():
    (install,) = re.findall(r"^RUN (python3 -m venv .+ -e '\.\[test\]')$", DOCKERFILE, re.MULTILINE)
    install = install.replace('${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ', "")
    command = f"{install} && {' '.join(json.loads(last('test', 'CMD')))}"
    assert command in (ROOT / "README.md").read_text().splitlines()


@pytest.mark.parametrize("name", ["check", "entrypoint.sh"])
def test_a_script_is_executable(name):
    assert os.access(DOCKER / name, os.X_OK)


def test_the_image_leaves_out_the_repository_and_environments():
    assert {".git", "**/.venv", "/bench-report"} <= set((ROOT / ".dockerignore").read_text().splitlines())


def test_the_documented_commands_name_services():
    assert set(re.findall(rf"{re.escape(COMMAND)} ([\w-]+)", GUIDE)) == set(SERVICES)
    assert set(re.findall(r"docker/check (\w+)", GUIDE)) <= set(SERVICES)
