"""Plain PyTorch: a GPT, its data, its training loop and its checkpoints, one noun per file. No Hydra inside."""
