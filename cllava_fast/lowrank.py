"""Products ``B^T A`` of thin factors, shortened and compared without ever building the ``d_out x d_in`` matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def truncate(A: Tensor, B: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """The best ``A [k, d_in]``, ``B [k, d_out]`` of at most that rank for ``B^T A``, and the relative error.

    A truncated singular value decomposition (Eckart and Young), whose error ``|short - whole| / |whole|`` (Frobenius)
    is the least possible. Factors come back balanced: each has the singular values' roots.

    Args:
        A, B: ``[r, d_in]`` and ``[r, d_out]``, best in float64.
        rank: None, or one of at least ``r``, gives back ``A`` and ``B`` themselves.
    """
    if rank is None or rank >= len(A):
        return A, B, 0.0
    # B^T A = Qb (Rb Ra^T) Qa^T, so a decomposition of the small matrix in the middle is enough
    Qa, Ra = torch.linalg.qr(A.t())  # [d_in, k], [k, r]
    Qb, Rb = torch.linalg.qr(B.t())
    U, S, V = torch.linalg.svd(Rb @ Ra.t(), full_matrices=False)  # [k, k], [k], [k, k]
    lost, whole = torch.linalg.vector_norm(S[rank:]), torch.linalg.vector_norm(S)
    root = S[:rank].sqrt()
    A, B = (V[:rank] * root[:, None]) @ Qa.t(), (U[:, :rank] * root).t() @ Qb.t()
    missing = (0, 0, 0, rank - len(A))  # a linear narrower than the rank
    return nn.functional.pad(A, missing), nn.functional.pad(B, missing), (lost / whole).item() if whole > 0 else 0.0


def relative_error(A: Tensor, B: Tensor, exact_A: Tensor, exact_B: Tensor) -> Tensor:
    """``|B^T A - exact_B^T exact_A| / |exact_B^T exact_A|`` (Frobenius), float64 ``[]``; 0 where the exact one is 0."""
    whole = _norm(exact_A.double(), exact_B.double())
    off = _norm(torch.cat([A, exact_A]).double(), torch.cat([B.double(), -exact_B.double()]))
    return torch.where(whole > 0, off / whole, torch.zeros_like(whole))


def _norm(A: Tensor, B: Tensor) -> Tensor:
    # |B^T A|^2 = tr(A^T B B^T A) = sum of (A A^T) * (B B^T)
    return ((A @ A.t()) * (B @ B.t())).sum().clamp(min=0).sqrt()
