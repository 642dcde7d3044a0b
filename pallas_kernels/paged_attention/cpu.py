"""x"""
from pallas_kernels import native
def unsupported(*, head_dim: int, dtype: object) -> str | None:
    return native.load().reason
def paged_attention(*args, **kw): raise NotImplementedError
