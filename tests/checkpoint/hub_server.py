"""A hub on this machine: it speaks what huggingface_hub speaks, and keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_right"
OWNER = "me"


class Hub(ThreadingHTTPServer):
    """Repositories by name: what each holds, and whether it is private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by hash
        self.commits: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        return False

    def do_PUT(self) -> None:
        content = self.body()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self) -> None:
        found = re.fullmatch(r"/api/models/([^/]+/[^/?]+)(/revision/main)?(\?.*)?", self.path)
        name = found[1] if found else ""
        if name not in self.server.files:
            self.answer({"error": "Repository not found"}, 404)
            return
        files = [{"rfilename": file} for file in self.server.files[name]]
        private = self.server.private[name]
        self.answer({"id": name, "sha": "0" * 40, "private": private, "siblings": files})

    def do_POST(self) -> None:
        content = self.body()
        if not self.allowed():
            return
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            self.create(json.loads(content))
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs"
                    if file["path"].endswith((".safetensors", ".gguf"))
                    else "regular",
                }
                for file in json.loads(content)["files"]
            ]
            self.answer({"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.address}/lfs"}}}
                for each in json.loads(content)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self.commit(found[1], content)
        else:
            self.answer({"error": f"no such endpoint: {path}"}, 404)

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != OWNER:
            self.answer({"error": "You don't have the rights to create a model there"}, 403)
        elif name in self.server.files:
            address = f"{self.server.address}/{name}"
            self.answer({"error": "You already created this model repo", "url": address}, 409)
        else:
            private = wanted.get("private") is True or wanted.get("visibility") == "private"
            self.server.files[name], self.server.private[name] = {}, private
            self.answer({"url": f"{self.server.address}/{name}", "name": name})

    def commit(self, name: str, content: bytes) -> None:
        files = self.server.files[name]
        for line in content.splitlines():
            entry = json.loads(line)
            about = entry["value"]
            if entry["key"] == "header":
                self.server.commits.append(about["summary"])
            elif entry["key"] == "file":
                files[about["path"]] = base64.b64decode(about["content"])
            elif entry["key"] == "lfsFile":
                files[about["path"]] = self.server.objects[about["oid"]]
        address = f"{self.server.address}/{name}/commit/{'1' * 40}"
        self.answer(
            {"success": True, "commitOid": "1" * 40, "commitUrl": address, "hookOutput": ""}
        )
