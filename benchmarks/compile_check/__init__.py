"""Compiles steps and kernels for chips that are not here; see `__main__`."""
