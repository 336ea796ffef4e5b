"""The scrolling view of a conversation, drawn as lines."""
