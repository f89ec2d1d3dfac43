"""The door: from a command line to typed values, and what is said of wrong ones."""
