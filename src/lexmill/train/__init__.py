"""The engine room of pretraining and fine-tuning: one loop, batches, optimisers, exact state."""
