"""Raw files become records, splits, token files and batches."""
