"""Model folders in, named tensors out."""
