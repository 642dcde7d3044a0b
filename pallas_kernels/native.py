"""x"""
from typing import NamedTuple
class A(NamedTuple):
    reason: str|None
def load(): return A("the native library is not written yet")
