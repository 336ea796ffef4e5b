"""glmchat: talk to a local language model in a terminal."""

__version__ = "0.1.0"
