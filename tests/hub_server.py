"""A Hugging Face Hub on loopback: as much of its API as the real client needs to publish and to fetch repositories.

Models and datasets live in memory, with commits, branches and tags, and with large files by the LFS protocol. A test
looks at what came in (`requests`, `repos`) and says what is to fail: always (`faults`), or at a request that it counts
(`plan`).
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from urllib.parse import parse_qs, unquote

import yaml
from hub_faults import PlannedFaults
from hub_http import Handler, Listener, Reply, Request, error, ranged
from hub_repositories import Blob, Repo, entry, folder_entry, folders_of, is_large

USER, TOKEN = "user", "hf_loopback_token"
ORGANISATION = "lab"  # which the user may write to
TIME = "2026-01-01T00:00:00.000Z"


class HubServer(PlannedFaults):
    """Serves while its `with` block lasts.

    Args:
        token: the one that it knows; requests with another are refused, as are writes without one.

    Attributes:
        url: for `HF_ENDPOINT`.
        repos: (kind, name) -> repository; kind is "model", "dataset", or "space", of which files can be read alone.
        requests: (method, path) of all requests so far.
        authorizations, ranges: all that came in these headers.
        faults: (method, pattern of the path) -> the reply that is given instead.
        licenses: those that a card may name.
    """

    def __init__(self, token: str = TOKEN) -> None:
        super().__init__()
        self.token = token
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.authorizations: set[str | None] = set()
        self.ranges: list[str] = []
        self.faults: dict[tuple[str, str], Reply] = {}
        self.licenses = {"apache-2.0", "mit", "odc-by", "other"}
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.num_late, self.settling = 0, threading.Condition()
        self._http = Listener(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Listens no more, also on connections that are open."""
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def add_repo(self, kind: str, name: str, files: Mapping[str, bytes] | None = None, private: bool = False) -> Repo:
        """A repository with one commit on main."""
        repo = self.repos[kind, name] = Repo(kind, name, private)
        blobs = {path: Blob(content, is_large(path, len(content))) for path, content in (files or {}).items()}
        self.large |= {blob.sha256: blob.content for blob in blobs.values() if blob.is_large}
        repo.commit("main", "initial commit", {".gitattributes": Blob(b"", False), **blobs})
        return repo

    def dataset(self, name: str) -> Repo:
        return self.repos["dataset", name]

    def model(self, name: str) -> Repo:
        return self.repos["model", name]

    def count(self, method: str, pattern: str) -> int:
        """Requests whose path has the pattern in it."""
        return sum(asked == method and re.search(pattern, path) is not None for asked, path in self.requests)

    # Answers

    def settle(self) -> None:
        """Waits until what is answered late is done, also where nobody waits for the answer any more."""
        with self.settling:
            self.settling.wait_for(lambda: self.num_late == 0)

    def handle_late(self, request: Request) -> Reply:
        """Does what is asked for after a while."""
        with self.settling:
            self.num_late += 1
        try:
            time.sleep(self.slowness)
            return self.handle(request)
        finally:
            with self.settling:
                self.num_late -= 1
                self.settling.notify_all()

    def handle(self, request: Request) -> Reply:
        authorization = request.headers.get("Authorization")
        with self.lock:
            self.requests.append((request.method, request.path))
            self.authorizations.add(authorization)
            self.ranges += [request.headers["Range"]] if "Range" in request.headers else []
            for (method, pattern), reply in self.faults.items():
                if method == request.method and re.search(pattern, request.path):
                    return reply
            if authorization not in (None, f"Bearer {self.token}"):
                return error(401, "", "Invalid credentials in Authorization header")
            for pattern, methods, answer in ROUTES:
                match = re.fullmatch(pattern, request.path)
                if match and request.method in methods:
                    return answer(self, request, **match.groupdict(default=""))
        return error(404, "", f"no such page: {request.path}")

    def is_signed_in(self, request: Request) -> bool:
        return request.headers.get("Authorization") is not None

    def whoami(self, request: Request) -> Reply:
        if not self.is_signed_in(request):
            return error(401, "", "Invalid username or password.")
        return Reply({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self, request: Request) -> Reply:
        if not self.is_signed_in(request):
            return error(401, "", "Invalid username or password.")
        wanted = request.json
        owner = wanted.get("organization") or USER
        kind, name = wanted.get("type") or "model", f"{owner}/{wanted['name']}"
        where = {"url": f"{self.url}/{'' if kind == 'model' else 'datasets/'}{name}"}
        if owner not in (USER, ORGANISATION):
            message = f'You don\'t have the rights to create a {kind} under the namespace "{owner}"'
            return error(403, "", message)
        if (kind, name) in self.repos:
            return Reply({"error": f"You already created this {kind} repo", **where}, 409)
        self.add_repo(kind, name, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return Reply({**where, "name": name})

    def validate_yaml(self, request: Request) -> Reply:
        header = re.match(r"---\n(.*?)\n---\n", request.json["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(header.group(1)) if header else {}
        except yaml.YAMLError as problem:
            return Reply({"errors": [{"message": str(problem)}], "warnings": []}, 400)
        wrong = [] if isinstance(metadata, dict) else [{"message": "the metadata must be a mapping"}]
        named = (metadata or {}).get("license", "other")
        if not wrong and not self.licenses.issuperset(named if isinstance(named, list) else [named]):
            wrong = [{"message": '"license" must be one of [apache-2.0, mit, ...]'}]
        return Reply({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def found(self, request: Request, kind: str, name: str) -> Repo | None:
        """The repository, if it is there and its name may be known to the one who asks."""
        repo = self.repos.get((kind, name))
        return repo if repo is not None and (self.is_signed_in(request) or not repo.private) else None

    def in_repo(self, request: Request, kind: str, name: str, action: str, rest: str) -> Reply:
        """Answers what is asked of one repository by the API."""
        repo = self.found(request, kind, name)
        if repo is None:
            return error(404 if self.is_signed_in(request) else 401, "RepoNotFound", "Repository not found")
        writes = {"preupload", "commit", "branch", "tag"}
        if action in writes and request.method in ("POST", "DELETE"):
            if not self.is_signed_in(request):
                return error(401, "", "Invalid username or password.")
            if not name.startswith((f"{USER}/", f"{ORGANISATION}/")):
                return error(403, "", f"You have no write access to {name}")
        return ACTIONS[action](self, request, repo, rest if action == "tree" else unquote(rest))

    def info(self, request: Request, repo: Repo, revision: str) -> Reply:
        commit = repo.at(revision or "main")
        if commit is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        card = commit.files.get("README.md")
        header = re.match(rb"---\n(.*?)\n---\n", card.content, re.DOTALL) if card else None
        return Reply(
            {
                "_id": commit.oid[:24], "id": repo.name, "modelId": repo.name, "sha": commit.oid,
                "private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
                "author": repo.name.split("/")[0], "createdAt": TIME, "lastModified": TIME,
                "cardData": yaml.safe_load(header.group(1)) if header else {},
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )  # fmt: skip

    def tree(self, request: Request, repo: Repo, rest: str) -> Reply:
        revision, _, folder = (unquote(part) for part in rest.partition("/"))
        commit = repo.at(revision)
        if commit is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        below = {path: blob for path, blob in commit.files.items() if path.startswith(prefix)}
        if folder and not below:
            return error(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {path: entry(path, blob) for path, blob in below.items()}
        parents = {parent for path in below for parent in folders_of(path) if parent.startswith(prefix)}
        entries |= {path: folder_entry(path) for path in parents}
        return Reply([entries[path] for path in sorted(entries) if recursive or "/" not in path[len(prefix) :]])

    def paths_info(self, request: Request, repo: Repo, revision: str) -> Reply:
        commit = repo.at(revision)
        if commit is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        wanted = parse_qs(request.body.decode()).get("paths", [])
        parents = {parent for path in commit.files for parent in folders_of(path)}
        files = [entry(path, commit.files[path]) for path in wanted if path in commit.files]
        return Reply(files + [folder_entry(path) for path in wanted if path in parents])

    def refs(self, request: Request, repo: Repo, _rest: str) -> Reply:
        def listed(refs: Mapping[str, str], where: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        branches, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
        return Reply({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def commits(self, request: Request, repo: Repo, revision: str) -> Reply:
        if repo.at(revision) is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return Reply(
            [
                {"id": commit.oid, "title": commit.title, "message": "", "date": TIME, "authors": [{"user": USER}]}
                for commit in reversed(repo.commits)
            ]
        )

    def branch(self, request: Request, repo: Repo, name: str) -> Reply:
        if name in repo.branches:
            return error(409, "", f"Reference already exists: {name}")
        start = repo.at((request.json if request.body else {}).get("startingPoint") or "main")
        if start is None:
            return error(404, "RevisionNotFound", "Invalid starting point")
        repo.branches[name] = start.oid
        return Reply({})

    def tag(self, request: Request, repo: Repo, revision: str) -> Reply:
        commit, name = repo.at(revision), request.json["tag"]
        if commit is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name in repo.tags:
            return error(409, "", f"Tag reference exists already: {name}")
        repo.tags[name] = commit.oid
        return Reply({})

    def preupload(self, request: Request, repo: Repo, revision: str) -> Reply:
        """Says of each file how it is to come, and the hash of the one that is there under its name."""
        commit = repo.at(revision)
        if commit is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = []
        for file in request.json["files"]:
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            there = commit.files.get(file["path"])
            oid = None if there is None else there.sha256 if there.is_large else there.git_oid
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Reply({"files": files})

    def lfs_batch(self, request: Request, **_repo: str) -> Reply:
        if not self.is_signed_in(request):
            return error(401, "", "Invalid username or password.")
        objects = []
        for wanted in request.json["objects"]:
            actions = {"upload": {"href": f"{self.url}/large/{wanted['oid']}", "header": {}}}
            known = wanted["oid"] in self.large
            objects.append({**wanted, "authenticated": True} | ({} if known else {"actions": actions}))
        return Reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, oid: str) -> Reply:
        if hashlib.sha256(request.body).hexdigest() != oid:
            return error(400, "", "the content does not have this hash")
        self.large[oid] = request.body
        return Reply()

    def make_commit(self, request: Request, repo: Repo, branch: str) -> Reply:
        if branch not in repo.branches:
            return error(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        before = repo.at(branch)
        assert before is not None
        files, title = dict(before.files), ""
        for line in request.body.splitlines():
            item = json.loads(line)
            value, path = item["value"], item["value"].get("path", "")
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, before.oid):
                    return error(412, "", "A commit has happened since")
            elif item["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    return error(400, "", f"LFS pointer of {path} points to a file that does not exist")
                files[path] = Blob(self.large[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del files[path]
            elif item["key"] == "deletedFolder":
                files = {name: blob for name, blob in files.items() if not name.startswith(path)}
        pull_request = {}
        if "create_pr" in request.query:
            branch = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.branches)}"
            where = f"{self.url}/{repo.name}/discussions/{branch.rpartition('/')[2]}"
            pull_request = {"pullRequestUrl": where}
        commit = repo.commit(branch, title, files)
        prefix = "" if repo.kind == "model" else "datasets/"
        url = f"{self.url}/{prefix}{repo.name}/commit/{commit.oid}"
        return Reply({"success": True, "commitOid": commit.oid, "commitUrl": url, **pull_request})

    def resolve(self, request: Request, name: str, rest: str, prefix: str = "") -> Reply:
        """A file, whole or a range of it."""
        repo = self.found(request, {"datasets/": "dataset", "spaces/": "space"}.get(prefix, "model"), name)
        if repo is None:
            return error(404 if self.is_signed_in(request) else 401, "RepoNotFound", "Repository not found")
        # a slash in the name of a branch comes encoded
        revision, path = (unquote(part) for part in rest.split("/", maxsplit=1))
        commit = repo.at(revision)
        if commit is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in commit.files:
            missing = error(404, "EntryNotFound", "Entry not found")
            return missing._replace(headers={**missing.headers, "X-Repo-Commit": commit.oid})
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.git_oid}"', "Accept-Ranges": "bytes"}
        if blob.is_large:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        return ranged(blob.content, request.headers.get("Range"), headers)


ACTIONS: dict[str, Callable[[HubServer, Request, Repo, str], Reply]] = {
    "": HubServer.info,
    "revision": HubServer.info,
    "tree": HubServer.tree,
    "paths-info": HubServer.paths_info,
    "refs": HubServer.refs,
    "commits": HubServer.commits,
    "branch": HubServer.branch,
    "tag": HubServer.tag,
    "preupload": HubServer.preupload,
    "commit": HubServer.make_commit,
}
NAME = r"(?P<name>[^/]+(?:/[^/]+)?)"


def _api(hub: HubServer, request: Request, kind: str, path: str) -> Reply:
    """Splits `name[/action[/rest]]`; a name has one part or two, so the repositories that are there decide."""
    parts = path.split("/")
    for length in (2, 1):
        name, action, rest = "/".join(parts[:length]), "".join(parts[length : length + 1]), parts[length + 1 :]
        if action in ACTIONS and (length == 2 or (kind, name) in hub.repos):
            return hub.in_repo(request, kind, name, action, "/".join(rest))
    return error(404, "RepoNotFound", "Repository not found")


ROUTES: list[tuple[str, tuple[str, ...], Callable[..., Reply]]] = [
    ("/api/whoami-v2", ("GET",), HubServer.whoami),
    ("/api/repos/create", ("POST",), HubServer.create),
    ("/api/validate-yaml", ("POST",), HubServer.validate_yaml),
    (r"/api/(?P<kind>model|dataset)s/(?P<path>.+)", ("GET", "POST", "DELETE"), _api),
    (rf"/(?:datasets/)?{NAME}\.git/info/lfs/objects/batch", ("POST",), HubServer.lfs_batch),
    (r"/large/(?P<oid>[0-9a-f]{64})", ("PUT",), HubServer.lfs_put),
    (rf"/(?P<prefix>datasets/|spaces/){NAME}/resolve/(?P<rest>.+)", ("GET", "HEAD"), HubServer.resolve),
    (rf"/{NAME}/resolve/(?P<rest>.+)", ("GET", "HEAD"), HubServer.resolve),
]
