"""From a conversation to ids: the formats of the ChatGLM families, and templates that come with a checkpoint."""
