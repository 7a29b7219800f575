"""
A hub on loopback that takes uploads as huggingface_hub makes them: repositories, branches, preupload, LFS, commits.

Weights go by LFS, as on the real one, and the rest in the commit.
"""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_secret"


class Hub:
    """
    State of the hub.

    Attributes:
        repos: files of each repository and branch, `{"me/model": {"main": {"README.md": b"..."}}}`.
        private: repositories that were created as private ones.
        commits: messages of the commits.
        url: address.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.commits: list[str] = []
        self.large: dict[str, bytes] = {}
        self.url = ""


@contextmanager
def fake_hub():
    """Serve a [`Hub`] while the context is open."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            return found

        def answer(self, content: object, status: int = 200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self):
            body, path = self.body(), self.path.split("?")[0]
            if path != "/api/validate-yaml" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid username or password."}, 401)
            if path == "/api/repos/create":
                given = json.loads(body)
                repo = f"{given.get('organization') or 'me'}/{given['name']}"
                if repo in hub.repos:
                    return self.answer({"url": f"{hub.url}/{repo}"}, 409)
                hub.repos[repo] = {"main": {}}
                if given.get("visibility") == "private" or given.get("private"):
                    hub.private.add(repo)
                return self.answer({"url": f"{hub.url}/{repo}"})
            if path == "/api/validate-yaml":
                has_head = json.loads(body)["content"].startswith("---\n")
                return self.answer({"errors": [], "warnings": [] if has_head else [{"message": "empty metadata"}]})
            if path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.url}/large/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                return self.answer({"transfer": "basic", "objects": objects})
            _, _, _, owner, name, what, branch = path.split("/")
            repo = hub.repos.get(f"{owner}/{name}")
            if repo is None:
                return self.answer({"error": "Repository not found"}, 404)
            if what == "branch":
                repo[branch] = dict(repo["main"])
                return self.answer({}, 200)
            if what == "preupload":
                files = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for each in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    hub.commits.append(value["summary"])
                elif item["key"] == "file":
                    repo[branch][value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    repo[branch][value["path"]] = hub.large[value["oid"]]
            oid = f"{len(hub.commits):040}"
            return self.answer({"commitUrl": f"{hub.url}/{owner}/{name}/commit/{oid}", "commitOid": oid})

        def do_PUT(self):
            hub.large[self.path.split("/")[-1]] = self.body()
            self.answer({})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
