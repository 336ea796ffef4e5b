"""Other people's clients before `glmchat serve`: openai, LangChain, LiteLLM and llm. Not for CI.

    python -m venv ENV && ENV/bin/pip install openai langchain-openai litellm llm
    .venv/bin/python benchmarks/foreign_clients.py --python ENV/bin/python

Nothing is installed here; a package that the environment lacks is named. The server has the starter model and a key;
each check is what the package's own documentation shows. One row of JSON per check; exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-of-this-benchmark"
ASK = [{"role": "user", "content": "Name a colour."}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "count": {"type": "integer"}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the environment with the clients")
    parser.add_argument("--model", default="smollm2", help="what the server is to serve")
    parser.add_argument(
        "--ask", metavar="URL", help="be the clients of the server there; the benchmark calls itself so"
    )
    options = parser.parse_args()
    if options.ask:
        return ask(options.ask)
    with tempfile.TemporaryDirectory(prefix="glmchat-clients-") as folder, serving(options.model, Path(folder)) as url:
        command = [str(options.python.absolute()), "-P", str(Path(__file__).resolve()), "--ask", url]
        # A client may read the user's own keys and settings; here it has none.
        environment = {"PATH": os.environ["PATH"], "HOME": folder, "LLM_USER_PATH": folder, "NO_PROXY": "127.0.0.1"}
        environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices
        return subprocess.run(command, env=environment, cwd=folder, check=False).returncode


@contextmanager
def serving(model: str, folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    glmchat = [sys.executable, "-P", "-m", "glmchat", "serve", model, "--port", str(port)]
    environment = {"GLMCHAT_HOME": str(ROOT / ".test-cache"), **os.environ, "GLMCHAT_API_KEY": KEY}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            glmchat, env=environment, cwd=folder, stderr=log, stdout=log, stdin=subprocess.DEVNULL
        )
    try:
        health = urllib.request.Request(f"http://127.0.0.1:{port}/health", headers={"Authorization": f"Bearer {KEY}"})
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and server.poll() is None:
            try:
                urllib.request.urlopen(health, timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        else:
            raise SystemExit((folder / "server.log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def ask(url: str) -> int:
    failed = 0
    for package, module, checks in (
        ("openai", "openai", OPENAI),
        ("langchain-openai", "langchain_openai", LANGCHAIN),
        ("litellm", "litellm", LITELLM),
        ("llm", "llm", LLM),
    ):
        try:
            importlib.import_module(module)
        except ImportError as missing:
            print(json.dumps({"client": package, "missing": str(missing)}), flush=True)
            continue
        version = importlib.import_module("importlib.metadata").version(package)
        for check in checks:
            started = time.perf_counter()
            row = {"client": f"{package} {version}", "check": (check.__doc__ or check.__name__).strip()}
            try:
                check(url)
                row["right"] = True
            except Exception as error:  # noqa: BLE001 - whatever a client raises is the result
                failed += 1
                row |= {"right": False, "error": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps({**row, "seconds": round(time.perf_counter() - started, 2)}), flush=True)
    return 1 if failed else 0


# openai


def client(url: str, **options: Any) -> Any:
    import openai

    return openai.OpenAI(base_url=url, api_key=KEY, **options)


def name_of(url: str) -> str:
    return str(client(url).models.list().data[0].id)


def lists_and_retrieves(url: str) -> None:
    """models.list, models.retrieve"""
    row = client(url).models.list().data[0]
    assert client(url + "/").models.retrieve(row.id) == row


def chats(url: str) -> None:
    """chat, seed, stop, both names of the limit"""

    def said(**given: Any) -> str:
        whole = client(url).chat.completions.create(model=name_of(url), messages=ASK, **given)
        return str(whole.choices[0].message.content)

    assert said(seed=7, max_tokens=9) == said(seed=7, max_tokens=9) != ""
    word = said(temperature=0, max_tokens=12).split()[1]
    assert word not in said(temperature=0, max_tokens=12, stop=[word])
    assert len(said(temperature=0, max_tokens=1, max_completion_tokens=8)) > len(said(temperature=0, max_tokens=1))


def streams(url: str) -> None:
    """stream with usage, the stream() helper, asynchronous"""
    import openai

    create = {"model": name_of(url), "messages": ASK, "max_tokens": 8, "temperature": 0}
    chunks = list(client(url).chat.completions.create(**create, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage.completion_tokens == 8
    helped = {**create, "max_tokens": 20, "extra_body": {"guided_choice": ["a red one"]}}  # it wants a whole answer
    with client(url).chat.completions.stream(**helped) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == "a red one"

    async def later() -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as other:
            return str((await other.chat.completions.create(**create)).choices[0].message.content)

    assert asyncio.run(later()) == text


def several(url: str) -> None:
    """n=3, logprobs, top_logprobs, logit_bias, penalties"""
    whole = client(url).chat.completions.create(
        model=name_of(url), messages=ASK, n=3, logprobs=True, top_logprobs=4, max_tokens=5, seed=1,
        presence_penalty=0.5, frequency_penalty=0.5, logit_bias={"42": -100},
    )  # fmt: skip
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    for choice in whole.choices:
        assert all(len(one.top_logprobs) == 4 and one.logprob <= 0 for one in choice.logprobs.content)
        assert choice.message.content.startswith(choice.logprobs.content[0].token)


def of_a_form(url: str) -> None:
    """response_format json_object and json_schema, parse() with a pydantic model"""
    import pydantic

    create, model = client(url).chat.completions.create, name_of(url)
    whole = create(model=model, messages=ASK, response_format=FORMAT, max_tokens=60)
    answer = json.loads(whole.choices[0].message.content)
    assert answer["colour"] in ("red", "green", "blue") and isinstance(answer["count"], int)
    anything = create(model=model, messages=ASK, response_format={"type": "json_object"}, max_tokens=400, seed=3)
    if anything.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(anything.choices[0].message.content), dict)

    class Colour(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=12)
        warm: bool

    parsed = client(url).chat.completions.parse(model=model, messages=ASK, response_format=Colour, max_tokens=80)
    assert isinstance(parsed.choices[0].message.parsed, Colour)


def completes(url: str) -> None:
    """completions: text, ids, stream, logprobs, 16 tokens where no limit is named"""
    create, model = client(url).completions.create, name_of(url)
    whole = create(model=model, prompt="Once upon a time", temperature=0, logprobs=2)
    assert whole.usage.completion_tokens <= 16 and len(whole.choices[0].logprobs.top_logprobs[0]) >= 2
    streamed = create(model=model, prompt="Once upon a time", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == whole.choices[0].text
    assert create(model=model, prompt=[10, 11, 12], max_tokens=2).choices[0].text is not None


def guided(url: str) -> None:
    """vLLM's and llama-server's extra fields"""
    create, model = client(url).chat.completions.create, name_of(url)
    for field, value, right in (
        ("guided_choice", ["yes", "no"], ("yes", "no")),
        ("guided_regex", "(red|blue)!", ("red!", "blue!")),
        ("grammar", 'root ::= "a" | "b"', ("a", "b")),
        ("structured_outputs", {"choice": ["x", "y"]}, ("x", "y")),
    ):
        whole = create(model=model, messages=ASK, max_tokens=20, extra_body={field: value})
        assert whole.choices[0].message.content in right, field
    create(model=model, messages=ASK, max_tokens=-1, extra_body={"min_tokens": 2, "stop_token_ids": [2], "top_k": 3})


def refused(url: str) -> None:
    """what is not done is refused by name (tools, embeddings, an unknown model, an unknown field)"""
    import openai

    create, model = client(url, max_retries=0).chat.completions.create, name_of(url)
    for given in ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {"modalities": ["audio"]}):
        try:
            create(model=model, messages=ASK, **given)
        except openai.BadRequestError as error:
            assert error.param in given
        else:
            raise AssertionError(f"{given} was taken")
    for wrong in (
        lambda: client(url, max_retries=0).embeddings.create(model=model, input="x"),
        lambda: create(model="nobody", messages=ASK),
    ):
        try:
            wrong()
        except openai.NotFoundError:
            continue
        raise AssertionError("it was found")


def crowds(url: str) -> None:
    """16 at once with the package's own two retries"""
    import openai

    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as other:
            asked = [other.chat.completions.create(model=model, messages=ASK, max_tokens=12) for _ in range(16)]
            return await asyncio.gather(*asked)

    model = name_of(url)
    assert len(asyncio.run(all_of_them())) == 16


OPENAI: list[Callable[[str], None]] = [
    *(lists_and_retrieves, chats, streams, several, of_a_form, completes, guided, refused, crowds)
]


# LangChain


def chat_model(url: str, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=url, api_key=KEY, model=name_of(url), **options)


def chain_invokes(url: str) -> None:
    """ChatOpenAI: invoke, stream, batch"""
    model = chat_model(url, max_tokens=8, temperature=0)
    text = model.invoke("Name a colour.").content
    assert text and "".join(chunk.content for chunk in model.stream("Name a colour.")) == text
    assert [answer.content for answer in model.batch(["Name a colour."] * 3)] == [text] * 3


def chain_is_structured(url: str) -> None:
    """ChatOpenAI.with_structured_output (json_schema, json_mode), logprobs"""
    model = chat_model(url, max_tokens=80)
    schema = {**SCHEMA, "title": "answer", "description": "a colour"}
    answer = model.with_structured_output(schema, method="json_schema").invoke("Name a colour.")
    assert answer["colour"] in ("red", "green", "blue")
    told = model.bind(logprobs=True, top_logprobs=2).invoke("hi").response_metadata["logprobs"]["content"]
    assert len(told[0]["top_logprobs"]) == 2


def chain_completes(url: str) -> None:
    """OpenAI (completions)"""
    from langchain_openai import OpenAI

    assert OpenAI(base_url=url, api_key=KEY, model=name_of(url), max_tokens=5).invoke("Once upon a time")


LANGCHAIN: list[Callable[[str], None]] = [chain_invokes, chain_is_structured, chain_completes]


# LiteLLM


def lite(url: str, **options: Any) -> Any:
    import litellm

    return litellm.completion(model=f"openai/{name_of(url)}", api_base=url, api_key=KEY, messages=ASK, **options)


def lite_completes(url: str) -> None:
    """completion, stream, with a slash behind the address"""
    text = lite(url, max_tokens=8, temperature=0).choices[0].message.content
    chunks = lite(url + "/", max_tokens=8, temperature=0, stream=True)
    assert text and "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def lite_is_structured(url: str) -> None:
    """response_format, n, logprobs, user, metadata"""
    whole = lite(url, response_format=FORMAT, max_tokens=60, user="me", metadata={"a": "b"})
    assert json.loads(whole.choices[0].message.content)["colour"] in ("red", "green", "blue")
    assert len(lite(url, n=2, max_tokens=3, logprobs=True, top_logprobs=1).choices) == 2


def lite_text(url: str) -> None:
    """text_completion"""
    import litellm

    name = f"text-completion-openai/{name_of(url)}"
    whole = litellm.text_completion(model=name, api_base=url, api_key=KEY, prompt="Once upon", max_tokens=4)
    assert whole.choices[0].text


LITELLM: list[Callable[[str], None]] = [lite_completes, lite_is_structured, lite_text]


# llm


def llm_command(url: str, *arguments: str) -> str:
    name = name_of(url)
    row = {"model_id": "here", "model_name": name, "api_base": url, "api_key_name": "here", "supports_schema": True}
    Path(os.environ["LLM_USER_PATH"], "extra-openai-models.yaml").write_text(json.dumps([row]))
    Path(os.environ["LLM_USER_PATH"], "keys.json").write_text(json.dumps({"here": KEY}))
    command = [sys.executable, "-m", "llm", "-m", "here", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr[-300:]
    return done.stdout


def llm_prompts(url: str) -> None:
    """prompt streamed and whole, options, a conversation gone on with"""
    options = ("-o", "temperature", "0", "-o", "max_tokens", "8", "-o", "seed", "3")
    text = llm_command(url, "Name a colour.", *options)
    assert text.strip() and llm_command(url, "Name a colour.", "--no-stream", *options) == text
    assert llm_command(url, "-c", "And another?", *options).strip()


def llm_schema(url: str) -> None:
    """--schema"""
    answer = json.loads(llm_command(url, "Name a colour.", "--schema", json.dumps(SCHEMA), "-o", "max_tokens", "60"))
    assert answer["colour"] in ("red", "green", "blue")


LLM: list[Callable[[str], None]] = [llm_prompts, llm_schema]


if __name__ == "__main__":
    sys.exit(main())
