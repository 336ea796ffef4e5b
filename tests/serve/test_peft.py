"""An adapter that PEFT computes, asked for through the API: with a scale, off again, refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapter_builders as adapters
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from glmchat.engine import Engine


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny GPT-NeoX that reads and writes bytes."""
    folder = adapters.write_neox(tmp_path / "neox")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}'
    )
    return folder


def test_a_request_chooses_kind_and_scale_and_the_next_one_without_is_the_base_again(
    serve: Any, base: Path, tmp_path: Path
) -> None:
    for name, peft_type in (("poet", "LOHA"), ("sage", "IA3")):
        adapters.write_kind(base, tmp_path / name, peft_type, seed=3)
    engine = Engine.load(base, threads=1, dtype="float32")
    running = serve(engine, adapters={"poet": tmp_path / "poet", "sage": tmp_path / "sage"})
    try:
        settings = {"temperature": 0, "max_tokens": 8, "return_token_ids": True}

        def ids(**fields: Any) -> list[int]:
            reply = running.ask(**settings, **fields)
            assert reply.status_code == 200, reply.text
            return reply.json()["choices"][0]["token_ids"]

        plain = ids()
        poet = ids(adapters=[{"name": "poet", "scale": 1.0}])
        half = ids(adapters=[{"name": "poet", "scale": 0.5}])
        assert len({tuple(plain), tuple(poet), tuple(half)}) == 3
        assert ids() == plain
        assert ids(model="poet") == poet
        refused = running.ask(**settings, adapters=[{"name": "sage", "scale": 0.5}])
        assert refused.status_code == 400 and "IA3" in refused.json()["error"]["message"]
        both = running.ask(**settings, adapters=[{"name": "sage"}, {"name": "poet"}])
        assert both.status_code == 400 and "IA3 + LoHa" in both.json()["error"]["message"]
        assert ids() == plain
    finally:
        engine.close()
