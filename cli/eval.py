"""`glmchat eval`: candidates side by side on the same rows, with the interval of each difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmchat.cli import output
from glmchat.cli.completion import complete_columns, complete_evaluations
from glmchat.cli.engine_flags import EngineFlags, with_engine_flags
from glmchat.cli.output import cancelled_by_interrupt, follow_job, printed_events
from glmchat.cli.replay import sampling_changes
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.locations import user_path
from glmchat.core.messages import Sampling
from glmchat.core.text import one_line

if TYPE_CHECKING:
    from glmchat.chat.launch import LaunchOptions

_BLEU = ("characters", "words")


def register(app: typer.Typer) -> None:
    app.command("eval")(with_engine_flags(evaluate, without=("quant", "revision", "context", "keep_alive")))


def evaluate(
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME[:int4][+ADAPTER[:WEIGHT]][,SETTING=VALUE]… DATA",
            help="One candidate or more, and the data last. An empty NAME repeats the model before it: "
            "`smollm2 +poet dev.jsonl`.",
            autocompletion=complete_columns,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="The first N rows alone.")] = None,
    sampling: Annotated[
        str,
        typer.Option(
            "--sampling", metavar="greedy|original", help="original: temperature 0.95, top_p 0.7, as ChatGLM's scripts."
        ),
    ] = "greedy",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A sampling setting for all candidates; repeatable."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Tokens of an answer at most.")
    ] = 512,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", metavar="N", min=16, help="Tokens of a row; of a longer one the question is cut."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", metavar="TEXT", help="System prompt of rows that have none.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option("--columns", metavar="PART=FIELD,…", help="prompt=question,answer=reply; messages=…; text=…."),
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="alpaca, sharegpt, … where the fields do not tell.")
    ] = None,
    bleu: Annotated[
        str, typer.Option("--bleu", metavar="characters|words", help="What BLEU-4 counts; words: as ChatGLM3's demo.")
    ] = "characters",
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=0, help="Show so many worst and best rows.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The predictions, as ChatGLM's generated_predictions.txt."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also", metavar="DATA", help="Other rows, with a table of their own: what was forgotten; repeatable."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of sampling and of the intervals.")] = 0,
    again: Annotated[bool, typer.Option("--again", help="Forget the answers that are here already.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="List the evaluations.")] = False,
    shown: Annotated[
        str | None,
        typer.Option("--show", metavar="NAME", autocompletion=complete_evaluations, help="The table of one again."),
    ] = None,
    engine: EngineFlags,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout: each answer, then the table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Have models, quantisations, adapters or settings answer the rows of a file, and compare what they wrote.

    Loss and perplexity per learned token, exact match, ROUGE-1, ROUGE-2 and ROUGE-L (of jieba's words), BLEU-4, how
    many answers end by themselves and how long they are; and of each difference to the first candidate the interval
    that 95 of 100 samples of the same rows give. "no difference shown": it holds 0.

    Of pairs of a better and a worse answer: how often the better one is more probable, and by how much. Texts have
    their loss and perplexity.

    Of a conversation the last answer is judged. Each answer is kept as soon as it is written: the same command goes on
    after Ctrl-C or a kill, and other commands use it too.
    """
    from glmchat.chat.evaluating import SAMPLINGS, candidates_of, data_of
    from glmchat.chat.jobs import run_job

    given = words or []
    if listing or shown is not None:
        if given or (listing and shown is not None):
            raise Usage(
                tr(
                    "{one} and {other} conflict",
                    one="--list" if listing else "--show",
                    other=given[0] if given else "--show",
                ),
                hint=tr("give one of them"),
                code="usage.contradiction",
            )
        if shown is not None:
            _show_again(shown, as_json=as_json)
        else:
            _list(as_json=as_json)
        return
    if len(given) < 2:
        raise Usage(
            tr("name one candidate or more, and the data last"),
            hint=tr("for example glmchat eval smollm2 smollm2+poet dev.jsonl"),
            code="eval.words",
        )
    _one_of("--sampling", sampling, tuple(SAMPLINGS))
    _one_of("--bleu", bleu, _BLEU)
    chosen = {**SAMPLINGS[sampling], "max_tokens": max_tokens, "seed": seed, **sampling_changes(setting or [])}
    Sampling(**chosen)
    request = {
        "candidates": candidates_of(given[:-1], _base(engine, chosen)),
        "data": [data_of(given[-1])],
        "also": [data_of(one) for one in also or ()],
        "format": form,
        "columns": _columns(columns),
        "system": system,
        "max_length": max_length,
        "limit": limit,
        "bleu": bleu,
        "seed": seed,
        "rows": rows,
        "again": again,
        "out": None if out is None else str(_new_file(out, len(given) - 1)),
    }
    with cancelled_by_interrupt() as cancelled, printed_events(as_json=as_json, quiet=quiet, unit="steps") as show:
        result = follow_job(run_job("evaluate", request, cancelled=cancelled), show)
    if as_json:
        output.json_line({"event": "done", **result})
        return
    for number, table in enumerate((result, *result["also"])):
        if number:
            output.data("")
        _show(table)


def _one_of(flag: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise Usage(
            tr("{flag} cannot be {value}", flag=flag, value=repr(one_line(value, 60))),
            hint=", ".join(known),
            code="usage.value",
        )


def _columns(text: str | None) -> dict[str, str]:
    """ "prompt=question,answer=reply" -> part -> field. Raises Usage."""
    pairs = [part.partition("=") for part in text.split(",")] if text else []
    if any(not part.strip() or not key for part, _, key in pairs):
        raise Usage(
            tr("{flag} cannot be {value}", flag="--columns", value=repr(one_line(text or "", 60))),
            hint=tr("for example --columns prompt=question,answer=reply"),
            code="usage.value",
        )
    return {part.strip(): key for part, _, key in pairs}


def _new_file(path: Path, candidates: int) -> Path:
    """Where predictions may go. Raises Usage for a file that is there, or a folder that is not."""
    place = user_path(path)
    names = [place, *(place.with_name(f"{place.stem}-{n + 1}{place.suffix}") for n in range(candidates))]
    if (there := next((name for name in names if name.exists()), None)) is not None:
        raise Usage(
            tr("it already exists: {path}", path=one_line(str(there))), hint=tr("name another file"), code="eval.out"
        )
    if not place.parent.is_dir():
        raise Usage(
            tr("there is no folder {path}", path=one_line(str(place.parent))), hint=tr("make it first"), code="eval.out"
        )
    return place


def _base(flags: EngineFlags, chosen: Mapping[str, Any]) -> LaunchOptions:
    from glmchat.chat.launch import LaunchOptions
    from glmchat.core.settings import Settings

    return LaunchOptions(engine=flags.options(Settings()), sampling=chosen, keep_copy=False)


def _list(*, as_json: bool) -> None:
    from glmchat.chat import evaluating
    from glmchat.core.eval_folder import evaluations

    rows = evaluations()
    if as_json:
        output.json_line([evaluating.facts(row) for row in rows])
    elif not rows:
        output.say(tr("there are no evaluations yet; for example glmchat eval smollm2 smollm2+poet dev.jsonl"))
    else:
        output.table(
            (tr("evaluation"), tr("state"), tr("date"), tr("candidates")),
            [
                (
                    row.id,
                    evaluating.state_words(row.state()),
                    f"{datetime.fromtimestamp(row.created):%Y-%m-%d %H:%M}",
                    one_line(" ".join(row.candidates), 100),
                )
                for row in rows
            ],
        )


def _show_again(name: str, *, as_json: bool) -> None:
    """What an evaluation found out. Raises what ended it, or Usage where it is not at its end."""
    from glmchat.chat import evaluating
    from glmchat.core.eval_folder import find_evaluation

    found = find_evaluation(name)
    now = evaluating.Watch(found).look()
    if now.problem is not None:
        raise now.problem
    if now.table is None:
        raise Usage(
            tr("{name} has no table: {state}", name=found.id, state=evaluating.state_words(now.state)),
            hint=tr("the same command goes on with the next one; --again begins anew"),
            code="eval.unfinished",
        )
    if as_json:
        output.json_line({"event": "done", **now.table})
    else:
        _show(now.table)


def _show(result: Mapping[str, Any]) -> None:
    from glmchat.chat import evaluating

    candidates = result["candidates"]
    for number in range(len(candidates)):
        output.data(f"{number + 1:>2}  {''.join(evaluating.named(result, number))}")
    output.data("")
    output.data(tr("{rows:,} rows of {data}", rows=result["rows"], data=one_line(result["data"], 200)))
    heads = [str(number) for number in range(1, len(candidates) + 1)]
    output.table((tr("measure"), *heads), evaluating.value_cells(result), right=range(1, len(candidates) + 1))
    for number in range(1, len(candidates)):
        output.data("")
        lines = evaluating.difference_cells(result, number)
        output.table((f"{number + 1} − 1", tr("difference"), tr("95 % interval"), ""), lines, right=(1, 2))
        if note := evaluating.difference_note(result, number):
            output.data(note)
    for side, head in evaluating.sides(len(candidates)).items():
        for row in result["shown"][side]:
            output.data("")
            output.data(f"{head}: {one_line(row['place'], 200)}")
            output.data(f"  ?   {one_line(row['asked'], 300)}")
            for sign, text in evaluating.wanted(row["answers"][0]):
                output.data(f"  {sign}   {one_line(text, 300)}")
            for number, answer in enumerate(row["answers"], 1):
                output.data(f"  {number}   {one_line(evaluating.said(answer), 300)}")
    for file in result.get("files", ()):
        output.say(tr("written: {path}", path=one_line(file)))
