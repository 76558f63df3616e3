"""A local server that plays the Hugging Face hub, for processes with HF_ENDPOINT set to it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit


def commit(number: int) -> str:
    return f"{number:040x}"


@dataclass
class Repository:
    """Files by commit, and what its names stand for."""

    files: dict[str, dict[str, bytes]]
    refs: dict[str, str] = field(default_factory=lambda: {"main": commit(1)})
    token: str | None = None
    """Where it is gated: the token that opens it."""

    @classmethod
    def of(cls, folder: Path, **fields: Any) -> Repository:
        files = {one.name: one.read_bytes() for one in sorted(folder.iterdir())}
        return cls({commit(1): files}, **fields)


class HubServer(ThreadingHTTPServer):
    """`repositories` by `models/OWNER/NAME` or `datasets/OWNER/NAME`; `requests` what was asked."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.busy = 0
        """Requests that are answered with 429 before any other."""
        self.lock = Lock()

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process ask this server, from an empty cache of its own."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_address[1]}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "",
        }

    def fetched(self, name: str) -> int:
        """How often the body of a file was sent."""
        return sum(one.startswith("GET") and one.endswith(f"/{name}") for one in self.requests)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    server = HubServer()
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._respond()

    def _respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
            busy = self.server.busy
            self.server.busy = max(busy - 1, 0)
        if busy:
            return self._answer(429, b"", {"Retry-After": "0"})
        api = path.startswith("/api/")
        name, action, rest = self._divided(path)
        repository = self.server.repositories.get(name)
        if repository is None:
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        allowed = self.headers.get("Authorization") == f"Bearer {repository.token}"
        if repository.token and not allowed and not (api and action in ("", "revision")):
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        reference = rest if action in ("", "revision") else rest.partition("/")[0]
        sha = repository.refs.get(reference or "main", reference)
        if sha not in repository.files:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = repository.files[sha]
        if not api:
            return self._file(files, rest.partition("/")[2], sha)
        self._answer(200, self._described(name, action, files, sha))

    @staticmethod
    def _divided(path: str) -> tuple[str, str, str]:
        """`models/OWNER/NAME`, the action, and what follows it."""
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            parts = parts[1:]
        elif parts[0] != "datasets":
            parts = ["models", *parts]
        return "/".join(parts[:3]), parts[3] if len(parts) > 3 else "", "/".join(parts[4:])

    def _described(self, name: str, action: str, files: dict[str, bytes], sha: str) -> bytes:
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _digest(content)}
            for path, content in files.items()
        ]
        if action == "tree":
            return json.dumps(entries).encode()
        if action == "paths-info":
            asked = json.loads(self._body)["paths"]
            return json.dumps([one for one in entries if one["path"] in asked]).encode()
        siblings = [{"rfilename": path} for path in files]
        key = name.partition("/")[2]
        return json.dumps({"id": key, "sha": sha, "siblings": siblings, "tags": []}).encode()

    def _file(self, files: dict[str, bytes], name: str, sha: str) -> None:
        if name not in files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        body = files[name]
        if self.command == "GET" and name.endswith(".safetensors"):
            time.sleep(0.3)  # long enough for other processes to come too
        self._answer(200, body, {"ETag": f'"{_digest(body)}"', "X-Repo-Commit": sha})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
