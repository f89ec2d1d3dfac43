"""Parts of models that have a file of their own."""
