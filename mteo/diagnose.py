"""What can be known of a training before it: which share of the student's squared error rows, grid and offsets can remove, and where it lies.

Shares are cross-fitted: found on one half of the pictures, counted on the other, both ways; 1 = all of it, 0 = none.
"""
from dataclasses import dataclass

import torch

from .distill import ridge
from .tableau import Tableau

PROBE = 2e-3  # root mean square of the offsets of a finite difference: rounding and curvature are both small there


def halves(count: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(indices to fit on, indices to count on), both ways."""
    one, two = torch.arange(0, count, 2), torch.arange(1, count, 2)
    return (one, two), (two, one)


def row_error(terms: list[torch.Tensor], target: torch.Tensor, tableau: Tableau) -> torch.Tensor:
    """[N] mean squared end-point error of each picture with the last row solved on the other half; terms [x_T, D_0, …], each [N, …]."""
    columns = torch.stack([term.cpu().double().flatten(1) for term in terms], 2)  # [N, numbers of a picture, terms]
    target, error = target.cpu().double().flatten(1), torch.zeros(len(target), dtype=torch.float64)
    for fit, test in halves(len(target)):
        flat, goal = columns[fit].flatten(0, 1), target[fit].flatten()
        row = ridge(flat.T @ flat, flat.T @ goal, tableau.matrix[-1])
        error[test] = (columns[test] @ row - target[test]).square().mean(1)
    return error


@dataclass
class OffsetsShare:
    """share: of the squared error, after each iteration; best: the largest; sites: path -> its part of the reduction to first order at the best (sum 1)."""

    share: list[float]
    best: float
    sites: dict[str, float]


def offsets_share(ends, offsets: dict[str, torch.Tensor], target: torch.Tensor, iterations: int = 8, progress=None) -> OffsetsShare:
    """What the best offsets remove to first order, beyond `offsets` as they are. From below: a training sees more pictures than these, and goes on from where it is.

    ends(part, offsets) -> end points of the pictures `part`, differentiable. Conjugate gradients on min Σ_i |r_i − J_iΔ|² / |r_i|² (docs/theory.md §3; Hestenes &
    Stiefel 1952, as CGLS): Jᵀ by a backward pass, J by a finite difference; without the weights a few hard pictures rule the sum [26]. Stopping early is the
    regulariser: the iteration counts whose share on the other half is best.
    """
    before, after, reduction = 0.0, torch.zeros(iterations, dtype=torch.float64), []
    for number, (fit, test) in enumerate(halves(len(target))):
        with torch.no_grad():
            plain = {name: ends(part, offsets) for name, part in (("fit", fit), ("test", test))}
        left, rest = target[fit] - plain["fit"], target[test] - plain["test"]  # r − JΔ
        before += energy(rest)
        weight = 1 / left.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (left.dim() - 1))
        weight = weight / weight.mean()
        left = weight * left
        solution = {path: torch.zeros_like(value) for path, value in offsets.items()}
        first = gradient = pulled_back(ends, fit, offsets, weight * left)
        way, size = gradient, dot(gradient, gradient)
        for step in range(iterations):
            moved = weight * pushed(ends, fit, offsets, way, plain["fit"])
            length = size / max(energy(moved), 1e-30)
            solution = {path: value + length * way[path] for path, value in solution.items()}
            left = left - length * moved
            rest = rest - length * pushed(ends, test, offsets, way, plain["test"])
            after[step] += energy(rest)
            reduction.append({path: dot({path: first[path]}, {path: value}) for path, value in solution.items()})  # gᵀΔ by site
            if progress is not None:
                progress("offsets", number * iterations + step + 1, 2 * iterations)
            if step + 1 < iterations:
                gradient = pulled_back(ends, fit, offsets, weight * left)
                size, last = dot(gradient, gradient), size
                way = {path: gradient[path] + size / max(last, 1e-30) * way[path] for path in way}
    share = (1 - after / before).tolist()
    best = max(range(iterations), key=share.__getitem__)
    sites = {path: reduction[best][path] + reduction[iterations + best][path] for path in offsets}
    whole = sum(sites.values())
    return OffsetsShare(share, share[best], {path: value / max(whole, 1e-30) for path, value in sites.items()})


def dot(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[path].cpu().double() * b[path].cpu().double()).sum()) for path in a)


def energy(x: torch.Tensor) -> float:
    return float(x.cpu().double().square().sum())


def pulled_back(ends, part: torch.Tensor, offsets: dict[str, torch.Tensor], cotangent: torch.Tensor, batch: int = 8) -> dict[str, torch.Tensor]:
    """Jᵀ · cotangent, a few pictures at a time."""
    leaves = {path: value.detach().clone().requires_grad_(True) for path, value in offsets.items()}
    total = {path: torch.zeros_like(value) for path, value in offsets.items()}
    for begin in range(0, len(part), batch):
        value = (ends(part[begin : begin + batch], leaves) * cotangent[begin : begin + batch]).sum()
        for path, gradient in zip(leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True), strict=True):
            if gradient is not None:
                total[path] += gradient
    return total


@torch.no_grad()
def pushed(ends, part: torch.Tensor, offsets: dict[str, torch.Tensor], way: dict[str, torch.Tensor], plain: torch.Tensor) -> torch.Tensor:
    """J · way by a finite difference from `plain` = the end points at `offsets`."""
    size = (dot(way, way) / sum(value.numel() for value in way.values())) ** 0.5
    scale = PROBE / max(size, 1e-30)
    return (ends(part, {path: value + scale * way[path] for path, value in offsets.items()}) - plain) / scale
