"""What exists, where from, what is here; no torch."""
