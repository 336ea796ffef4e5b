"""The use cases: one conversation with one model."""
