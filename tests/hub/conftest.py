"""A Hub on the loopback interface, spoken to by huggingface_hub's real client."""

import hashlib
import http.server
import json
import re
import threading

import pytest

from loraformat.ops.convert import convert

COMMIT = "c" * 40


class Repository:
    """Files at one commit; the branch ``main`` and the tag ``v1`` point to it."""

    def __init__(self, files, commit=COMMIT):
        self.files = files
        self.commit = commit
        self.revisions = {"main", "v1", commit}

    def entry(self, path):
        data = self.files[path]
        header = f"blob {len(data)}\0".encode()
        entry = {"type": "file", "path": path, "size": len(data)}
        entry["oid"] = hashlib.sha1(header + data).hexdigest()
        if path.endswith((".safetensors", ".bin", ".gguf", ".onnx")):
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
        return entry


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves repositories; ``requests`` holds what was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}
        self.gated = set()
        self.failing = None
        self.requests = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def bodies(self):
        """Paths of the files whose content was fetched."""
        found = (
            re.search(r"/resolve/[^/]+/(.+)", path) for way, path in self.requests if way == "GET"
        )
        return sorted(match[1] for match in found if match)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path))
        if self.server.failing:
            return self.send(self.server.failing, b"out of order")
        match = re.fullmatch(
            r"(?P<api>/api/models)?/(?P<repo>[^/]+/[^/]+)"
            r"(/(?P<what>revision|tree|resolve)/(?P<revision>[^/]+)(/(?P<file>.+))?)?",
            path,
        )
        return self.repository(**match.groupdict()) if match else self.send(404, b"{}")

    def repository(self, api, repo, what, revision, file):
        if repo in self.server.gated and what != "revision" and what is not None:
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        repository = self.server.repositories.get(repo)
        if repository is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision is not None and revision not in repository.revisions:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if api and what == "tree":
            return self.json([repository.entry(path) for path in sorted(repository.files)])
        if api:
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            return self.json(
                {"id": repo, "sha": repository.commit, "siblings": siblings, "tags": [],
                 "private": False, "downloads": 0, "likes": 0}
            )  # fmt: skip
        return self.file(repository, file)

    def file(self, repository, path):
        headers = {"X-Repo-Commit": repository.commit}
        if path not in repository.files:
            return self.send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        entry = repository.entry(path)
        digest = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers |= {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(entry["size"])}
        data = repository.files[path]
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.send(206, data[first : last + 1], headers)
        return self.send(200, data, headers)

    def json(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def files_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def hub(model):
    """A Hub with ``org/dense``, and in it files that nobody wants."""
    server = FakeHub()
    files = files_of(model)
    for unwanted in ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", "original/params.json"):
        files[unwanted] = b"unwanted"
    files["README.md"] = b"# A model\n"
    server.repositories["org/dense"] = Repository(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub_bundle(hub, model, tmp_path):
    """The bundle ``org/bundle`` on that Hub."""
    convert(model, tmp_path / "bundle", shard_limit=6_000)
    hub.repositories["org/bundle"] = Repository(files_of(tmp_path / "bundle"), "b" * 40)
    return tmp_path / "bundle"


@pytest.fixture
def ask(command, hub):
    """Runs the command line against that Hub."""

    def run(*arguments, **environment):
        return command(*arguments, env={"HF_ENDPOINT": hub.endpoint, **environment})

    return run
