"""The part of CANN's Python module `acl` that vllm-ascend uses, over the memory of the emulated cards."""

from acl import rt

__all__ = ["rt"]
