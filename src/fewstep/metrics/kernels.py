"""Kernel distances between two sets of pictures: KID and CMMD, both an unbiased estimate of one squared MMD.

    MMD²(a, b) = mean k(a_i, a_j) + mean k(b_i, b_j) − 2 mean k(a_i, b_j)

each mean over the pairs i, j of pictures of *different* prompts, with the kernels

    KID    k(x, y) = (x·y / D + 1)³                  over the features of a picture (Bińkowski et al. 2018)
    CMMD   k(x, y) = exp(−‖x − y‖² / 2σ²), σ = 10     over unit embeddings of CLIP's pictures (Jayasumana et al. 2024)

Gretton et al. (2012, eq. 3) leave out only the pairs i = j within a set, for two independent sets. Here both are of the
same captions, and to the teacher from the same noise as well: pictures of one prompt resemble each other across the
sets, and such pairs are a larger share of the last mean than of the first two. That takes the estimate below zero where
nothing differs. Pictures of different prompts are independent, and without the rest all three means weigh each pair of
prompts alike as long as both sets have the same prompts, each with the same share of the pictures. So the expectation
is 0 for equal distributions, and a set against itself gives exactly 0.

Where each set has one picture of each prompt, this is Gretton's estimate for pairs (eq. 4): the usual one without the
pairs i = i across the sets. Where the sets have no prompt in common and each picture has its own, it is the usual one.

Unlike the Fréchet distance, neither grows when there are few pictures; both may come out slightly below zero. They use
all these pairs, where torchmetrics averages over random subsets: no randomness and less noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
"""CMMD is reported times a thousand, as by its authors."""

BLOCK = 128
"""Rows of a matrix of pairs that are held at once: few are also fastest. Of 30,000 pictures the whole would be 7 GB."""

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Two sets [N, D] and [M, D] to the kernel of every pair, [N, M]."""


def polynomial(a: Tensor, b: Tensor) -> Tensor:
    """(x·y / D + 1)³, [N, M]."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """exp(−‖x − y‖² / 2σ²) with CMMD's σ, [N, M]."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T
    return torch.exp(-squares.clamp_min(0) / (2 * CMMD_SIGMA**2))


def squared_mmd(
    a: Tensor, b: Tensor, kernel: Kernel, prompts_a: Sequence[int], prompts_b: Sequence[int], block: int = BLOCK
) -> float:
    """The estimate over features [N, D] and [M, D] in fp64, given each one's prompt; at least two prompts of each."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or (len(a), len(b)) != (len(prompts_a), len(prompts_b)):
        raise ValueError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} with {len(prompts_a)} and {len(prompts_b)} "
            "prompts; allowed: [N, D], [M, D] with N and M"
        )
    if min(len(set(prompts_a)), len(set(prompts_b))) < 2:
        raise ValueError("pictures of one prompt; allowed are at least two prompts of each")
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    of_a, of_b = torch.tensor(list(prompts_a)), torch.tensor(list(prompts_b))
    within = _mean_apart(a, a, kernel, of_a, of_a, block) + _mean_apart(b, b, kernel, of_b, of_b, block)
    return within - 2 * _mean_apart(a, b, kernel, of_a, of_b, block)


def _mean_apart(a: Tensor, b: Tensor, kernel: Kernel, prompts_a: Tensor, prompts_b: Tensor, block: int) -> float:
    """The mean of the kernel over pairs of different prompts, of sets [N, D] and [M, D]."""
    total, pairs = 0.0, 0
    for some, owners in zip(a.split(block), prompts_a.split(block), strict=True):
        apart = owners[:, None] != prompts_b[None]
        total += float((kernel(some, b) * apart).sum())
        pairs += int(apart.sum())
    return total / pairs


def kid(features: Tensor, reference: Tensor, prompts: Sequence[int], reference_prompts: Sequence[int]) -> float:
    """Kernel inception distance, over whichever features these are."""
    return squared_mmd(features, reference, polynomial, prompts, reference_prompts)


def cmmd(embeddings: Tensor, reference: Tensor, prompts: Sequence[int], reference_prompts: Sequence[int]) -> float:
    """CLIP maximum mean discrepancy × 1000, over embeddings that are brought to unit length."""
    a, b = (torch.nn.functional.normalize(one.double(), dim=1) for one in (embeddings, reference))
    return CMMD_SCALE * squared_mmd(a, b, gaussian, prompts, reference_prompts)
