"""What a folder or a GGUF file says of itself, without torch."""
