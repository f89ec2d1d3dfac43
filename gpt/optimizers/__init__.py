"""Optimizers that torch does not have: Muon as published since, and SOAP."""
