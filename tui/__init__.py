"""The chat window: Textual screens and widgets. Knows the use cases of `chat`, never torch."""
