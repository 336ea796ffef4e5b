"""The table of an evaluation: means and intervals of what rouge_chinese, nltk and plain sums say of each row."""

from __future__ import annotations

import math
import random
from typing import Any

import jieba
import numpy as np
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge as Theirs

from glmchat.tuning.metrics import Answer, compare, extremes, measures, worth

WANTED = ["上衣材质是牛仔布，风格是街头。", "the cat sat on the mat", "好的，我明白了！"]
GIVEN = ["上衣的材质是牛仔布。风格简约。", "a cat is on the mat", "好的，我明白了！"]
HOSTILE = ["", "。", " \n\t", "\x1b[31m\x00", "\u202e", "��", "🙂" * 3, "</s><|user|>"]


def answer(row: int, wanted: str, given: str | None, nats: float = 2.0, learned: int = 4, by: str = "eos") -> Answer:
    return Answer(row, wanted, given, nats, learned, 0 if given is None else len(given), by)


def of_theirs(given: str, wanted: str, *, words: bool) -> dict[str, float]:
    spaced = (" ".join(jieba.cut(text)) for text in (given, wanted))
    rouge = {name: round(score["f"] * 100, 4) for name, score in Theirs().get_scores(*spaced)[0].items()}
    units = [list(jieba.cut(text)) if words else list(text) for text in (wanted, given)]
    bleu = sentence_bleu([units[0]], units[1], smoothing_function=SmoothingFunction().method3)
    return {**rouge, "bleu-4": round(float(bleu) * 100, 4)}


@pytest.mark.parametrize("bleu", ["characters", "words"])
def test_the_table_holds_the_means_of_what_rouge_chinese_and_nltk_say(bleu: Any) -> None:
    answers = [answer(n, *texts) for n, texts in enumerate(zip(WANTED, GIVEN, strict=True))]
    values = compare([answers], bleu)["candidates"][0]["values"]
    theirs = [of_theirs(g, w, words=bleu == "words") for g, w in zip(GIVEN, WANTED, strict=True)]
    for name in ("rouge-1", "rouge-2", "rouge-l", "bleu-4"):
        assert values[name] == pytest.approx(sum(row[name] for row in theirs) / 3, abs=1e-6)
    assert values["exact"] == pytest.approx(100 / 3) and values["stopped"] == 100


def test_loss_is_per_token_whatever_row_it_stands_in() -> None:
    answers = [answer(1, "a", "a", nats=1.0, learned=1), answer(2, "b", "b", nats=2.0, learned=9, by="length")]
    values = compare([answers])["candidates"][0]["values"]
    assert values["loss"] == pytest.approx(0.3) and values["perplexity"] == pytest.approx(math.exp(0.3))
    assert values["stopped"] == 50


@pytest.mark.parametrize("given", HOSTILE)
@pytest.mark.parametrize("wanted", ["上衣", *HOSTILE])
def test_an_answer_of_any_kind_has_a_worth_between_nothing_and_all(given: str, wanted: str) -> None:
    found = measures(answer(1, wanted, given))
    assert all(0 <= found[name] <= 100.0001 for name in ("exact", "rouge-1", "rouge-2", "rouge-l", "bleu-4"))
    if not given and wanted.strip():
        assert not any(found[name] for name in ("exact", "rouge-1", "rouge-2", "rouge-l", "bleu-4"))


def test_texts_have_loss_alone() -> None:
    table = compare([[answer(1, "", None)], [answer(1, "", None, nats=1.0)]])
    assert table["answered"] == 0
    assert [set(one["values"]) for one in table["candidates"]] == [{"loss", "perplexity"}] * 2
    assert set(table["candidates"][1]["differences"]) == {"loss"}


def test_losses_over_other_tokens_have_no_difference() -> None:
    table = compare([[answer(1, "a", "a", learned=4)], [answer(1, "a", "a", learned=5)]])
    assert "loss" not in table["candidates"][1]["differences"]


def test_the_interval_of_a_loss_holds_the_true_one_as_often_as_it_says() -> None:
    """The true loss per token is known: rows of many lengths, each token of one worse by 0.1 nats on average."""
    draw, held = np.random.default_rng(4), 0
    for trial in range(150):
        lengths = draw.integers(1, 200, 80)
        base = [draw.gamma(2.0, 1.0, n).sum() for n in lengths]
        more = [base[at] + (0.1 + draw.normal(0, 0.2)) * n for at, n in enumerate(lengths)]
        sides = [[answer(at, "", None, float(x), int(n)) for at, (x, n) in enumerate(zip(nats, lengths, strict=True))]
                 for nats in (base, more)]  # fmt: skip
        found = compare(sides, seed=trial)["candidates"][1]["differences"]["loss"]
        assert found["low"] <= found["mean"] <= found["high"]
        held += found["low"] <= 0.1 <= found["high"]
    assert 0.87 <= held / 150 <= 0.99


def test_equal_answers_show_no_difference() -> None:
    answers = [answer(n, *texts) for n, texts in enumerate(zip(WANTED, GIVEN, strict=True))]
    differences = compare([answers, answers])["candidates"][1]["differences"]
    assert differences and not any(one["shown"] for one in differences.values())


def test_the_rows_that_are_shown_are_the_furthest_apart_and_no_row_is_both() -> None:
    draw = random.Random(2)
    words = [["上衣", "材质", "牛仔布", "风格", "街头"][draw.randrange(5)] for _ in range(9)]
    base = [answer(n, word, "x") for n, word in enumerate(words)]
    good = [answer(n, word, word if n == 3 else "x") for n, word in enumerate(words)]
    worst, best = extremes(worths(base, good), 2)
    assert best[0] == 3 and not set(worst) & set(best)
    assert extremes(worths(good), 1)[1] == [3]
    assert [len(side) for side in extremes(worths(base[:1]), 4)] == [1, 0]


def worths(*candidates: list[Answer]) -> list[list[float]]:
    return [[worth(one) for one in answers] for answers in candidates]


def test_an_answer_comes_back_from_its_line_as_it_was() -> None:
    for one in (answer(1, "上衣", "\x1b\n"), answer(2, "", None)):
        assert Answer.from_json(one.to_json()) == one
