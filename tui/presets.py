"""Sampling settings explained, and presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Values for the four settings that shape an answer; "model" means: whatever the model's own files say.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "precise": {"temperature": 0.2, "top_p": 0.9, "top_k": 0, "min_p": 0.0},
    "balanced": {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0},
    "creative": {"temperature": 1.1, "top_p": 1.0, "top_k": 0, "min_p": 0.05},
    "model": {},
}
PRESET_WORDS: Mapping[str, str] = {
    "precise": "close to the likeliest words: facts, code, extraction",
    "balanced": "for conversation",
    "creative": "for stories and ideas",
    "model": "what the model's makers recommend",
}

# Field -> (range, what it does).
EXPLAINED: Mapping[str, tuple[str, str]] = {
    "temperature": ("0 to 5", "0 always takes the likeliest token; 0.2 to 0.7 is sober, above 1 it wanders"),
    "top_p": ("0 to 1", "only the likeliest tokens that together reach this share; 1 switches it off"),
    "top_k": ("0 and up", "only this many of the likeliest tokens; 0 switches it off"),
    "min_p": ("0 to 1", "only tokens at least this share as likely as the likeliest; 0 switches it off"),
    "repetition_penalty": ("0.1 to 10", "above 1 makes tokens that were said less likely; 1 switches it off"),
    "max_tokens": ("1 and up, or none", "how long an answer may get; none is 2,048 or what the context leaves"),
    "seed": ("0 and up, or none", "the same seed and settings give the same answer; none takes another each time"),
    "stop": ("texts parted by |", "the answer ends before any of these texts"),
}
