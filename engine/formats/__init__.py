"""Weights as files hold them: shards, GGUF, THUDM's packed checkpoints, compressed-tensors, quantised folders."""
