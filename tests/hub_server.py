"""A Hub on 127.0.0.1: the routes by which `huggingface_hub` makes, writes and reads a repository."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens: who may write, and who may read what is private."""


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        before = self.commits.get(self.branches.get(branch, ""), {})
        sha = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = before | files
        self.branches[branch] = sha
        return sha


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory, and what was asked of them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Not on the terminal."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        route = self._route()
        if route == ["api", "validate-yaml"]:
            self._say({"errors": [], "warnings": []})
        elif self._token() != WRITER:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif route == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.server.repositories
            if not known:
                private = asked.get("visibility") == "private" or bool(asked.get("private"))
                self.server.repositories[name] = Repository(private)
                self.server.repositories[name].commit("main", {".gitattributes": b""})
            self._say({"url": f"{self.server.url}/{name}"}, 409 if known else 200)
        else:
            _, _, owner, name, action, revision = route
            repository = self.server.repositories[f"{owner}/{name}"]
            if action == "branch":
                known = revision in repository.branches
                repository.branches.setdefault(revision, repository.branches["main"])
                self._say({}, 409 if known else 200)
            elif action == "preupload":
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self._say({"files": files})
            else:
                lines = [json.loads(line) for line in body.splitlines()]
                values = [line["value"] for line in lines if line["key"] == "file"]
                files = {value["path"]: base64.b64decode(value["content"]) for value in values}
                sha = repository.commit(revision, files)
                address = f"{self.server.url}/{owner}/{name}/commit/{sha}"
                self._say({"commitUrl": address, "commitOid": sha})

    def do_GET(self) -> None:
        route = self._route()
        of_api = route[0] == "api"
        of_main = ["revision", "main"] if len(route) == 4 and of_api else []
        owner, name, action, revision, *path = [*route[2:], *of_main] if of_api else route
        repository = self.server.repositories.get(f"{owner}/{name}")
        # Who may not read a repository is not told that there is one.
        if repository is None or (repository.private and self._token() not in (WRITER, READER)):
            self._refuse(404 if self._token() else 401, "RepoNotFound", "Repository not found")
            return
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = repository.commits[sha]
        if of_api and action == "revision":
            siblings = [{"rfilename": file} for file in files]
            self._say({"id": f"{owner}/{name}", "sha": sha, "siblings": siblings, "tags": []})
        elif of_api:
            self._say(
                [
                    {"type": "file", "path": file, "size": len(content), "oid": blob(content)}
                    for file, content in files.items()
                ]
            )
        elif repository.gated and self._token() is None:
            self._refuse(401, "GatedRepo", f"Access to model {owner}/{name} is restricted")
        elif "/".join(path) not in files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            content = files["/".join(path)]
            self._send(200, content, {"ETag": f'"{blob(content)}"', "X-Repo-Commit": sha})

    do_HEAD = do_GET

    def _route(self) -> list[str]:
        self.server.requests.append(f"{self.command} {self.path}")
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _say(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def blob(content: bytes) -> str:
    """Git's name for these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
