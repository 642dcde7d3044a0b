"""Measures the numbers of kernels that only the chip can decide; see `__main__`."""
