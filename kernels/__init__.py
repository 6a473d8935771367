"""Operations on tensors, those of the table of `ops`: in Triton here, in PyTorch in `reference`, for a CPU in `cpu`."""
