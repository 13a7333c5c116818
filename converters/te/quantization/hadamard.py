"""The random Hadamard transform that NVFP4 applies along the summed dimension of both operands of wgrad.

It spreads an outlier over 16 elements. As it is orthogonal, the product of two transformed operands is theirs.

Source: TransformerEngine 2.20.2, transformer_engine/pytorch/tensor/nvfp4_tensor.py (`get_wgrad_sign_vector`,
`get_rht_matrix`): the signs are fixed, and the matrix is `diag(signs) @ hadamard(16) / 4`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SIZE = 16
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@functools.cache
def matrix() -> Tensor:
    """`[16 16]` fp32, entries of magnitude 1/4."""
    sylvester = torch.ones(1, 1)
    while len(sylvester) < SIZE:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    return torch.tensor(SIGNS, dtype=torch.float32)[:, None] * sylvester / 4


def transform(x: Tensor) -> Tensor:
    """Each 16 elements of the last dimension times the matrix, rounded once to the dtype of `x`."""
    blocks = x.float().reshape(*x.shape[:-1], -1, SIZE)
    return (blocks @ matrix()).flatten(-2).to(x.dtype)
