"""Device, precision, compilation, memory and cost."""
