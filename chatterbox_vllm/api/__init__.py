"""The HTTP server: OpenAI's speech routes over ``AsyncChatterbox``. Importing it imports neither torch nor vLLM."""
