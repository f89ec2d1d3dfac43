"""What a model knows and how it answers."""
