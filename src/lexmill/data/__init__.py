"""Stage 1: raw files become documents (readers, cleaning, splitting, deduplication, manifest and data card),
and documents that were encoded become token shards. Import the module that does what you need."""
