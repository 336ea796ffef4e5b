"""`glmchat mirror`: write a mirror folder, and serve one to everything that speaks the hub's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from glmchat.cli import output
from glmchat.cli.completion import complete_models
from glmchat.cli.output import printed_events
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line


class _NameOrServe(TyperGroup):
    """`glmchat mirror NAME DIR` beside `glmchat mirror serve DIR`: what is no command is a model's name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["write", *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    mirror = typer.Typer(
        cls=_NameOrServe,
        help="Keep models in a folder that other machines pull from: `glmchat mirror NAME DIR`, then `serve DIR`.",
    )
    mirror.command("write")(write)
    mirror.command("serve")(serve)
    mirror.command("list")(list_mirror)
    app.add_typer(mirror, name="mirror")


def write(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME[@REVISION]", help="A name or owner/repo.", autocompletion=complete_models),
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The mirror folder; created if it does not exist.")],
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag.")] = None,
    endpoint: Annotated[
        list[str] | None, typer.Option(help="Hub address or mirror folder to copy from; may be repeated, in order.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only files that match this pattern.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Skip files that match this pattern.")] = None,
    check: Annotated[bool, typer.Option(help="Hash every file again, even in a complete mirror.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Write every file of a revision into DIR, verified; broken off, the same command goes on."""
    from glmchat.core.settings import load_settings
    from glmchat.hub import mirror, store
    from glmchat.hub.file_request import ProgressEvents
    from glmchat.hub.plan import PullOptions
    from glmchat.hub.references import parse

    options = PullOptions(
        endpoints=tuple(endpoint or ()), include=tuple(include or ()), exclude=tuple(exclude or ()), everything=True
    )
    plan = mirror.plan_mirror(parse(name, revision=revision), directory, options, output.wait)
    if as_json:
        output.json_line(plan.to_json() if dry_run else {"event": "plan", **plan.to_json()})
    if dry_run and not as_json:
        rows = [(f.path, human_bytes(f.size) if f.size is not None else "?") for f in plan.files]
        output.table((tr("file"), tr("size")), rows, right=(1,))
    for line in plan.lines():
        output.say(line)
    if dry_run or (plan.done and not check):
        return
    try:
        with printed_events(as_json=as_json, quiet=quiet) as show:
            snapshot = mirror.execute_mirror(
                plan, ProgressEvents(show), lambda: False, concurrency=load_settings().downloads
            )
    except KeyboardInterrupt:
        raise store.stopped() from None
    if as_json:
        output.json_line({"event": "done", **snapshot.to_json()})
    else:
        output.say(
            tr("{name} is in the mirror: {count} files, all verified", name=plan.repo, count=len(snapshot.files))
        )
        output.say(tr("pull from it with --endpoint {path}, or serve it: glmchat mirror serve {path}", path=directory))


def serve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder created by `glmchat mirror`.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8090,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not print a line for each request.")] = False,
) -> None:
    """Serve DIR as a hub, read-only: `hf download`, transformers and glmchat pull from it with HF_ENDPOINT."""
    from glmchat.core.http import is_loopback
    from glmchat.hub.mirror_server import MirrorServer

    with MirrorServer(directory, host=host, port=port, log=None if quiet else output.say) as server:
        address = server.url
        output.data(address)
        if not is_loopback(host):
            output.say(tr("everyone who can reach this machine can read these models"))
        output.say(
            tr("on other machines: HF_ENDPOINT={address}, or glmchat pull --endpoint {address}", address=address)
        )
        output.say(tr("press Ctrl-C to stop"))
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            output.say(tr("the mirror is closed"))


def list_mirror(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder created by `glmchat mirror`.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """What a mirror folder holds."""
    from glmchat.hub.mirror_folder import MirrorFolder

    mirror = MirrorFolder(directory)
    entries: list[dict[str, Any]] = []
    for name in mirror.repos():
        branches, tags = mirror.refs(name)
        for commit in mirror.commits(name):
            snapshot = mirror.snapshot(name, commit)
            names = [ref for ref, target in (branches | tags).items() if target == commit]
            size = sum(file.size for file in snapshot.files)
            entries.append(
                {"repo": name, "revision": commit, "names": names, "files": len(snapshot.files), "bytes": size}
            )
    if as_json:
        output.json_line(entries)
        return
    if not entries:
        raise Usage(
            tr("the mirror {path} is empty", path=one_line(str(directory))),
            hint=tr("glmchat mirror NAME DIR adds a model"),
            code="mirror.empty",
        )
    rows = [
        (m["repo"], str(m["revision"])[:12], ", ".join(m["names"]), m["files"], human_bytes(m["bytes"]))
        for m in entries
    ]
    output.table((tr("model"), tr("revision"), tr("names"), tr("files"), tr("size")), rows, right=(3, 4))
