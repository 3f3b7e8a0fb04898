"""lexmill: from raw data to a running language model, in one package."""
