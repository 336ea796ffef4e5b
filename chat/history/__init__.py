"""Conversations in SQLite: rows, statements, search, export."""
