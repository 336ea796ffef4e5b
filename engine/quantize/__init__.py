"""INT4 and INT8 weights."""
