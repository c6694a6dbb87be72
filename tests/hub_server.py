"""A hub on 127.0.0.1 for the tests: the part of the Hugging Face hub's API that a download uses, with faults.

A revision is a dict {file name: bytes}. Weights are served as the hub serves large files: by a redirect to a signed
link on another host (localhost here), with the sha256 as their tag; the rest comes directly, with git's hash.
Asked for a whole address, it answers as a proxy does.
"""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SIGNATURE = "X-Signature=0c4f1dent1al"  # in every link to a large file; no line that a user reads may hold it


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


@dataclass
class Fault:
    """What happens to the next `times` requests whose 'METHOD path' matches the pattern.

    kind: 'status' (code, headers and answer), 'drop' (the connection ends after nine tenths of the body), 'reset' (the
    same by a TCP reset), 'slow' (the last tenth comes after `seconds`), 'late' (all does), 'corrupt' (one byte is
    another), 'endless' (after the body comes more, without a length), 'drip' (a byte every tenth of a second).
    """

    pattern: str
    kind: str
    times: int = 10**9
    code: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    answer: bytes = b"{}"
    seconds: float = 0.0


@dataclass
class Hub:
    model: str
    revisions: dict[str, dict[str, bytes]] = field(repr=False)
    url: str = ""
    token: str = ""  # if set, files are only for who sends it, as with a gated model
    claimed: dict[str, object] = field(default_factory=dict)  # file name: size that the hub says it has
    names_only: bool = False  # lists no sizes and no hashes, as a mirror may
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # 'METHOD path' of all that came, in order
    resumed: list[int] = field(default_factory=list)  # the bytes from which a client asked for the rest of a file
    proxied: int = 0  # requests that came as to a proxy
    surplus: int = 0  # bytes that were sent after the end of a file
    lock: threading.Lock = field(default_factory=threading.Lock)

    def commit(self, revision: str) -> str:
        return hashlib.sha1(f"{self.model} {revision}".encode()).hexdigest()

    def seen(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


def handler_for(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, code: int, error_code: str, message: str) -> None:
            self.answer(code, headers={"X-Error-Code": error_code, "X-Error-Message": message})

        def body(self, content: bytes, headers: dict[str, str], fault: Fault | None) -> None:
            """Sends a file, from where the client asks for it, with the fault that is due."""
            start = int(re.sub(r"bytes=(\d+)-", r"\1", self.headers.get("Range", "bytes=0-")))
            if start:
                with hub.lock:
                    hub.resumed.append(start)
                headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            content = content[start:]
            kind = fault.kind if fault and self.command == "GET" else ""
            if kind == "endless":
                self.endless(content)
                return
            if kind == "corrupt":
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.send_response(206 if start else 200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if kind in ("drop", "reset"):
                self.wfile.write(content[: len(content) * 9 // 10])
                self.wfile.flush()
                if kind == "reset":
                    time.sleep(0.2)  # what was sent arrives first
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            kept = len(content) // 10 if kind == "slow" else 0
            self.wfile.write(content[: len(content) - kept])
            self.wfile.flush()
            if kind == "slow":
                time.sleep(fault.seconds)
                self.wfile.write(content[-kept:])

        def endless(self, content: bytes) -> None:
            """Sends a file, and zeros after it, until the client has had enough or 200 MB of them."""
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            self.wfile.write(content)
            for _ in range(200):
                self.wfile.write(bytes(1_000_000))
                hub.surplus += 1_000_000

        def drip(self, seconds: float) -> None:
            """Sends a header, and of a body that never ends a byte every tenth of a second."""
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.close_connection = True
            for _ in range(int(seconds * 10)):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            with hub.lock:
                hub.proxied += bool(address.netloc)
            path = unquote(address.path)
            fault = hub.fault_for(f"{self.command} {path}")
            if fault and fault.kind == "late":
                time.sleep(fault.seconds)
            if fault and fault.kind == "status":
                self.answer(fault.code, fault.answer, fault.headers)
            elif fault and fault.kind == "drip":
                self.drip(fault.seconds)
            elif path.startswith("/cdn/"):
                _, _, revision, name = path.split("/")
                self.body(hub.revisions[revision][name], {}, fault)
            elif match := re.fullmatch(r"/api/models/(.+)/revision/([^/]+)", path):
                self.revision(*match.groups())
            elif match := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path):
                self.file(*match.groups(), fault)
            else:
                self.refuse(404, "", "Not found")

        do_HEAD = do_GET

        def find(self, model: str, revision: str) -> str | None:
            """The name of the revision, given by it or by its commit; answers the request itself if there is none."""
            if model != hub.model:
                self.refuse(401, "RepoNotFound", "Repository not found")  # as to anyone without a token
                return None
            for name in hub.revisions:
                if revision in (name, hub.commit(name)):
                    return name
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None

        def revision(self, model: str, revision: str) -> None:
            if not (revision := self.find(model, revision) or ""):
                return
            siblings = []
            for name, content in hub.revisions[revision].items():
                if hub.names_only:
                    siblings.append({"rfilename": name})
                    continue
                size = hub.claimed.get(name, len(content))
                siblings.append({"rfilename": name, "size": size, "blobId": git_sha1(content)})
                if is_large(name):
                    siblings[-1]["lfs"] = {"sha256": sha256(content), "size": size, "pointerSize": 135}
            answer = {"id": model, "sha": hub.commit(revision), "siblings": siblings}
            answer |= {
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "gated": "auto" if hub.token else False,
            }
            self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def file(self, model: str, revision: str, name: str, fault: Fault | None) -> None:
            if not (revision := self.find(model, revision) or ""):
                return
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.refuse(401, "GatedRepo", f"Access to model {model} is restricted.")
            elif name not in hub.revisions[revision]:
                self.refuse(404, "EntryNotFound", "Entry not found")
            else:
                content = hub.revisions[revision][name]
                headers = {"X-Repo-Commit": hub.commit(revision), "ETag": f'"{git_sha1(content)}"'}
                if is_large(name):
                    port = urlsplit(hub.url).port
                    headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
                    headers |= {"Location": f"http://localhost:{port}/cdn/{revision}/{name}?{SIGNATURE}"}
                    self.answer(302, headers=headers)
                else:
                    self.body(content, headers, fault)

    return Handler


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serves the hub on a free port of 127.0.0.1, in threads of this process, and sets its url."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(hub))
    server.handle_error = lambda *_: None  # a client that was killed
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
