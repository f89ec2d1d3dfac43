"""A loopback Hugging Face hub for tests: as much of its protocol as a download needs, and the ways in which it fails.

Like the real one it describes a repository at /api/models/<name>/revision/<revision>, says at
/<name>/resolve/<revision>/<file> which commit and which content that is, and sends whoever wants a large file on to a
signed address on another host, here another name, with an offer of Xet that it does not keep. Ranges work. With
`token`, it answers only those who show it.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "c0ffee" * 6 + "beef"
LARGE = (".safetensors", ".bin", ".h5")
HEADERS = {
    "code": "X-Error-Code", "location": "Location", "range": "Content-Range", "commit": "X-Repo-Commit", "etag": "ETag",
    "linked_etag": "X-Linked-Etag", "linked_size": "X-Linked-Size", "xet_hash": "X-Xet-Hash",
    "xet_route": "X-Xet-Refresh-Route",
}  # fmt: skip


@dataclass
class Repository:
    """Files by name at one commit, which the branch main stands for."""

    files: dict[str, bytes]
    commit: str = COMMIT
    token: str | None = None
    gated: bool = False
    claims: dict[str, dict[str, Any]] = field(default_factory=dict)  # by file: what the description says instead

    def digest(self, name: str) -> str:
        """What the hub knows a file's content by."""
        return (hashlib.sha256 if name.endswith(LARGE) else hashlib.sha1)(self.files[name]).hexdigest()

    def description(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            file = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
            if name.endswith(LARGE):
                file["lfs"] = {"sha256": self.digest(name), "size": len(content), "pointerSize": 134}
            siblings.append(file | self.claims.get(name, {}))
        return {"id": "x", "sha": self.commit, "siblings": siblings}


class Server:
    """Runs in threads of the test's process. Used as a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.received: list[tuple[str, dict[str, str]]] = []  # "GET /path" and the headers, in small letters
        self.cut_at: int | None = None  # byte of a large file beyond which nothing comes: the connection is closed
        self.lengths: Iterator[int] = iter(())  # of the next answers with a large file, then the connection is closed
        self.damaged = False  # one bit of every large file is another
        self.silent = False  # large files never come
        self.status: int | None = None  # of every answer of the storage
        self._gone = threading.Event()
        self._servers = [_Listener(("127.0.0.1", 0), _handler(self, kind)) for kind in ("hub", "storage")]

    def __enter__(self) -> "Server":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._gone.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage(self) -> str:
        return f"http://localhost:{self._servers[1].server_port}"  # another host by its name

    def requests(self, part: str) -> list[dict[str, str]]:
        """The headers of the requests for addresses with `part` in them."""
        return [headers for address, headers in self.received if part in address]


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


def _handler(hub: Server, kind: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer takes 40 ms

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def respond(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.received.append((f"{self.command} {self.path}", headers))
            path = urlsplit(self.path).path
            if path == "/" or path.startswith("/mirror/"):
                return self.answer(200 if path == "/" else 404)
            is_description = path.startswith("/api/models/")
            name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
            repository = hub.repositories.get(name)
            shown = headers.get("authorization", "").removeprefix("Bearer ")
            if repository is None or (kind == "hub" and repository.token not in (None, shown)):
                return self.answer(404, code="RepoNotFound")
            *_, revision, file = path.split("/")
            if is_description:
                revision = file
            if kind == "hub" and revision not in ("main", repository.commit):
                return self.answer(404, code="RevisionNotFound")
            if is_description:
                return self.answer(200, json.dumps(repository.description()).encode())
            if repository.gated:
                return self.answer(403, code="GatedRepo")
            if file not in repository.files:
                return self.answer(404, code="EntryNotFound")
            content, digest = repository.files[file], repository.digest(file)
            if kind == "storage":
                return self.send_large(content)
            if not file.endswith(LARGE):
                return self.answer(200, content, commit=repository.commit, etag=f'"{digest}"')
            location = f"{hub.storage}/{name}/resolve/x/{file}?Signature=s1gned"
            linked = {"linked_etag": f'"{digest}"', "linked_size": str(len(content))}
            xet = {"xet_hash": "ab" * 32, "xet_route": f"{hub.address}/api/models/{name}/xet-read-token/{revision}"}
            return self.answer(302, location=location, commit=repository.commit, **linked, **xet)

        def send_large(self, content: bytes) -> None:
            if hub.silent:
                hub._gone.wait(30)
            if hub.status:
                return self.answer(hub.status)
            if hub.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            sent = content[first : hub.cut_at][: next(hub.lengths, None)]
            self.close_connection = len(sent) < len(content) - first
            span = f"bytes {first}-{len(content) - 1}/{len(content)}" if first else ""
            return self.answer(206 if first else 200, content[first:], sent=sent, range=span)

        def answer(self, status: int, content: bytes = b"", sent: bytes | None = None, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                if value:
                    self.send_header(HEADERS[key], value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content if sent is None else sent)

        do_GET = do_HEAD = respond

    return Handler
