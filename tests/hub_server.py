"""A hub on 127.0.0.1 for the tests: the routes huggingface_hub uses, and a switch for each way a server can fail."""

import hashlib
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "1" * 40
OLD_COMMIT = "0" * 40


@dataclass
class Hub:
    """What the server holds and how it behaves; `log` is what it was asked, ``(method, path, range)``."""

    files: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    """Content by repository, commit and file name; under ``("", "", path)`` for plain URLs."""
    refs: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": OLD_COMMIT})
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    ignores_ranges: bool = False
    wrong_range: bool = False
    announced_size: int | None = None
    failures: int = 0
    """Requests answered with status 503 before all goes well."""
    cuts: int = 0
    """Bodies that end after half of what was announced."""
    stall: threading.Event | None = None
    """Where set, bodies stop after a half until the event happens."""
    pause: float = 0.0
    """Seconds between the eighths of a body."""
    damages: bool = False
    """Bodies have their last byte changed; hash and length are announced as they were."""
    silent: bool = False
    """Requests are taken and get no answer for some seconds."""
    url: str = ""

    def put(self, repo, files, commit=COMMIT):
        """Put files into a repository."""
        self.files.update({(repo, commit, name): content for name, content in files.items()})

    def asked(self, method, name):
        """Return the ranges of the requests for one file."""
        return [asked for verb, path, asked in self.log if verb == method and path.endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    hub: Hub

    def log_message(self, *_):
        """Keep quiet."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body):
        hub = self.hub
        hub.log.append((self.command, self.path, self.headers.get("Range")))
        if hub.silent:
            time.sleep(5)
            self.close_connection = True
            return None
        if hub.failures > 0:
            hub.failures -= 1
            return self._send(503, {}, b"busy", body)
        found = self._find(body)
        if found is None:
            return None
        content, headers = found
        asked = self.headers.get("Range")
        if not body:
            size = len(content) if hub.announced_size is None else hub.announced_size
            return self._send(200, {**headers, "X-Linked-Size": str(size)}, content, body)
        if asked is None or hub.ignores_ranges:
            return self._send(200, headers, content, body)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last or len(content)), len(content) - 1) + 1
        named = begin + 1 if hub.wrong_range else begin
        headers["Content-Range"] = f"bytes {named}-{end - 1}/{len(content)}"
        return self._send(206, headers, content[begin:end], body)

    def _find(self, body):
        """Return content and headers of what the path names, or answer that it is not there."""
        hub, parts = self.hub, self.path.strip("/").split("/")
        if ("", "", self.path) in hub.files:
            return hub.files["", "", self.path], {}
        if len(parts) < 5 or parts[2] != "resolve":
            self._send(404, {}, b"", body)
            return None
        repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if repo in hub.gated:
            self._send(403, {"X-Error-Code": "GatedRepo"}, b"", body)
            return None
        if not any(repo == known for known, _, _ in hub.files):
            self._send(401, {"X-Error-Code": "RepoNotFound"}, b"", body)
            return None
        commit = hub.refs.get(revision, revision)
        if not any(commit == known for _, known, _ in hub.files):
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"", body)
            return None
        if (repo, commit, name) not in hub.files:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"", body)
            return None
        content = hub.files[repo, commit, name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return content, {"ETag": etag, "X-Linked-Etag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}

    def _send(self, status, headers, content, body):
        hub = self.hub
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        half = len(content) // 2
        if status < 400 and hub.cuts > 0:
            hub.cuts -= 1
            self.wfile.write(content[:half])
            self.close_connection = True
        elif status < 400 and hub.stall is not None:
            self.wfile.write(content[:half])
            self.wfile.flush()
            hub.stall.wait(20)
            self.close_connection = True
        else:
            if status < 400 and hub.damages:
                content = content[:-1] + bytes([content[-1] ^ 1])
            step = -(-len(content) // 8) if hub.pause else max(1, len(content))
            for start in range(0, len(content), max(1, step)):
                self.wfile.write(content[start : start + step])
                time.sleep(hub.pause)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Keep quiet about clients that go away."""


def serve(hub):
    """Start a server for ``hub`` on a free port of 127.0.0.1; call its ``shutdown`` and ``server_close`` afterwards."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server
