"""A Hub on loopback: as much of it as huggingface_hub needs to create, fill and read model repositories.

Repositories live in memory. `trouble` makes a route fail: a status to answer with, or "hang up" to break the
connection, or "break off" to break it amid a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".png")  # uploaded before the commit, and named by it


class Hub(ThreadingHTTPServer):
    """`repos` maps an id to its commits, oldest first, each a dict from path to content."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.blobs: dict[str, bytes] = {}  # finished uploads of large files, by their sha256
        self.trouble: dict[str, int | str] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.closed = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        """From now on nobody listens, on open connections neither."""
        self.closed = True
        self.shutdown()
        self.server_close()

    def environment(self, home) -> dict[str, str]:
        """What a process needs to talk to this Hub, with an empty cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": "x", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}


def commit_id(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def file_id(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else git_id(content)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, status: int, content: dict | list | bytes = b"", **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        routes = ((re.fullmatch(pattern, path), name) for verbs, pattern, name in ROUTES if self.command in verbs)
        found, name = next((route for route in routes if route[0]), (None, None))
        if found is None:
            return self.refuse(404, "NotFound", f"no such route: {self.command} {path}")
        trouble = self.server.trouble.get(name)
        if trouble == "hang up" or self.server.closed:
            self.close_connection = True
            return self.connection.close()
        if isinstance(trouble, int):
            return self.refuse(trouble, "Trouble", "You are not allowed to do this.")
        if self.command in ("POST", "PUT") and not self.headers.get("Authorization") and name != "put":
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        repo = found.groupdict().get("repo")
        if repo is not None and repo not in self.server.repos:
            status = 404 if self.headers.get("Authorization") else 401
            return self.refuse(status, "RepoNotFound", "Repository not found")
        getattr(self, name)(body, **found.groupdict())

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    # Writing.

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        status = 409 if repo in self.server.repos else 200
        self.server.repos.setdefault(repo, [{}])
        self.answer(status, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def validate(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        head = self.server.repos[repo][-1]
        files = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(LARGE) else "regular"
            known = {"oid": file_id(path, head[path])} if path in head else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self.answer(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/upload/{asked['oid']}", "header": {}}}
            missing = asked["oid"] not in self.server.blobs
            objects.append({**asked, **({"actions": upload} if missing else {})})
        self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def put(self, body: bytes, name: str) -> None:
        if hashlib.sha256(body).hexdigest() != name:
            return self.refuse(422, "BadContent", "The content is not that of its name.")
        self.server.blobs[name] = body
        self.answer(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        commits = self.server.repos[repo]
        files = dict(commits[-1])
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    return self.refuse(400, "Missing", f"{value['path']} was not uploaded.")
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
        commits.append(files)
        sha = commit_id(repo, len(commits) - 1)
        self.answer(200, {"commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "hookOutput": ""})

    # Reading.

    def files(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes] | None]:
        commits = self.server.repos[repo]
        ids = [commit_id(repo, number) for number in range(len(commits))]
        if revision in (None, "main"):
            return ids[-1], commits[-1]
        if revision in ids:
            return revision, commits[ids.index(revision)]
        self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return revision, None

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        sha, files = self.files(repo, revision)
        if files is not None:
            siblings = [{"rfilename": path} for path in sorted(files)]
            self.answer(200, {"_id": "0" * 24, "id": repo, "sha": sha, "private": False, "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        _, files = self.files(repo, revision)
        if files is not None:
            entries = []
            for path, content in sorted(files.items()):
                large = {"oid": file_id(path, content), "size": len(content), "pointerSize": 100}
                extra = {"lfs": large} if path.endswith(LARGE) else {}
                entries.append({"type": "file", "path": path, "size": len(content), "oid": git_id(content), **extra})
            self.answer(200, entries)

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        sha, files = self.files(repo, revision)
        if files is None:
            return
        if path not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="No such file", X_Repo_Commit=sha)
        content, headers = files[path], {"ETag": f'"{file_id(path, files[path])}"', "X_Repo_Commit": sha}
        if path.endswith(LARGE):
            headers |= {"X_Linked_Etag": headers["ETag"], "X_Linked_Size": str(len(content))}
        if begin := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            headers["Content_Range"] = f"bytes {begin[1]}-{len(content) - 1}/{len(content)}"
            return self.answer(206, content[int(begin[1]) :], **headers)
        if self.server.trouble.get("resolve") == "break off" and self.command == "GET":
            self.close_connection = True
            return self.answer(200, content[:-1], **headers, Content_Length=str(len(content)))
        self.answer(200, content, **headers)


REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), r"/api/validate-yaml", "validate"),
    (("POST",), rf"/api/models/{REPO}/preupload/{REVISION}", "preupload"),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    (("PUT",), r"/upload/(?P<name>[0-9a-f]{64})", "put"),
    (("POST",), rf"/api/models/{REPO}/commit/{REVISION}", "commit"),
    (("GET",), rf"/api/models/{REPO}/tree/{REVISION}", "tree"),
    (("GET",), rf"/api/models/{REPO}(?:/revision/{REVISION})?", "info"),
    (("GET", "HEAD"), rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
]
