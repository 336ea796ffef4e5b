"""The prompt: several lines, history at its edges, one message for one paste."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from glmchat.core.text import show_controls
from glmchat.tui.steady import Steady

MAX_LINES = 10


def _pasted(text: str) -> str:
    return show_controls(text.replace("\r\n", "\n").replace("\r", "\n"))


class Prompt(Steady, TextArea):
    """Posts `Sent` with the text. Keys that belong to the screen while the prompt is focused are left to it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+d", "delete_or_leave", show=False, priority=True),
        Binding("ctrl+underscore", "undo", show=False),  # as in a shell; Ctrl+Z stops the window as it stops a program
    ]

    class Sent(Message):
        """Empty where Enter was pressed on an empty prompt."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    class NothingToSend(Message):
        """F5 on an empty prompt, where it sends; it may mean something else."""

    class Leave(Message):
        """Ctrl+D on an empty prompt."""

    class Edge(Message):
        """Up on the first line or Down on the last: the screen may have something to take back."""

        def __init__(self, step: int) -> None:
            super().__init__()
            self.step = step

    class Complete(Message):
        """Tab: take the suggested command."""

    class Choose(Message):
        """Up or Down among the suggestions."""

        def __init__(self, step: int) -> None:
            super().__init__()
            self.step = step

    def __init__(self, *, enter_sends: bool = True, id: str | None = None) -> None:
        super().__init__(
            id=id,
            soft_wrap=True,
            tab_behavior="focus",
            show_line_numbers=False,
            compact=True,
            highlight_cursor_line=False,
        )
        self.enter_sends = enter_sends
        self.suggesting = False  # suggestions are shown: Tab, Up and Down belong to them
        self.entered: list[str] = []  # earlier prompts, oldest first
        self._at: int | None = None  # which of them is shown
        self._draft = ""

    # Sending

    @property
    def sends_with_f5(self) -> bool:
        """Whether F5 is the prompt's. What was typed just before may not stand in it yet, so its text says nothing."""
        return not self.enter_sends and self.has_focus

    def _send(self) -> None:
        text = self.text
        if not text.strip():
            self.post_message(self.Sent(""))
        else:
            # Emptied here, not where it is heard of: what is typed meanwhile belongs to the next message.
            self.remember(text)
            self.set_text("")
            self.post_message(self.Sent(text))

    def remember(self, text: str) -> None:
        if text.strip() and (not self.entered or self.entered[-1] != text):
            self.entered.append(text)
        self._at = None

    def set_text(self, text: str) -> None:
        self.load_text(text)
        self.move_cursor(self.document.end)

    def empty(self) -> None:
        """Undo brings the text back."""
        self.replace("", (0, 0), self.document.end)

    def action_newline(self) -> None:
        if not self.enter_sends:
            self._send()
            return
        self.insert("\n")

    def action_delete_or_leave(self) -> None:
        if self.text:
            self.action_delete_right()
        else:
            self.post_message(self.Leave())

    async def _on_key(self, event: events.Key) -> None:
        key = event.key
        if key == "tab" and self.suggesting:
            self.post_message(self.Complete())
        elif key in ("ctrl+j", "shift+enter", "alt+enter"):
            self.action_newline()  # no binding of priority: that would overtake what was typed just before
        elif key == "f5" and not self.enter_sends and not self.text.strip():
            self.post_message(self.NothingToSend())
        elif key == "enter" or (key in ("ctrl+enter", "f5") and not self.enter_sends):
            if (key == "enter") != self.enter_sends:
                is_line = key == "enter" and bool(self.text)  # an empty prompt has no line to break
                self.insert("\n") if is_line else self._send()
            else:
                self._send()
        else:
            return  # Textual calls the base class's handler too, unless the default is prevented
        event.stop()
        event.prevent_default()

    async def _on_paste(self, event: events.Paste) -> None:
        """A paste is text, whatever line ends or control characters it holds."""
        event.stop()  # bubbling up it would come back through the app
        event.text = _pasted(event.text)

    def paste(self, text: str) -> None:
        """The same for a paste that came to something else."""
        self.insert(_pasted(text))

    # History at the edges

    def action_cursor_up(self, select: bool = False) -> None:
        if self.suggesting and not select:
            self.post_message(self.Choose(-1))
        elif not select and self.cursor_at_first_line and self.wrapped_row == 0:
            self.post_message(self.Edge(-1))
        else:
            super().action_cursor_up(select)

    def action_cursor_down(self, select: bool = False) -> None:
        if self.suggesting and not select:
            self.post_message(self.Choose(1))
        elif not select and self.cursor_at_last_line and self.wrapped_row == self.wrapped_rows - 1:
            self.post_message(self.Edge(1))
        else:
            super().action_cursor_down(select)

    @property
    def wrapped_row(self) -> int:
        """Which row of its wrapped line the cursor is in."""
        line, column = self.cursor_location
        return sum(1 for offset in self.wrapped_document.get_offsets(line) if offset <= column)

    @property
    def wrapped_rows(self) -> int:
        return len(self.wrapped_document.get_offsets(self.cursor_location[0])) + 1

    def recall(self, step: int) -> bool:
        """Show an earlier (-1) or later (1) prompt; the unsent text comes back at the end. False at either end."""
        if step < 0:
            if self._at == 0 or not self.entered:
                return False
            if self._at is None:
                self._draft = self.text
                self._at = len(self.entered)
            self._at -= 1
        elif self._at is None:
            return False
        else:
            self._at += 1
        if self._at >= len(self.entered):
            self._at = None
            self.set_text(self._draft)
        else:
            self.set_text(self.entered[self._at])
            if step < 0:
                self.move_cursor((0, 0))
                self.move_cursor(self.get_cursor_line_end_location())
        return True
