"""A local server that answers as much of S3 as reading needs: list, head, and get with ranges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

DATE = "Wed, 01 Jan 2025 00:00:00 GMT"


class ObjectStore(ThreadingHTTPServer):
    """`objects` maps bucket/key to bytes; `requests` lists what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    server = ObjectStore()
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._object()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        if "list-type" in query:
            self._list(unquote(parts.path).strip("/"), query)
        else:
            self._object()

    def _object(self) -> None:
        key = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {key}")
        if not self.headers.get("Authorization"):
            return self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        if "/" not in key:  # a bucket
            known = any(name.startswith(f"{key}/") for name in self.server.objects)
            return self._answer(200 if known else 404, b"")
        body = self.server.objects.get(key)
        if body is None:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        span = self.headers.get("Range")
        if not span:
            return self._answer(200, body)
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) if last else len(body), len(body) - 1) + 1
        self._answer(
            206, body[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}
        )

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        self.server.requests.append(f"LIST {bucket}/{prefix}")
        keys = [
            name.removeprefix(f"{bucket}/")
            for name in sorted(self.server.objects)
            if name.startswith(f"{bucket}/{prefix}")
        ]
        direct = [key for key in keys if "/" not in key.removeprefix(prefix)]
        folders = sorted({
            prefix + key.removeprefix(prefix).partition("/")[0] + "/"
            for key in keys
            if "/" in key.removeprefix(prefix)
        })  # fmt: skip
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.server.objects[f'{bucket}/{key}'])}"
            "</Size><LastModified>2025-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in direct
        ) + "".join(
            f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in folders
        )
        body = (
            f'<?xml version="1.0"?><ListBucketResult><Name>{bucket}</Name>'
            f"<KeyCount>{len(direct) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
            f"{contents}</ListBucketResult>"
        )
        self._answer(200, body.encode())

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Last-Modified": DATE, "ETag": '"1"', **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
