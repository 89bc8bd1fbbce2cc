"""The data-dependent steps of training-free systems, in NumPy, around stages that an engine runs."""
