"""Triton kernels. With TRITON_INTERPRET=1 at import they run on CPU tensors; else they are compiled for a GPU."""
