"""A local HTTP server of files that can also behave badly, and that counts what it is asked."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Behaviour = Callable[[BaseHTTPRequestHandler, bytes, int], bool]
"""Called with the request, the file and how often the path was asked before; False: serve it."""


@dataclass
class FileServer:
    """Files by path, bad behaviour by path, and what was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    bad: dict[str, Behaviour] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Path and Range of each request, in order."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of bodies by path."""
    at_once: int = 0
    """The most requests that were answered at one time."""
    address: str = ""
    hold: threading.Event = field(default_factory=threading.Event)
    """What a stalled answer waits for; set when the server ends."""

    def times(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.asked)


def etag(data: bytes) -> str:
    return f'"{sha256(data).hexdigest()[:32]}"'


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for key, value in headers.items():
        handler.send_header(key.replace("_", "-"), value)
    if "Content_Length" not in headers:
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    with suppress(OSError):
        handler.wfile.write(body)


@contextmanager
def serve() -> Iterator[FileServer]:
    """Serve ``files`` with ranges and strong ETags until the block ends."""
    state = FileServer()
    lock = threading.Lock()
    open_now = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            nonlocal open_now
            path = urlsplit(self.path).path
            with lock:
                before = state.times(path)
                state.asked.append((path, self.headers.get("Range", "")))
                open_now += 1
                state.at_once = max(state.at_once, open_now)
            try:
                self.answer(path, before)
            finally:
                with lock:
                    open_now -= 1

        def answer(self, path: str, before: int) -> None:
            data = state.files.get(path, b"")
            if path in state.bad and state.bad[path](self, data, before):
                return
            if path not in state.files:
                reply(self, 404)
                return
            asked, tag = self.headers.get("Range", ""), etag(data)
            if asked and self.headers.get("If-Range") == tag:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start >= len(data):
                    reply(self, 416)
                    return
                about = f"bytes {start}-{len(data) - 1}/{len(data)}"
                state.sent[path] += len(data) - start
                reply(self, 206, data[start:], Content_Range=about, ETag=tag)
                return
            state.sent[path] += len(data)
            reply(self, 200, data, ETag=tag, Accept_Ranges="bytes")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        state.hold.set()
        server.shutdown()
        server.server_close()


def once(behaviour: Behaviour, times: int = 1) -> Behaviour:
    """Behave badly the first times that a path is asked."""
    return lambda handler, data, before: before < times and behaviour(handler, data, before)


def cut(at: int, *, length: bool = True) -> Behaviour:
    """Send the first bytes and close, with or without having told how many there are."""

    def behave(handler: BaseHTTPRequestHandler, data: bytes, before: int) -> bool:
        about = {"Content_Length": str(len(data))} if length else {"Connection": "close"}
        if length:
            reply(handler, 200, data[:at], ETag=etag(data), **about)
        else:
            handler.send_response(200)
            handler.send_header("Connection", "close")
            handler.end_headers()
            handler.wfile.write(data[:at])
        handler.close_connection = True
        return True

    return behave


def stall(state: FileServer, at: int) -> Behaviour:
    """Send the first bytes, then nothing."""

    def behave(handler: BaseHTTPRequestHandler, data: bytes, before: int) -> bool:
        reply(handler, 200, data[:at], ETag=etag(data), Content_Length=str(len(data)))
        handler.wfile.flush()
        state.hold.wait(20)
        handler.close_connection = True
        return True

    return behave


def status(code: int, body: bytes = b"", **headers: str) -> Behaviour:
    """Answer with a status."""

    def behave(handler: BaseHTTPRequestHandler, data: bytes, before: int) -> bool:
        reply(handler, code, body, **headers)
        return True

    return behave
