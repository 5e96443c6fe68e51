"""A small Hub on loopback: as much of its protocol as huggingface_hub speaks when it reads models.

    with hub({"lab/tiny": {"main": folder, "step1": other}}) as server:
        server.url, server.requests          # what to set HF_ENDPOINT to; what was asked for

A repository may be gated (403) by its name in `gated`. `cut` is how many bytes of each file's first
download arrive before the connection breaks, 0 for all.
"""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    def __init__(self, repositories: dict[str, dict[str, Path]], gated=(), cut=0):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories = repositories
        self.gated = gated
        self.cut = cut
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str, revision: str) -> str:
        """40 hex digits for a revision."""
        return hashlib.sha1(f"{repository} {revision}".encode()).hexdigest()

    def folder(self, repository: str, revision: str) -> tuple[str, Path] | None:
        """(commit, folder) of a revision by its name or its commit."""
        for name, folder in self.repositories[repository].items():
            commit = self.commit(repository, name)
            if revision in (name, commit):
                return commit, folder
        return None


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        parts = path.split("/")
        repository = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        if repository not in self.server.repositories:
            return self.fail(404, "RepoNotFound", "Repository not found")
        if repository in self.server.gated:
            return self.fail(403, "GatedRepo", "Access to this model is restricted")
        if parts[:2] == ["api", "models"]:
            return self.answer_api(repository, parts[4:])
        return self.answer_file(repository, parts[3], "/".join(parts[4:]))

    def answer_api(self, repository, rest):
        if rest == ["refs"]:
            branches = [
                {
                    "name": name,
                    "ref": f"refs/heads/{name}",
                    "targetCommit": self.server.commit(repository, name),
                }
                for name in self.server.repositories[repository]
            ]
            return self.send({"branches": branches, "converts": [], "tags": []})
        revision = rest[1] if len(rest) > 1 else "main"
        found = self.server.folder(repository, revision)
        if not found:
            return self.fail(404, "RevisionNotFound", "Revision not found")
        commit, folder = found
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": digest(p)}
                for p in files
            ]
            return self.send(entries)
        siblings = [
            {"rfilename": p.name, "size": p.stat().st_size, "blobId": digest(p)} for p in files
        ]
        return self.send({"_id": "1", "id": repository, "sha": commit, "siblings": siblings})

    def answer_file(self, repository, revision, name):
        found = self.server.folder(repository, revision)
        if not found:
            return self.fail(404, "RevisionNotFound", "Revision not found")
        commit, folder = found
        path = folder / name
        if not path.is_file():
            return self.fail(404, "EntryNotFound", "Entry not found")
        content = path.read_bytes()
        asked = self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{digest(path)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.server.cut and name.endswith(".safetensors"):
            part = content[start : start + self.server.cut]
            self.server.cut = 0
            self.wfile.write(part)
            self.close_connection = True
            return self.connection.close()
        return self.wfile.write(content[start:])

    def send(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def fail(self, status, code, message):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def hub(repositories, **options):
    server = Hub(repositories, **options)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
