"""Paddock's kernels in Triton: attention over paged KV, and the fused ops between the matrix products."""
