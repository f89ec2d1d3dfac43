"""Optimizers that torch does not have: Muon as published since, and the running mean of the weights."""
