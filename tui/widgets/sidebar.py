"""The conversations: titles, dates, models; open, rename, pin, delete with undo, search with the hits highlighted."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.text import is_chinese, one_line, show_controls
from glmchat.tui.steady import Steady
from glmchat.tui.theme import PALETTES, Palette
from glmchat.tui.widgets.actions import KeyLine
from glmchat.tui.widgets.rows import Headed, Rows

if TYPE_CHECKING:
    from glmchat.chat.history.history import History
    from glmchat.chat.history.rows import Conversation
    from glmchat.chat.history.search import Hit

_SHOWN = 500  # conversations in the list; older ones are found by searching

_LEAD = 10  # cells of text before a hit


class Sidebar(Steady, Vertical):
    """Hidden until asked for. Posts `Open`; renames, pins and deletes by itself through the history."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", show=False),
        Binding("r", "rename", show=False),
        Binding("p", "pin", show=False),
        Binding("delete,d,x", "delete", show=False),
        Binding("u", "undelete", show=False),
        Binding("slash", "search", show=False),
        Binding("o", "one_shots", show=False),
    ]

    class Open(Message):
        def __init__(self, conversation: int, message: int | None, query: str) -> None:
            super().__init__()
            self.conversation, self.message, self.query = conversation, message, query

    class Changed(Message):
        """A conversation, perhaps the open one, has another title or place, or is gone or back."""

    class Closed(Message):
        pass

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.palette: Palette = PALETTES["dark"]
        self.history: History | None = None
        self.open_id: int | None = None
        self.targets: list[tuple[int, int | None]] = []
        self.stands_by = False  # opened by itself, and not taken up yet
        self._listed = ""  # the query whose hits the list holds
        self._deleted: list[int] = []
        self._renaming: int | None = None
        self._with_one_shots = False
        self.display = False

    def compose(self) -> ComposeResult:
        yield Static(tr("new title"), id="renaming")
        yield Input(placeholder=tr("search everything"), id="search", compact=True, select_on_focus=False)
        yield Rows(id="conversations")
        yield KeyLine()

    def on_mount(self) -> None:
        self.border_title = tr("Conversations")

    def on_resize(self) -> None:
        self.call_after_refresh(self.query_one(KeyLine).place)

    def stand_by(self, shown: bool) -> None:
        """Open beside the conversation without the focus; closed again only if nobody took it up."""
        if shown and not self.display:
            self.stands_by = True
            self._show(True)
            self.reload()
        elif not shown and self.stands_by:
            self._show(False)
            self.stands_by = False

    def toggle(self) -> None:
        """Into the list, and out of it."""
        if self.display and not self.stands_by:
            self.action_close()
        else:
            self.stands_by = False
            self._show(True)
            self._end_search()
            self.query_one(OptionList).focus()

    def _show(self, shown: bool) -> None:
        """Where the window is narrow the list takes the place of the conversation."""
        self.display = shown
        self.screen.set_class(shown, "with-sidebar")

    def find(self, query: str) -> None:
        """Open with the search field filled."""
        self.stands_by = False
        self._show(True)
        self._end_search()
        field = self.query_one("#search", Input)
        field.value = query
        self.reload()
        field.focus()

    def action_close(self) -> None:
        self._show(False)
        self._end_search()
        self.post_message(self.Closed())

    def action_search(self) -> None:
        self.query_one("#search", Input).focus()

    # The list

    @property
    def query_text(self) -> str:
        return "" if self._renaming is not None else self.query_one("#search", Input).value.strip()

    def reload(self) -> None:
        """Read the list, or the hits, from the history."""
        if not self.display or self.history is None:
            return
        listing = self.query_one(OptionList)
        at = None if self.stands_by else listing.highlighted  # nobody has chosen a row of a list that opened by itself
        before = self.targets[at] if at is not None and at < len(self.targets) else None
        listing.clear_options()
        query, brief = self.query_text, ""
        if query != self._listed:
            at, self._listed = None, query  # the row of another list says nothing of this one
        if query:
            from glmchat.chat.history.search import grouped  # not before the first frame

            groups = grouped(self.history.search(query, limit=100))
            hits = [hit for group in groups for hit in group]
            self.targets = [(hit.conversation, hit.message) for hit in hits]
            listing.add_options([Option(self._hit(hit)) for hit in hits])
            hint = tr("{n} results · Enter opens", n=len(hits)) if hits else tr("no matches")
            if len(hits) == 1:
                hint = tr("1 result · Enter opens")
        else:
            rows = [c for c in self.history.conversations(limit=_SHOWN) if self._is_listed(c)]
            self.targets = [(c.id, None) for c in rows]
            now = time.time()
            above = ""
            for c in rows:
                day = tr("pinned") if c.pinned else day_of(c.updated, now)
                heading = Text(("\n" if above else "") + day, self.palette.faded)
                row = self._row(c, now)
                listing.add_option(Option(row) if day == above else Headed(heading, row))
                above = day
            hint = tr("Enter opens · r rename · p pin · d delete · o one-shots · / search")
            brief = tr("r rename · p pin · d delete")
            ids = [c.id for c in rows]
            at = at if at is not None else (ids.index(self.open_id) if self.open_id in ids else 0)
        if self._deleted:
            hint, brief = tr("deleted · u restores it"), ""
        if before in self.targets:
            at = self.targets.index(before)  # pinned or renamed, it stands elsewhere now and stays the chosen one
        if self.targets:
            listing.highlighted = min(at or 0, len(self.targets) - 1)
        self.query_one(KeyLine).say(hint, brief)

    def _is_listed(self, c: Conversation) -> bool:
        """One that was only begun is listed by its draft; one-shots are listed when they are asked for."""
        if c.id == self.open_id or c.pinned:
            return True
        return bool(c.message_count or c.draft) and (self._with_one_shots or not c.settings.one_shot)

    def _row(self, c: Conversation, now: float) -> Text:
        p = self.palette
        sign = ("★" if c.pinned else "●" if c.id == self.open_id else " ") + " "
        text = Text.assemble((sign, p.accented if c.id == self.open_id else p.style(p.user)))
        title = c.title or (tr("draft: {text}", text=c.draft) if c.draft else tr("untitled"))
        text.append(one_line(title, 60), p.strong if c.id == self.open_id else p.body)
        facts = [when(c.updated, now), *([one_line(c.model, 24)] if c.model else [])]
        text.append(f"\n  {' · '.join(facts)}", p.quiet)
        return text

    def _hit(self, hit: Hit) -> Text:
        """Who said it, when, and in which conversation; below, what was said around the words."""
        p = self.palette
        who = {"user": tr("you"), "assistant": tr("model")}.get(hit.role or "", tr("title"))
        text = Text.assemble((f"{who} · {when(hit.created, time.time())} · ", p.quiet))
        text.append(one_line(hit.title or tr("untitled"), 60) + "\n", p.strong)
        plain, spans = hit.snippet.replace("\n", " "), hit.spans
        at = _lead(plain, spans[0][0]) if spans else 0
        if at:
            text.append("…", p.quiet)
        for start, end in spans:
            text.append(show_controls(plain[at:start]), p.quiet)
            text.append(show_controls(plain[start:end]), p.hit_style)
            at = end
        text.append(show_controls(plain[at:]), p.quiet)
        return text

    @property
    def _chosen(self) -> int | None:
        at = self.query_one(OptionList).highlighted
        return self.targets[at][0] if at is not None and at < len(self.targets) else None

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        conversation, message = self.targets[event.option_index]
        self.post_message(self.Open(conversation, message, self.query_text))

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        if self._renaming is None:
            self.reload()

    def on_key(self, event: events.Key) -> None:
        """Up and Down choose a hit while the words are still being typed."""
        if event.key in ("up", "down") and self.query_one("#search", Input).has_focus and self._renaming is None:
            event.stop()
            listing = self.query_one(OptionList)
            listing.action_cursor_up() if event.key == "up" else listing.action_cursor_down()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        if self._renaming is not None and self.history is not None:
            history, renaming, title = self.history, self._renaming, event.value.strip()
            try:
                if title:
                    self._change(lambda: history.rename(history.load(renaming), title))
            finally:
                self._end_renaming()
        elif self.targets:
            at = self.query_one(OptionList).highlighted
            conversation, message = self.targets[at or 0]
            self.post_message(self.Open(conversation, message, self.query_text))

    # Changes

    def action_rename(self) -> None:
        if (chosen := self._chosen) is not None and self.history is not None and not self.query_text:
            try:
                title = self.history.load(chosen).conversation.title
            except GlmchatError:
                self.reload()  # another window has removed it
                raise
            self._begin_renaming(chosen, title)

    def _begin_renaming(self, conversation: int, title: str) -> None:
        self._renaming = conversation
        field = self.query_one("#search", Input)
        self.query_one("#renaming").display = True
        field.value = title
        field.focus()
        field.action_end()  # the old title is mended, not typed over
        self.query_one(KeyLine).say(tr("Enter renames · Esc cancels"))

    def _end_renaming(self) -> None:
        self._end_search()
        self.query_one(OptionList).focus()

    def _end_search(self) -> None:
        """The list is of conversations again, and the field is for searching."""
        self._renaming = None
        self.query_one("#renaming").display = False
        with self.prevent(Input.Changed):
            self.query_one("#search", Input).value = ""
        self.reload()

    def key_escape(self) -> None:
        if self._renaming is not None:
            self._end_renaming()

    def action_one_shots(self) -> None:
        """Answers to single commands, in the list or not."""
        self._with_one_shots = not self._with_one_shots
        self.reload()

    def action_pin(self) -> None:
        if (chosen := self._chosen) is not None and self.history is not None:
            history = self.history

            def pin() -> None:
                tree = history.load(chosen)
                history.pin(tree, not tree.conversation.pinned)

            self._change(pin)

    def action_delete(self) -> None:
        if (chosen := self._chosen) is not None and self.history is not None:
            history = self.history

            def delete() -> None:
                deletion = history.delete_conversation(chosen)
                history.require_written()
                self._deleted.append(deletion)

            self._change(delete)

    def action_undelete(self) -> None:
        if self._deleted and self.history is not None:
            history = self.history

            def restore() -> None:
                history.restore(self._deleted[-1])
                history.require_written()
                self._deleted.pop()

            self._change(restore)

    def _change(self, act: Callable[[], None]) -> None:
        """Do it, and say where it did not reach the disk. What another window removed meanwhile leaves the list."""
        try:
            act()
            if self.history is not None:
                self.history.require_written()
        finally:
            self.reload()
            self.post_message(self.Changed())


def when(seconds: float, now: float) -> str:
    """A date as one says it: the time today, the day this year, else the date."""
    then, today = datetime.fromtimestamp(seconds), datetime.fromtimestamp(now)
    if then.date() == today.date():
        return then.strftime("%H:%M")
    return then.strftime("%m-%d") if then.year == today.year else then.strftime("%Y-%m-%d")


def day_of(seconds: float, now: float) -> str:
    """The group of a list that a time belongs to."""
    days = (datetime.fromtimestamp(now).date() - datetime.fromtimestamp(seconds).date()).days
    return tr("today") if days <= 0 else tr("yesterday") if days == 1 else tr("older")


def _lead(text: str, hit: int) -> int:
    """Where to begin, so that the first hit stands within the narrow list: where a word begins, if one does there."""
    begin = hit
    while begin > 0 and cell_len(text[begin - 1 : hit]) <= _LEAD:
        begin -= 1
    words = [at for at in range(begin, hit) if at == 0 or text[at - 1].isspace()]
    return next(iter(words), begin if is_chinese(text[begin:hit]) else hit)
