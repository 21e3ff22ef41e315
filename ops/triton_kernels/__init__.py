"""The Triton kernels of `ops.cuda`: in each file some `@triton.jit` kernels, and the functions that launch them.

A host function has the signature of its op, never waits for the device (a decode step can be captured as a graph), and
takes CPU tensors under Triton's interpreter. Compiled for Hopper (sm_90); Triton 3.6 or newer.
"""
