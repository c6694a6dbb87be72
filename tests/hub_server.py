"""A hub on 127.0.0.1 for the tests: what a download asks of the Hugging Face hub, with faults.

A revision is a dict {file name: bytes}. Weights are served as the hub serves large files: by a
redirect to a signed link on another host (localhost here), with the sha256 as their tag; the rest
comes directly, with git's hash.
"""

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SIGNATURE = "X-Signature=0c4f1dent1al"  # in every link to a large file; no user may read it


def git_sha1(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Fault:
    """What happens to the next `times` requests whose 'METHOD path' matches the pattern.

    kind: 'status' (code, headers and answer), 'drop' (nine tenths come, then the connection ends),
    'reset' (by a TCP reset), 'slow' (the last tenth comes after `seconds`), 'late' (all does),
    'corrupt' (the last byte is another).
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
    claimed: dict[str, int] = field(default_factory=dict)  # file name: size that the hub claims
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # 'METHOD path' of all that came, in order
    resumed: list[int] = field(default_factory=list)  # bytes after which a rest was asked for
    lock: threading.Lock = field(default_factory=threading.Lock)

    def commit(self, revision: str) -> str:
        return sha1(f"{self.model} {revision}".encode()).hexdigest()

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

        def start(self, code: int, headers: dict[str, str], length: int) -> None:
            self.send_response(code)
            for name, value in (headers | {"Content-Length": str(length)}).items():
                self.send_header(name, value)
            self.end_headers()

        def answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None):
            self.start(code, headers or {}, len(body))
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, code: int, error: str) -> None:
            self.answer(code, headers={"X-Error-Code": error, "X-Error-Message": error})

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            fault = hub.fault_for(f"{self.command} {path}")
            if fault and fault.kind == "late":
                time.sleep(fault.seconds)
            if fault and fault.kind == "status":
                self.answer(fault.code, fault.answer, fault.headers)
                return
            if path.startswith("/cdn/"):
                _, _, revision, name = path.split("/")
                self.send_file(hub.revisions[revision][name], {}, fault)
                return
            api = re.fullmatch(r"/api/models/(.+)/(refs|revision|tree)(?:/([^/]+))?", path)
            file = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path)
            model, revision = api.group(1, 3) if api else file.group(1, 2) if file else ("", "")
            names = {hub.commit(name): name for name in hub.revisions}
            name = names.get(revision, revision)
            if model != hub.model:  # as to all who send no token
                self.refuse(401, "RepoNotFound")
            elif revision and name not in hub.revisions:
                self.refuse(404, "RevisionNotFound")
            elif file:
                self.resolve(name, file[3], fault)
            elif revision:
                self.list_files(api[2], name)
            else:
                self.list_branches()

        do_HEAD = do_GET

        def list_branches(self) -> None:
            branches = []
            for name in ["main", *hub.revisions]:
                branch = {"name": name, "ref": f"refs/heads/{name}"}
                branches.append(branch | {"targetCommit": hub.commit(name)})
            refs = {"tags": [], "branches": branches, "converts": []}
            self.answer(200, json.dumps(refs).encode())

        def list_files(self, form: str, revision: str) -> None:
            """The files of a revision, as /revision/ and /tree/ give them."""
            path_key, oid_key, sum_key = ("rfilename", "blobId", "sha256")
            if form == "tree":
                path_key, oid_key, sum_key = ("path", "oid", "oid")
            files = []
            for path, content in hub.revisions[revision].items():
                size = hub.claimed.get(path, len(content))
                files.append({path_key: path, oid_key: git_sha1(content), "size": size})
                files[-1] |= {"type": "file"} if form == "tree" else {}
                if path.endswith((".safetensors", ".bin")):
                    large = {sum_key: sha256(content).hexdigest(), "size": size, "pointerSize": 135}
                    files[-1]["lfs"] = large
            model = {"id": hub.model, "sha": hub.commit(revision)}
            listed = files if form == "tree" else model | {"siblings": files}
            self.answer(200, json.dumps(listed).encode())

        def resolve(self, revision: str, name: str, fault: Fault | None) -> None:
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.refuse(403, "GatedRepo")
                return
            content = hub.revisions[revision][name]
            headers = {"X-Repo-Commit": hub.commit(revision), "ETag": f'"{git_sha1(content)}"'}
            if not name.endswith((".safetensors", ".bin")):
                self.send_file(content, headers, fault)
                return
            link = f"http://localhost:{urlsplit(hub.url).port}/cdn/{revision}/{name}?{SIGNATURE}"
            headers |= {"X-Linked-Etag": f'"{sha256(content).hexdigest()}"', "Location": link}
            self.start(302, headers | {"X-Linked-Size": str(len(content))}, 0)

        def send_file(self, content: bytes, headers: dict[str, str], fault: Fault | None) -> None:
            """Sends a file, from where the client asks for it, with the fault that is due."""
            begin = int(re.sub(r"bytes=(\d+)-", r"\1", self.headers.get("Range", "bytes=0-")))
            if begin:
                hub.resumed.append(begin)
                part = f"bytes {begin}-{len(content) - 1}/{len(content)}"
                headers = headers | {"Content-Range": part}
            content = content[begin:]
            self.start(206 if begin else 200, headers, len(content))
            if self.command == "HEAD":
                return
            kind = fault.kind if fault else ""
            if kind == "corrupt":
                content = content[:-1] + bytes([content[-1] ^ 1])
            kept = len(content) // 10 if kind in ("drop", "reset", "slow") else 0
            self.wfile.write(content[: len(content) - kept])
            self.wfile.flush()
            if kind == "slow":
                time.sleep(fault.seconds)
                self.wfile.write(content[-kept:])
            elif kept:
                if kind == "reset":
                    time.sleep(0.2)  # what was sent arrives first
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                self.connection.close()

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
