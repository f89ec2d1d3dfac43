"""Turns a command line into typed values and reports wrong ones."""
