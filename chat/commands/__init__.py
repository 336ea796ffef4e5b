"""The slash commands of a conversation: one table, and what those do that need no window."""
