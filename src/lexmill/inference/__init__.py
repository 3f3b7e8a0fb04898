"""Stage 5: models at work. Sampling, generation and chat need no torch; the torch backend does."""
