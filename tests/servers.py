"""Real servers on loopback, and the ways in which servers fail."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[Mapping[str, Any], int], tuple[int, Any] | tuple[int, Any, dict[str, str]]]
"""Body and number of a request to status, body and headers; a body of parts is sent without its length."""


class Reset(Exception):
    """Raised by who answers: the connection is reset, without a word or in the middle of the parts."""


class Quiet(ThreadingHTTPServer):
    """Says nothing of clients that leave, and waits for no answer when it is closed."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        """Quiet."""


class Handler(BaseHTTPRequestHandler):
    """What all handlers here have in common."""

    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, status: int, said: Any, headers: Mapping[str, str]) -> None:
        parts = said if isinstance(said, Iterator) else None
        data = said if isinstance(said, bytes) else json.dumps(said).encode() if not parts else b""
        length = {"Connection": "close"} if parts else {"Content-Length": str(len(data))}
        self.send_response(status)
        for name, value in {**length, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for part in parts or [data]:
            self.wfile.write(part)
        self.close_connection = parts is not None

    def reset(self) -> None:
        """Ends the connection as a machine does that has crashed and is back."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def listening(handler: type[Handler]) -> Iterator[str]:
    """A server with these answers; its address."""
    server = Quiet(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def served(answer: Answer, path: str = "/score") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server to which JSON is posted: an address on it, and the requests it got."""
    got: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Posted(Handler):
        def do_POST(self) -> None:
            body = json.loads(self.body())
            with lock:
                got.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
                number = len(got)
            try:
                status, said, *headers = answer(body, number)
                self.send(status, said, dict(*headers))
            except Reset:
                self.reset()

    with listening(Posted) as address:
        yield address + path, got


@contextmanager
def absent() -> Iterator[str]:
    """An address at which nobody listens, taken for as long as this is entered."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def silent() -> Iterator[str]:
    """A server that takes every connection and never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(100)  # by the kernel: nobody here accepts
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def failing() -> Iterator[str]:
    """A server that answers everything with 500."""

    class Failing(Handler):
        def do_GET(self) -> None:
            self.body()
            self.send(500, b"", {})

        do_HEAD = do_POST = do_PUT = do_GET

    with listening(Failing) as address:
        yield address


class Biases:
    """As much of a W&B server as a run needs that logs no tables; it may go away."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        """Ids under which runs were begun or gone on with."""
        self.rows: list[dict[str, Any]] = []
        """The history that has come."""
        self.gone = threading.Event()

    def answer(self, asked: Mapping[str, Any], host: str) -> Any:
        """What a query of the SDK is answered."""
        values = asked.get("variables") or {}
        match asked.get("operationName"):
            case "RunResumeStatus":
                return {"model": None}
            case "UpsertBucket":
                self.runs.append(values["name"])
                project = {"id": "cA==", "name": "p", "entity": {"id": "ZQ==", "name": "e"}}
                bucket = {"id": "aWQ=", "name": values["name"], "displayName": "n", "config": "{}"}
                bucket |= {"description": "", "sweepName": None, "historyLineCount": 0}
                return {
                    "upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}
                }
            case "CreateRunFiles":
                files = [{"name": n, "uploadUrl": f"http://{host}/{n}"} for n in values["files"]]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, body: Mapping[str, Any]) -> None:
        """Takes a part of the history."""
        lines = body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.rows += map(json.loads, lines)


@contextmanager
def biases() -> Iterator[tuple[str, Biases]]:
    """A W&B server, and what it knows."""
    known = Biases()

    class Tracking(Handler):
        def do_POST(self) -> None:
            body = self.body()
            if known.gone.is_set():
                threading.Event().wait(60)
            if self.path == "/graphql":
                found = known.answer(json.loads(body), self.headers["Host"])
                return self.send(200, {"data": found}, {})
            if self.path.endswith("/file_stream"):
                known.stream(json.loads(body))
            return self.send(200, {}, {})

        do_GET = do_PUT = do_POST

    with listening(Tracking) as address:
        yield address, known
