"""The form that an answer must have, in llguidance's own words, and the process in which it is read for the first time.

A form comes from whoever may ask. llguidance bounds what it builds, but not how deep it calls itself on the way: a
chain of 3,000 references overflows the stack and takes the engine with it, and a schema of 60 kB can take minutes. So a
form is built once in a process of its own, which may take two seconds and a gigabyte; the engine builds only what came
out of that well.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from functools import lru_cache

from glmchat.core.decoding import Grammar, GrammarKind
from glmchat.core.errors import FieldError
from glmchat.core.language import tr
from glmchat.core.text import one_line

LARGEST = 128 * 1024  # characters; OpenAI's bound on the names and values of a schema is 120,000
# Between the parts of a JSON text: room for a model's own layout, and none to fill with blanks for ever.
WHITESPACE = r"( |\n {0,20})?"
_CPU_SECONDS, _SECONDS, _MEMORY = 2, 20.0, 2**30  # of the process; it waits for a core where others have them
_STACK = 2 * 2**20  # a quarter of what the engine's thread has


def source(grammar: Grammar) -> str:
    """What llguidance is given. Raises whatever its readers raise."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    match grammar.kind:
        case "json_schema":
            return str(LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": WHITESPACE}))
        case "regex":
            return str(LLMatcher.grammar_from_regex(grammar.text))
        case "choice":
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text))
            return str(LLMatcher.grammar_from_lark(f"start: {texts}"))
        case "grammar":
            return str(LLMatcher.grammar_from_lark(any_to_lark(grammar.text)))


def check(grammar: Grammar) -> None:
    """Raise FieldError for a form that cannot be built within the limits. What was seen before costs nothing."""
    if problem := _problem(grammar.kind, grammar.text):
        raise refusal(grammar, problem)


def refusal(grammar: Grammar, problem: str) -> FieldError:
    return FieldError(
        tr(
            "{param} asks for a form that cannot be kept to: {problem}",
            param=grammar.param,
            problem=one_line(problem, 300),
        ),
        hint=tr("simplify it: JSON Schema without not, uniqueItems and remote references; no look-around"),
        code="decoding.grammar",
        param=grammar.param,
    )


@lru_cache(256)
def _problem(kind: GrammarKind, text: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name in _PASSED}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "glmchat.engine.decoding.form"],
            input=json.dumps({"kind": kind, "text": text}).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
            cwd="/",
            env=environment,
            check=False,
        )
        return str(json.loads(done.stdout)["problem"])
    except (subprocess.TimeoutExpired, ValueError, KeyError):  # it was ended by a limit, or by its own depth
        return tr("it is too large, or refers to itself too deeply")


# What a Python needs to start in the place where it stands.
_PASSED = frozenset(
    {"PATH", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "RAYON_NUM_THREADS"}
)


class _Bytes:
    """The smallest vocabulary: every byte, and an end."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)
    tokens = (*(bytes([value]) for value in range(256)), b"<end>")

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def _problem_of(grammar: Grammar) -> str:
    """Why it cannot be built; empty if it can."""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    try:
        matcher = LLMatcher(LLTokenizer(TokenizerWrapper(_Bytes())), source(grammar), log_level=0)
        matcher.compute_bitmask()  # a form that refers to itself alone fails here
        return matcher.get_error() if matcher.is_error() else ""
    except Exception as error:  # noqa: BLE001 - the GBNF reader raises plain Exceptions
        return str(error) or type(error).__name__


def main() -> None:
    """Read one form from standard input and say on standard output what is wrong with it."""
    for kind, limit in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CPU, _CPU_SECONDS), (resource.RLIMIT_CORE, 0)):
        try:
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS; the seconds still hold
            continue
    asked = json.load(sys.stdin)

    def answer() -> None:
        sys.stdout.write(json.dumps({"problem": _problem_of(Grammar(asked["kind"], asked["text"]))}))

    threading.stack_size(_STACK)
    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
