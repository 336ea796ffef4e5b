"""One file from its candidates to its place: attempts, resumes, restarts, and the proof at the end."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

from glmchat.core.errors import Damaged, Failed, GlmchatError, NetworkFailed
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line
from glmchat.hub.download_state import DownloadState
from glmchat.hub.fetch import LONGEST_WAIT, Broken, Refused, Reply, open_reply, source_name
from glmchat.hub.file_request import Candidate, FetchedFile, FileRequest
from glmchat.hub.hf_token import is_told, refused_hint, refused_words, without_words
from glmchat.hub.partial import PartialFile
from glmchat.hub.store import git_blob_of, sha256_of

_SLOW_SECONDS, _SLOW_BYTES = 30.0, 30_000  # under 1 kB/s for this long counts as a stall where there is another source
_WORTH = 64_000  # bytes that a broken attempt must have brought for the same source to be asked again at once
_RESTARTS = 3


@dataclass(slots=True)
class State:
    """What the screen may look at while a transfer works. Written by one thread, read by another."""

    done: int = 0
    total: int | None = None
    state: str = "waiting"
    host: str = ""
    received: int = 0  # new bytes of this run, without what was here or came twice


class _Changed(Exception):
    """The source now has another file under the name: what was here is gone, ask again from zero."""


class _Told(Exception):
    """While this request waited for its turn the source asked to be left alone for a time."""


class Transfer:
    """`run` brings one file home. Raises the error tree's errors; what has arrived stays in the partial."""

    def __init__(self, request: FileRequest, state: State, shared: DownloadState) -> None:
        self.request, self.state, self.shared = request, state, shared
        self.sha256, self.git_blob, self.size = request.sha256, request.git_blob, request.size
        self._alive = list(request.candidates)
        self._reasons: dict[str, Broken | Refused] = {}
        self._senders: set[str] = set()  # whose bytes the partial holds; "" is an earlier run
        self._etags: dict[str, str | None] = {}  # by source: what the partial's bytes belong to
        self._restarts = 0
        state.total = request.size

    def run(self) -> FetchedFile:
        begun = time.monotonic()
        if self.request.destination.is_file() and (got := self._what_is_there(begun)):
            return got
        with PartialFile(self.request.partial) as part:
            self.state.state = "checking"
            resumed = part.take_over(self.size, self._count_old, lambda: self.shared.cancelled)
            self.state.done = part.length
            if resumed:
                self._senders.add("")
            host = self._until_whole(part)
            part.finish(self.request.destination)
            self.state.done = self.state.total = part.length
            self.state.state = "done"
            return self._got(part.length, part.sha256, host, begun, resumed)

    def _got(self, size: int, sha256: str, host: str, begun: float, resumed: int) -> FetchedFile:
        return FetchedFile(self.request.path, size, sha256, host, time.monotonic() - begun, resumed)

    def _what_is_there(self, begun: float) -> FetchedFile | None:
        """The destination, if it is already what is wanted: another process was faster, or a run was repeated."""
        there = self.request.destination
        size = there.stat().st_size
        if (self.size is not None and size != self.size) or not (self.sha256 or self.git_blob):
            return None
        self.state.state = "checking"
        digest = sha256_of(there, on_bytes=self._count_old, cancelled=lambda: self.shared.cancelled)
        if digest != self.sha256 and (self.sha256 or git_blob_of(there) != self.git_blob):
            self.state.done = 0
            return None
        self.state.total, self.state.state = size, "done"
        return self._got(size, digest, "", begun, size)

    def _count_old(self, count: int) -> None:
        self.state.done += count

    # -- rounds through the candidates -------------------------------------------------------------------------------

    def _until_whole(self, part: PartialFile) -> str:
        """Ask until the partial is the whole and right file; -> the source of its last byte."""
        if self._is_whole(part) and self._is_right(part):
            return ""
        rounds = 0
        while True:
            before, asked = part.length, False
            for candidate in self.shared.hosts.order(self._alive):
                self.shared.check()
                if self._is_told_to_wait(candidate):
                    continue
                asked = True
                if self._ask(candidate, part):
                    return source_name(candidate)
            rounds = 0 if part.length > before else rounds + asked
            retry = self.shared.retry
            if not self._alive or rounds >= (retry.rounds if self.shared.reached else retry.unreached_rounds):
                raise self._failure(part)
            self._wait(rounds, part)

    def _is_told_to_wait(self, candidate: Candidate) -> bool:
        """True while the source wants to be left alone; another file may have been told so."""
        seconds = self.shared.hosts.seconds_until(candidate)
        if seconds:
            words = tr("asks to wait {n} seconds", n=math.ceil(seconds))
            self._reasons.setdefault(source_name(candidate), Broken(words))
        return bool(seconds)

    def _wait(self, rounds: int, part: PartialFile) -> None:
        retry = self.shared.retry
        pause = min(retry.longest_pause, retry.first_pause * 2 ** max(0, rounds - 1)) * random.uniform(0.8, 1.2)  # noqa: S311
        asked = min(self.shared.hosts.seconds_until(one) for one in self._alive)
        if asked > LONGEST_WAIT:
            raise self._failure(part)
        self.state.state = "retrying"
        self.shared.pause(max(pause if rounds else pause / 4, asked))

    def _ask(self, candidate: Candidate, part: PartialFile) -> bool:
        """All that one source gives: reconnect as long as bytes come. True when the file is whole and right."""
        name, hosts = source_name(candidate), self.shared.hosts
        while True:
            before = part.length
            try:
                self._attempt(hosts.allowed(candidate), part)
            except _Told:
                return False
            except Refused as refusal:
                self.shared.reached = True
                if refusal.for_token and name not in hosts.token_refused:
                    hosts.token_refused.add(name)
                    if not is_told(name):
                        self.shared.notify(one_line(without_words(name)))
                    continue
                self._reasons[name] = refusal
                self._alive.remove(candidate)
                hosts.failed(candidate, at_once=refusal.why in ("html", "wrong"))
                self._say(_in_words(name, refusal))
                return False
            except _Changed as change:
                self._restarts += 1
                self._say(f"{name} {change}")
                if self._restarts > _RESTARTS:
                    self._reasons[name] = Refused(tr("keeps changing the file"), "wrong")
                    self._alive.remove(candidate)
                    hosts.failed(candidate, at_once=True)
                    return False
            except Broken as failure:
                self.shared.check()  # a cancel looks like a broken connection
                self._reasons[name] = failure
                self.shared.reached = self.shared.reached or not failure.unreached
                if failure.unreached:
                    self.shared.note = one_line(failure.reason)  # true of every file
                else:
                    self._say(_in_words(name, failure))
                if part.length - before < _WORTH or failure.stalled or failure.retry_after is not None:
                    hosts.failed(candidate, retry_after=failure.retry_after)
                    return False
            else:
                if self._is_right(part):
                    hosts.worked(candidate)
                    self.shared.note = ""
                    return True
                alone, digest = self._senders <= {name}, part.sha256
                self._restart(part)  # what an earlier run or another source left may be to blame: once more from zero
                if alone:
                    self._reasons[name] = Refused(
                        tr("sent a different file (sha256 {hash}…)", hash=digest[:12]), "wrong"
                    )
                    self._alive.remove(candidate)
                    hosts.failed(candidate, at_once=True)
                    return False

    # -- one attempt -------------------------------------------------------------------------------------------------

    def _attempt(self, candidate: Candidate, part: PartialFile) -> None:
        """One request. Returns when the source has nothing more to send; raises Refused or Broken."""
        shared, has_hash = self.shared, bool(self.sha256 or self.git_blob)
        shared.hosts.begin(candidate, shared.check)
        try:
            self._request(shared.hosts.allowed(candidate), part, has_hash)
        finally:
            shared.hosts.answered(candidate)

    def _request(self, candidate: Candidate, part: PartialFile, has_hash: bool) -> None:
        name, shared = source_name(candidate), self.shared
        if self._is_told_to_wait(candidate):
            raise _Told
        if not has_hash and part.length and not self._bound_to(name):
            self._restart(part)
        self.state.state, self.state.host = "loading", name
        with open_reply(
            shared.client,
            candidate,
            part.length,
            size=self.size,
            if_range=None if has_hash else self._bound_to(name),
            watch=shared.watch,
        ) as reply:
            shared.reached = True
            shared.hosts.answered(candidate)
            self._compare(reply, candidate, name)
            changed = name in self._etags and reply.etag != self._etags[name]
            if part.length and changed and (not has_hash or not self._restarts):  # some stores have an ETag per machine
                self._restart(part)
                raise _Changed(tr("changed the file in the meantime: starting over"))
            self._etags[name] = reply.etag
            if reply.complete:
                return
            expected = self.size if self.size is not None else reply.total
            self.state.total = expected
            self._receive(reply, expected, name, part)

    def _bound_to(self, name: str) -> str | None:
        return self._etags.get(name, self.request.etag if "" in self._senders else None)

    def _compare(self, reply: Reply, candidate: Candidate, name: str) -> None:
        """What the answer says about the file against what is known; learn a hash that a hub vouches for."""
        if self.size is not None and reply.total is not None and reply.total != self.size:
            raise Refused(
                tr("has a file of {found} bytes, expected {expected}", found=reply.total, expected=self.size),
                "wrong",
            )
        if tag := reply.linked_etag:
            for expected, length in ((self.sha256, 64), (self.git_blob, 40)):
                if expected and len(tag) == length and tag != expected and _is_hex(tag):
                    raise Refused(
                        tr(
                            "has another version of the file ({found}…, expected {expected}…)",
                            found=tag[:12],
                            expected=expected[:12],
                        ),
                        "wrong",
                    )
            if not (self.sha256 or self.git_blob) and _is_hex(tag):
                self.sha256 = tag if len(tag) == 64 else None
                self.git_blob = tag if len(tag) == 40 else None
        if not (self.sha256 or self.git_blob or candidate.trusted):
            raise Refused(tr("gives no hash for it, and neither does any other source"), "untrusted")

    def _receive(self, reply: Reply, expected: int | None, name: str, part: PartialFile) -> None:
        skip = part.length - reply.start  # a server that ignores Range sends again what is here: compared, not kept
        again = _Again(skip, part) if skip else None
        window, in_window = time.monotonic(), 0
        for chunk in reply.chunks:
            if self.shared.cancelled:
                self.shared.check()
            rest = memoryview(chunk)
            if again is not None:
                rest = again.swallow(rest)
                if again.differs:
                    self._restart(part)
                    raise _Changed(tr("sends a different file than before: starting over"))
            if expected is not None and part.length + len(rest) > expected:
                raise Refused(tr("sent more than the {expected} bytes of the file", expected=expected), "wrong")
            if rest:
                if name not in self._senders:
                    self._senders.add(name)
                part.append(rest)
                self.state.done = part.length
                self.state.received += len(rest)
            in_window += len(chunk)
            if (now := time.monotonic()) - window > _SLOW_SECONDS:
                if in_window < _SLOW_BYTES and self._has_better(name):
                    raise Broken(tr("sends less than 1 kB per second"), stalled=True)
                window, in_window = now, 0
        if expected is not None and part.length < expected:
            raise Broken(tr("stopped after {done} of {expected} bytes", done=part.length, expected=expected))

    def _has_better(self, name: str) -> bool:
        return any(source_name(one) != name and not self.shared.hosts.is_demoted(one) for one in self._alive)

    # -- what the partial is -----------------------------------------------------------------------------------------

    def _is_whole(self, part: PartialFile) -> bool:
        return self.size is not None and part.length == self.size and bool(self.sha256 or self.git_blob)

    def _is_right(self, part: PartialFile) -> bool:
        if self.size is not None and part.length != self.size:
            return False
        if self.sha256:
            return part.sha256 == self.sha256
        if self.git_blob:
            return git_blob_of(part.path) == self.git_blob
        return True  # a trusted host, and a length that fits

    def _restart(self, part: PartialFile) -> None:
        part.restart()
        self._senders.clear()
        self._etags.clear()
        self.state.done = 0

    def _say(self, text: str) -> None:
        self.shared.note = one_line(f"{self.request.path}: {text}")

    def _failure(self, part: PartialFile) -> GlmchatError:
        """The one error for a file that no source gives."""
        path = one_line(self.request.path)
        why = "; ".join(_in_words(name, reason) for name, reason in self._reasons.items()) or tr(
            "there is no known source"
        )
        remainder = tr("{size} of it are kept: ", size=human_bytes(part.length)) if part.length else ""
        whys = {reason.why for reason in self._reasons.values() if isinstance(reason, Refused)}
        if self._alive or not whys:
            return NetworkFailed(
                tr("cannot fetch {path}: {said}", path=path, said=why),
                hint=remainder + tr("run the same command again later, or name a mirror with --endpoint"),
                code="pull.network",
            )
        if "wrong" in whys:
            return Damaged(
                tr("no source has the right {path}: {said}", path=path, said=why),
                hint=tr("the file was discarded; try another mirror with --endpoint, or another revision"),
                code="pull.wrong_file",
            )
        if "untrusted" in whys:
            return Damaged(
                tr("{path} was rejected: {said}", path=path, said=why),
                hint=tr("use a source that publishes hashes, or --trust-host to accept the file unchecked"),
                code="pull.unknown_hash",
            )
        if "denied" in whys:
            hint = tr("accept the model's terms on its page, then `hf auth login` or set HF_TOKEN")
            if refused := self.shared.hosts.token_refused & set(self._reasons):
                hint = refused_hint()
                why = f"{refused_words(min(refused))}; {why}"
            return Failed(tr("cannot fetch {path}: {said}", path=path, said=why), hint=hint, code="pull.denied")
        if "html" in whys:
            return NetworkFailed(
                tr("cannot fetch {path}: {said}", path=path, said=why),
                hint=tr(
                    "this may be a login page of the network, or not a mirror at all: open the address in a browser"
                ),
                code="pull.html",
            )
        return Failed(
            tr("cannot fetch {path}: {said}", path=path, said=why),
            hint=tr("check the name and the revision"),
            code="pull.missing",
        )


class _Again:
    """The bytes a server sends although they are here: hashed, compared at the end, dropped."""

    def __init__(self, count: int, part: PartialFile) -> None:
        import hashlib

        self._left, self._digest, self._expected = count, hashlib.sha256(), part.sha256
        self._whole_prefix = count == part.length
        self.differs = False

    def swallow(self, chunk: memoryview) -> memoryview:
        if self._left <= 0:
            return chunk
        head, rest = chunk[: self._left], chunk[self._left :]
        self._digest.update(head)
        self._left -= len(head)
        if self._left == 0 and self._whole_prefix:
            self.differs = self._digest.hexdigest() != self._expected
        return rest


def _in_words(name: str, problem: Broken | Refused) -> str:
    """What a source did, with its name once."""
    return problem.reason if name in problem.reason else f"{name} {problem.reason}"


def _is_hex(text: str) -> bool:
    return all(c in "0123456789abcdef" for c in text)
