"""Adaptors on the Hugging Face hub, against a server on this machine that answers as the hub's API does."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import lemoe
from lemoe.adaptor.hub import parse_hub_id

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Repositories, and the files in them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.repositories: dict[str, dict[str, bytes]] = {}


class HubRequest(BaseHTTPRequestHandler):
    """The requests that an upload and a download make."""

    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self._reply({"url": f"http://{self.headers['Host']}/{name}"})
            return
        if self.path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
            return
        name, kind = "/".join(self.path.split("/")[3:5]), self.path.split("/")[5]
        if kind == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._reply({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        else:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    file = line["value"]
                    self.server.repositories[name][file["path"]] = base64.b64decode(file["content"])
            address = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
            self._reply({"success": True, "commitOid": COMMIT, "commitUrl": address, "hookOutput": ""})

    def do_HEAD(self) -> None:
        self._send_file(with_body=False)

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):
            self._reply({"name": "somebody", "type": "user", "sha": COMMIT})
        else:
            self._send_file(with_body=True)

    def _send_file(self, *, with_body: bool) -> None:
        organisation, repository, _, _, *path = self.path.strip("/").split("/")
        files = self.server.repositories.get(f"{organisation}/{repository}")
        content = (files or {}).get("/".join(path))
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if files is None else "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _reply(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def lemoe_with_hub(hub: Hub, tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs the command in a process of its own, which knows this hub alone."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "a-token",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }

    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "lemoe", *map(str, arguments)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
        )

    return run


def test_an_adaptor_is_pushed_with_its_card_and_taken_by_its_name(
    hub: Hub,
    lemoe_with_hub: Callable[..., "subprocess.CompletedProcess[str]"],
    base: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    anchor: Callable[..., lemoe.Settings],
    tmp_path: Path,
) -> None:
    lemoe.edit(base, facts[:2], tmp_path / "run", anchor(steps=1))
    adaptor = (tmp_path / "run" / "adaptor.safetensors").read_bytes()
    unasked = lemoe_with_hub("push", tmp_path / "run", "org/facts")
    assert (unasked.returncode, hub.repositories) == (2, {})
    assert "read the texts of 2 edits at org/facts?" in unasked.stderr
    pushed = lemoe_with_hub("push", tmp_path / "run", "org/facts", "--yes", "-q")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip().endswith(f"/org/facts/commit/{COMMIT}")
    card = (tmp_path / "run" / "README.md").read_bytes()
    assert hub.repositories == {"org/facts": {"adaptor.safetensors": adaptor, "README.md": card}}
    shown = lemoe_with_hub("show", "org/facts@main", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["sha256"] == hashlib.sha256(adaptor).hexdigest()
    hub.repositories["org/empty"] = {}
    for name, said in (("org/nothing", "no such repository on the hub"), ("org/empty", "holds no adaptor")):
        refused = lemoe_with_hub("show", name)
        assert (refused.returncode, said in refused.stderr) == (2, True), refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_a_hub_that_cannot_be_reached_is_one_clear_message(
    hub: Hub, lemoe_with_hub: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    hub.shutdown()
    hub.server_close()
    file = Path(__file__).parent / "files" / "anchor-v1.safetensors"
    refused = lemoe_with_hub("push", file, "org/facts", "--yes", "-q")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
    assert "org/facts: cannot be uploaded: " in refused.stderr


def test_what_may_be_a_path_is_never_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert [parse_hub_id(name) for name in ("runs/one", "./a/b", "../a", "/a/b", "a/b/c", "edits.lemoe")] == [None] * 6
    assert parse_hub_id("org/name") == ("org/name", None)
    assert parse_hub_id("org/name@v1") == ("org/name", "v1")
