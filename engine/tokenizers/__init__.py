"""Text to ids and back, one file per vocabulary."""
