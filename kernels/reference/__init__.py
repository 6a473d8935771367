"""Every op in PyTorch: the oracle of the other backends, and the one of a CPU without numba."""
