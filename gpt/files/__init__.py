"""Files that survive a crash: paths, atomic writes, rows of JSON, tensors."""
