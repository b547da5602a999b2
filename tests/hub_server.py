"""A Hugging Face Hub in a process of one's own: as much of its HTTP API as create_repo, upload_folder,
snapshot_download and HfFileSystem use (seen in huggingface_hub's source: hf_api.py, file_download.py, _commit_api.py,
hf_file_system.py).

    python -m tests.hub_server PORT FOLDER

Repositories whose name has `private` in it are not there without the token `good`; `gated` ones answer GatedRepo.
"""

import base64
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = {"models": "", "datasets": "datasets/"}


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def _route(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        may_write = self.headers.get("Authorization") == "Bearer good"
        if path == "/api/repos/create":
            asked = json.loads(body)
            kind, repo = f"{asked.get('type', 'model')}s", f"{asked.get('organization') or 'me'}/{asked['name']}"
            if not may_write:
                return self._json({"error": "Invalid username or password."}, 401)
            (self.root / kind / repo).mkdir(parents=True, exist_ok=True)
            return self._json({"url": self._address(kind, repo), "id": repo, "name": repo})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/(.*))?)?", path):
            kind, repo, verb, rest = match.groups()
            return self._api(kind, repo, verb or "", rest or "", body, may_write)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind = "datasets" if match[1] else "models"
            return self._file(method, kind, match[2], match[4], may_write)
        return self._json({"error": "no such page"}, 404)

    def _api(self, kind: str, repo: str, verb: str, rest: str, body: bytes, may_write: bool) -> None:
        folder = self.root / kind / repo
        if self._refused(folder, repo, may_write):
            return None
        if verb == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(body)["files"]]
            return self._json({"files": files})
        if verb == "commit":
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    target = folder / item["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(item["value"]["content"]))
            address = f"{self._address(kind, repo)}/commit/{self._sha(folder)}"
            return self._json({"success": True, "commitOid": self._sha(folder), "commitUrl": address})
        if verb in ("", "revision"):
            if rest not in ("", "main", self._sha(folder)):
                return self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": f} for f in self._files(folder)]
            return self._json({"id": repo, "_id": "1", "sha": self._sha(folder), "private": "private" in repo,
                               "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})
        if verb == "tree":
            _, _, place = rest.partition("/")
            if not (folder / place).is_dir():
                return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            deep = "recursive=true" in self.path.lower()
            found = sorted((folder / place).rglob("*") if deep else (folder / place).iterdir())
            return self._json([self._entry(folder, path) for path in found])
        if verb == "paths-info":
            asked = [folder / name for name in parse_qs(body.decode())["paths"]]
            return self._json([self._entry(folder, path) for path in asked if path.exists()])
        return self._json({"error": "no such call"}, 404)

    def _file(self, method: str, kind: str, repo: str, name: str, may_write: bool) -> None:
        folder = self.root / kind / repo
        if self._refused(folder, repo, may_write):
            return
        if not (folder / name).is_file():
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        whole = data = (folder / name).read_bytes()
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if first:
            data = whole[int(first) : int(last or len(whole)) + 1]
        self.send_response(206 if first else 200)
        for key, value in {"X-Repo-Commit": self._sha(folder), "ETag": f'"{hashlib.sha1(whole).hexdigest()}"',
                           "Content-Length": str(len(data)), "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.end_headers()
        if method == "GET":
            self.wfile.write(data)

    @staticmethod
    def _entry(folder: Path, path: Path) -> dict:
        size = 0 if path.is_dir() else path.stat().st_size
        return {"type": "directory" if path.is_dir() else "file", "path": str(path.relative_to(folder)), "size": size,
                "oid": "0"}

    def _refused(self, folder: Path, repo: str, may_write: bool) -> bool:
        """Answer for a repository that is not there, or not for this one."""
        if not folder.is_dir() or ("private" in repo and not may_write):
            self._json({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
            return True
        if "gated" in repo and not may_write:
            self._json({"error": "Access to it is restricted"}, 403, {"X-Error-Code": "GatedRepo"})
            return True
        return False

    def _address(self, kind: str, repo: str) -> str:
        return f"http://{self.headers['Host']}/{KINDS[kind]}{repo}"

    @staticmethod
    def _files(folder: Path) -> list[str]:
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    def _sha(self, folder: Path) -> str:
        digest = hashlib.sha1()
        for name in self._files(folder):
            digest.update(name.encode() + (folder / name).read_bytes())
        return digest.hexdigest()

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        told = {"X-Error-Message": value["error"]} if isinstance(value, dict) and "error" in value else {}
        for key, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **told,
                          **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


if __name__ == "__main__":
    Hub.root = Path(sys.argv[2])
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Hub)
    print(server.server_address[1], flush=True)
    server.serve_forever()
