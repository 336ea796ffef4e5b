"""Forms, biases, penalties, log probabilities and ends: what transformers, jsonschema and the OpenAI API say they are.

Covers engine/decoding/decoder.py, engine/decoding/form.py, engine/decoding/passes.py, core/decoding.py.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import LlamaForCausalLM, LogitsProcessorList, MinNewTokensLengthLogitsProcessor
from transformers import SequenceBiasLogitsProcessor as BiasLogitsProcessor

from glmchat.core.decoding import PLAIN, Decoding, Grammar, TokenLogprob
from glmchat.core.errors import FieldError, Usage
from glmchat.core.messages import Sampling
from glmchat.engine import Engine, load_tokenizer
from glmchat.engine.decoding import form
from glmchat.engine.decoding.decoder import Decoder, Decoders
from glmchat.engine.sampling import make_sampler

GREEDY = Sampling(temperature=0, max_tokens=12)
PROMPT = [104, 105, 44, 60, 9]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["大", "b\n", 3, None]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 20}, "maxItems": 3},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["name", "kind", "sizes", "inner"],
    "additionalProperties": False,
    "$defs": {
        "inner": {
            "type": "object",
            "properties": {"yes": {"type": "boolean"}},
            "required": ["yes"],
            "additionalProperties": False,
        }
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, builders: ModuleType) -> Path:
    return builders.write_folder(tmp_path_factory.mktemp("decoder") / "m")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    loaded = Engine.load(folder, dtype="float32", threads=1)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def said(engine: Engine, decoding: Decoding, sampling: Sampling = GREEDY) -> tuple[list[int], str, list[TokenLogprob]]:
    """Ids without the one that ended it, the text, and what was told of each token."""
    ids: list[int] = []
    told: list[TokenLogprob] = []
    text = ""
    for chunk in engine.stream_ids(PROMPT, sampling, decoder=engine.decoder(decoding, PROMPT), chat=False):
        ids += chunk.token_ids
        text += chunk.text
        told += chunk.logprobs
        if chunk.facts.get("stopped_by") == "eos":
            ids.pop()
    return ids, text, told


def generated(reference: Any, *processors: Any) -> list[int]:
    """What transformers says, greedily, with its own processors."""
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        whole = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=[0, 2],
            pad_token_id=0, logits_processor=LogitsProcessorList(processors),
        )  # fmt: skip
    made = whole[0, len(PROMPT) :].tolist()
    return made[:-1] if made[-1] in (0, 2) else made


def test_a_request_that_asks_for_nothing_has_no_decoder_and_says_the_same(engine: Engine, reference: Any) -> None:
    assert engine.decoder(PLAIN) is None
    ids, _, told = said(engine, PLAIN)
    assert ids == generated(reference) and told == []
    assert said(engine, Decoding(top_logprobs=2))[0] == ids, "to be told of the chances changes none"


def test_log_probabilities_are_those_of_transformers_own_logits(engine: Engine, reference: Any) -> None:
    ids, _, told = said(
        engine, Decoding(top_logprobs=3, logit_bias={70: 4.0}), Sampling(temperature=1.5, seed=3, max_tokens=9)
    )
    with torch.inference_mode():
        logits = reference(torch.tensor([PROMPT + ids])).logits[0]
    rows = torch.log_softmax(logits, -1)[len(PROMPT) - 1 : -1]
    assert len(told) == len(ids)
    for row, token, one in zip(rows, ids, told, strict=True):
        assert one.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, best = row.topk(3)
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert one.top[0][0] == (engine.tokenizer.piece_bytes(int(best[0])) or one.top[0][0])


def test_biases_are_added_to_the_logits(engine: Engine, reference: Any) -> None:
    for bias in ({80: 100.0}, {80: 3.5, 81: -2.0}, dict.fromkeys(range(120), -100.0)):
        expected = generated(reference, BiasLogitsProcessor([[[token], value] for token, value in bias.items()]))
        assert said(engine, Decoding(logit_bias=bias))[0] == expected


@pytest.mark.parametrize(("presence", "frequency"), [(2.0, 0.0), (0.0, 2.0), (1.5, -1.5), (-2.0, 0.7)])
def test_penalties_count_what_was_said_as_the_api_reference_has_it(
    engine: Engine, reference: Any, presence: float, frequency: float
) -> None:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence; c counts the tokens of the answer."""
    ids: list[int] = []
    with torch.inference_mode():
        while len(ids) < 12:
            mu = reference(torch.tensor([PROMPT + ids])).logits[0, -1]
            for token in set(ids):
                mu[token] = mu[token] - ids.count(token) * frequency - float(ids.count(token) > 0) * presence
            if (chosen := int(mu.argmax())) in (0, 2):
                break
            ids.append(chosen)
    assert said(engine, Decoding(presence_penalty=presence, frequency_penalty=frequency))[0] == ids


def test_before_the_least_length_no_token_ends_an_answer(engine: Engine, reference: Any) -> None:
    end = Decoding(logit_bias={2: 100.0})
    assert said(engine, end)[0] == []
    least = MinNewTokensLengthLogitsProcessor(len(PROMPT), 7, [0, 2])
    wanted = generated(reference, BiasLogitsProcessor([[[2], 100.0]]), least)
    assert said(engine, Decoding(logit_bias={2: 100.0}, min_tokens=7))[0] == wanted and len(wanted) == 7


def test_a_stop_token_ends_the_answer_and_is_not_shown(engine: Engine) -> None:
    ids, whole, _ = said(engine, PLAIN)
    third = ids[3]
    at = ids.index(third)
    stopped, text, told = said(engine, Decoding(stop_token_ids=(third,), top_logprobs=0))
    assert stopped == ids[:at] and len(told) == at
    assert whole.startswith(text) and text == engine.tokenizer.decode(ids[:at])


def of_form(engine: Engine, grammar: Grammar, seed: int, temperature: float = 1.0) -> str:
    sampling = Sampling(temperature=temperature, top_p=1.0, seed=seed, max_tokens=240)
    return said(engine, Decoding(grammar=grammar), sampling)[1]


def test_answers_of_a_model_that_knows_nothing_still_have_the_schema(engine: Engine) -> None:
    for seed in range(12):
        answer = of_form(engine, Grammar("json_schema", json.dumps(SCHEMA)), seed)
        jsonschema.validate(json.loads(answer), SCHEMA, cls=jsonschema.Draft202012Validator)


def test_a_vocabulary_of_characters_with_bytes_beside_them_keeps_the_schema_too(
    tmp_path: Path, builders: ModuleType
) -> None:
    """As Llama 2's tokenizer.json: blanks as ▁, and a piece for each byte of what it has no character for."""
    folder = builders.write_folder(tmp_path / "m", vocab_size=400)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [chr(code) for code in range(33, 127)] + ["▁", '▁"', '":', "na", "me", "true", "▁▁"]
    lower = Tokenizer(
        models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    lower.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    lower.add_special_tokens([AddedToken(word, normalized=False) for word in words[:3]])
    lower.save(str(folder / "tokenizer.json"))
    engine = Engine.load(folder, dtype="float32", threads=1)
    try:
        assert engine.tokenizer.token_bytes(300) is None, "the vocabulary is of the other kind"
        assert (
            engine.tokenizer.piece_bytes(3 + 0xE5) == b"\xe5"
            and engine.tokenizer.piece_bytes(words.index('▁"')) == b' "'
        )
        for seed in range(8):
            answer = of_form(engine, Grammar("json_schema", json.dumps(SCHEMA)), seed)
            jsonschema.validate(json.loads(answer), SCHEMA, cls=jsonschema.Draft202012Validator)
    finally:
        engine.close()


REAL = Path(__file__).resolve().parents[3] / "shared" / "tokenizers"


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared with the real vocabularies is absent")
@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm-6b-early", "chatglm2", "chatglm3", "glm4"])
def test_the_real_vocabularies_keep_a_schema_whatever_the_logits_say(name: str) -> None:
    tokenizer = load_tokenizer(REAL / name)
    for text in ('{"name": "你好", "n": [1,\n  2]}', "naïve 🌍 a  b   c\t{x}"):
        pieces = b"".join(tokenizer.piece_bytes(token) for token in tokenizer.encode(text))
        assert pieces.decode().removeprefix(" ") == text, "the pieces of a text are the text"
    size = tokenizer.vocab_size
    end = size - 1
    made = Decoders(tokenizer, (end,), size)
    noise = torch.Generator().manual_seed(1)
    for seed in range(3):
        decoder = made.make(Decoding(grammar=Grammar("json_schema", json.dumps(SCHEMA))))
        assert decoder is not None
        choose = decoder.sampler(make_sampler(Sampling(temperature=1.0, top_p=1.0), seed))
        ids: list[int] = []
        while len(ids) < 300 and (token := choose(torch.randn(size, generator=noise))) != end:
            ids.append(token)
        answer = json.loads(tokenizer.decode(ids))
        jsonschema.validate(answer, SCHEMA, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_an_expression_a_choice_and_a_grammar_are_kept_to(engine: Engine, temperature: float) -> None:
    for seed in range(4):
        date = of_form(engine, Grammar("regex", r"(19|20)\d\d-[01]\d-[0-3]\d"), seed, temperature)
        assert re.fullmatch(r"(19|20)\d\d-[01]\d-[0-3]\d", date)
        texts = ["positive", 'not "sure"', "否\n"]
        assert of_form(engine, Grammar("choice", json.dumps(texts)), seed, temperature) in texts
        gbnf = 'root ::= item ("," item)?\nitem ::= [a-c] | "(" item ")"\n'
        sums = of_form(engine, Grammar("grammar", gbnf), seed, temperature)
        assert re.fullmatch(r"\(*[abc]\)*(,\(*[abc]\)*)?", sums) and sums.count("(") == sums.count(")")


def test_the_form_comes_before_a_least_length_that_it_cannot_have(engine: Engine) -> None:
    asked = Decoding(grammar=Grammar("choice", '["yes"]'), min_tokens=40)
    assert said(engine, asked, Sampling(temperature=0, max_tokens=60))[1] == "yes"


@pytest.mark.parametrize(
    ("grammar", "word"),
    [
        (Grammar("json_schema", '{"not": {"type": "string"}}'), "not"),
        (Grammar("json_schema", '{"type": "nonsense"}'), "nonsense"),
        (Grammar("json_schema", '{"$ref": "https://example.com/x"}'), "example.com"),
        (Grammar("regex", "(a"), "unclosed"),
        (Grammar("regex", "a(?=b)"), "look"),
        (Grammar("grammar", "root ::= nobody"), "nobody"),
        (Grammar("grammar", "root ::= ((("), "guided_grammar"),
    ],
)
def test_a_form_that_cannot_be_kept_to_is_refused_with_the_reason(engine: Engine, grammar: Grammar, word: str) -> None:
    with pytest.raises(Usage, match=word) as refused:
        engine.decoder(Decoding(grammar=Grammar(grammar.kind, grammar.text, "guided_grammar")))
    assert refused.value.code == "decoding.grammar" and "guided_grammar" in refused.value.message


def chain(length: int) -> str:
    links = {f"{n:x}": {"$ref": f"#/$defs/{n + 1:x}"} for n in range(length)}
    return json.dumps({"$defs": {**links, f"{length:x}": {}}, "$ref": "#/$defs/0"})


HOSTILE = {
    "a chain of references": ("json_schema", chain(3000)),
    "a schema that is itself": ("json_schema", '{"$ref": "#"}'),
    "expressions in a row": ("json_schema", json.dumps({"patternProperties": {f"^{n:x}$": {} for n in range(4000)}})),
    "alternatives": ("json_schema", json.dumps({"anyOf": [{"properties": {f"{n:x}": {}}} for n in range(4000)]})),
    "a file": ("json_schema", '{"$ref": "file:///etc/passwd"}'),
    "brackets": ("grammar", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "rules of rules": ("grammar", "start: A0\n" + "".join(f"A{n}: /x/ A{n + 1}\n" for n in range(5000)) + "A5000: /x/"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_form_that_takes_all_time_or_all_stack_is_refused_and_the_engine_lives(engine: Engine, name: str) -> None:
    kind, text = HOSTILE[name]
    with pytest.raises(FieldError, match="cannot be kept to") as refused:
        engine.decoder(Decoding(grammar=Grammar(kind, text)))  # type: ignore[arg-type]
    assert refused.value.param == "response_format" and len(refused.value.message) < 500
    assert engine.decoder(Decoding(grammar=Grammar("regex", "a+"))) is not None


def test_a_form_is_read_by_its_own_process_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Decoding(grammar=Grammar("regex", "once+"))
    engine.decoder(asked)
    monkeypatch.setattr(form.subprocess, "run", lambda *given, **more: pytest.fail("it was read already"))
    engine.decoder(asked)


def test_ids_outside_the_vocabulary_are_refused(engine: Engine) -> None:
    for asked in (Decoding(logit_bias={272: 1.0}), Decoding(stop_token_ids=(9999,))):
        with pytest.raises(Usage, match="outside the vocabulary of 272"):
            engine.decoder(asked)


def test_the_best_candidates_of_a_card_do_not_decide_over_a_row_that_was_changed(engine: Engine) -> None:
    row = torch.zeros(272)
    row[5] = 1.0
    row.candidates = lambda choice: pytest.fail("they are those of the model's own row")  # type: ignore[attr-defined]
    for asked in (
        Decoding(logit_bias={7: 100.0}),
        Decoding(top_logprobs=1),
        Decoding(grammar=Grammar("regex", "[a-z]")),
    ):
        decoder = engine.decoder(asked)
        assert decoder is not None
        token = decoder.sampler(make_sampler(Sampling(temperature=0), 0))(row)
        assert token == 7 if asked.logit_bias else token == 5 if asked.grammar is None else token not in (5, 7)


def test_a_thought_ends_when_its_budget_is_used_up(tmp_path: Path, engine: Engine, builders: ModuleType) -> None:
    folder = builders.write_folder(tmp_path / "m", vocab_size=280)
    lower = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lower.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    lower.save(str(folder / "tokenizer.json"))
    opens, closes = lower.token_to_id("<think>"), lower.token_to_id("</think>")
    assert opens is not None and closes is not None
    thinker = Engine.load(folder, dtype="float32", threads=1)
    try:
        never = {closes: -100.0, opens: -100.0, 0: -100.0, 2: -100.0}
        for budget, prompt in ((5, [*PROMPT, opens]), (0, [*PROMPT, opens]), (3, PROMPT)):
            bias = never if prompt is not PROMPT else {**never, opens: 0.0}
            decoder = thinker.decoder(Decoding(thinking_budget=budget, logit_bias=bias), prompt)
            ids = [t for c in thinker.stream_ids(prompt, GREEDY, decoder=decoder, chat=False) for t in c.token_ids]
            newline = lower.encode("\n").ids[0]
            if prompt is not PROMPT:
                assert ids[budget : budget + 4] == [newline, closes, newline, newline]
                assert closes not in ids[budget + 2 :], "it is closed once, and the answer goes on"
            elif opens in ids:
                assert ids[ids.index(opens) + 1 + budget :][:2] == [newline, closes][: len(ids) - ids.index(opens) - 4]
    finally:
        thinker.close()
    with pytest.raises(Usage, match="does not mark its thoughts"):
        engine.decoder(Decoding(thinking_budget=5))


@pytest.mark.parametrize("length", [1, 2, 200])
def test_log_probabilities_of_a_prompt_are_those_of_transformers_own_logits(
    engine: Engine, reference: Any, length: int
) -> None:
    """Longer than one chunk of rows, and behind an answer whose cache holds its beginning."""
    prompt = torch.randint(3, 260, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    rows = torch.log_softmax(reference(torch.tensor([prompt])).logits[0].detach(), -1)
    list(engine.stream_ids(prompt, GREEDY))
    for top, only_reads in ((0, True), (3, True), (3, False)):
        decoder = engine.decoder(Decoding(top_logprobs=top, of_prompt=True, only_reads=only_reads), prompt)
        chunks = list(engine.stream_ids(prompt, Sampling(temperature=0, max_tokens=1), decoder=decoder, chat=False))
        told = [one for chunk in chunks for one in chunk.logprobs]
        assert len(told) == length + (not only_reads), "one for each id, also for an id that ends the answer"
        assert sum(len(chunk.token_ids) for chunk in chunks) == (not only_reads)
        assert (told[0].logprob, told[0].top) == (None, ())
        for row, token, one in zip(rows, prompt[1:], told[1:], strict=False):
            assert one.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert [value for _, value in one.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)
        if not only_reads:
            assert told[-1].logprob == pytest.approx(float(rows[-1].max()), abs=1e-4)


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b"])
def test_log_probabilities_of_a_prompt_are_those_of_one_uncached_pass(
    name: str, tmp_path: Path, random_checkpoints: ModuleType
) -> None:
    config = random_checkpoints.tiny(name, padded_vocab_size=400)
    random_checkpoints.write_checkpoint(tmp_path, config, dtype=torch.float32)
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    try:
        prompt = torch.randint(3, 300, (200,), generator=torch.Generator().manual_seed(1)).tolist()
        rows = torch.log_softmax(engine.logits(prompt), -1)
        decoder = Decoder(Decoding(top_logprobs=1, of_prompt=True), (), lambda token: b"%d" % token)
        deque(engine.sequence.read(prompt, on_rows=decoder.reader(prompt)))
        told = decoder.told()
        assert [int(one.piece) for one in told] == prompt
        right = rows[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert [one.logprob for one in told[1:]] == pytest.approx(right.tolist(), abs=1e-4)
    finally:
        engine.close()


def test_a_model_that_reads_both_ways_has_no_log_probabilities_of_a_prompt(
    tmp_path: Path, random_checkpoints: ModuleType
) -> None:
    random_checkpoints.write_checkpoint(tmp_path, random_checkpoints.tiny("chatglm-6b"), dtype=torch.float32)
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    try:
        with pytest.raises(FieldError) as refused:
            engine.decoder(Decoding(top_logprobs=1, of_prompt=True))
        assert refused.value.param == "echo"
    finally:
        engine.close()


def test_reading_a_prompt_for_its_log_probabilities_is_stopped_between_layers(engine: Engine) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 5

    prompt = [7, 8, 9] * 80
    decoder = engine.decoder(Decoding(top_logprobs=1, of_prompt=True), prompt)
    (end,) = engine.stream_ids(prompt, GREEDY, decoder=decoder, cancelled=cancelled)
    assert end.finish_reason == "cancelled" and len(end.logprobs) < len(prompt)
