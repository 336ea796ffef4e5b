"""Search finds every Chinese word, marks it where it stands, and stays quick."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from glmchat.chat.history.history import History
from glmchat.chat.history.search import find_spans, match_expression, snippet, spaced


def add(history: History, *texts: str) -> None:
    tree = history.new()
    for text in texts:
        history.append(tree, "user", text)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("量", True),
        ("量化", True),
        ("化模型", True),
        ("模型 量化", True),  # each word anywhere
        ('"量化模型"', True),
        ("模量", False),
        ("化量", False),
        ("int4", True),
        ("INT", True),  # a beginning, any case
        ("nt4", False),
        ("cafe", True),
        ("CAFÉ", True),
        ("café au lait", True),
        ('"au café"', False),
        ("カタ", True),
        ("한국", True),
        ("国어", False),
        ("😀", True),
        ("->", True),
        ("=>", False),
        ('a"b OR x', False),
        ("NEAR(", False),
        ("*", False),
        ("'; DROP TABLE message; --", False),
        ("", False),
    ],
)
def test_words_are_found_as_people_type_them(history: History, query: str, found: bool) -> None:
    add(history, "比较 int4 量化模型（Café au lait）カタカナ 한국어 😀 a -> b", "something else")
    hits = history.search(query)
    assert bool(hits) is found
    assert history.count_hits(query) == len(hits)


@pytest.mark.parametrize("lead", [*range(20, 50), 400])
def test_a_snippet_begins_where_a_word_begins(lead: int) -> None:
    text = ("a wonderful afternoon 花园里 " * 40)[:lead] + " needle and more"
    around, spans = snippet(text, find_spans(text, "needle"))
    assert [around[a:b] for a, b in spans] == ["needle"]
    assert around.removeprefix("…").split()[0] in (*text[:lead].split(), "needle", "花园里", "园里", "里")


def test_hits_carry_a_snippet_with_the_words_marked(history: History) -> None:
    text = "前言" * 50 + "这里说到量化，以及\n另一行的 Quantising 方法" + "后记" * 80
    add(history, text)
    (hit,) = history.search("量化 quant")
    marked = [hit.snippet[a:b] for a, b in hit.spans]
    assert marked == ["量化", "Quant"]
    assert text[hit.offset :].startswith("量化")
    assert "\n" not in hit.snippet and hit.snippet.startswith("…") and hit.snippet.endswith("…")


def test_the_newest_come_first_and_pages_do_not_overlap(history: History) -> None:
    add(history, *(f"note {n}" for n in range(30)))
    first = history.search("note", limit=10)
    second = history.search("note", limit=10, offset=10)
    assert [h.snippet for h in first] == [f"note {n}" for n in range(29, 19, -1)]
    assert not {h.message for h in first} & {h.message for h in second}
    assert history.count_hits("note") == 30


def test_what_an_answer_says_is_found_once_it_has_ended(history: History) -> None:
    tree = history.new()
    history.append(tree, "user", "?")
    answer = history.begin_answer(tree)
    history.add_piece(tree, answer, "aard")
    history.add_piece(tree, answer, "vark")
    history.finish_answer(tree, answer, "stopped")
    assert [h.message for h in history.search("aardvark")] == [answer.id]


def test_a_given_title_is_found_and_a_changed_one_only_by_its_new_words(history: History) -> None:
    add(history, "hello")
    tree = history.load(1)
    history.rename(tree, "关于鲸鱼")
    history.rename(tree, "关于海豚")
    assert history.search("鲸鱼") == []
    (hit,) = history.search("海豚")
    assert hit.message is None and hit.title == "关于海豚"


@pytest.mark.parametrize(
    "text", ["plain", "量化 int4", "ﬁne Straße ÅNGSTRÖM", "a\u0301bc", "𠮷野家", "İstanbul", "😀👩‍👩‍👧 x"]
)
def test_spans_point_into_the_original_text(text: str) -> None:
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            for a, b in find_spans(text, text[start:end]):
                assert 0 <= a < b <= len(text)
    spans = find_spans(text, text)
    around, inside = snippet(text, spans)
    assert all(around[a:b] for a, b in inside)


@pytest.mark.parametrize("mended", [False, True])
def test_titles_are_found_whoever_gave_them_and_the_first_words_of_a_question_once(
    history: History, mended: bool
) -> None:
    plain, named, titled, brought = (history.new() for _ in range(4))
    for tree in (plain, named, titled):
        history.append(tree, "user", "alpha beta\nand more")
    history.rename(named, "gamma of a person")
    assert history.give_title(titled, "delta of a model")
    history.append(brought, "user", "epsilon")
    history.change(brought, title="zeta of another program")
    if mended:
        assert history.store._mend_search()
    for word in ("gamma", "delta", "zeta"):
        (hit,) = history.search(word)
        assert hit.message is None
    assert [hit.message for hit in history.search("alpha")] == [3, 2, 1]
    assert [hit.message for hit in history.search("epsilon")] == [4]


def test_spacing_leaves_latin_words_whole() -> None:
    assert spaced("用int4量化") == " 用 int4 量  化 "
    assert match_expression("用int4 x") == '"用 int4"* AND "x"*'


def test_a_large_history_is_searched_and_opened(tmp_path: Path) -> None:
    """The size is the point; times are reported, not asserted (the benchmark measures them on a quiet machine)."""
    with History.open(tmp_path / "history.db") as history:
        tree = history.new()
        with history.store.transaction():
            message = history.append(tree, "user", "量化是什么")
            rows = (
                (n, 1, n - 1, "user" if n % 2 else "assistant", f"第{n}条 message about 量化 and models {n % 97}")
                for n in range(2, 20_001)
            )
            for row in rows:
                history.store.run(
                    "INSERT INTO message (id, conversation, parent, role, text, state, created)"
                    " VALUES (?, ?, ?, ?, ?, 'complete', 0)",
                    row,
                )
            history.store.run("INSERT INTO search (rowid, text) SELECT id, text FROM message WHERE id > 1")
        began = time.perf_counter()
        hits = history.search("models 42", limit=50)
        print(f"search: {time.perf_counter() - began:.3f} s")
        assert len(hits) == 50 and message.id == 1
        assert history.count_hits("models 42") > 50
        began = time.perf_counter()
        assert len(history.load(1).messages) == 20_000
        print(f"load: {time.perf_counter() - began:.3f} s")
