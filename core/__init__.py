"""The words every layer speaks."""
