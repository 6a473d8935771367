"""Hand-written operations on tensors: every op in the table of `ops`, launcher beside oracle."""
