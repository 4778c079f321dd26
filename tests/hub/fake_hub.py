"""A Hub on the loopback interface, spoken to by huggingface_hub's real client.

It holds repositories with commits, branches, tags and pull requests, takes uploads through
LFS or through Xet's own local store, and can be told to fail in the ways that matter.
"""

import base64
import hashlib
import http.server
import json
import re
import sys
import threading
import time
import urllib.parse
from pathlib import Path

from tests.hub import xet_shards

COMMIT = "c" * 40
LARGE = (".safetensors", ".bin", ".gguf", ".onnx")
TOKEN = "hf_aVeryLongSecretThatMustNeverBeShown"


class Repository:
    """Files at one commit to begin with; ``main`` and the tag ``v1`` point to it."""

    def __init__(self, files=(), commit=COMMIT, *, private=False, tags=("v1",), card=None):
        self.commits = {commit: dict(files)}
        self.branches = {"main": commit}
        self.tags = dict.fromkeys(tags, commit)
        self.pulls = {}
        self.log = []
        self.private = private
        self.card = card

    @property
    def commit(self):
        return self.branches["main"]

    @property
    def files(self):
        return self.commits[self.commit]

    def find(self, revision):
        names = self.branches | self.tags | self.pulls
        commit = names.get(revision, revision)
        return commit if commit in self.commits else None

    def add_commit(self, branch, parent, files, summary):
        seed = f"{parent}{summary}{sorted(files)}{len(self.log)}".encode()
        commit = hashlib.sha1(seed).hexdigest()
        self.commits[commit] = files
        self.log.append((branch, summary))
        return commit


def entry(path, data, xet):
    item = {"type": "file", "path": path, "size": len(data)}
    item["oid"] = git_oid(data)
    if path.endswith(LARGE):
        digest = hashlib.sha256(data).hexdigest()
        item["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
        if digest in xet:
            item["xetHash"] = xet[digest]
    return item


def git_oid(data):
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves repositories; ``requests`` holds what was asked for.

    ``failing`` answers everything with that status; ``corrupt`` names files whose bytes are
    changed on their way to the client, ``slow`` those that hang for a while, ``stored_wrong``
    those that are kept otherwise than they came; ``broken_uploads`` is how many uploads fail
    from now on.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}
        self.gated = set()
        self.failing = None
        self.corrupt = set()
        self.slow = set()
        self.stored_wrong = set()
        self.broken_uploads = 0
        self.meanwhile = None
        self.read_only = set()
        self.objects = {}
        self.xet_hashes = {}
        self.xet_store = None
        self.known = {}
        self.requests = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that was killed, or has seen enough, is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def bodies(self):
        """Paths of the files whose content was fetched."""
        found = (
            re.search(r"/resolve/[^/]+/(.+)", path) for way, path in self.requests if way == "GET"
        )
        return sorted(match[1] for match in found if match)

    def uploads(self):
        """How many contents were sent to the LFS store."""
        return sum(way == "PUT" for way, path in self.requests)


def serve():
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    return server, thread


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        url = urllib.parse.urlsplit(self.path)
        path = url.path
        self.query = urllib.parse.parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, path))
        if self.server.failing:
            return self.send(self.server.failing, b"out of order")
        if self.command in ("POST", "PUT"):
            return self.write(path)
        match = re.fullmatch(
            r"(?P<api>/api/models)?/(?P<repo>[^/]+/[^/]+)"
            r"(/(?P<what>revision|tree|resolve|refs|xet-read-token|xet-write-token)"
            r"(/(?P<revision>[^/]+)(/(?P<file>.+))?)?)?",
            path,
        )
        return self.repository(**match.groupdict()) if match else self.send(404, b"{}")

    # Reading

    def repository(self, api, repo, what, revision, file):
        if repo in self.server.gated and what != "revision" and what is not None:
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and not self.authorized()):
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if what == "refs":
            return self.refs(repository)
        commit = repository.find(urllib.parse.unquote(revision or "main"))
        if commit is None:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if what and what.startswith("xet-"):
            return self.xet_token()
        files = repository.commits[commit]
        if api and what == "tree":
            xet = self.server.xet_hashes
            return self.json([entry(path, files[path], xet) for path in sorted(files)])
        if api:
            siblings = [{"rfilename": path} for path in sorted(files)]
            gated = "manual" if repo in self.server.gated else False
            return self.json(
                {"id": repo, "sha": commit, "siblings": siblings, "tags": [],
                 "private": repository.private, "downloads": 0, "likes": 0,
                 "cardData": repository.card, "gated": gated}
            )  # fmt: skip
        return self.file(files, commit, urllib.parse.unquote(file), repo)

    def authorized(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def refs(self, repository):
        def of(names, kind):
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}
                for name, commit in names.items()
            ]

        self.json(
            {"branches": of(repository.branches, "heads"), "converts": [],
             "tags": of(repository.tags, "tags"), "pullRequests": []}
        )  # fmt: skip

    def xet_token(self):
        store = f"local://{self.server.xet_store}"
        token = {"accessToken": "x", "exp": 4_000_000_000, "casUrl": store}
        self.send(
            200, json.dumps(token).encode(),
            {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "x",
             "X-Xet-Token-Expiration": "4000000000", "Content-Type": "application/json"},
        )  # fmt: skip

    def file(self, files, commit, path, repo):
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            return self.send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        data = files[path]
        item = entry(path, data, self.server.xet_hashes)
        digest = item["lfs"]["oid"] if "lfs" in item else item["oid"]
        headers |= {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if "lfs" in item:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(item["size"])}
        if "xetHash" in item:
            route = f"{self.server.endpoint}/api/models/{repo}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": item["xetHash"], "X-Xet-Refresh-Route": route}
        if path in self.server.slow and self.command == "GET":
            time.sleep(20)
        if path in self.server.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.send(206, data[first : last + 1], headers)
        return self.send(200, data, headers)

    # Writing

    def write(self, path):
        if path == "/api/validate-yaml":
            return self.validate(json.loads(self.body)["content"])
        if path.startswith("/lfs/"):
            return self.lfs_object(path.removeprefix("/lfs/"))
        if not self.authorized():
            return self.send(401, b'{"error": "Invalid username or password."}')
        if path == "/api/repos/create":
            return self.create(json.loads(self.body))
        match = re.fullmatch(
            r"(/api/models)?/(?P<repo>[^/]+/[^/]+?)(\.git)?/(?P<what>preupload|commit|tag|branch|"
            r"info/lfs/objects/batch)(/(?P<revision>[^/]+))?",
            path,
        )
        repository = self.server.repositories.get(match["repo"]) if match else None
        if repository is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if match["repo"] in self.server.read_only and "create_pr" not in self.query:
            return self.send(403, b'{"error": "You have read access only."}')
        revision = urllib.parse.unquote(match["revision"] or "main")
        name = match["what"].rpartition("/")[2]
        return getattr(self, f"post_{name}")(repository, match["repo"], revision)

    def validate(self, text):
        front = re.match(r"---\n(.*?)\n---\n", text, re.S)
        bad = front and re.search(r"^base_model:\s*['\"]?[/.]", front[1], re.M)
        if bad:
            message = '"base_model" is not valid. Use a model id from https://hf.co/models.'
            errors = [{"message": message}]
            return self.send(400, json.dumps({"errors": errors, "warnings": []}).encode())
        return self.json({"errors": [], "warnings": []})

    def create(self, wanted):
        repo = f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.server.endpoint}/{repo}"
        if repo in self.server.repositories:
            return self.send(409, json.dumps({"url": url, "error": "exists"}).encode())
        if wanted["organization"] in self.server.read_only:
            return self.send(403, b'{"error": "You may not create a repository there."}')
        private = wanted.get("visibility") == "private"
        self.server.repositories[repo] = Repository(
            {".gitattributes": b"*.safetensors filter=lfs\n"}, "1" * 40, private=private, tags=()
        )
        return self.json({"url": url})

    def post_preupload(self, repository, repo, revision):
        files = repository.commits[repository.find(revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            path, large = file["path"], file["path"].endswith(LARGE)
            here = files.get(path)
            oid = None
            if here is not None:
                oid = hashlib.sha256(here).hexdigest() if large else git_oid(here)
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": answers})

    def post_batch(self, repository, repo, revision):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            item = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                href = f"{self.server.endpoint}/lfs/{wanted['oid']}"
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(item)
        self.json({"transfer": "basic", "objects": objects})

    def lfs_object(self, name):
        oid, _, verify = name.partition("/")
        if verify:
            wanted = json.loads(self.body)
            held = len(self.server.objects.get(oid, b"")) == wanted["size"]
            return self.json({}) if held else self.send(404, b"{}")
        if self.server.broken_uploads > 0:
            self.server.broken_uploads -= 1
            return self.send(400, b'{"error": "the connection broke"}')
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        return self.send(200, b"")

    def post_commit(self, repository, repo, revision):
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if self.server.meanwhile:
            self.server.meanwhile(repository)
        head = repository.find(revision)
        parent = header.get("parentCommit")
        pull = "create_pr" in self.query
        if parent and parent != head and not pull:
            return self.send(412, b'{"error": "A commit has happened since."}')
        files = dict(repository.commits[head])
        for line in lines[1:]:
            self.apply(files, line["key"], line["value"])
        commit = repository.add_commit(revision, head, files, header["summary"])
        answer = {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{commit}"}
        answer["commitOid"] = commit
        if pull:
            number = len(repository.pulls) + 1
            repository.pulls[f"refs/pr/{number}"] = commit
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{repo}/discussions/{number}"
        else:
            repository.branches[revision] = commit
        return self.json(answer)

    def apply(self, files, key, value):
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[path] = self.large(value["oid"], value["size"])
        elif key == "deletedFile":
            del files[path]
        if path in self.server.stored_wrong:
            files[path] = bytes([files[path][0] ^ 1]) + files[path][1:]

    def large(self, oid, size):
        if self.server.xet_store is None:
            return self.server.objects[oid]
        self.server.xet_hashes |= xet_shards.hashes(self.server.xet_store)
        assert oid in self.server.xet_hashes
        return self.server.known[oid]

    def post_tag(self, repository, repo, revision):
        tag = json.loads(self.body)["tag"]
        if tag in repository.tags:
            return self.send(409, b'{"error": "Tag reference exists already"}')
        repository.tags[tag] = repository.find(revision)
        return self.json({})

    def post_branch(self, repository, repo, revision):
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        if revision in repository.branches:
            return self.send(409, b'{"error": "Reference already exists"}')
        repository.branches[revision] = repository.find(start)
        return self.json({})

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
        for path in Path(directory).rglob("*")
        if path.is_file()
    }
