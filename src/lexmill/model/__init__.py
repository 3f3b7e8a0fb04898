"""The Transformer: its configuration, its parts, and model directories."""
