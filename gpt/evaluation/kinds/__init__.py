"""The kinds of evaluation, a file each."""
