"""A model hub on loopback: as much of the hub's HTTP interface as its real client asks for.

Source: huggingface/huggingface_hub 2.4.0, _snapshot_download.py, file_download.py `get_hf_file_metadata` and
utils/_http.py `hf_raise_for_status` (headers ETag, X-Repo-Commit, X-Error-Code).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(kw_only=True)
class Repo:
    """One repository: its files by path, and who may read them. As on the hub, a gated one still lists its files."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    allowed: frozenset[str] = frozenset({"right-token"})
    commit: str = "0123456789abcdef0123456789abcdef01234567"

    @classmethod
    def of(cls, folder: Path, **more: object) -> Repo:
        """A repository that holds the files of `folder`."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return cls(files=files, **more)  # type: ignore[arg-type]


@dataclass(kw_only=True)
class Hub:
    """A running stand-in: where it is, and every request that it was sent."""

    url: str
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve(repos: dict[str, Repo]) -> Iterator[Hub]:
    """Serve `repos` on a free port of loopback until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    hub = Hub(url=f"http://127.0.0.1:{server.server_port}")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, *_: object) -> None: ...

        def send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def answer(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            parts = self.path.split("?")[0].strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            parts = parts[2:] if api else parts
            verb, revision = parts[2:4] if len(parts) >= 4 else ("", "main")
            name, rest = "/".join(parts[:2]), "/".join(parts[4:])
            repo = repos.get(name)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if repo is None or (repo.private and token not in repo.allowed):
                return self.send(404 if token else 401, b"{}", X_Error_Code="RepoNotFound")
            if revision not in ("main", repo.commit):
                return self.send(404, b"{}", X_Error_Code="RevisionNotFound")
            if api:
                return self.listing(repo, verb)
            if repo.gated and token not in repo.allowed:
                return self.send(403 if token else 401, b"", X_Error_Code="GatedRepo")
            if rest not in repo.files:
                return self.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=repo.commit)
            body = repo.files[rest]
            etag = hashlib.sha1(body).hexdigest()
            return self.send(200, body, ETag=f'"{etag}"', X_Repo_Commit=repo.commit)

        def listing(self, repo: Repo, verb: str) -> None:
            tree = [
                {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for path, body in repo.files.items()
            ]
            info = {"id": "x/y", "sha": repo.commit, "siblings": [{"rfilename": path} for path in repo.files]}
            body = json.dumps(tree if verb == "tree" else info).encode()
            self.send(200, body, Content_Type="application/json")

    server.RequestHandlerClass = Handler
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
