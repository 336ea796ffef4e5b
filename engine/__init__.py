"""Text in, text out: a checkpoint folder behind one face."""
