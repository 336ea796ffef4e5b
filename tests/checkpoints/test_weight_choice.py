"""Which files are the weights: what transformers would load is what is chosen, and what it would not is told by name.

The right value comes from transformers' own choice of files, and from the model that it loads of them.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from glmchat.checkpoints.fit import check_folder, stored_bytes
from glmchat.checkpoints.weight_choice import choose_weights, missing_parts
from glmchat.checkpoints.weight_files import weight_files
from glmchat.core.errors import Damaged, Hostile
from glmchat.engine import Engine

SAFE, BIN = "model.safetensors", "pytorch_model.bin"
SAFE_INDEX, BIN_INDEX = f"{SAFE}.index.json", f"{BIN}.index.json"
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer as transformers saves it, in one file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("toy")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def shards(toy: Path, folder: Path, names: Sequence[str], index: str | None = None, scale: float | None = 1.0) -> None:
    """The toy's tensors dealt out to files of these names, and the index that says so. scale None: the index alone."""
    tensors = load_file(toy / SAFE)
    where = {name: names[number % len(names)] for number, name in enumerate(sorted(tensors))}
    for file in names if scale is not None else ():
        part = {name: tensors[name] * scale for name, its in where.items() if its == file}
        if ".safetensors" in file:
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if index is not None:
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def numbered(pattern: str, numbers: Sequence[int]) -> list[str]:
    return [pattern.format(number) for number in numbers]


SIX = numbered("model-{:05d}-of-000002.safetensors", (1, 2))
FIVE = numbered("model-{:05d}-of-00002.safetensors", (1, 2))
THREE = numbered("model-{:05d}-of-00003.safetensors", (1, 2, 3))
SIX_BIN = numbered("pytorch_model-{:05d}-of-000002.bin", (1, 2))
FROM_ZERO = numbered("model-{:05d}-of-00002.safetensors", (0, 1))
PLAIN = numbered("model-{}-of-2.safetensors", (1, 2))
CONSOLIDATED = numbered("consolidated-{:05d}-of-00002.safetensors", (1, 2))
Write = tuple[Sequence[str], str | None, float | None]  # files, index, factor of their numbers (None: not written)
ONE: Write = ([SAFE], None, 1.0)
# Folders that transformers loads: what is written into them one after the other.
LOADED: Mapping[str, Sequence[Write]] = {
    "one file": [ONE],
    "totals of six digits": [(SIX, SAFE_INDEX, 1.0)],
    "totals of six digits, bin": [(SIX_BIN, BIN_INDEX, 1.0)],
    "counted from zero": [(FROM_ZERO, SAFE_INDEX, 1.0)],
    "no leading zeros": [(PLAIN, SAFE_INDEX, 1.0)],
    "names that count nothing": [(["model_part1.safetensors", "rest.safetensors"], SAFE_INDEX, 1.0)],
    "consolidated shards with an index": [(CONSOLIDATED, SAFE_INDEX, 1.0)],
    "a stale index beside one file": [ONE, (THREE, SAFE_INDEX, None)],
    "old shards and their index beside one file": [(FIVE, SAFE_INDEX, 9.0), ONE],
    "bin beside safetensors": [ONE, ([BIN], None, 9.0)],
    "bin beside shards": [(FIVE, SAFE_INDEX, 1.0), ([BIN], None, 9.0)],
    "one bin beside old bin shards": [(SIX_BIN, BIN_INDEX, 9.0), ([BIN], None, 1.0)],
    "bin beside shards without an index": [(FIVE, None, 9.0), ([BIN], None, 1.0)],
    "shards of an older save": [(THREE, SAFE_INDEX, 9.0), (FIVE, SAFE_INDEX, 1.0)],
    "a variant beside": [ONE, (["model.fp16.safetensors"], None, 9.0)],
    "Mistral's own file beside": [(FIVE, SAFE_INDEX, 1.0), (["consolidated.safetensors"], None, 9.0)],
    "an adapter beside": [ONE, (["adapter_model.safetensors"], None, 9.0)],
    "a file that config.json names": [(["other.safetensors"], None, 1.0), ([SAFE], None, 9.0)],
    "an index that config.json names": [(PLAIN, "other.safetensors.index.json", 1.0), ([SAFE], None, 9.0)],
}
NAMED = {
    "a file that config.json names": "other.safetensors",
    "an index that config.json names": "other.safetensors.index.json",
}


@pytest.fixture
def folder(toy: Path, tmp_path: Path) -> Path:
    shutil.copy(toy / "config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    )
    return tmp_path


@pytest.mark.parametrize("case", LOADED)
def test_what_transformers_loads_is_what_is_chosen(case: str, toy: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    for names, index, scale in LOADED[case]:
        shards(toy, folder, names, index, scale)
    if named := NAMED.get(case):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
    files, _ = _get_resolved_checkpoint_files(str(folder), None, None, None, None, False, named)
    assert files is not None
    assert sorted(str(path) for path in weight_files(folder)) == sorted(files)
    check_folder(folder)
    assert stored_bytes(folder) == sum(Path(file).stat().st_size for file in files)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        right = model(torch.tensor([PROMPT])).logits[0]
    logits = Engine.load(folder, dtype="float32", device="cpu").logits(PROMPT)
    assert torch.allclose(logits, right, atol=1e-4)


@pytest.mark.parametrize(
    "names",
    [
        FIVE,
        ["model-00001-of-00001.safetensors"],
        FROM_ZERO,
        SIX_BIN,
        PLAIN,
        numbered("model.safetensors-{:05d}-of-00002", (1, 2)),
    ],
)
def test_shards_that_came_without_their_index_are_the_model_that_transformers_saved(
    names: Sequence[str], toy: Path, folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    shards(toy, folder, names)
    assert [path.name for path in weight_files(folder)] == sorted(names)
    with torch.no_grad():
        right = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32)(torch.tensor([PROMPT])).logits[0]
    logits = Engine.load(folder, dtype="float32", device="cpu").logits(PROMPT)
    assert torch.allclose(logits, right, atol=1e-4)


def refused(folder: Path, code: str) -> Damaged:
    from transformers import AutoModelForCausalLM

    with pytest.raises((OSError, RuntimeError, ValueError, KeyError)):  # transformers does not load it either
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(Damaged) as caught:
        check_folder(folder)
    assert caught.value.code == code and "\n" not in caught.value.message and caught.value.hint
    return caught.value


@pytest.mark.parametrize("index", [SAFE_INDEX, None])
def test_a_missing_shard_is_named(index: str | None, toy: Path, folder: Path) -> None:
    shards(toy, folder, SIX, index)
    (folder / SIX[1]).unlink()
    error = refused(folder, "weights.missing_shard")
    assert SIX[1] in error.message and SIX[0] not in error.message


def test_a_file_that_config_json_names_and_that_is_not_there_is_missed(toy: Path, folder: Path) -> None:
    shards(toy, folder, [SAFE])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert "other.safetensors" in refused(folder, "weights.missing_shard").message


def test_an_index_of_other_files_beside_a_whole_set_is_named_with_the_way_out(toy: Path, folder: Path) -> None:
    shards(toy, folder, FIVE)
    shards(toy, folder, THREE, SAFE_INDEX, None)
    error = refused(folder, "weights.missing_shard")
    assert THREE[0] in error.message and "model.safetensors.index.json does not belong" in error.hint
    (folder / SAFE_INDEX).unlink()  # what the hint says
    assert [path.name for path in weight_files(folder)] == FIVE


def test_a_stale_index_is_told_where_only_a_bin_file_is_left(toy: Path, folder: Path) -> None:
    shards(toy, folder, [BIN])
    shards(toy, folder, THREE, SAFE_INDEX, None)
    assert BIN in refused(folder, "weights.missing_shard").hint


def test_sets_that_count_from_zero_and_from_one_are_not_mixed(toy: Path, folder: Path) -> None:
    shards(toy, folder, FROM_ZERO)
    shards(toy, folder, FIVE)
    refused(folder, "weights.several")


def test_two_whole_sets_without_an_index_are_not_guessed_between(toy: Path, folder: Path) -> None:
    shards(toy, folder, FIVE)
    shards(toy, folder, THREE)
    refused(folder, "weights.several")


LAYOUTS: Mapping[str, tuple[Sequence[str], str, str]] = {
    "Meta's": (["consolidated.00.pth", "params.json", "tokenizer.model"], "weights.layout", "Meta"),
    "Meta's below": (["original/consolidated.00.pth", "original/params.json"], "weights.layout", "Meta"),
    "Mistral's": (["consolidated.safetensors", "params.json", "tekken.json"], "weights.layout", "Mistral"),
    "Mistral's in shards": (CONSOLIDATED, "weights.layout", "Mistral"),
    "a variant": (["model.fp16.safetensors"], "weights.unread", "fp16"),
    "a variant in shards": (numbered("model.bf16-{:05d}-of-00002.safetensors", (1, 2)), "weights.unread", "bf16"),
    "a variant, bin": (["pytorch_model.fp16.bin"], "weights.unread", "fp16"),
    "no total": (["model-00001.safetensors", "model-00002.safetensors"], "weights.unread", "model-00001.safetensors"),
    "another name": (["merged.safetensors"], "weights.unread", "merged.safetensors"),
    "TensorFlow": (["tf_model.h5"], "weights.unread", "tf_model.h5"),
    "a .pth": (["model.pth"], "weights.unread", "model.pth"),
    "GGUF beside a config": (["x-Q4_0.gguf"], "weights.unread", "GGUF"),
    "a sub-folder": (["weights/model.safetensors"], "weights.unread", "weights"),
    "nothing": (["notes.txt"], "weights.none", "no weights"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_what_is_no_layout_of_transformers_is_called_by_its_name(case: str, folder: Path) -> None:
    names, code, word = LAYOUTS[case]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 100)
    assert word in refused(folder, code).message


@pytest.mark.parametrize("case", ["Meta's", "Mistral's"])
def test_metas_and_mistrals_own_download_without_a_config_is_told_too(case: str, folder: Path) -> None:
    for name in LAYOUTS[case][0]:
        (folder / name).write_bytes(b"x" * 100)
    (folder / "config.json").unlink()
    assert LAYOUTS[case][2] in refused(folder, "weights.layout").message


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", 7, None, ""])
def test_an_index_that_leads_out_of_its_folder_is_hostile_wherever_it_is_met(name: Any, folder: Path) -> None:
    (folder / SAFE_INDEX).write_text(json.dumps({"weight_map": {"t": name}}))
    with pytest.raises(Hostile):
        weight_files(folder)


def test_an_index_whose_content_is_not_known_leaves_the_names_of_the_shards() -> None:
    chosen = choose_weights([*SIX, SAFE_INDEX, "consolidated.safetensors"], lambda _: None)
    assert chosen is not None and (chosen.files, chosen.missing) == (tuple(SIX), ())
    chosen = choose_weights(["a.safetensors", "b.safetensors", SAFE_INDEX], lambda _: None)
    assert chosen is not None and chosen.files == ("a.safetensors", "b.safetensors")


def test_parts_that_count_themselves_tell_which_are_missing() -> None:
    assert missing_parts(["a-00001-of-00003.gguf", "a-00003-of-00003.gguf", "b.gguf"]) == ["a-00002-of-00003.gguf"]
    assert missing_parts(["a-0-of-2.gguf"]) == ["a-1-of-2.gguf"]
    assert missing_parts(["a-00001-of-99999999.gguf", "a-5-of-3.gguf"]) == []  # a count beyond reason is no count


OTHERS = ["model.fp16.safetensors", "consolidated.safetensors", "merged.safetensors", "adapter_model.safetensors"]
OTHERS += ["tf_model.h5", "x-Q4_0.gguf", "training_args.bin"]
ANY = [SAFE, BIN, *SIX, *FIVE, *THREE, *SIX_BIN, *FROM_ZERO, *PLAIN, *OTHERS]
MIXED = [*SIX, "merged.safetensors"]
SETS = [[SAFE], [BIN], SIX, FIVE, THREE, SIX_BIN, FROM_ZERO, PLAIN, ["merged.safetensors"], MIXED]


@cache
def empty_bin() -> bytes:
    file = io.BytesIO()
    torch.save({}, file)
    return file.getvalue()


@pytest.mark.parametrize("seed", range(300))
def test_of_any_files_and_indexes_the_choice_is_transformers_or_a_whole_set_that_it_does_not_know(
    seed: int, tmp_path: Path
) -> None:
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    draw = random.Random(seed)
    there = {name for one in draw.sample(SETS, draw.randint(0, 3)) for name in one if draw.random() < 0.9}
    there |= set(draw.sample(ANY, draw.randint(0, 3)))
    for name in there:
        (tmp_path / name).write_bytes(save({}) if ".safetensors" in name else empty_bin())
    for index in (SAFE_INDEX, BIN_INDEX):
        if draw.random() < 0.4:
            table = {f"t{number}": name for number, name in enumerate(draw.choice(SETS))}
            (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    named = draw.choice([None] * 6 + ["merged.safetensors", SAFE_INDEX])
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": named} if named else {}))
    try:
        right, _ = _get_resolved_checkpoint_files(str(tmp_path), None, None, None, None, False, named)
    except (OSError, ValueError):
        right = None
    if right is not None and not all(Path(path).is_file() for path in right):
        right = None  # it notices when it opens them
    try:
        found = [path.name for path in weight_files(tmp_path)]
    except Damaged:
        found = None
    if right is not None:
        assert found is not None and sorted(found) == sorted(Path(path).name for path in right)
    elif found is not None:  # shards without an index, all of them there
        assert found in (SIX, FIVE, THREE, SIX_BIN, FROM_ZERO, PLAIN) and not (tmp_path / SAFE_INDEX).exists()
