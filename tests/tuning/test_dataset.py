"""Whole files to examples: counts that add up, prompts that are the chat's, tokens that are never stale.

Covers tuning/dataset.py, tuning/gathering.py, tuning/options.py, tuning/prompt_side.py, tuning/store.py,
tuning/page.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from vocabulary_kinds import KINDS, as_it_is

from glmchat.core.messages import Message
from glmchat.tuning.dataset import DataOptions, read_dataset
from glmchat.tuning.page import Facts, lines
from glmchat.tuning.prompt_side import PromptSide, load_prompt_side

Sides = Callable[[str], PromptSide]
REAL = {
    "advertisegen/dev.json": 1070,
    "advertisegen/train-sample.json": 30,
    "alpaca-zh/zh-data-first200.json": 200,
    "chatglm/improve_data_sample.jsonl": 100,
    "chatglm/multiturn_ptuning_readme.jsonl": 3,
    "chatglm-efficient-tuning/examples.json": 2,
    "chatglm-efficient-tuning/oaast_sft_zh.json": 689,
    "llama-factory/alpaca_en_demo.json": 999,
    "llama-factory/c4_demo.jsonl": 300,
    "llama-factory/identity.json": 91,
    "llama-factory/dataset_info.json#identity": 91,
}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", REAL)
def test_a_real_file_is_read_with_counts_that_add_up(sides: Sides, shared: Path, name: str) -> None:
    dataset = read_dataset([str(shared / "data" / name)], DataOptions(over_length="cut-question"), sides("smollm2"))
    facts = dataset.facts
    assert facts.read == REAL[name] == facts.used + facts.refusals
    assert facts.refusals == sum(what.count for what in facts.refused.values())
    assert facts.documents == len(dataset.examples) >= facts.used
    assert facts.tokens == sum(dataset.examples.lengths) == sum(len(example.ids) for example in dataset.examples)
    assert facts.learned == sum(dataset.examples.counts)
    assert sum(facts.lengths.values()) == facts.documents
    assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    assert lines(facts)
    dataset.close()


def test_the_prompt_of_an_example_is_what_the_chat_sends(sides: Sides, family: str, tmp_path: Path) -> None:
    turns = [("你好", "你好！"), ("Two and two?", "4"), ("谢谢 {{x}} <|user|>", "不客气\n再见")]
    said = [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    data = write(tmp_path / "a.jsonl", {"messages": [message.to_json() for message in said]})
    side = sides(family)
    dataset = read_dataset([data], DataOptions(), side)
    ends = []
    for example in dataset.examples:
        ends += [(example, s) for s in example.segments if s.part == "answer"]
    assert len(ends) == len(turns)
    for number, (example, segment) in enumerate(ends):
        assert list(example.ids[: segment.start]) == side.prompt.render(said[: 2 * number + 1])
        assert all(example.learned[segment.start : segment.end + 1])
        assert example.ids[segment.end] in side.prompt.stop_ids
        decoded = side.tokenizer.decode(example.ids[segment.start : segment.end])
        assert side.prompt.clean(decoded).strip() == turns[number][1]
    assert dataset.facts.stopped == dataset.facts.documents
    dataset.close()


def test_a_kept_reading_is_used_again_and_never_a_stale_one(sides: Sides, tmp_path: Path) -> None:
    folder, side = tmp_path / "run", sides("smollm2")
    folder.mkdir()
    data = write(tmp_path / "a.jsonl", {"question": "a", "answer": "b"}, {"question": "c", "answer": "d"})

    def read(options: DataOptions, of: PromptSide = side) -> tuple[int, list[tuple[int, ...]]]:
        dataset = read_dataset([data], options, of, folder=folder)
        examples = [example.ids for example in dataset.examples]
        dataset.close()
        return (folder / "tokens.bin").stat().st_ino, examples

    first, examples = read(DataOptions())
    assert read(DataOptions()) == (first, examples)
    second, others = read(DataOptions(system="Be brief."))
    assert second != first and others != examples
    third, others = read(DataOptions(), sides("glm4"))
    assert third != second and others != examples
    write(tmp_path / "a.jsonl", {"question": "a", "answer": "b"}, {"question": "c", "answer": "e"})
    fourth, others = read(DataOptions())
    assert fourth != third and others[0] == examples[0] and others[1] != examples[1]
    assert read(DataOptions(max_length=100))[0] != fourth
    (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-4])
    assert read(DataOptions(max_length=100))[1] == others


def test_another_template_or_vocabulary_in_the_same_folder_makes_other_tokens(tmp_path: Path) -> None:
    data, kept = write(tmp_path / "a.jsonl", {"question": "the cat", "answer": "sat"}), tmp_path / "run"
    kept.mkdir()
    folder, seen = KINDS[0].build(tmp_path / "model", as_it_is), []

    def read() -> None:
        side = load_prompt_side(folder)
        dataset = read_dataset([data], DataOptions(), side, folder=kept)
        seen.append(((kept / "tokens.bin").stat().st_ino, dataset.fingerprint))
        asked = side.prompt.render([Message("user", "the cat")])
        assert list(dataset.examples[0].ids[: len(asked)]) == asked
        dataset.close()
        side.close()

    read()
    read()
    assert seen[0] == seen[1]
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|im_end|>", "!<|im_end|>"))
    read()
    assert seen[2][0] != seen[1][0] and seen[2][1] != seen[1][1]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    read()
    assert len({fingerprint for _, fingerprint in seen}) == 3


def test_the_page_says_what_is_learned_and_nothing_of_the_data_drives_the_terminal(
    sides: Sides, tmp_path: Path
) -> None:
    data = write(tmp_path / "a.jsonl", {"question": "\x1b]0;x\x07", "answer": "你好\u202e"})
    dataset = read_dataset([data], DataOptions(), sides("smollm2"))
    page = "\n".join(lines(dataset.facts))
    assert "[<|im_end|>]" in page and "<|im_start|>·" in page and "‹›" in page and "你" in page
    assert not any((ord(character) < 32 and character != "\n") or character == "\u202e" for character in page)
    dataset.close()


def test_a_gguf_model_has_the_same_fingerprint_in_every_process(tmp_path: Path, starter_model: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "a", "answer": "b"}\n')
    code = (
        "import sys; from pathlib import Path; from glmchat.tuning.dataset import DataOptions, read_dataset;"
        "from glmchat.tuning.prompt_side import load_prompt_side; side = load_prompt_side(Path(sys.argv[1]));"
        "print(read_dataset([sys.argv[2]], DataOptions(), side).fingerprint); side.close()"
    )
    command = [sys.executable, "-P", "-c", code, str(starter_model), str(data)]
    prints = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(prints) == 1


def test_long_texts_go_on_in_windows_that_the_page_counts_and_no_token_is_lost(sides: Sides, tmp_path: Path) -> None:
    side = sides("smollm2")
    folder = tmp_path / "texts"
    folder.mkdir()
    words = [" ".join(f"word{n}" for n in range(count)) for count in (5, 60, 200)]
    for number, text in enumerate(words):
        (folder / f"{number}.txt").write_text(text + "\n")
    found = read_dataset([str(folder)], DataOptions(on="text", max_length=50), side)
    begin = tuple(side.prompt.complete(""))
    learned: dict[str, list[int]] = {}
    for example in found.examples:
        assert len(example.ids) <= 50 and example.ids[: len(begin)] == begin
        learned.setdefault(example.place.file, []).extend(example.ids[len(begin) :])
    stop = side.prompt.stop_ids[0]
    assert list(learned.values()) == [[*side.tokenizer.encode(text), stop] for text in words]
    assert found.facts.split == 2 and any("another document: 2" in line for line in lines(found.facts))
    found.close()
