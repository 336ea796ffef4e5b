"""What a request may ask of the choice of tokens beside `Sampling`: whatever looks at the whole row of logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

GrammarKind = Literal["json_schema", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like. text: the schema as JSON, the expression, a JSON list of the texts that may be
    chosen, or a grammar (GBNF or Lark).
    """

    kind: GrammarKind
    text: str
    param: str = "response_format"  # the field of the request that asked for it


@dataclass(frozen=True, slots=True)
class Decoding:
    """The fields are named as OpenAI (the first three, top_logprobs) and vLLM (the others) name them.

    Penalties count what was said in this answer: logit - frequency_penalty * count - presence_penalty * (count > 0).
    stop_token_ids end an answer and are not shown. Before min_tokens tokens nothing ends it.
    top_logprobs: how many alternatives are told beside each token, 0 for none; None tells no log probabilities at all.
    They are those of the model itself, before any setting has changed them.
    thinking_budget: tokens a thought may take before it is closed; None leaves it to the model.
    of_prompt: log probabilities of the prompt's tokens stand before those of the answer, which then also tell of one
    that ends it. only_reads: the prompt is read, and nothing is answered.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    top_logprobs: int | None = None
    grammar: Grammar | None = None
    thinking_budget: int | None = None
    budget_param: str = "thinking_budget"  # the field of the request that told it
    of_prompt: bool = False
    only_reads: bool = False


PLAIN = Decoding()  # asks for nothing: answers are computed as if none of this existed


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token: its bytes, its log probability, and the likeliest tokens of its place with theirs.

    logprob: None of the first token of a prompt, before which stands nothing that could foretell it.
    """

    piece: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()
