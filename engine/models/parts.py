"""What a model tells of itself to whoever computes a whole token at once: which of its modules do what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from glmchat.checkpoints.spec import ModelSpec
from glmchat.engine.models.layers import tied_head


class NotCompiled(Exception):
    """Why torch has to compute this model."""


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One layer. qkv: query, key, value, or one matrix that is all; gate_up: gate and up likewise, or one alone.
    attention_norm, feed_forward_norm: of what the two parts add to the residual stream (GLM-4-0414)."""

    input_norm: nn.Module
    qkv: Sequence[nn.Module]
    o_proj: nn.Module
    second_norm: nn.Module
    gate_up: Sequence[nn.Module]
    down_proj: nn.Module
    attention_norm: nn.Module | None = None
    feed_forward_norm: nn.Module | None = None
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class Parts:
    """A decoder, as a step sees it.

    frequencies: radians per position of each pair that is rotated; None without rotary positions. rotary: a pair is one
    of each half of a head, two neighbours, or one of each half of a half, with two positions (ChatGLM-6B). positions:
    learnt ones (GPT-2). gated: the feed-forward part multiplies gate and up. alpha: the residual is the *normalised*
    input times this (ChatGLM-6B); None: the input itself. by_head: fused rows are query, key, value of one head after
    the other; else all queries, then all keys, then all values.
    """

    embedding: nn.Module
    layers: Sequence[LayerParts]
    last_norm: nn.Module
    head: nn.Module
    frequencies: torch.Tensor | None
    eps: float
    rotary: Literal["halves", "interleaved", "two positions"] | None = "halves"
    positions: nn.Module | None = None
    activation: Literal["silu", "gelu"] = "silu"
    gated: bool = True
    alpha: float | None = None
    by_head: bool = False


def llama_layer(layer: Any) -> LayerParts:
    attention, feed_forward = layer.self_attn, layer.mlp
    return LayerParts(
        input_norm=layer.input_layernorm,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        o_proj=attention.o_proj,
        second_norm=layer.post_attention_layernorm,
        gate_up=(feed_forward.gate_proj, feed_forward.up_proj),
        down_proj=feed_forward.down_proj,
        query_norm=attention.q_norm,
        key_norm=attention.k_norm,
    )


def glm_layer(layer: Any) -> LayerParts:
    attention, feed_forward = layer.self_attn, layer.mlp
    return LayerParts(
        input_norm=layer.input_layernorm,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        o_proj=attention.o_proj,
        second_norm=layer.post_attention_layernorm,
        gate_up=(feed_forward.gate_up_proj,),
        down_proj=feed_forward.down_proj,
        attention_norm=layer.post_self_attn_layernorm,
        feed_forward_norm=layer.post_mlp_layernorm,
    )


def chatglm2_layer(layer: Any) -> LayerParts:
    return LayerParts(
        input_norm=layer.input_layernorm,
        qkv=(layer.self_attention.query_key_value,),
        o_proj=layer.self_attention.dense,
        second_norm=layer.post_attention_layernorm,
        gate_up=(layer.mlp.dense_h_to_4h,),
        down_proj=layer.mlp.dense_4h_to_h,
    )


def chatglm_parts(network: Any, spec: ModelSpec, frequencies: torch.Tensor, alpha: float) -> Parts:
    layers = [
        LayerParts(
            input_norm=block.input_layernorm,
            qkv=(block.attention.query_key_value,),
            o_proj=block.attention.dense,
            second_norm=block.post_attention_layernorm,
            gate_up=(block.mlp.dense_h_to_4h,),
            down_proj=block.mlp.dense_4h_to_h,
        )
        for block in network.layers
    ]
    return Parts(
        network.word_embeddings,
        layers,
        network.final_layernorm,
        tied_head(network.word_embeddings),
        frequencies,
        spec.extra["epsilon"],
        rotary="two positions" if spec.extra["two_positions"] else "halves",
        activation="gelu",
        gated=False,
        alpha=alpha,
        by_head=True,
    )


def gpt2_parts(network: Any, spec: ModelSpec, head: nn.Module | None) -> Parts:
    layers = [
        LayerParts(
            input_norm=block.ln_1,
            qkv=(block.attn.c_attn,),
            o_proj=block.attn.c_proj,
            second_norm=block.ln_2,
            gate_up=(block.mlp.c_fc,),
            down_proj=block.mlp.c_proj,
        )
        for block in network.h
    ]
    return Parts(
        network.wte,
        layers,
        network.ln_f,
        tied_head(network.wte) if head is None else head,
        None,
        spec.extra["epsilon"],
        rotary=None,
        positions=network.wpe,
        activation="gelu",
        gated=False,
    )
