"""A stand-in for the hub on the loopback address: the part of its HTTP interface that huggingface_hub uses here.

Model and dataset repositories with commits and branches; their information and trees; files by revision, with ranges, etags and
a redirect of LFS files to another host; uploads (preupload, LFS batch in one part, commit); refusals with the headers that
huggingface_hub reads. `Troubles` are switches for what goes wrong on a real line. No xet: set HF_HUB_DISABLE_XET for uploads.

Written from huggingface_hub 2.4 (`hf_api.py`, `_commit_api.py`, `lfs.py`, `file_download.py`), whose client is what is tested.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_ENDINGS = (".safetensors", ".bin", ".gguf", ".pt")
_PIECE = 1 << 18


class Blob:
    """The bytes of a file: in memory, or a file of this machine.

    Args:
        sha256: of a file that is too large to be hashed here; any 64 hex digits will do, nobody downloads it whole.
    """

    def __init__(self, content: bytes | Path, sha256: str | None = None):
        self.content = content
        self.size = content.stat().st_size if isinstance(content, Path) else len(content)
        if isinstance(content, Path):
            self.sha256 = sha256 or hashlib.sha256(content.read_bytes()).hexdigest()
        else:
            self.sha256 = hashlib.sha256(content).hexdigest()
        self.oid = hashlib.sha1(f"blob {self.size}\0{self.sha256}".encode()).hexdigest()
        if not isinstance(content, Path):
            self.oid = hashlib.sha1(f"blob {self.size}\0".encode() + content).hexdigest()

    def pieces(self, begin: int, end: int) -> Iterator[bytes]:
        if not isinstance(self.content, Path):
            for at in range(begin, end, _PIECE):
                yield self.content[at : min(end, at + _PIECE)]
            return
        with self.content.open("rb") as file:
            file.seek(begin)
            while begin < end and (piece := file.read(min(_PIECE, end - begin))):
                begin += len(piece)
                yield piece

    def read(self) -> bytes:
        return b"".join(self.pieces(0, self.size))


@dataclass
class Repo:
    """Attributes: commits: {commit: {path: Blob}}; branches: {name: commit}; token: that may read it, None for everybody;
    gated: known to all, read by nobody."""

    kind: str
    name: str
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, files: Mapping[str, Blob], branch: str = "main", keep: bool = True) -> str:
        before = self.commits.get(self.branches.get(branch, ""), {}) if keep else {}
        after = {**before, **files}
        text = json.dumps([len(self.commits), self.name, sorted((path, blob.oid) for path, blob in after.items())])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = after
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    @property
    def head(self) -> dict[str, Blob]:
        return self.commits[self.branches["main"]]


@dataclass
class Troubles:
    """What goes wrong; counters go down as it happens.

    Attributes:
        cut_after, cuts: so many bodies of ranges end after so many bytes, and their connection with them.
        dead_after: so many ranges of files are sent, then none any more: their connections end. None: for ever.
        ignore_ranges: the whole file is sent.
        wrong_etag: the etag of a file is another than its listing says.
        busy, retry_after: so many requests for files are answered 429, with so many seconds to wait.
        broken: so many requests for files are answered 503.
        bytes_per_second: of all connections together; delay: seconds before every answer.
        refuse_uploads: so many uploads of LFS objects are cut.
        failing: so many requests for what is known of a repository are answered by this status; limited: by 429 with the header
            by which the real service says that its window ends in so many seconds.
        tokens: those that are known; any other is answered 401. None: all are.
        redirect: status by which a large file is sent elsewhere. circle: it is sent to itself.
        compressed: bodies of files are gzip.
    """

    cut_after: int = 0
    cuts: int = 0
    dead_after: int | None = None
    ignore_ranges: bool = False
    wrong_etag: bool = False
    busy: int = 0
    retry_after: int = 0
    broken: int = 0
    bytes_per_second: float | None = None
    delay: float = 0.0
    refuse_uploads: int = 0
    failing: tuple[int, int] = (0, 500)
    limited: tuple[int, int] = (0, 0)
    tokens: frozenset[str] | None = None
    redirect: int = 302
    circle: bool = False
    compressed: bool = False


@dataclass(frozen=True)
class Request:
    """One answered request: `sent` bytes of its body went out."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int
    token: str | None
    host: str


class StandIn:
    """The server; `with StandIn() as hub:` runs it in threads.

    Attributes:
        url: for HF_ENDPOINT. requests: all that were answered, in order. moved: {old name: new name} of repositories.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}  # LFS objects that were uploaded and not committed yet
        self.troubles = Troubles()
        self.requests: deque[Request] = deque()
        self.lock = threading.Lock()
        self.answering = 0
        self._free_at = 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> StandIn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, files: Mapping[str, Blob | bytes | Path] | Path, kind: str = "models", **how: Any) -> Repo:
        """A repository with one commit; of a folder its files."""
        if isinstance(files, Path):
            folder = files
            files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        repo = Repo(kind, name, **how)
        repo.commit({path: blob if isinstance(blob, Blob) else Blob(blob) for path, blob in files.items()})
        self.repos[kind, name] = repo
        return repo

    def files_read(self) -> int:
        """Bytes of files that were sent, by this address or the other one; answers on their way are waited for."""
        deadline = time.monotonic() + 5
        while self.answering and time.monotonic() < deadline:
            time.sleep(0.001)
        return sum(r.sent for r in self.requests if r.method == "GET" and ("/resolve/" in r.path or "/cdn/" in r.path))

    def throttle(self, size: int) -> None:
        """Wait for the turn of so many bytes on a line that all connections share."""
        rate = self.troubles.bytes_per_second
        if not rate:
            return
        with self.lock:
            begin = max(self._free_at, time.monotonic())
            self._free_at = begin + size / rate
        time.sleep(max(0.0, self._free_at - time.monotonic()))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def hub(self) -> StandIn:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, *_: object) -> None:
        pass

    # -- answers

    def _answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self._done(status, len(body))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _done(self, status: int, sent: int) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        host = (self.headers.get("Host") or "").partition(":")[0]
        self.hub.requests.append(Request(self.command, self.path, self.headers.get("Range"), status, sent, token, host))

    def _json(self, data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._answer(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._json({"error": message}, status, headers)

    def _body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # -- what is asked

    def do_GET(self) -> None:
        with self.hub.lock:
            self.hub.answering += 1
        try:
            self._look_for()
        finally:
            with self.hub.lock:
                self.hub.answering -= 1

    do_HEAD = do_GET

    def _look_for(self) -> None:
        time.sleep(self.hub.troubles.delay)
        path = urlsplit(self.path).path
        if self._turned_away(path):
            return
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "cdn":
            sha256 = parts[1]
            blobs = (b for repo in self.hub.repos.values() for files in repo.commits.values() for b in files.values())
            blob = next((b for b in blobs if b.sha256 == sha256), None)
            if blob is None:
                self._answer(404)
            else:
                self._send(blob, {"ETag": f'"{blob.sha256[:32]}"'})  # a storage of its own has etags of its own
        elif parts == ["api", "whoami-v2"]:
            if self.headers.get("Authorization"):
                self._json({"name": "me", "type": "user", "orgs": []})
            else:
                self._refuse(401, None, "Invalid username or password.")
        elif parts[0] == "api" and parts[1] in ("models", "datasets"):
            self._about(parts)
        elif "resolve" in parts:
            kind = "datasets" if parts[0] == "datasets" else "models"
            at = parts.index("resolve")
            self._file(kind, "/".join(parts[at - 2 : at]), parts[at + 1], "/".join(parts[at + 2 :]))
        else:
            self._refuse(404, None, "Not found")

    def _turned_away(self, path: str) -> bool:
        """Whether the request is answered before anybody looks for what it asks for."""
        troubles = self.hub.troubles
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if troubles.tokens is not None and token is not None and token not in troubles.tokens:
            self._refuse(401, None, "Invalid credentials in Authorization header")
            return True
        old = next((old for old in self.hub.moved if f"/{old}" in path), None)
        if old is not None:
            self._answer(307, b"", {"Location": self.path.replace(old, self.hub.moved[old])})
            return True
        if path.startswith("/api/models/") and troubles.failing[0]:
            count, status = troubles.failing
            troubles.failing = (count - 1, status)
            self._answer(status)
            return True
        if path.startswith("/api/models/") and troubles.limited[0]:
            count, seconds = troubles.limited
            troubles.limited = (count - 1, seconds)
            self._answer(429, b"", {"RateLimit": f'"api";r=0;t={seconds}'})
            return True
        return False

    def _found(self, kind: str, name: str, revision: str) -> tuple[Repo, str] | None:
        """(repository, commit), or the refusal is sent."""
        repo = self.hub.repos.get((kind, name))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if repo is None or (repo.token is not None and token != repo.token):
            # Who may not see a repository is told the same as of one that there is not.
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        commit = repo.resolve(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, commit

    def _about(self, parts: list[str]) -> None:
        kind, name = parts[1], "/".join(parts[2:4])
        rest = parts[4:]
        revision = rest[1] if len(rest) > 1 else "main"
        found = self._found(kind, name, revision)
        if found is None:
            return
        repo, commit = found
        files = repo.commits[commit]
        if rest[:1] == ["tree"]:
            under = "/".join(rest[2:])
            deep = "recursive" in self.path and parse_qs(urlsplit(self.path).query)["recursive"][0].lower() == "true"
            rows, folders = [], set()
            for path, blob in sorted(files.items()):
                if under and not path.startswith(f"{under}/"):
                    continue
                inner = path[len(under) + 1 :] if under else path
                if "/" in inner and not deep:
                    folders.add(f"{under}/{inner.split('/')[0]}" if under else inner.split("/")[0])
                    continue
                row = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
                if path.endswith(LFS_ENDINGS):
                    row["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
                rows.append(row)
            rows += [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in sorted(folders)]
            if under and not rows:
                self._refuse(404, "EntryNotFound", f"{under} does not exist")
                return
            self._json(rows)
            return
        siblings = []
        for path, blob in sorted(files.items()):
            row: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.path:
                row |= {"size": blob.size, "blobId": blob.oid}
                if path.endswith(LFS_ENDINGS):
                    row["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}
            siblings.append(row)
        self._json(
            {"id": repo.name, "modelId": repo.name, "sha": commit, "private": repo.token is not None,
             "gated": "manual" if repo.gated else False, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
        )  # fmt: skip

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        found = self._found(kind, name, revision)
        if found is None:
            return
        repo, commit = found
        if repo.gated:
            self._refuse(403, "GatedRepo", f"Access to model {name} is restricted.")
            return
        troubles = self.hub.troubles
        if troubles.busy > 0:
            troubles.busy -= 1
            self._answer(429, b"", {"Retry-After": str(troubles.retry_after)})
            return
        if troubles.broken > 0:
            troubles.broken -= 1
            self._answer(503)
            return
        blob = repo.commits[commit].get(path)
        if blob is None:
            self._refuse(404, "EntryNotFound", f"{path} does not exist")
            return
        etag = blob.sha256 if path.endswith(LFS_ENDINGS) else blob.oid
        if troubles.wrong_etag:
            etag = "0" * len(etag)
        headers = {"X-Repo-Commit": commit}
        if path.endswith(LFS_ENDINGS):
            # Another host, as the real storage is: whoever follows must leave the token behind.
            headers |= {
                "X-Linked-Etag": f'"{etag}"',
                "X-Linked-Size": str(blob.size),
                "Location": f"http://localhost:{self.hub.port}/cdn/{blob.sha256}",
            }
            if troubles.circle:
                headers["Location"] = self.path
            self._answer(troubles.redirect, b"", headers)
        else:
            self._send(blob, {**headers, "ETag": f'"{etag}"'})

    def _send(self, blob: Blob, headers: dict[str, str]) -> None:
        troubles = self.hub.troubles
        begin, end, status = 0, blob.size, 200
        asked = self.headers.get("Range")
        if asked and not troubles.ignore_ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end, status = int(first), min(blob.size, int(last) + 1 if last else blob.size), 206
            if begin >= blob.size:
                self._answer(416, b"", {"Content-Range": f"bytes */{blob.size}"})
                return
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{blob.size}"
        if troubles.compressed:
            blob = Blob(gzip.compress(b"".join(blob.pieces(begin, end))))
            begin, end = 0, blob.size
            headers["Content-Encoding"] = "gzip"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command == "HEAD":
            self._done(status, 0)
            return
        stop = end
        if asked and troubles.cuts > 0 and end - begin > troubles.cut_after:
            troubles.cuts -= 1
            stop = begin + troubles.cut_after
        if asked and troubles.dead_after is not None:
            troubles.dead_after -= 1
            stop = stop if troubles.dead_after >= 0 else begin
        sent = 0
        try:
            for piece in blob.pieces(begin, stop):
                self.hub.throttle(len(piece))
                self.wfile.write(piece)
                sent += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        self._done(status, sent)
        if stop < end:
            self.close_connection = True

    # -- uploads

    def do_POST(self) -> None:
        body = self._body()
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif token is None:
            self._refuse(401, None, "Invalid username or password.")
        elif parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            kind = f"{asked.get('type') or 'model'}s"
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            answer = {"url": f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}", "name": name}
            if (kind, name) in self.hub.repos:
                self._json({"error": "You already created this repo", **answer}, 409)
                return
            private = asked.get("visibility") == "private" or asked.get("private")
            self.hub.add(name, {}, kind, token=token if private else None)
            self._json(answer)
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            rows = []
            known = self.hub.objects.keys() | {
                b.sha256 for r in self.hub.repos.values() for files in r.commits.values() for b in files.values()
            }
            for row in json.loads(body)["objects"]:
                rows.append(dict(row))
                if row["oid"] not in known:
                    rows[-1]["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{row['oid']}"}}
            self._json({"transfer": "basic", "objects": rows})
        elif parts[0] == "api" and len(parts) > 4 and parts[4] in ("preupload", "commit"):
            found = self._found(parts[1], "/".join(parts[2:4]), parts[5])
            if found is not None:
                (self._preupload if parts[4] == "preupload" else self._commit)(body, *found)
        else:
            self._refuse(404, None, "Not found")

    def _preupload(self, body: bytes, repo: Repo, commit: str) -> None:
        rows = []
        for file in json.loads(body)["files"]:
            lfs = file["path"].endswith(LFS_ENDINGS)
            there = repo.commits[commit].get(file["path"])
            oid = None if there is None else there.sha256 if lfs else there.oid
            rows.append(
                {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}
            )
        self._json({"files": rows})

    def _commit(self, body: bytes, repo: Repo, commit: str) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != commit:
            self._refuse(412, None, "A commit has happened since. Please refresh and try again.")
            return
        files: dict[str, Blob] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                there = self.hub.objects.get(value["oid"])
                everything = (b for r in self.hub.repos.values() for c in r.commits.values() for b in c.values())
                known = next(
                    (b for b in everything if b.sha256 == value["oid"]), None if there is None else Blob(there)
                )
                if known is None:
                    self._refuse(400, None, f"{value['path']}: its object was not uploaded")
                    return
                files[value["path"]] = known
        oid = repo.commit(files)
        self._json(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo.name}/commit/{oid}",
             "pullRequestUrl": None, "hookOutput": ""}
        )  # fmt: skip

    def do_PUT(self) -> None:
        body = self._body()
        if self.hub.troubles.refuse_uploads > 0:
            self.hub.troubles.refuse_uploads -= 1
            self._answer(400)
            return
        sha256 = self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != sha256:
            self._answer(400)
            return
        self.hub.objects[sha256] = body
        self._answer(200, b"", {"ETag": f'"{sha256}"'})


def serve(files: Mapping[str, Blob], name: str, bytes_per_second: float | None = None) -> None:
    """Serve a repository until standard input ends: its address first, then what was asked for, as JSON."""
    with StandIn() as hub:
        hub.add(name, files)
        hub.troubles.bytes_per_second = bytes_per_second
        print(hub.url, flush=True)
        sys.stdin.read()
        print(json.dumps({"requests": len(hub.requests), "bytes": hub.files_read()}))


def main() -> None:
    """python stand_in_hub.py FOLDER NAME [BYTES_PER_SECOND]: serve a folder's files."""
    folder, name, *rate = sys.argv[1:]
    # Hashes of files of many gigabytes take minutes, and nobody here downloads one whole.
    files = {p.name: Blob(p, hashlib.sha256(p.name.encode()).hexdigest()) for p in sorted(Path(folder).iterdir())}
    serve(files, name, float(rate[0]) if rate else None)


if __name__ == "__main__":
    main()
