"""`glmchat tune`: what is to be learned, and how; its runs are those of cli/runs.py."""

from __future__ import annotations

from typing import Annotated

import typer

from glmchat.cli import output, runs
from glmchat.cli.completion import complete_installed, complete_runs
from glmchat.core.engine_options import parse_quant
from glmchat.core.errors import Usage
from glmchat.core.language import tr

_DATA, _LORA, _WHOLE, _STEPS, _RUNS = "Data", "Adapter", "Whole model", "Training", "Runs"  # the panels of its help


def register(app: typer.Typer) -> None:
    app.command("tune")(tune)


def tune(
    base: Annotated[
        str | None,
        typer.Argument(
            metavar="[BASE]",
            help="A model of `glmchat ls`; with scratch the words: of a model, a folder, or train:N.",
            autocompletion=complete_installed,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DATA]...", help="JSON, JSON lines, CSV, a folder of .txt, dataset_info.json#name."),
    ] = None,
    name: Annotated[str | None, typer.Option("--as", metavar="NAME", help="What the result will be called.")] = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            metavar="RECIPE",
            help="As a known guide does it: lora-guide, ptuning, ptuning-chat, chatglm2-ptuning, chatglm3,"
            " chatglm-tuning, cpm.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="lora|prefix|prompt|full|scratch|dpo",
            help="An adapter (prefix: P-Tuning v2), all weights, a new GPT-2, or with dpo which of two is better.",
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="answers|last|all|text", help="What is learned of a row.", rich_help_panel=_DATA),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="Put before each row that has none.", rich_help_panel=_DATA),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option("--eval", metavar="FILE|5%", help="Rows that are judged, never learned.", rich_help_panel=_DATA),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option("--mix", metavar="FILE:20%", help="Rows of another file among them.", rich_help_panel=_DATA),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option("--columns", metavar="prompt=A,answer=B", help="Which columns hold what.", rich_help_panel=_DATA),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", metavar="N", help="Tokens of a row.", rich_help_panel=_DATA)
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            metavar="N",
            help="Of texts: tokens from one window to the next; none overlap.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    over_length: Annotated[
        str | None,
        typer.Option(
            "--over-length",
            metavar="refuse|cut-question|cut-answer|split|drop",
            help="What becomes of longer rows.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", help="Width of the change; 8.", rich_help_panel=_LORA)
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", metavar="X", help="Its scale is alpha / rank; 16.", rich_help_panel=_LORA)
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option("--dropout", metavar="X", help="Share of its inputs left out; 0.", rich_help_panel=_LORA),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets",
            metavar="NAMES|REGEX|all-linear",
            help="The layers that it changes.",
            rich_help_panel=_LORA,
        ),
    ] = None,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Scale by the root of the rank.", rich_help_panel=_LORA)
    ] = False,
    dora: Annotated[
        bool, typer.Option("--dora", help="Learn directions and lengths apart.", rich_help_panel=_LORA)
    ] = False,
    prefix_length: Annotated[
        int | None,
        typer.Option(
            "--prefix-length", metavar="N", help="Learned positions before a text; 128.", rich_help_panel=_LORA
        ),
    ] = None,
    prefix_projection: Annotated[
        bool, typer.Option("--prefix-projection", help="Learn a small network that makes them.", rich_help_panel=_LORA)
    ] = False,
    beta: Annotated[
        float | None,
        typer.Option("--beta", metavar="X", help="Of dpo: how strongly the base holds; 0.1.", rich_help_panel=_LORA),
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", metavar="sigmoid|ipo", help="Of dpo.", rich_help_panel=_LORA)
    ] = None,
    output_as: Annotated[
        str | None,
        typer.Option(
            "--output", metavar="peft|pt", help="PEFT's folder, or the guides' one file.", rich_help_panel=_LORA
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE", help="Of scratch: a config.json of GPT-2.", rich_help_panel=_WHOLE),
    ] = None,
    last_layers: Annotated[
        int | None,
        typer.Option(
            "--last-layers",
            metavar="N",
            help="Only these learn; embedding, last norm and head stay.",
            rich_help_panel=_WHOLE,
        ),
    ] = None,
    optimiser_dtype: Annotated[
        str | None,
        typer.Option(
            "--optimiser-dtype",
            metavar="float32|bfloat16",
            help="Of AdamW's moments: 8 or 4 bytes a weight.",
            rich_help_panel=_WHOLE,
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", metavar="X", help="Learning rate.", rich_help_panel=_STEPS)
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs",
            min=1,
            metavar="N",
            help="How often all rows are seen; 3, few rows oftener.",
            rich_help_panel=_STEPS,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, metavar="N", help="So many, in as many epochs as it takes.", rich_help_panel=_STEPS
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="X", help="As many steps as fit.", rich_help_panel=_STEPS)
    ] = None,
    tokens_per_step: Annotated[
        int | None,
        typer.Option("--tokens-per-step", metavar="N", help="Of the rows that make a step.", rich_help_panel=_STEPS),
    ] = None,
    save_every: Annotated[
        int | None, typer.Option("--save-every", metavar="N", help="Steps between checkpoints.", rich_help_panel=_STEPS)
    ] = None,
    row_tokens: Annotated[
        int | None,
        typer.Option("--row-tokens", metavar="N", help="Tokens of one pass: less memory.", rich_help_panel=_STEPS),
    ] = None,
    checkpointing: Annotated[
        str | None,
        typer.Option(
            "--checkpointing",
            metavar="auto|on|off",
            help="Compute layers twice: less memory, a third more time.",
            rich_help_panel=_STEPS,
        ),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option("--quant", metavar="4|8", help="Quantise the base as it is loaded.", rich_help_panel=_STEPS),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="float32|bfloat16|float16", help="Of the base.", rich_help_panel=_STEPS),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="cpu|cuda", help="Where it trains.", rich_help_panel=_STEPS)
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="Of a CPU.", rich_help_panel=_STEPS)
    ] = None,
    samples: Annotated[
        list[str] | None,
        typer.Option("--sample", metavar="QUESTION", help="Answered now and then; repeatable.", rich_help_panel=_STEPS),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", help="Of the rows' order and dropout; 0.", rich_help_panel=_STEPS),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, learn nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask after the plan.")] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Leave it as soon as it learns.", rich_help_panel=_RUNS)
    ] = False,
    prepare: Annotated[
        int | None,
        typer.Option(
            "--prepare",
            min=2,
            metavar="N",
            help="Make its folder and say what starts it in N processes.",
            rich_help_panel=_RUNS,
        ),
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the runs.", rich_help_panel=_RUNS)] = False,
    attach: Annotated[
        str | None,
        typer.Option(
            "--attach", metavar="RUN", autocompletion=complete_runs, rich_help_panel=_RUNS, help="Look at one."
        ),
    ] = None,
    stop: Annotated[
        str | None,
        typer.Option(
            "--stop", metavar="RUN", autocompletion=complete_runs, rich_help_panel=_RUNS, help="Save and stop it."
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            autocompletion=complete_runs,
            rich_help_panel=_RUNS,
            help="Go on from its last checkpoint.",
        ),
    ] = None,
    again: Annotated[
        str | None,
        typer.Option(
            "--again",
            metavar="RUN",
            autocompletion=complete_runs,
            rich_help_panel=_RUNS,
            help="Repeat it from its recipe, and say where the two part.",
        ),
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(
            "--rm",
            metavar="RUN",
            autocompletion=complete_runs,
            rich_help_panel=_RUNS,
            help="Delete its folder; the adapter in the store stays.",
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live view.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout.")] = False,
) -> None:
    """Teach a model from your own rows: the plan, then an adapter or a model. `glmchat tune BASE DATA --dry-run`."""
    from glmchat.chat.recipe import Recipe
    from glmchat.chat.tune_request import request_again, request_of
    from glmchat.core import run_folder

    asked = {"--list": listing, "--attach": attach, "--stop": stop, "--resume": resume, "--rm": remove,
             "--again": again}  # fmt: skip
    named = [flag for flag, value in asked.items() if value not in (None, False)]
    if len(named) > 1 or (named and base is not None):
        raise Usage(
            tr("{one} and {other} conflict", one=named[0], other=named[1] if len(named) > 1 else "BASE"),
            hint=tr("give one of them"),
            code="usage.contradiction",
        )
    recipe = Recipe(
        like=like, method=method, on=on, system=system, eval=held_out, mix=mix or [], columns=columns,
        max_length=max_length, stride=stride, over_length=over_length, rank=rank, alpha=alpha, dropout=dropout,
        targets=targets,
        rslora=rslora or None, dora=dora or None, prefix_length=prefix_length,
        prefix_projection=prefix_projection or None, beta=beta, loss=loss, output=output_as, config=config,
        last_layers=last_layers, optimiser_dtype=optimiser_dtype, lr=lr,
        epochs=epochs, steps=steps, minutes=minutes, tokens_per_step=tokens_per_step, save_every=save_every,
        row_tokens=row_tokens, checkpointing=checkpointing, quant=parse_quant(quant, "--quant"),
        dtype=dtype, device=device, threads=threads, samples=samples or [], seed=seed,
    )  # fmt: skip
    if named:
        fixed = recipe.given()
        if again is None:  # a run that is there is as it was begun: nothing that is told now would come into force
            told = {"as": name, "dry-run": dry_run, "detach": detach and resume is None, **fixed}
        else:
            told = {flag: value for flag, value in fixed.items() if flag != "threads"}
        if others := [flag for flag, value in told.items() if value not in (None, False)]:
            raise Usage(
                tr("{one} and {other} conflict", one=named[0], other=f"--{others[0]}"),
                hint=tr("a run is repeated as it was; --threads and --as may differ")
                if again is not None
                else tr("a run goes on as it was begun: leave out {flag}", flag=f"--{others[0]}"),
                code="usage.contradiction",
            )
    if listing:
        runs.print_list(as_json=as_json)
        return
    if stop is not None:
        runs.stop(run_folder.find_run(stop))
        return
    if remove is not None:
        runs.remove(run_folder.find_run(remove, is_whole=True))
        return
    if attach is not None:
        run = run_folder.find_run(attach)
    elif resume is not None:
        from glmchat.chat import tuning

        run = run_folder.find_run(resume)
        tuning.resume(run)
    else:
        if again is None and (base is None or not data):
            raise Usage(
                tr("there is nothing to learn from") if base else tr("no model was named"),
                hint=tr("glmchat tune BASE DATA, for example: glmchat tune smollm2 rows.jsonl --dry-run"),
                code="tune.nothing",
            )
        if prepare is not None and (dry_run or detach):
            raise Usage(
                tr("{one} and {other} conflict", one="--prepare", other="--dry-run" if dry_run else "--detach"),
                hint=tr("give one of them"),
                code="usage.contradiction",
            )
        asks = not yes and not as_json and output.interactive()
        checked = recipe.checked()
        if again is not None:
            request = request_again(run_folder.find_run(again), threads, name)
        else:
            assert base is not None and data is not None
            request = request_of(base, data, name, checked.get("method")) | checked
        shows_page = dry_run or detach or not as_json
        only_plan = dry_run or prepare is not None
        planned = runs.plan(request, dry_run=only_plan, asks=asks, shows_page=shows_page, as_json=as_json)
        if prepare is not None:
            runs.prepare(request, prepare, as_json=as_json)
        if planned is None:
            return
        run = planned
    if detach:
        if as_json:
            output.json_line({"event": "started", "run": run.id, "folder": str(run.folder)})
        else:
            output.say(runs.how_to_come_back(run))
        return
    runs.look(run, plain=plain, as_json=as_json)
