"""What a CPU computes with: kernels that numba compiles, and what they lie in and run on."""
