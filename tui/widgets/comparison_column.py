"""One column of a comparison: who answers, the answer as it streams, and how fast it was."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Static

from glmchat.chat.history.transcript import answered_by
from glmchat.chat.sampling_choice import value_text
from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.messages import Finished, Piece
from glmchat.core.text import one_line
from glmchat.tui.conversation import state_note
from glmchat.tui.steady import Steady
from glmchat.tui.theme import Palette
from glmchat.tui.transcript.transcript import Transcript
from glmchat.tui.transcript.turns import Turn

if TYPE_CHECKING:
    from glmchat.chat.answering import SessionEvent
    from glmchat.chat.compare.columns import Column
    from glmchat.chat.history.rows import StoredMessage
    from glmchat.chat.launch import LaunchOptions

_ALWAYS = ("temperature", "top_p")  # settings that are shown whatever their value
_SILENT = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": None,
    "max_tokens": None,
    "stop": (),
    "ignore_eos": False,
}


class ComparisonColumn(Steady, Vertical):
    """Feed it the events of its session. A click makes it the current one; its last row picks it."""

    class Chosen(Message):
        """picked: go on with this one; else only look at it."""

        def __init__(self, number: int, picked: bool) -> None:
            super().__init__()
            self.number, self.picked = number, picked

    def __init__(self, number: int, column: Column, launch: LaunchOptions, palette: Palette) -> None:
        super().__init__(classes="column")
        self.number, self.column, self.launch = number, column, launch
        self.state = ""  # "", "answering", "done" or "failed"
        self._palette = palette
        self._tokens = 0
        self._first: float | None = None
        self._finished: Finished | None = None

    def compose(self) -> ComposeResult:
        yield Static("", classes="identity")
        yield Transcript(self._palette)
        yield Static("", classes="pick")

    @property
    def transcript(self) -> Transcript:
        return self.query_one(Transcript)

    @property
    def title(self) -> str:
        named = self.column.text[:1] not in ("", "+", ",")
        return f"{self.number + 1} {one_line(('' if named else self.column.name) + self.column.text, 60)}"

    def on_mount(self) -> None:
        self.border_title = Text(self.title)
        engine = self.launch.engine
        self._identify(engine.model, engine.revision, engine.quant_label, dict(self.launch.sampling))
        self.note(tr("not asked yet"))

    def note(self, text: str) -> None:
        """The line below: what it waits for, how fast it is, how it ended."""
        self.border_subtitle = Text(text)

    def wait(self) -> None:
        self.transcript.show([])
        self.query_one(".pick", Static).update("")
        self.state, self._tokens, self._first, self._finished = "", 0, None, None
        self.note(tr("waiting for its turn"))

    def load(self, stage: str, done: float) -> None:
        self.note(f"{stage} {done:.0%}" if done else stage)

    def hear(self, event: SessionEvent) -> None:
        from glmchat.chat.answering import Begun, Done

        match event:
            case Begun(_, answer):
                self._begin(answer)
            case Piece(text, ids):
                self._say(text, max(1, len(ids)))
            case Finished() as finished:
                self._finished = finished
            case Done(answer):
                self.end(answer)

    def _begin(self, answer: StoredMessage) -> None:
        d = answer.details
        self._identify(d.get("model"), d.get("revision"), d.get("quant"), d.get("sampling") or {})
        self.transcript.show([Turn("answer", "assistant", label=answered_by(answer), state="waiting")])
        if answer.text:
            self.transcript.feed("answer", answer.text)
        self.state = "answering"
        self.note(tr("reading the prompt"))

    def _say(self, text: str, tokens: int) -> None:
        self._first = self._first or time.monotonic()
        self._tokens += tokens
        self.transcript.feed("answer", text)
        seconds = time.monotonic() - self._first
        speed = f" · {self._tokens / seconds:.1f} tok/s" if seconds > 0.5 else ""
        self.note(tr("{n} tokens", n=self._tokens) + speed)

    def end(self, answer: StoredMessage) -> None:
        """Show a stored answer with its numbers; also one of an earlier comparison."""
        d, f = answer.details, self._finished
        self._identify(d.get("model"), d.get("revision"), d.get("quant"), d.get("sampling") or {})
        if self.state == "answering":
            self.transcript.finish("answer", state_note(answer))
        else:
            turn = Turn("answer", "assistant", answer.text, answered_by(answer), state_note(answer))
            self.transcript.show([turn], at_end=False)
        tokens = d.get("completion_tokens") or len(answer.token_ids)
        speed = d.get("decode_tokens_per_second") or (f.decode_tokens_per_second if f else None)
        facts = [tr("{n} tokens", n=tokens)]
        facts += [f"{speed:.1f} tok/s"] if isinstance(speed, float) else []
        facts += [tr("seed {seed}", seed=d["seed"])] if d.get("seed") is not None else []
        self.state = "done"
        self.query_one(".pick", Static).update(Text(tr("continue with this one"), self._palette.accented))
        self.note(" · ".join(facts))

    def fail(self, error: GlmchatError) -> None:
        self.state = "failed"
        self.transcript.finish("answer")
        self.transcript.add(Turn("error", "error", error.message, hint=error.hint))
        self.note(tr("no answer"))

    def _identify(self, model: Any, revision: Any, quant: Any, sampling: Mapping[str, Any]) -> None:
        """What answers: weights, adapters, and the settings that are the column's own or not the usual ones."""
        p = self._palette
        text = Text.assemble((one_line(str(model or "?"), 60), p.strong))
        text.append(f"@{str(revision)[:7]}" if revision else "", p.faded)
        text.append(f" · {quant}" if quant and quant != "none" else "", p.quiet)
        for name, scale in self.column.adapters:
            text.append(f" + {one_line(name, 40)}" + (f":{scale:g}" if scale != 1 else ""), p.style(p.user))
        values = {name: sampling[name] for name in _ALWAYS if name in sampling}
        values |= {n: sampling[n] for n, usual in _SILENT.items() if n in sampling and sampling[n] not in (usual, [])}
        for number, (name, value) in enumerate(values.items()):
            value = tuple(value) if isinstance(value, list) else value
            text.append(" · " if number else "\n", p.faded)
            own = name in self.column.sampling  # set for this column: what it is compared for
            text.append(f"{name.replace('_', ' ')} {value_text(value)}", p.strong if own else p.quiet)
        self.query_one(".identity", Static).update(text)

    def on_click(self, event: events.Click) -> None:
        on_row = event.widget is self.query_one(".pick") and self.state == "done"
        self.post_message(self.Chosen(self.number, picked=on_row))
