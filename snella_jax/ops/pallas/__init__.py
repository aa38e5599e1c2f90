"""Pallas kernels of an adapted matmul, for TPUs (Mosaic) and NVIDIA GPUs (Mosaic GPU).

They make the update tile by tile from the factors, so that no array of its size is
written: `search` finds the threshold, `product` multiplies by `w0 + delta`, and
`gradients` reduces `x^T g` into the factors' gradients, each tile where it is made.
"""
