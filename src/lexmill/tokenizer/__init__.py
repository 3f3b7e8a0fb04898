"""Text to numbers and back: training, encoding, special tokens, chat templates."""
