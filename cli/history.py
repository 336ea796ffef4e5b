"""`glmchat history`: list, show, search, export, import, rm, restore."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmchat.cli import output
from glmchat.cli.asking import TextCommand
from glmchat.cli.completion import complete_conversations
from glmchat.core.errors import FULL, DoesNotFit, Failed, Usage
from glmchat.core.files import read_given, write_for_person
from glmchat.core.language import tr
from glmchat.core.text import one_line

if TYPE_CHECKING:
    from glmchat.chat.history.history import History
    from glmchat.chat.history.rows import Conversation, StoredMessage, Tree

Json = Annotated[bool, typer.Option("--json", help="For programs: JSON on stdout.")]
Ids = Annotated[
    list[int],
    typer.Argument(metavar="ID...", help="Numbers from `glmchat history list`.", autocompletion=complete_conversations),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Conversations: list, show, search, export, import, delete.")
    group.command("list")(list_)
    group.command("ls", hidden=True)(list_)
    group.command("show")(show)
    group.command("search", cls=TextCommand)(search)
    group.command("export")(export)
    group.command("import")(import_)
    group.command("rm")(rm)
    group.command("restore")(restore)
    app.add_typer(group, name="history")


def _history() -> History:
    from glmchat.chat.history.history import History

    history = History.default()
    if history.note:
        output.say(history.note)
    elif history.problem:
        output.say(tr("not saved: {reason}", reason=one_line(history.problem)))
    return history


def _when(seconds: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _row(c: Conversation) -> dict[str, Any]:
    from datetime import UTC, datetime

    return {
        "id": c.id,
        "title": c.title,
        "model": c.model,
        "created": datetime.fromtimestamp(c.created, UTC).isoformat(),
        "updated": datetime.fromtimestamp(c.updated, UTC).isoformat(),
        "messages": c.message_count,
        "pinned": c.pinned,
    }


def list_(
    as_json: Json = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, max=2**31, help="Only the newest N; 0 shows all.")] = 0,
) -> None:
    """Conversations, pinned ones first, then the last used first."""
    with _history() as history:
        conversations = history.conversations(limit=limit or -1)
    if as_json:
        output.json_line([_row(c) for c in conversations])
        return
    if not conversations:
        output.say(tr("There are no conversations yet."))
        return
    rows = [(c.id, "*" if c.pinned else "", _when(c.updated), c.message_count, c.model, c.title) for c in conversations]
    columns = ("ID", "", tr("LAST USED"), tr("MESSAGES"), tr("MODEL"), tr("TITLE"))
    output.table(columns, rows, right=(0, 3))


def show(
    conversation: Annotated[
        int,
        typer.Argument(
            metavar="ID", help="A number from `glmchat history list`.", autocompletion=complete_conversations
        ),
    ],
    as_json: Json = False,
) -> None:
    """One conversation: the branch that is open; with --json that branch and its settings."""
    from glmchat.chat.history.transcript import export as export_text

    with _history() as history:
        tree = history.load(conversation)
    if as_json:
        output.json_line({**_row(tree.conversation), **_branch(tree)})
        return
    output.data(export_text(tree, "text"), end="")


def _branch(tree: Tree) -> dict[str, Any]:
    return {
        "settings": tree.conversation.settings.to_json(),
        "messages": [_message(m) for m in tree.path()],
    }


def _message(m: StoredMessage) -> dict[str, Any]:
    from datetime import UTC, datetime

    return {
        "id": m.id,
        "parent": m.parent,
        "role": m.role,
        "text": m.text,
        "state": m.state,
        "created": datetime.fromtimestamp(m.created, UTC).isoformat(),
        "token_ids": list(m.token_ids),
        "details": dict(m.details),
    }


def search(
    query: Annotated[str, typer.Argument(help='Words that must all occur; "in quotes" as one phrase.')],
    as_json: Json = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=2**31, help="At most N results.")] = 50,
) -> None:
    """Search everything that was said, newest first. Chinese words of any length are found."""
    from glmchat.chat.history.search import grouped

    with _history() as history:
        hits = history.search(query, limit=limit)
        total = history.count_hits(query) if len(hits) == limit else len(hits)
    if as_json:
        from dataclasses import asdict

        output.json_line([asdict(hit) for hit in hits])
        return
    bold = output.is_terminal(sys.stdout)
    for group in grouped(hits):
        output.data(f"{group[0].conversation}  {one_line(group[0].title or tr('untitled'), 60)}")
        for hit in group:
            who = {"user": tr("You"), "assistant": tr("Assistant")}.get(hit.role or "", hit.role or tr("TITLE"))
            output.marked(f"    {_when(hit.created)}  {who}: ", hit.snippet, hit.spans if bold else ())
    if total > len(hits):
        output.say(tr("{shown} of {total} results; --limit shows more", shown=len(hits), total=total))
    elif not hits:
        output.say(tr("Nothing found."))


def export(
    conversations: Annotated[
        list[int] | None,
        typer.Argument(metavar="[ID...]", help="Without one: all of them.", autocompletion=complete_conversations),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", "-f", help="markdown, json or text. Default: from --output, else markdown."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="PATH", help="A file, or a folder for one file each. Default: stdout."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Write conversations as Markdown, text, or JSON (which `import` reads)."""
    from glmchat.chat.history import transcript

    destination = None if target in (None, "-") else Path(str(target))
    folder = destination is not None and (destination.is_dir() or str(target).endswith("/"))
    chosen = _format(form, None if folder else destination)
    with _history() as history:
        numbers = conversations or [c.id for c in reversed(history.conversations())]
        trees = [history.load(number) for number in numbers]
    if destination is not None and (folder or (len(trees) > 1 and chosen != "json")):
        _one_file_each(trees, chosen, destination, force)
        return
    import json

    if chosen == "json":
        text = json.dumps(transcript.to_json(trees), ensure_ascii=False, indent=1) + "\n"
    else:
        text = "\n".join(transcript.export(tree, chosen) for tree in trees)
    if destination is None:
        output.data(text, end="")
    else:
        _write(destination, text, force)


def _format(form: str | None, destination: Path | None) -> Any:
    from glmchat.chat.history.transcript import SUFFIXES

    words = {"markdown": "markdown", "md": "markdown", "json": "json", "text": "text", "txt": "text"}
    if form is None:
        return SUFFIXES.get(destination.suffix.lower() if destination else "", "markdown")
    if form.lower() not in words:
        raise Usage(
            tr("there is no format {name}", name=repr(one_line(form))),
            hint="markdown, json, text",
            code="history.format",
        )
    return words[form.lower()]


def _one_file_each(trees: list[Tree], form: Any, folder: Path, force: bool) -> None:
    from glmchat.chat.history import transcript

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    taken: set[str] = set()
    for tree in trees:
        name = transcript.file_name(tree, form)
        if name.lower() in taken:  # two conversations of one title
            name = f"{tree.conversation.id}-{name}"
        taken.add(name.lower())
        _write(folder / name, transcript.export(tree, form), force)


def _write(path: Path, text: str, force: bool) -> None:
    try:
        write_for_person(path, text, replace=force)
    except FileExistsError:
        raise Usage(
            tr("{path} already exists", path=one_line(str(path))),
            hint=tr("--force overwrites it"),
            code="history.exists",
        ) from None
    except OSError as error:
        raise _unwritable(path, error) from None
    output.say(str(path))


def _unwritable(path: Path, error: OSError) -> Failed | DoesNotFit:
    return (DoesNotFit if error.errno in FULL else Failed)(
        tr("{path} cannot be written: {reason}", path=one_line(str(path)), reason=error.strerror or str(error)),
        hint=tr("choose another path with --output"),
        code="history.unwritable",
    )


def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSON; - is stdin.")],
    as_json: Json = False,
) -> None:
    """Bring conversations in: JSON of glmchat, ChatGPT, Open WebUI, LibreChat, Claude or ShareGPT, or messages."""
    from glmchat.chat.history.transcript import IMPORT_LIMIT, add_to_history, read_import

    incoming = []
    for file in files:
        try:
            data = sys.stdin.buffer.read(IMPORT_LIMIT + 1) if str(file) == "-" else read_given(file, IMPORT_LIMIT)
        except OSError as error:
            raise Usage(
                tr("{path} cannot be read: {reason}", path=one_line(str(file)), reason=error.strerror or str(error)),
                hint=tr("give a JSON file"),
                code="history.unreadable",
            ) from None
        incoming += read_import(data, str(file))
    with _history() as history:
        history.require_saved()
        trees = add_to_history(history, incoming)
        rows = [c for tree in trees if (c := history.find(tree.conversation.id))]
    if as_json:
        output.json_line([_row(c) for c in rows])
        return
    for c in rows:
        output.data(f"{c.id}  {one_line(c.title)}")


def rm(
    conversations: Ids,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    forever: Annotated[
        bool, typer.Option("--forever", help="Delete permanently; otherwise it can be undone for a week.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete conversations. `glmchat history restore` brings them back within a week."""
    with _history() as history:
        numbers = list(dict.fromkeys(conversations))
        # What waits for its week to pass can go at once.
        hidden = {c: deletion for deletion, c in history.deletions() if history.find(c) is None} if forever else {}
        heads = [history.load(number).conversation for number in numbers if number not in hidden]
        history.require_saved()
        if not yes:
            titles = ", ".join(
                [f"{c.id} {one_line(c.title, 40)}" for c in heads] + [str(n) for n in numbers if n in hidden]
            )
            if not output.confirm(tr("Delete {titles}?", titles=titles)):
                raise Usage(tr("nothing was deleted"), hint=tr("answer y to delete"), code="history.kept")
        deletions = [history.delete_conversation(c.id) for c in heads]
        if forever:
            history.purge([*deletions, *(hidden[n] for n in numbers if n in hidden)])
        history.require_saved()
    if as_json:
        output.json_line([{"id": number, "forever": forever} for number in numbers])
    elif forever:
        output.say(tr("Deleted permanently."))
    else:
        ids = " ".join(map(str, numbers))
        output.say(tr("Deleted. Within a week `glmchat history restore {ids}` brings it back.", ids=ids))


def restore(conversations: Ids, as_json: Json = False) -> None:
    """Bring deleted conversations back."""
    with _history() as history:
        history.require_saved()
        by_conversation = {number: deletion for deletion, number in reversed(history.deletions())}
        for number in conversations:
            deletion = by_conversation.get(number)
            if deletion is None or history.find(number) is not None:
                raise Usage(
                    tr("conversation {id} is not deleted", id=number),
                    hint=tr("a conversation can be restored for a week after it was deleted"),
                    code="history.not_deleted",
                )
            history.restore(deletion)
        history.require_saved()
        rows = [c for number in conversations if (c := history.find(number))]
    if as_json:
        output.json_line([_row(c) for c in rows])
        return
    for c in rows:
        output.data(f"{c.id}  {one_line(c.title)}")
