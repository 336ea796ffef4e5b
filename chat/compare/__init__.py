"""One question to several columns."""
