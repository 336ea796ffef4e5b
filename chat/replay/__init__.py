"""Answers said again in a fresh process, and what a record holds for that."""
