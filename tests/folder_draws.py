"""Model folders drawn at random: every kind of thing that real ones differ in, each drawn by itself.

`draw(seed)` says what one is like and `write(draw, folder)` writes it, small and with random weights; the same seed
gives the same folder.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import chatglm_draws
import torch
from chatglm_draws import ORIGINALS
from foreign_forms import FORMS
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from vocabulary_kinds import CHATML, FRAGMENTS, KINDS, LLAMA2, QWEN3, ROLE_TOKENS, THINKING, Kind, as_it_is

Tensors = dict[str, torch.Tensor]
SIZES: Mapping[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
             "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], "factor": 4.0}  # fmt: skip
_LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
           "head_dim": 8, "num_key_value_heads": 4}  # fmt: skip
# Name -> transformers' type and what its configuration has beside SIZES.
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, one key head": ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "Llama 3": ("llama", {"rope_parameters": _LLAMA3}),
    "Llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}),
    "Llama, YaRN": ("llama", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}}),
    "Llama, dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    "Llama, GELU": ("llama", {"hidden_act": "gelu"}),
    "Qwen2": ("qwen2", {}),
    "Qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "Qwen3": ("qwen3", {"head_dim": 16}),
    "Qwen3 with biases": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "Mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "Mistral with a window": ("mistral", {"sliding_window": 16}),
    "Gemma": ("gemma", {"head_dim": 16}),
    "Gemma 2": ("gemma2", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "Gemma 3": ("gemma3_text", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "Phi": ("phi", {"num_key_value_heads": 4}),
    "Phi-3": ("phi3", {}),
    "Phi-3, long": ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": _LONGROPE}),
    "GPT-2": ("gpt2", {"intermediate_size": 256, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 1024}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-J": ("gptj", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 1024, "rotary_dim": 8}),
    "BLOOM": ("bloom", {"n_head": 4, "n_layer": 2}),
    "OPT": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Falcon": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "GLM": ("glm", {"head_dim": 16}),
    "GLM-4": ("glm4", {"head_dim": 16}),
    "GLM-4 mixture": ("glm4_moe", {
        "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1}),
    "OLMo 2": ("olmo2", {}),
    "Granite": ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "SmolLM3": ("smollm3", {"no_rope_layer_interval": 2}),
    "Cohere 2": ("cohere2", {"sliding_window": 16}),
    "StarCoder2": ("starcoder2", {"sliding_window": 16}),
    "StableLM": ("stablelm", {"num_key_value_heads": 4}),
    "ERNIE 4.5": ("ernie4_5", {"head_dim": 16}),
    "EXAONE 4": ("exaone4", {"sliding_window": 16}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2 mixture": ("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "Qwen3 mixture": ("qwen3_moe", {**_EXPERTS, "head_dim": 16}),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16}),
    "DeepSeek V3": ("deepseek_v3", {
        **_LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
        "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "Mamba": ("mamba", {"state_size": 8}),
}  # fmt: skip
# Types for which transformers has no tokenizer class of its own, and then takes tokenizer.json as it is.
_NO_CLASS = ("llama", "mistral", "mixtral", "glm", "glm4", "glm4_moe", "olmo2", "granite", "phi3", "smollm3", "exaone4",
             "stablelm", "lfm2", "gpt_oss", "deepseek_v3", "falcon", "bloom", "ernie4_5")  # fmt: skip
GGUF_VOCABULARIES = {
    "Llama": ("bytes", "Llama 3", "pieces, added_tokens.json, legacy", "pieces, added_tokens_decoder", "pieces, both",
              "pieces, defined by the user"),
    "Qwen2": ("Qwen",),
}  # fmt: skip
PACKABLE = ("Llama", "Llama with biases", "Llama 3", "Qwen2", "Qwen3", "Mistral", "GLM", "GLM-4")
ITS_OWN = ("none", "none", "none", "THUDM 8", "THUDM 4", "glmchat 4", "glmchat 4, offsets", "glmchat 8")

_REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<|im_start|>{{ m.role }} {{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
_BEGINS = "{{ bos_token }}" + CHATML.replace("<|im_end|>", "{{ eos_token }}")
TEMPLATES: Mapping[str, str | None] = {
    "its own": "", "none": None, "ChatML": CHATML, "thinking": THINKING, "Qwen3": QWEN3, "Llama 2": LLAMA2,
    "roles": ROLE_TOKENS, "no system": _REFUSES_SYSTEM, "named tokens": _BEGINS,
}  # fmt: skip
PLACES = ("tokenizer_config.json", "chat_template.jinja", "a list of named ones", "both, the file wins")
SHARDS: Mapping[str, tuple[str, ...]] = {
    "one": ("model.safetensors",),
    "five digits": ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    "six digits": tuple(f"model-{n:05d}-of-000003.safetensors" for n in (1, 2, 3)),
    "from zero": ("model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"),
    "plain": ("model-1-of-2.safetensors", "model-2-of-2.safetensors"),
    "behind": ("model.safetensors-00001-of-00002", "model.safetensors-00002-of-00002"),
    "one .bin": ("pytorch_model.bin",),
    ".bin": ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
}
INDEXES = ("right", "right", "right", "absent", "stale", "foreign", "names more tensors", "names more files")
TIES = ("as transformers saves", "both", "both, different", "head alone", "said otherwise")
ENDS = ("int", "list", "generation", "generation wins", "both lists", "lost", "generation without", "0 and -1")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GGUFS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "K mixture")
QUANTS = (*FORMS, *dict.fromkeys(ITS_OWN[3:]), "compressed-tensors", *(f"GGUF {kind}" for kind in GGUFS))
WORDS = (
    AddedToken("Straße", normalized=False), AddedToken("čas", normalized=True), AddedToken("the cat", lstrip=True),
    AddedToken("word", rstrip=True), AddedToken("y_", single_word=True), AddedToken("    "),
    AddedToken("<|x|>", special=True, lstrip=True, rstrip=True), AddedToken("é"), AddedToken("你好", normalized=False),
)  # fmt: skip


NAMED = ("texts", "objects", "special_tokens_map.json", "no class")
RELICS = ("", "", "", "rotary_emb.inv_freq", "masks", "no prefix")  # tensors that older programs wrote, or named so


@dataclass(frozen=True)
class Draw:
    """What a folder is like. Each field names an entry of the tables above."""

    seed: int
    family: str
    vocabulary: str
    template: str
    place: str
    words: tuple[str, ...]  # added to tokenizer.json
    begins: bool  # add_bos_token beside a tokenizer.model
    rows: int  # of the matrix beyond the vocabulary's words
    shards: str
    index: str
    tied: bool
    ties: str
    ends: str
    dtype: str
    quant: str
    lean: bool  # config.json leaves out what is the class's default
    old: bool  # rope_scaling and torch_dtype, as transformers 4 wrote them
    said: tuple[str, ...]  # system (or ""), question, answer, question
    text: str  # to be completed
    named: str  # how tokenizer_config.json names bos_token and eos_token, or that it names no class
    relics: str

    @property
    def kind(self) -> Kind:
        """The vocabulary with the template of this draw."""
        kind = next(kind for kind in KINDS if kind.name == self.vocabulary)
        template = TEMPLATES[self.template]
        return kind if template == "" else replace(kind, template=template or "")

    @property
    def has_pieces(self) -> bool:
        """The vocabulary is a tokenizer.model."""
        return self.vocabulary.startswith("pieces")

    def messages(self) -> list[dict[str, str]]:
        turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(self.said[1:])]
        return [{"role": "system", "content": self.said[0]}, *turns] if self.said[0] else turns


def vocabularies(family: str) -> list[str]:
    """The kinds whose files transformers reads as they are in such a folder. In a Qwen2's it takes the class of that
    name whatever the files say, and beside most types a tokenizer.model without tokenizer.json loses its first blank.
    """
    if family in ORIGINALS:
        return [ORIGINALS[family][2]]
    kind = FAMILIES[family][0]
    if kind == "qwen2":
        return ["Qwen", "Qwen 3"]
    return [k.name for k in KINDS if kind in ("llama", "smollm3", "deepseek_v3") or not k.name.startswith("pieces")]


def draw(seed: int) -> Draw:
    """Half of them have nothing odd about their files, and two thirds dense weights."""
    chance = random.Random(seed)
    quant = chance.choice([name for name in QUANTS if "THUDM" not in name]) if chance.random() < 0.3 else "none"
    family = chance.choice([*FAMILIES, *ORIGINALS])
    if family in ORIGINALS:
        quant = chance.choice(ITS_OWN[: 3 if "GLM-4" in family else None])
    odd = chance.random() < 0.5 and not quant.startswith(("GGUF", "glmchat"))
    if quant.startswith("GGUF"):
        family = chance.choice(("Llama", "Qwen2"))
    elif family not in ORIGINALS and quant != "none" and chance.random() < 0.85:
        family = chance.choice(PACKABLE)
    names = vocabularies(family)
    fragments = [chance.randint(0, 5) for _ in range(5)]
    texts = ["".join(chance.choices(FRAGMENTS, k=count)) for count in fragments]
    return Draw(
        seed=seed,
        family=family,
        vocabulary=chance.choice(GGUF_VOCABULARIES[family] if quant.startswith("GGUF") else names),
        template="its own" if family in ORIGINALS else chance.choice(list(TEMPLATES)),
        place=chance.choice(PLACES),
        words=tuple(str(word.content) for word in chance.sample(WORDS, 2)) if chance.random() < 0.3 else (),
        begins=chance.random() < 0.5,
        rows=chance.choice((0, 0, 0, 5, 16) if quant.startswith("GGUF") else (0, 0, 0, 5, 16, -1, -3)),
        shards=chance.choice(list(SHARDS)) if odd else "one",
        index=chance.choice(INDEXES) if odd else "right",
        tied=chance.random() < 0.5,
        ties=chance.choice(TIES) if odd else TIES[0],
        ends=chance.choice(ENDS),
        dtype=chance.choice(list(DTYPES)),
        quant=quant,
        lean=chance.random() < 0.5,
        old=chance.random() < 0.3,
        said=(texts[0] if chance.random() < 0.5 else "", texts[1], texts[2], texts[3]),
        # In front of pieces in GGUF llama.cpp puts a blank beside the one that a text begins with; transformers none.
        text=texts[4].lstrip(" ▁" if quant.startswith("GGUF") else "") + "the cat",
        named=chance.choice(NAMED),
        relics=chance.choice(RELICS) if quant == "none" else "",
    )


def write_words(one: Draw, folder: Path, rename: Callable[[str], str] = as_it_is) -> int:
    """The vocabulary and its template. Returns how many ids there are."""
    one.kind.build(folder, rename)
    if (folder / "tokenizer.json").is_file():
        lower = Tokenizer.from_file(str(folder / "tokenizer.json"))
        own = (folder / "added_tokens.json").is_file() or "words in" in one.vocabulary
        if not own and not one.quant.startswith("GGUF"):  # which says nothing of blanks beside a word
            lower.add_tokens([word for word in WORDS if word.content in one.words])
        if one.quant.startswith("GGUF"):  # which has no normalizer, neither in llama.cpp nor in transformers
            lower.normalizer = None
        lower.save(str(folder / "tokenizer.json"))
    if not one.quant.startswith("GGUF"):
        (folder / "config.json").write_text(json.dumps({"model_type": FAMILIES[one.family][0]}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    source = settings.pop("chat_template")
    if not (folder / "tokenizer.json").is_file():
        settings["add_bos_token"] = one.begins
    _name(one, folder, settings)
    if one.quant.startswith("GGUF") and not one.has_pieces:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if one.quant.startswith("GGUF") and TEMPLATES[one.template] is not None:
        settings["chat_template"] = source
    elif TEMPLATES[one.template] is not None:
        match one.place:
            case "chat_template.jinja":
                (folder / one.place).write_text(source)
            case "a list of named ones":
                settings["chat_template"] = [
                    {"name": "tool_use", "template": "{{ messages[0].content }}"},
                    {"name": "default", "template": source},
                ]
            case "both, the file wins":
                (folder / "chat_template.jinja").write_text(source)
                settings["chat_template"] = "{{ messages[0].content }}"
            case _:
                settings["chat_template"] = source
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary_size(folder)


def _name(one: Draw, folder: Path, settings: dict[str, Any]) -> None:
    tokens = {name: settings[name] for name in ("bos_token", "eos_token")}
    plain_word = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    match one.named:
        case "objects":
            settings |= {n: {"__type": "AddedToken", "content": text, **plain_word} for n, text in tokens.items()}
        case "special_tokens_map.json" if (folder / "tokenizer.json").is_file():
            (folder / one.named).write_text(json.dumps(tokens))
            for name in tokens:
                del settings[name]
        case "no class" if (
            settings["tokenizer_class"] == "PreTrainedTokenizerFast" and FAMILIES[one.family][0] in _NO_CLASS
        ):
            del settings["tokenizer_class"]


def vocabulary_size(folder: Path) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(folder))


def write(one: Draw, folder: Path) -> Path:
    """The folder, or the GGUF file in it. What it means by others' reckoning lies in `folder`.plain (see `plain`)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if one.family in ORIGINALS:
        return _write_original(one, folder)
    rows = write_words(one, folder) + one.rows
    kind, more = FAMILIES[one.family]
    sizes = {**SIZES, "vocab_size": rows, "tie_word_embeddings": one.tied, **more}
    if one.quant == "GGUF K mixture":
        sizes |= {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    config = AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(one.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.Generator().manual_seed(one.seed + zlib.crc32(name.encode()))
        values = torch.randn(parameter.shape, generator=noise)
        parameter.data = 1 + 0.1 * values if "norm" in name else 0.15 * values
    model.tie_weights()
    if one.quant.startswith("GGUF"):
        from gguf_draws import write_gguf

        return write_gguf(one, folder, plain(folder), config, model)
    model.save_pretrained(plain(folder))
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        path = plain(folder) / name
        if path.is_file() and name != "generation_config.json":
            (folder / name).write_bytes(path.read_bytes())
        path.unlink(missing_ok=name == "generation_config.json")
    tensors = {name: value.to(DTYPES[one.dtype]) for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    tied = dict(getattr(model, "_tied_weights_keys", None) or {})
    tensors = _age(one, _tie(one, tensors, tied), str(getattr(model, "base_model_prefix", "")))
    told = _settings(one, folder)
    (folder / "config.json").write_text(json.dumps(told))
    if one.quant in FORMS:
        tensors, dense = _pack(one, tensors)
        told |= FORMS[one.quant][1]
    elif one.quant == "compressed-tensors":
        tensors, dense = _compress(tensors)
        told |= {"quantization_config": _COMPRESSED}
    else:
        dense = tensors
    save_file(dense, plain(folder) / "model.safetensors", metadata={"format": "pt"})
    (plain(folder) / "config.json").write_text((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told))
    _shard(one, folder, tensors)
    return _quantised(one, folder)


def _write_original(one: Draw, folder: Path) -> Path:
    chatglm_draws.write_words(one.family, folder)
    told = chatglm_draws.configuration(one.family)
    tensors = dense = chatglm_draws.weights(one.family, one.seed, DTYPES[one.dtype])
    if one.quant.startswith("THUDM"):
        bits = int(one.quant[-1])
        tensors, dense = chatglm_draws.pack(tensors, bits)
        told |= {"quantization_bit": bits}
    (folder / "config.json").write_text(json.dumps(told))
    save_file(dense, plain(folder) / "model.safetensors", metadata={"format": "pt"})
    _shard(one, folder, tensors)
    return _quantised(one, folder)


def _quantised(one: Draw, folder: Path) -> Path:
    """What glmchat writes where the draw says so, its codes times their scales beside the folder; else the folder."""
    if not one.quant.startswith("glmchat"):
        return folder
    from glmchat.checkpoints.recipe import Recipe
    from glmchat.engine.quantize.plan import plan_quantise
    from glmchat.engine.quantize.quantiser import execute

    recipe = Recipe(8 if one.quant == "glmchat 8" else 4, symmetric=one.quant == "glmchat 4")
    path = execute(plan_quantise(folder, folder.with_name("quantised"), recipe))
    dense = unpacked(path, lies_across=one.family == "GPT-2")
    save_file(dense, plain(folder) / "model.safetensors", metadata={"format": "pt"})
    return path


def plain(folder: Path) -> Path:
    """The same network beside it, dense and in one file, for where transformers cannot read the folder itself."""
    other = folder.with_name(folder.name + ".plain")
    other.mkdir(exist_ok=True)
    return other


def _settings(one: Draw, folder: Path) -> dict[str, Any]:
    """config.json as somebody's transformers wrote it, without ends of a text."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    told: dict[str, Any] = config.to_diff_dict() if one.lean else config.to_dict()
    told = json.loads(json.dumps(told)) | {"model_type": config.model_type}
    for name in ("eos_token_id", "bos_token_id", "dtype"):
        told.pop(name, None)
    told["torch_dtype" if one.old else "dtype"] = one.dtype
    rope = told.get("rope_parameters")
    if one.old and isinstance(rope, dict) and not any(isinstance(part, dict) for part in rope.values()):
        del told["rope_parameters"]
        rope["type"] = rope.pop("rope_type", "default")
        theta = rope.pop("rope_theta", None)
        told |= {} if theta is None else {"rope_theta": theta}
        told["rope_scaling"] = None if rope["type"] == "default" else rope
    if one.ties == "said otherwise":
        told["tie_word_embeddings"] = not one.tied
    return told


def set_ends(one: Draw, folder: Path, ids: list[int]) -> None:
    """Write `ids`, which the model comes to say, as ends of a text where this draw has them."""
    path, generation = folder / "config.json", folder / "generation_config.json"
    config = json.loads(path.read_text())
    first, second = ids[len(ids) // 2], ids[-1]
    at, there = {
        "int": (first, None),
        "list": ([second, first], None),
        "generation": (None, {"eos_token_id": [first]}),
        "generation wins": (second, {"eos_token_id": first, "do_sample": True}),
        "both lists": ([first, second], {"eos_token_id": [second]}),
        "lost": (None, None),
        "generation without": (first, {"do_sample": False}),
        "0 and -1": ([first, 0], {"pad_token_id": 0}),
    }[one.ends]
    if at is not None:
        path.write_text(json.dumps({**config, "eos_token_id": at}))
    if there is not None:
        generation.write_text(json.dumps(there))


def _tie(one: Draw, tensors: Tensors, tied: Mapping[str, str]) -> Tensors:
    """The ends of the network as a merge, a training or another program left them."""
    head, embedding = next(iter(tied.items()), ("", ""))
    if embedding not in tensors:
        return tensors
    match one.ties:
        case "both":
            return {**tensors, head: tensors[embedding].clone()}
        case "both, different":
            return {**tensors, head: tensors[embedding].flip(0).contiguous()}
        case "head alone":
            rest = {name: value for name, value in tensors.items() if name != embedding}
            return {**rest, head: tensors.get(head, tensors[embedding])}
    return tensors


def _age(one: Draw, tensors: Tensors, prefix: str) -> Tensors:
    """With what old programs left in such files."""
    if one.relics == "no prefix" and prefix:  # as the network without its head is saved
        return {name.removeprefix(prefix + "."): value for name, value in tensors.items()}
    kind = FAMILIES[one.family][0]
    if one.relics == "rotary_emb.inv_freq" and kind in ("llama", "mistral", "qwen2"):
        waves = torch.arange(8.0)
        return tensors | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": waves.clone() for n in range(2)}
    if one.relics == "masks" and kind in ("gpt2", "gptj", "gpt_neox"):
        stem = "gpt_neox.layers.{}.attention" if kind == "gpt_neox" else "transformer.h.{}.attn"
        masks = {f"{stem.format(n)}.bias": torch.ones(1, 1, 8, 8).tril().bool() for n in range(2)}
        return tensors | masks | {f"{stem.format(n)}.masked_bias": torch.tensor(-1e9) for n in range(2)}
    return tensors


_LAYER = re.compile(r"\b(layers|h)\.\d+\.")


def _pack(one: Draw, tensors: Tensors) -> tuple[Tensors, Tensors]:
    pack, stored, dense = FORMS[one.quant][0], Tensors(), Tensors()
    for name, tensor in tensors.items():
        ends = any(part in name for part in ("embed", "lm_head"))
        apart = not _LAYER.search(name) and not (ends and "MLX" in one.quant)
        if apart or tensor.dim() != 2 or any(size % 32 for size in tensor.shape):
            stored[name] = dense[name] = tensor
            continue
        turned = one.family == "GPT-2" and not ends  # its Conv1D holds [in, out]; others pack [out, in]
        parts, matrix = pack(tensor.t().contiguous() if turned else tensor)
        dense[name] = (matrix.t() if turned else matrix).float().contiguous()
        stored |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
    return stored, dense


def unpacked(path: Path, *, lies_across: bool) -> Tensors:
    """What compressed-tensors' own unpacking makes of a folder that glmchat wrote: codes times their scales.

    lies_across: the network holds the matrices of its layers as [in, out], as GPT-2's. Offsets, in files of their own
    beside the shards, are glmchat's addition.
    """
    helpers = import_module("compressed_tensors.compressors.pack_quantized.helpers")
    stored, dense = Tensors(), Tensors()
    for file in path.glob("*.safetensors"):
        stored |= load_file(file)
    for name, tensor in stored.items():
        stem, _, part = name.rpartition("weight_")
        if f"{stem}weight_packed" not in stored:
            dense[name] = tensor
        if part != "packed":
            continue
        stem += "weight"
        shape, scale = torch.Size(stored[f"{stem}_shape"].tolist()), stored[f"{stem}_scale"].float()
        codes = helpers.unpack_from_int32(tensor, 32 * tensor.shape[1] // shape[1], shape).float()
        codes = codes.view(len(scale), scale.shape[1], -1)
        if f"{stem}_zero_point" in stored:
            codes = codes - helpers.unpack_from_int32(stored[f"{stem}_zero_point"], 4, scale.shape, 0)[..., None]
        matrix = codes * scale[..., None]
        if f"{stem}_offset" in stored:
            matrix = matrix + stored[f"{stem}_offset"][..., None]
        matrix = matrix.view(shape)
        dense[stem] = matrix.t().contiguous() if lies_across and _LAYER.search(stem) else matrix
    return dense


_COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}},
}  # fmt: skip


def _compress(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Symmetric INT4 with a scale for each 32 inputs, as llm-compressor writes it."""
    helpers = import_module("compressed_tensors.compressors.pack_quantized.helpers")

    stored, dense = Tensors(), Tensors()
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or "layers." not in name or tensor.shape[1] % 32:
            stored[name] = dense[name] = tensor
            continue
        groups = tensor.float().view(len(tensor), -1, 32)
        scale = (groups.abs().amax(-1) / 7.5).half()
        codes = (groups / scale.float()[..., None]).round().clamp(-8, 7)
        dense[name] = (codes * scale.float()[..., None]).view(tensor.shape)
        stored |= {
            f"{name}_packed": helpers.pack_to_int32(codes.view(tensor.shape).to(torch.int8), 4),
            f"{name}_scale": scale,
            f"{name}_shape": torch.tensor(tensor.shape),
        }
    return stored, dense


def _shard(one: Draw, folder: Path, tensors: Tensors) -> None:
    names = SHARDS[one.shards]
    where = {name: names[number % len(names)] for number, name in enumerate(sorted(tensors))}
    for file in names:
        part = {name: tensors[name].contiguous() for name in tensors if where[name] == file}
        if ".safetensors" in file:
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    kind = "pytorch_model.bin" if ".bin" in names[0] else "model.safetensors"
    others = [f"{kind.partition('.')[0]}-0000{n}-of-00007.{kind.partition('.')[2]}" for n in range(1, 8)]
    match one.index:
        case "absent":
            return
        case "right" if len(names) == 1:
            return
        case "stale" | "foreign":
            where = {name: others[number % 7] for number, name in enumerate(sorted(tensors))}
            if one.index == "foreign":
                where = {name.replace("model.", "base."): file for name, file in where.items()}
        case "names more tensors":
            where |= {"model.layers.99.mlp.up_proj.weight": names[0], "extra": names[-1]}
        case "names more files":
            where |= {"extra": others[0]}
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
