"""Errors of the kernels; the caller maps them to its own."""


class UnsupportedKernel(RuntimeError):
    """A backend cannot run here, or not with these shapes; the message gives reason and remedy."""
