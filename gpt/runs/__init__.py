"""One run's life: directory, checkpoints, resuming, metrics, Weights & Biases, signals, cards."""
