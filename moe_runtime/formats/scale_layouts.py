"""Where the factors of a block-scaled matrix lie: row by row, or in the atoms that Blackwell's tensor cores read.

An atom holds 128 rows x 4 factors in 512 bytes, the factor (r, k) at (r % 32) * 16 + (r / 32) * 4 + k. Atoms follow
each other along K first; rows are padded to a multiple of 128 and factors to one of 4, with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .elements import UE8M0_BIAS

ATOM_ROWS = 128
ATOM_FACTORS = 4


def to_atoms(factors: Tensor) -> Tensor:
    """Row by row [..., N, G] of any one-byte dtype -> [..., ceil(N/128), ceil(G/4), 512]."""
    rows, groups = factors.shape[-2:]
    padded = pad(factors, (0, -groups % ATOM_FACTORS, 0, -rows % ATOM_ROWS))
    atoms = padded.unflatten(-1, (-1, ATOM_FACTORS)).unflatten(-3, (-1, ATOM_ROWS // 32, 32))
    # [..., row atoms, r / 32, r % 32, factor atoms, k]
    return atoms.movedim(-2, -4).transpose(-3, -2).flatten(-3).contiguous()


def from_atoms(atoms: Tensor, rows: int, groups: int) -> Tensor:
    """Inverse of to_atoms: [..., rows, groups], contiguous."""
    split = atoms.unflatten(-1, (32, ATOM_ROWS // 32, ATOM_FACTORS)).transpose(-3, -2)
    plain = split.movedim(-4, -2).flatten(-2).flatten(-4, -2)
    return plain[..., :rows, :groups].contiguous()


def unit_atoms(rows: int, groups: int, device: torch.device | None = None) -> Tensor:
    """Atoms of ue8m0 factors that are all 2^0, by which fp8 tokens read as mxfp8: uint8 [ceil(N/128), ceil(G/4), 512].

    One set, for the most rows that any expert has, serves all experts: wherever one looks, the factor is the same.
    """
    shape = (-(-rows // ATOM_ROWS), -(-groups // ATOM_FACTORS), ATOM_ROWS * ATOM_FACTORS)
    return torch.full(shape, UE8M0_BIAS, dtype=torch.uint8, device=device)
