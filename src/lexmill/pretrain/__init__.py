"""Stage 3: a model from nothing, by predicting what comes next."""
