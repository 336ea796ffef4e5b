"""`glmchat eval`: candidates side by side on the same rows, with the interval of each difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from glmchat.cli import output
from glmchat.cli.completion import complete_columns
from glmchat.cli.engine_flags import EngineFlags, with_engine_flags
from glmchat.cli.output import cancelled_by_interrupt, follow_job, printed_events
from glmchat.cli.replay import sampling_changes
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.locations import user_path
from glmchat.core.messages import Sampling
from glmchat.core.text import one_line

# Of both, the length of an answer is another setting.
SAMPLINGS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "original": {"temperature": 0.95, "top_p": 0.7},  # ChatGLM-6B's ptuning/main.py
}
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
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of sampling and of the intervals.")] = 0,
    again: Annotated[bool, typer.Option("--again", help="Forget the answers that are here already.")] = False,
    engine: EngineFlags,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout: each answer, then the table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Have models, quantisations, adapters or settings answer the rows of a file, and compare what they wrote.

    Loss and perplexity per learned token, exact match, ROUGE-1, ROUGE-2 and ROUGE-L (of jieba's words), BLEU-4, how
    many answers end by themselves and how long they are; and of each difference to the first candidate the interval
    that 95 of 100 samples of the same rows give. "no difference shown": it holds 0.

    Of a conversation the last answer is judged. Each answer is kept as soon as it is written: the same command goes on
    after Ctrl-C or a kill, and other commands use it too.
    """
    from glmchat.chat.jobs import run_job

    given = words or []
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
        "candidates": _candidates(given[:-1], engine, chosen),
        "data": [_data(given[-1])],
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

        def show_event(event: Mapping[str, Any]) -> None:
            if not as_json:
                for line in event.get("words", ()):
                    output.say(line)
            show(event)

        result = follow_job(run_job("evaluate", request, cancelled=cancelled), show_event)
    if as_json:
        output.json_line({"event": "done", **result})
        return
    _show(result, given[-1])


def _candidates(texts: Sequence[str], flags: EngineFlags, chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As the job wants them. Raises what `launches` does, and Usage for settings that change the question."""
    from glmchat.chat.compare.columns import launches, parse_columns
    from glmchat.chat.launch import LaunchOptions
    from glmchat.core.settings import Settings
    from glmchat.hub import adapters

    parsed = parse_columns(texts)
    if any("template_variables" in settings for settings in (chosen, *(column.sampling for column in parsed))):
        raise Usage(
            tr("template variables cannot be set here: data are read without them"),
            hint=tr("for example glmchat eval smollm2,temp=0.5 dev.jsonl"),
            code="eval.variables",
        )
    base = LaunchOptions(engine=flags.options(Settings()), sampling=chosen, keep_copy=False)
    found = []
    for column, launch in zip(parsed, launches(parsed, base), strict=True):
        brought = [(name, str(adapters.find_adapter(name).path), weight) for name, weight in column.adapters]
        arguments = launch.engine.to_arguments()
        text = column.text if column.text[:1] not in ("", "+", ",") else column.name + column.text
        found.append({"text": text, "engine": arguments, "adapters": brought, "sampling": launch.sampling})
    return found


def _one_of(flag: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise Usage(
            tr("{flag} cannot be {value}", flag=flag, value=repr(one_line(value, 60))),
            hint=", ".join(known),
            code="usage.value",
        )


def _data(word: str) -> str:
    """The data's place, which the job is told absolutely. Raises Usage where nothing is."""
    name, mark, entry = word.partition(".json#")
    path = user_path(name + ".json" if mark else word)
    if not path.exists():
        raise Usage(
            tr("there is no file {path}", path=one_line(str(path))),
            hint=tr("the data stand last: glmchat eval smollm2 dev.jsonl"),
            code="data.missing",
        )
    return f"{path}#{entry}" if mark else str(path)


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


def _show(result: Mapping[str, Any], data: str) -> None:
    candidates = result["candidates"]
    names = _names(result["bleu"])
    for number, one in enumerate(candidates, 1):
        output.data(f"{number:>2}  {one_line(one['text'], 120)}  ({_how(one['sampling'])})")
    output.data("")
    output.data(tr("{rows:,} rows of {data}", rows=result["rows"], data=one_line(data, 60)))
    lines = []
    for name, (label, digits, unit) in names.items():
        if name in candidates[0]["values"]:
            cells = [f"{one['values'][name]:,.{digits}f}{unit}" for one in candidates]
            lines.append((label, *cells))
    heads = [str(number) for number in range(1, len(candidates) + 1)]
    output.table((tr("measure"), *heads), lines, right=range(1, len(candidates) + 1))
    for number, one in enumerate(candidates[1:], 2):
        output.data("")
        lines = []
        for name, found in one["differences"].items():
            label, digits, unit = names[name]
            parts = (f"{found[part]:+.{digits}f}".replace("-", "−") for part in ("mean", "low", "high"))
            mean, low, high = parts
            note = "" if found["shown"] else tr("no difference shown")
            lines.append((label, mean + unit, f"{low} … {high}", note))
        output.table((f"{number} − 1", tr("difference"), tr("95 % interval"), ""), lines, right=(1, 2))
        if "loss" not in one["differences"]:
            output.data(
                tr("the losses of 1 and {number} count other tokens, so they have no difference", number=number)
            )
    _show_rows(result["shown"], candidates)
    for file in result["files"]:
        output.say(tr("written: {path}", path=one_line(file)))


def _how(sampling: Mapping[str, Any]) -> str:
    most = tr("at most {count:,} tokens", count=sampling["max_tokens"])
    if sampling["temperature"] == 0:
        return f"{tr('greedy')}, {most}"
    return f"temperature {sampling['temperature']:g}, top_p {sampling['top_p']:g}, {most}"


def _names(bleu: str) -> dict[str, tuple[str, int, str]]:
    """Of each measure: what it is called, its decimals and its unit."""
    unit = tr("characters") if bleu == "characters" else tr("words")
    return {
        "loss": (tr("loss per learned token"), 4, ""),
        "perplexity": (tr("perplexity"), 3, ""),
        "exact": (tr("exact match"), 1, " %"),
        "rouge-1": ("ROUGE-1", 2, ""),
        "rouge-2": ("ROUGE-2", 2, ""),
        "rouge-l": ("ROUGE-L", 2, ""),
        "bleu-4": (tr("BLEU-4 of {unit}", unit=unit), 2, ""),
        "stopped": (tr("ended by itself"), 1, " %"),
        "tokens": (tr("length in tokens"), 1, ""),
    }


def _show_rows(shown: Mapping[str, Sequence[Mapping[str, Any]]], candidates: Sequence[Any]) -> None:
    several = len(candidates) > 1
    heads = {
        "worst": tr("where {number} is furthest behind 1", number=len(candidates)) if several else tr("worst"),
        "best": tr("where {number} is furthest ahead of 1", number=len(candidates)) if several else tr("best"),
    }
    for side, head in heads.items():
        for row in shown[side]:
            output.data("")
            output.data(f"{head}: {one_line(row['place'], 200)}")
            output.data(f"  ?   {one_line(row['asked'], 300)}")
            if row["answers"][0]["predict"] is not None:
                output.data(f"  =   {one_line(row['answers'][0]['labels'], 300)}")
            for number, answer in enumerate(row["answers"], 1):
                text = answer["predict"]
                if text is None:
                    loss = answer["nats"] / max(answer["learned"], 1)
                    output.data(f"  {number}   " + tr("loss per learned token") + f" {loss:.4f}")
                else:
                    output.data(f"  {number}   {one_line(text, 300) or tr('(nothing)')}")
