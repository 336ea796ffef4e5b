"""Where files may come from: hubs that speak Hugging Face's protocol, ModelScope, a mirror folder. Names, not bytes.

A source answers two questions: what a repository holds at a revision (a listing with a full commit, sizes and hashes),
and under which address one file is served. What a server says is checked here before anything is built from it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from glmchat.core.errors import Damaged, Failed, GlmchatError, NetworkFailed, Usage
from glmchat.core.http import host_of, make_client, network_error, without_password
from glmchat.core.http_bounds import Bounds
from glmchat.core.language import tr
from glmchat.core.locations import user_path
from glmchat.core.text import one_line
from glmchat.hub.catalogue import KnownFile
from glmchat.hub.fetch import LONGEST_WAIT, asked_wait
from glmchat.hub.hf_token import refused_hint, refused_words, token, without_words
from glmchat.hub.mirror_folder import MirrorFolder
from glmchat.hub.references import checked_repo, is_commit
from glmchat.hub.safe_paths import check_listing

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DEFAULT = "https://huggingface.co"
MODELSCOPE = "https://www.modelscope.cn"
_TIMEOUT = 15.0  # seconds for a listing
_TRIES = 5  # of a listing, where the hub says each time when it may be asked again


@dataclass(frozen=True, slots=True)
class HubEndpoint:
    """One place that serves repositories."""

    kind: str  # "hf" | "modelscope" | "folder"
    address: str  # https://host[/path] without a slash at the end, or an absolute folder
    sends_token: bool = False  # the user's Hugging Face token goes to the hub and to $HF_ENDPOINT, to no other mirror

    @property
    def label(self) -> str:
        """How messages and manifests call it; never with a password."""
        return self.address if self.kind == "folder" else host_of(self.address)

    def url(self, repo: str, revision: str, path: str) -> str:
        """The address of one file on an HTTP endpoint."""
        middle = "models/" if self.kind == "modelscope" else ""
        return f"{self.address}/{middle}{quote(repo)}/resolve/{quote(revision, safe='')}/{quote(path)}"


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds at one revision, as an endpoint told."""

    repo: str  # the name asked for
    commit: str  # full commit; for ModelScope the revision asked for
    files: tuple[KnownFile, ...]
    endpoint: HubEndpoint
    canonical: str = ""  # the repository's present name, if it was renamed
    notes: tuple[str, ...] = ()  # what the user should know of how it was had


def parse_endpoint(text: str) -> HubEndpoint:
    """An --endpoint or a line of the config: an address, a folder, or the word `modelscope`. Raises Usage."""
    text = text.strip()
    if text.lower() == "modelscope":
        return HubEndpoint("modelscope", MODELSCOPE)
    if re.match(r"https?://", text):
        try:
            parts = urlsplit(text)
            host = (parts.hostname or "") if parts.port != 0 else ""  # .port raises for what is none
        except ValueError:
            host = ""
        if host:
            kind = "modelscope" if host.endswith(("modelscope.cn", "modelscope.ai")) else "hf"
            return HubEndpoint(kind, text.rstrip("/"), sends_token=_gets_token(text))
    elif text and "://" not in text:
        folder = user_path(text.removeprefix("file:"))
        if folder.is_dir():
            return HubEndpoint("folder", str(folder.absolute()))
        raise Usage(
            tr("there is no folder {path} to pull from", path=one_line(text)),
            hint=tr("an endpoint is https://host, a mirror folder, or modelscope"),
            code="pull.endpoint",
        )
    raise Usage(
        tr("{text} is not an endpoint", text=repr(one_line(without_password(text).partition("?")[0], 80))),
        hint=tr("an endpoint is https://host, a mirror folder, or modelscope"),
        code="pull.endpoint",
    )


def endpoints(explicit: Sequence[str], configured: Sequence[str]) -> list[HubEndpoint]:
    """The places to ask, in order: --endpoint, else the config's list, else $HF_ENDPOINT, else the hub itself.

    With --endpoint nobody else is asked: a machine in a rack must not reach for the internet.
    """
    chosen = [parse_endpoint(text) for text in (explicit or configured)]
    if explicit:
        return _distinct(chosen)
    chosen = chosen or [parse_endpoint(os.environ.get("HF_ENDPOINT") or DEFAULT)]
    if os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "yes", "on"):
        chosen.insert(0, HubEndpoint("modelscope", MODELSCOPE))
    return _distinct(chosen)


def offline() -> bool:
    """True if the user said so to every Hugging Face tool, by huggingface_hub's rule: the second variable counts only
    where the first is absent or empty."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.lower() in ("1", "true", "yes", "on")


# (why, seconds): called where a hub asks to be left alone for a time; returns when it may be asked again. 0 seconds:
# a download waits by itself, and only the why is to be told.
Wait = Callable[[str, float], None]


def sleep_silently(why: str, seconds: float) -> None:
    """A `Wait` for callers that have nobody to tell."""
    time.sleep(seconds)


def read_listing(
    places: Sequence[HubEndpoint], repo: str, revision: str | None, wait: Wait = sleep_silently
) -> Listing:
    """Ask the endpoints in order what `repo` holds; the first that answers decides.

    Raises NetworkFailed (nobody could be reached), Failed (nobody has it, or it needs a token), Damaged (nonsense).
    """
    if offline() and all(p.kind != "folder" for p in places):
        raise NetworkFailed(
            tr("HF_HUB_OFFLINE is set, and {repo} is not in the catalogue", repo=repo),
            hint=tr("unset HF_HUB_OFFLINE, or pull from a mirror folder with --endpoint"),
            code="pull.offline",
        )
    problems: list[GlmchatError] = []
    for place in places:
        try:
            return _ask(place, repo, revision, wait)
        except GlmchatError as problem:
            problems.append(problem)
    if len(problems) == 1:
        raise problems[0]
    worst = next((p for p in problems if not isinstance(p, NetworkFailed)), problems[0])
    raise type(worst)("; ".join(p.message for p in problems), hint=worst.hint, code=worst.code)


def _ask(place: HubEndpoint, repo: str, revision: str | None, wait: Wait) -> Listing:
    if place.kind == "folder":
        return _ask_folder(place, repo, revision)
    for left in reversed(range(_TRIES)):
        try:
            listing = (_ask_modelscope if place.kind == "modelscope" else _ask_hf)(place, repo, revision)
            break
        except _Busy as busy:
            if busy.seconds is None or busy.seconds > LONGEST_WAIT or not left:
                raise busy.failure(place, repo) from None
            wait(busy.failure(place, repo).message, busy.seconds)
    check_listing((f.path for f in listing.files), source=place.label)
    if not listing.files:
        raise Failed(
            tr("{host} lists no files in {repo}", host=place.label, repo=repo),
            hint=tr("check the name, or pull from another endpoint"),
            code="pull.empty",
        )
    return listing


class _Busy(Exception):
    """429: too many requests. seconds: how long the hub asks to be left alone, if it says so."""

    def __init__(self, seconds: float | None) -> None:
        super().__init__()
        self.seconds = seconds

    def failure(self, place: HubEndpoint, repo: str) -> NetworkFailed:
        words = tr("{host} answered {status} to a request for {repo}", host=place.label, status=429, repo=repo)
        if self.seconds:
            words += tr(" and asks to wait {n} seconds", n=round(self.seconds))
        return NetworkFailed(words, hint=tr("try again later, or use another --endpoint"), code="pull.network")


def _ask_folder(place: HubEndpoint, repo: str, revision: str | None) -> Listing:
    """What a folder endpoint holds of `repo`. Raises Usage, Failed, Damaged, Hostile."""
    mirror = MirrorFolder(Path(place.address))
    name = mirror.find(repo)
    commit = mirror.resolve(name, revision) if name else None
    if name is None or commit is None:
        what = repo if name is None else f"{repo}@{one_line(revision or 'main', 80)}"
        raise Failed(
            tr("the mirror {path} has no {what}", path=one_line(place.address), what=what),
            hint=tr("it has {names}; `glmchat mirror NAME DIR` adds more", names=", ".join(mirror.repos()[:8]) or "–"),
            code="mirror.missing",
        )
    files = tuple(
        KnownFile(f.path, f.size, f.sha256, None if f.lfs else f.git_blob) for f in mirror.snapshot(name, commit).files
    )
    return Listing(repo, commit, files, place, "" if name == repo else name)


def _ask_hf(place: HubEndpoint, repo: str, revision: str | None) -> Listing:
    import httpx2
    from huggingface_hub import HfApi, constants, set_client_factory
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    # Else the library asks huggingface.co about agents, once a day, whatever endpoint was named.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    bounds = Bounds()  # of all that follows; the library's client is used by several calls
    set_client_factory(lambda: make_client(timeout=_TIMEOUT, follow_redirects=True, bounds=bounds))
    key, notes = (token() or False) if place.sends_token else False, []
    api = HfApi(endpoint=place.address, token=key)
    try:
        try:
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        except HfHubHTTPError as error:
            if not key or isinstance(error, GatedRepoError) or error.response.status_code not in (401, 403):
                raise
            notes.append(without_words(place.label))
            api = HfApi(endpoint=place.address, token=False)
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        commit, siblings, canonical = info.sha, info.siblings or [], info.id
    except GatedRepoError:
        raise (_refused_token(place) if notes else _needs_token(place, repo)) from None
    except RevisionNotFoundError:
        raise _no_revision(place, repo, revision) from None
    except RepositoryNotFoundError:
        raise (_refused_token(place) if notes else _no_repo(place, repo)) from None
    except HfHubHTTPError as error:
        if error.response.status_code == 429:
            raise _Busy(asked_wait(error.response.headers)) from None
        if notes and error.response.status_code in (401, 403):
            raise _refused_token(place) from None
        raise _status(place, repo, error.response.status_code) from None
    except httpx2.HTTPError as error:
        raise network_error(error, place.address, code="pull.network") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # a web page, or JSON of another kind
        raise _nonsense(place, repo) from None
    if not isinstance(commit, str) or not is_commit(commit):
        raise _nonsense(place, repo, tr("it does not name a commit"))
    if revision and is_commit(revision) and commit != revision:
        raise _nonsense(place, repo, tr("it names a different commit"))
    files = tuple(_hf_file(place, repo, s.rfilename, s.size, s.blob_id, s.lfs) for s in siblings)
    if not all(f.sha256 or f.git_blob for f in files):
        files = _from_tree(place, api, repo, commit) or files
    renamed = canonical if isinstance(canonical, str) and canonical.lower() != repo.lower() else ""
    return Listing(repo, commit, files, place, checked_repo(renamed) if renamed else "", tuple(notes))


def _from_tree(place: HubEndpoint, api: HfApi, repo: str, commit: str) -> tuple[KnownFile, ...]:
    """The files with hashes as the tree tells them, where a mirror's model info leaves them out; () if it has none."""
    import httpx2
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import HfHubHTTPError

    try:
        entries = [e for e in api.list_repo_tree(repo, recursive=True, revision=commit) if isinstance(e, RepoFile)]
        return tuple(_hf_file(place, repo, e.path, e.size, e.blob_id, e.lfs) for e in entries)
    except HfHubHTTPError as error:
        if error.response.status_code == 429:
            raise _Busy(asked_wait(error.response.headers)) from None
        return ()
    except (httpx2.HTTPError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ()  # the names are known; files whose hash nobody knows are refused or trusted later


def _hf_file(place: HubEndpoint, repo: str, path: Any, size: Any, blob_id: Any, lfs: Any) -> KnownFile:
    """One file of a hub's answer. Sizes and hashes become path names and bounds, so each is checked."""
    sha256 = lfs.get("sha256") if isinstance(lfs, Mapping) else None
    if isinstance(lfs, Mapping) and isinstance(lfs.get("size"), int):
        size = lfs["size"]
    git_blob = None if lfs else blob_id  # of a large file git keeps only the pointer
    good = (
        isinstance(path, str)
        and (size is None or (isinstance(size, int) and not isinstance(size, bool) and size >= 0))
        and (sha256 is None or re.fullmatch(r"[0-9a-f]{64}", str(sha256)))
        and (git_blob is None or re.fullmatch(r"[0-9a-f]{40}", str(git_blob)))
    )
    if not good:
        raise _nonsense(place, repo, tr("the size or hash of {path} is not valid", path=one_line(str(path), 60)))
    return KnownFile(path, size, sha256, git_blob)


def _ask_modelscope(place: HubEndpoint, repo: str, revision: str | None) -> Listing:
    """ModelScope's own listing: its repositories have their own owners, branches (`master`) and no commits to pin."""
    import httpx2

    branch = revision or "master"
    url = f"{place.address}/api/v1/models/{quote(repo)}/repo/files"
    try:
        with make_client(timeout=_TIMEOUT, follow_redirects=True, bounds=Bounds()) as client:
            answer = client.get(url, params={"Revision": branch, "Recursive": "true"})
        if answer.status_code == 404:
            raise _no_repo(place, repo)
        if answer.status_code == 429:
            raise _Busy(asked_wait(answer.headers))
        if answer.status_code != 200:
            raise _status(place, repo, answer.status_code)
        listed = answer.json()["Data"]["Files"]
        files = tuple(_modelscope_file(place, repo, item) for item in listed if item.get("Type") != "tree")
    except httpx2.HTTPError as error:
        raise network_error(error, place.address, code="pull.network") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _nonsense(place, repo) from None
    return Listing(repo, branch, files, place)


def _modelscope_file(place: HubEndpoint, repo: str, item: Mapping[str, Any]) -> KnownFile:
    path, size, sha256 = item["Path"], item.get("Size"), item.get("Sha256") or None
    if not isinstance(path, str) or (sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(sha256))):
        raise _nonsense(place, repo, tr("the size or hash of {path} is not valid", path=one_line(str(path), 60)))
    # A Size of 0 beside a hash is what the service gives for files it has not measured.
    return KnownFile(path, size if isinstance(size, int) and size > 0 else None, sha256)


def _gets_token(address: str) -> bool:
    host = (urlsplit(address).hostname or "").lower()
    own = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return host == "huggingface.co" or host.endswith(".huggingface.co") or (bool(own) and address.rstrip("/") == own)


def _distinct(places: Sequence[HubEndpoint]) -> list[HubEndpoint]:
    return list({p.address: p for p in places}.values())


def _nonsense(place: HubEndpoint, repo: str, why: str = "") -> Damaged:
    return Damaged(
        tr("{host} did not answer with a list of the files in {repo}", host=place.label, repo=repo)
        + (f": {why}" if why else ""),
        hint=tr("this may be a login page, a proxy or another kind of server: check --endpoint and HF_ENDPOINT"),
        code="pull.not_a_hub",
    )


def _no_repo(place: HubEndpoint, repo: str) -> Failed:
    return Failed(
        tr("{host} has no model {repo} that you can access", host=place.label, repo=repo),
        hint=tr("check the name; a private or gated model needs `hf auth login` or HF_TOKEN"),
        code="pull.no_repo",
    )


def _no_revision(place: HubEndpoint, repo: str, revision: str | None) -> Failed:
    return Failed(
        tr(
            "{host} has no revision {revision} of {repo}",
            host=place.label,
            revision=repr(revision or "main"),
            repo=repo,
        ),
        hint=tr("after @ comes a branch, a tag or a full commit"),
        code="pull.no_revision",
    )


def _refused_token(place: HubEndpoint) -> Failed:
    """The token is refused, and without one nothing is given either."""
    return Failed(refused_words(place.label), hint=refused_hint(), code="pull.token")


def _needs_token(place: HubEndpoint, repo: str) -> Failed:
    return Failed(
        tr("{host} gives access to {repo} only after you accept its terms", host=place.label, repo=repo),
        hint=tr("accept them on the model's page, then `hf auth login` or HF_TOKEN"),
        code="pull.gated",
    )


def _status(place: HubEndpoint, repo: str, status: int) -> Failed:
    if status in (401, 403):
        return _needs_token(place, repo)
    return NetworkFailed(
        tr("{host} answered {status} to a request for {repo}", host=place.label, status=status, repo=repo),
        hint=tr("try again later, or use another --endpoint"),
        code="pull.network",
    )
