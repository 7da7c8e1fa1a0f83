"""TensorRT plugins: Triton kernels, their launch plans, their compiler, and the C++ shell that launches them."""
