"""A local server that answers as the model hub does, or fails in one way."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def hub(behaviour: str, files: Path, asked: list[str] | None = None) -> Iterator[str]:
    """Serve a repository ``owner/llm`` as the hub does, or fail in one way; yield its address.

    ``asked`` gets the name of each file whose bytes were asked for.
    """
    commit = "0123456789012345678901234567890123456789"
    names = sorted(file.name for file in files.iterdir())

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if not self.path.startswith(("/api/models/owner/llm", "/owner/llm/")):
                self.answer(404)
                return
            if behaviour in ("401", "404"):
                code = {"X_Error_Code": "RepoNotFound"} if behaviour == "404" else {}
                self.answer(int(behaviour), b"{}", **code)
                return
            if "/tree/" in self.path:
                tree = [
                    {
                        "type": "file",
                        "path": name,
                        "oid": "0",
                        "size": (files / name).stat().st_size,
                    }
                    for name in names
                ]
                self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
                return
            if "/resolve/" not in self.path:
                siblings = [{"rfilename": name} for name in names]
                body = json.dumps({"id": "owner/llm", "sha": commit, "siblings": siblings})
                self.answer(200, body.encode(), Content_Type="application/json")
                return
            data = (files / self.path.rsplit("/", 1)[1]).read_bytes()
            about = {"ETag": f'"{len(data)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
            if self.command == "HEAD":
                self.answer(200, Content_Length=str(len(data)), **about)
                return
            if asked is not None:
                asked.append(self.path.rsplit("/", 1)[1])
            if behaviour == "slow":
                time.sleep(1)
            if behaviour == "half" and self.path.endswith(".safetensors"):
                self.answer(200, data[: len(data) // 2], Content_Length=str(len(data)), **about)
                self.close_connection = True
                return
            self.answer(200, data, **about)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if behaviour == "silent":
        server.shutdown()
        server.server_close()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        return
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
