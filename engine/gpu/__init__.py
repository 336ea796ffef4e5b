"""The engine on a card: where a model lies, its products and whole decoder steps as Triton kernels, its prompts."""
