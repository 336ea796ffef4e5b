"""Beside the decode loop: what an answer may be held to, how likely its tokens were, and what a replay repeats."""
