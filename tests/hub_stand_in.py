"""The few calls of the Hub's HTTP API that pushing and loading needs, on loopback, with files in memory."""

import base64
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


class HubStandIn:
    """Repositories by id: path to content on their only branch, and all calls, as method and path.

    Files of weights and shards go by LFS, all others inside of the commit, as on the Hub.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.url = ""
        self.cache = tempfile.TemporaryDirectory()

    @property
    def environment(self) -> dict[str, str]:
        """What leads a new process to this Hub and to no other."""
        environment = {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_stand_in", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": self.cache.name}
        return environment | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

    def create(self, body: dict) -> tuple[dict, int]:
        """A repository, and the status of the answer: another where there is one of its name."""
        repo_id = f"{body['organization']}/{body['name']}"
        status = 409 if repo_id in self.repositories else 200
        self.repositories.setdefault(repo_id, {})
        return {"url": f"{self.url}/{repo_id}", "id": repo_id, "name": repo_id}, status

    def preupload(self, repo_id: str, body: dict) -> dict:
        files = []
        for path in (file["path"] for file in body["files"]):
            mode = "lfs" if path.endswith((".safetensors", ".arrow")) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
        return {"files": files}

    def batch(self, body: dict) -> dict:
        wanted = [entry for entry in body["objects"]]
        for entry in wanted:
            if entry["oid"] not in self.objects:
                entry["actions"] = {"upload": {"href": f"{self.url}/upload/{entry['oid']}"}}
        return {"transfer": "basic", "objects": wanted}

    def commit(self, repo_id: str, lines: list[dict]) -> dict:
        files = self.repositories[repo_id]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        oid = self.head(repo_id)
        return {"commitUrl": f"{self.url}/{repo_id}/commit/{oid}", "commitOid": oid}

    def head(self, repo_id: str) -> str:
        files = sorted(self.repositories[repo_id].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()

    def info(self, repo_id: str) -> dict:
        siblings = [{"rfilename": path} for path in self.repositories[repo_id]]
        return {"id": repo_id, "modelId": repo_id, "sha": self.head(repo_id), "siblings": siblings, "tags": []}

    def tree(self, repo_id: str, folder: str) -> list[dict]:
        files = {path: content for path, content in self.repositories[repo_id].items() if path.startswith(folder)}
        return [{"type": "file", "path": path, "size": len(content), "oid": "0"} for path, content in files.items()]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, values, status: int = 200) -> None:
        self.answer(status, json.dumps(values).encode(), Content_Type="application/json")

    def parts(self) -> list[str]:
        path = unquote(urlsplit(self.path).path)
        self.hub.calls.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "datasets":
            return parts[1:]
        return ["api", "models", *parts[2:]] if parts[:2] == ["api", "datasets"] else parts

    def do_POST(self):
        parts, body = self.parts(), self.body()
        if parts == ["api", "repos", "create"]:
            return self.answer_json(*self.hub.create(json.loads(body)))
        if parts == ["api", "validate-yaml"]:
            return self.answer_json({"warnings": [], "errors": []})
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self.answer_json(self.hub.batch(json.loads(body)))
        repo_id, call = "/".join(parts[2:4]), parts[4]
        if call == "preupload":
            return self.answer_json(self.hub.preupload(repo_id, json.loads(body)))
        if call == "commit":
            return self.answer_json(self.hub.commit(repo_id, list(map(json.loads, body.splitlines()))))
        self.answer(404)

    def do_PUT(self):
        parts, body = self.parts(), self.body()
        digest = hashlib.sha256(body).hexdigest()
        if parts != ["upload", digest]:
            return self.answer(400)
        self.hub.objects[digest] = body
        self.answer(200)

    def do_GET(self):
        parts = self.parts()
        api = parts[:2] == ["api", "models"]
        repo_id = "/".join(parts[2:4] if api else parts[:2])
        if repo_id not in self.hub.repositories:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if api and parts[4:5] in ([], ["revision"]):
            return self.answer_json(self.hub.info(repo_id))
        if api and parts[4] == "tree" and (files := self.hub.tree(repo_id, "/".join(parts[6:]))):
            return self.answer_json(files)
        content = None if api else self.hub.repositories[repo_id].get("/".join(parts[4:]))  # owner/name/resolve/main/
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        etag = hashlib.sha256(content).hexdigest()
        self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=self.hub.head(repo_id))

    do_HEAD = do_GET


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """A running stand-in, to be named by `HF_ENDPOINT`; empty, though the same one each time."""
    hub = running()
    for held in (hub.repositories, hub.objects, hub.calls):
        held.clear()
    yield hub


@functools.cache
def running() -> HubStandIn:
    """This process's."""
    hub = HubStandIn()
    handler = type("HandlerOfOne", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    return hub
