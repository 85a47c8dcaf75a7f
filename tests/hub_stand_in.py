"""A stand-in for the Hugging Face hub: the few routes that huggingface_hub asks for models."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"


@dataclass
class StandIn:
    """Repositories by name, each with its files; what was asked is kept in `requests`."""

    repos: dict[str, dict[str, bytes]]
    gated: frozenset[str] = frozenset()
    revisions: frozenset[str] = frozenset({"main", "v1", COMMIT})
    endpoint: str = ""
    requests: list[str] = field(default_factory=list)

    @contextmanager
    def serving(self) -> Iterator["StandIn"]:
        """Answer at `endpoint` meanwhile."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def log_message(self, *arguments: object) -> None:
                """Be silent."""

            def _answer(self) -> None:
                path = unquote(urlsplit(self.path).path)
                stand_in.requests.append(f"{self.command} {path}")
                if path.startswith("/api/models/"):
                    repo, _, revision = path.removeprefix("/api/models/").partition("/tree/")
                    self._list(repo, revision)
                else:
                    repo, _, rest = path[1:].partition("/resolve/")
                    revision, _, file = rest.partition("/")
                    self._file(repo, revision, file)

            def _refused(self, repo: str, revision: str) -> bool:
                if repo not in stand_in.repos:
                    self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
                elif repo in stand_in.gated:
                    self._send(403, b"", {"X-Error-Code": "GatedRepo"})
                elif revision not in stand_in.revisions:
                    self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                else:
                    return False
                return True

            def _list(self, repo: str, revision: str) -> None:
                if not self._refused(repo, revision):
                    files = [
                        {"type": "file", "path": name, "size": len(data), "oid": 40 * "0"}
                        for name, data in stand_in.repos[repo].items()
                    ]
                    self._send(
                        200, json.dumps(files).encode(), {"Content-Type": "application/json"}
                    )

            def _file(self, repo: str, revision: str, file: str) -> None:
                if self._refused(repo, revision):
                    return
                data = stand_in.repos[repo].get(file)
                if data is None:
                    self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                    return
                tag = hashlib.sha256(data).hexdigest()
                self._send(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

            def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

        return Handler
