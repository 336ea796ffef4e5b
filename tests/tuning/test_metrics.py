"""ROUGE and BLEU are those of rouge_chinese and nltk to the last digit they print; an interval covers what it says."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import jieba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge as Theirs

from glmchat.tuning import metrics
from glmchat.tuning.metrics import Answer, Rouge, bleu4, extremes, paired_difference, rouge, worth

ADGEN = Path(__file__).resolve().parents[3] / "shared" / "data" / "advertisegen" / "dev.json"
SIGNS = st.text(alphabet="上衣材质牛仔布风格。！？?…．.”’，, \n\tab🙂", max_size=60)


def rouge_of_theirs(answer: str, wanted: str) -> tuple[float, ...]:
    scores = Theirs().get_scores(" ".join(jieba.cut(answer)), " ".join(jieba.cut(wanted)))[0]
    return tuple(round(scores[name]["f"] * 100, 4) for name in ("rouge-1", "rouge-2", "rouge-l"))


def bleu_of_theirs(answer: str, wanted: str) -> float:
    score = sentence_bleu([list(wanted)], list(answer), smoothing_function=SmoothingFunction().method3)
    return round(float(score) * 100, 4)


def compare(answer: str, wanted: str) -> None:
    ours = rouge(answer, wanted)
    try:
        theirs = rouge_of_theirs(answer, wanted)
    except ValueError:  # theirs has no score for a text without a word
        theirs = (0.0, 0.0, 0.0)
    assert (ours.one, ours.two, ours.longest) == pytest.approx(theirs, abs=1e-6)
    assert bleu4(answer, wanted) == pytest.approx(bleu_of_theirs(answer, wanted) if answer else 0.0, abs=1e-6)


@settings(max_examples=300)
@given(SIGNS, SIGNS)
def test_any_two_texts_score_as_there(answer: str, wanted: str) -> None:
    compare(answer, wanted)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("", "上衣"), ("上衣", ""), ("", ""), ("。", "上衣。"), ("  ", "上衣"), ("🙂", "🙂"),
        ("the cat sat on the mat", "a cat is on the mat"), ("a", "a"), ("好", "好"), ("好 好 好 好", "好"),
        ("他说：“走吧。”然后走了。", "他说：“走吧。”"), ("等等……再说", "等等......再说"),
    ],
)  # fmt: skip
def test_texts_at_the_edge_score_as_there_and_a_text_without_words_scores_nothing(answer: str, wanted: str) -> None:
    compare(answer, wanted)


@pytest.mark.skipif(not ADGEN.is_file(), reason="the advertisements of AdvertiseGen lie outside the repository")
def test_a_thousand_advertisements_score_as_there() -> None:
    draw = random.Random(7)
    texts = [json.loads(line)["summary"] for line in ADGEN.read_text(encoding="utf-8").splitlines()]
    assert len(texts) == 1070
    for place, text in enumerate(texts):
        way = place % 4
        if way == 0:
            other = texts[draw.randrange(len(texts))]
        elif way == 1:
            other = "".join(draw.sample(text, len(text)))
        elif way == 2:
            other = text[: draw.randrange(len(text))]
        else:
            other = text + text[: draw.randrange(len(text))]
        compare(other, text)


def test_two_texts_of_five_thousand_words_take_little_memory() -> None:
    draw = random.Random(3)
    words = [f"w{n}" for n in range(900)]
    a, b = (" ".join(draw.choice(words) for _ in range(5000)) for _ in range(2))
    jieba.initialize()
    tracemalloc.start()
    scored = rouge(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert scored.longest > 0 and peak < 200e6


def test_the_same_text_scores_all_there_is() -> None:
    text = "上衣材质是牛仔布，风格是街头。"
    assert rouge(text, text) == Rouge(100.0, 100.0, 100.0)
    assert bleu4(text, text) == 100.0
    assert bleu4(["a", "b", "c", "d"], ["a", "b", "c", "d"]) == 100.0


def test_an_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    draw, held = np.random.default_rng(1), 0
    for trial in range(200):
        theirs = draw.normal(50, 10, 60)
        interval = paired_difference((theirs + draw.normal(2.0, 5, 60)).tolist(), theirs.tolist(), trial)
        held += interval.low <= 2.0 <= interval.high
    assert 0.88 <= held / 200 <= 0.99


def test_equal_candidates_show_no_difference_and_the_same_rows_the_same_interval() -> None:
    scores = [1.0, 5.0, 3.0]
    assert not paired_difference(scores, scores).shown
    assert paired_difference([2.0, 6.0, 4.0], scores).shown
    assert paired_difference([2, 9, 4], scores) == paired_difference([2, 9, 4], scores)
    assert not paired_difference([], []).shown


def test_no_row_is_shown_as_behind_or_ahead_where_two_candidates_are_worth_the_same() -> None:
    assert extremes([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], 1) == ([], [])
    assert extremes([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]], 1) == ([0], [])
    assert extremes([[0.5, 0.0, 0.2], [0.0, 0.3, 0.2]], 1) == ([0], [1])
    assert extremes([[0.5, 0.0, 0.2]], 1) == ([1], [0])


def pairs(seed: int, count: int = 40) -> list[Answer]:
    drawn = np.random.default_rng(seed).normal(30, 8, (count, 2))
    return [
        Answer(row, "good", None, float(a), 5 + row % 4, worse="bad", worse_nats=float(b), worse_learned=7)
        for row, (a, b) in enumerate(np.abs(drawn))
    ]


def test_pairs_are_told_apart_by_what_dpo_calls_its_margin_and_its_accuracy() -> None:
    base, trained = pairs(1), pairs(2)
    table = metrics.compare([base, trained])
    assert (table["rows"], table["answered"], table["pairs"]) == (40, 0, 40)
    margins = [np.array([a.worse_nats - a.nats for a in side]) for side in (base, trained)]
    for one, margin in zip(table["candidates"], margins, strict=True):
        assert one["values"]["preferred"] == pytest.approx(100 * (margin > 0).mean())
        assert one["values"]["margin"] == pytest.approx(margin.mean())
    values, differences = (table["candidates"][1][name] for name in ("values", "differences"))
    rewards = margins[1] - margins[0]  # of trl, divided by beta
    assert differences["margin"]["mean"] == pytest.approx(rewards.mean())
    assert differences["margin"]["low"] < rewards.mean() < differences["margin"]["high"]
    assert differences["gained"]["mean"] == pytest.approx(100 * (rewards > 0).mean())
    worse = [a.worse_nats / a.worse_learned for a in trained]
    assert values["loss-worse"] == pytest.approx(np.mean(worse))
    better = [a.nats / a.learned for a in trained]
    assert values["preferred-mean"] == pytest.approx(100 * np.mean(np.array(better) < np.array(worse)))
    assert values["loss"] == pytest.approx(sum(a.nats for a in trained) / sum(a.learned for a in trained))


def test_a_candidate_beside_itself_shows_no_difference_of_pairs() -> None:
    differences = metrics.compare([pairs(1), pairs(1)])["candidates"][1]["differences"]
    assert [name for name, found in differences.items() if found["shown"]] == []
    assert differences["gained"]["mean"] == 50.0


def test_pairs_are_ranked_by_how_far_they_are_told_apart_and_stand_beside_other_rows() -> None:
    mixed = [*pairs(3, 4), Answer(9, "a b", "a b", 2.0, 3, 2, "eos"), Answer(10, "", None, 2.0, 3)]
    assert [worth(a) for a in mixed[:4]] == [a.worse_nats - a.nats for a in mixed[:4]]
    assert [Answer.from_json(a.to_json()) for a in mixed] == mixed
    table = metrics.compare([mixed])
    assert (table["rows"], table["answered"], table["pairs"]) == (6, 1, 4)
    assert {"exact", "margin", "loss"} <= set(table["candidates"][0]["values"])
