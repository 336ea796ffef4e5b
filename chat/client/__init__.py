"""The client of the OpenAI API that engines and foreign servers speak."""
