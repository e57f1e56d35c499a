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
    """share: of the squared error, after each round; best: the last and largest, 0 = none; sites: path -> its part of the reduction to first order (sum 1)."""

    share: list[float]
    best: float
    sites: dict[str, float]


def offsets_share(ends, offsets: dict[str, torch.Tensor], target: torch.Tensor, rounds: int = 4, iterations: int = 8, progress=None) -> OffsetsShare:
    """What the best offsets remove beyond `offsets` as they are. From below: a training sees more pictures than these.

    ends(part, offsets) -> end points of the pictures `part`, differentiable. Gauss–Newton: each round solves the linearised problem by conjugate gradients
    (`steps`), goes there, and is counted by the end points that the network really gives there, so that no share is promised that only a straight line has.
    Stopping early is the regulariser: a round takes the iteration that is best on the other halves, and the last round is the last that is better there, the
    whole way, half or a quarter of it.
    """
    both = halves(len(target))
    at, reduction = [dict(offsets), dict(offsets)], {path: 0.0 for path in offsets}

    def missing(half: int, own) -> tuple[torch.Tensor, torch.Tensor]:
        """What is left of the target on the half that is fitted and on the other."""
        with torch.no_grad():
            return tuple(target[part] - ends(part, own) for part in both[half])

    left = [missing(half, own) for half, own in enumerate(at)]
    before = sum(energy(rest) for _, rest in left)
    share = [0.0]
    for number in range(rounds):
        found = []
        for half in (0, 1):
            found.append(steps(ends, both[half], at[half], left[half], target, iterations))
            if progress is not None:
                progress("offsets", 2 * number + half + 1, 2 * rounds)
        taken = min(range(iterations), key=lambda i: found[0][i][1] + found[1][i][1])
        for length in (1.0, 0.5, 0.25):
            moved = [{path: value + length * found[half][taken][0][path] for path, value in at[half].items()} for half in (0, 1)]
            now = [missing(half, own) for half, own in enumerate(moved)]
            if (one := 1 - sum(energy(rest) for _, rest in now) / before) > share[-1]:
                break
        else:
            break
        at, left = moved, now
        share.append(one)
        for half in (0, 1):
            for path, value in found[half][taken][2].items():
                reduction[path] += length * value
    if progress is not None:
        progress("offsets", 2 * rounds, 2 * rounds)
    whole = sum(reduction.values())
    return OffsetsShare(share[1:], share[-1], {path: value / max(whole, 1e-30) for path, value in reduction.items()})


def steps(
    ends,
    half: tuple[torch.Tensor, torch.Tensor],
    offsets: dict[str, torch.Tensor],
    left: tuple[torch.Tensor, torch.Tensor],
    target: torch.Tensor,
    iterations: int,
) -> list[tuple[dict, float, dict]]:
    """After each iteration: (Δ, what is then left of the other half's squared error to first order, gᵀΔ of each site).

    Conjugate gradients on min Σ_i |r_i − J_iΔ|² / |r_i|² (docs/theory.md §3; Hestenes & Stiefel 1952, as CGLS): Jᵀ by a backward pass, J by a finite
    difference; without the weights a few hard pictures rule the sum [26]."""
    (fit, test), (left, rest), made = half, left, []
    plain, plain_rest = target[fit] - left, target[test] - rest
    weight = 1 / left.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (left.dim() - 1))
    weight = weight / weight.mean()
    left = weight * left
    solution = {path: torch.zeros_like(value) for path, value in offsets.items()}
    first = gradient = pulled_back(ends, fit, offsets, weight * left)
    way, size = gradient, dot(gradient, gradient)
    for step in range(iterations):
        moved = weight * pushed(ends, fit, offsets, way, plain)
        length = size / max(energy(moved), 1e-30)
        solution = {path: value + length * way[path] for path, value in solution.items()}
        left = left - length * moved
        rest = rest - length * pushed(ends, test, offsets, way, plain_rest)
        made.append((solution, energy(rest), {path: dot({path: first[path]}, {path: value}) for path, value in solution.items()}))
        if step + 1 < iterations:
            gradient = pulled_back(ends, fit, offsets, weight * left)
            size, last = dot(gradient, gradient), size
            way = {path: gradient[path] + size / max(last, 1e-30) * way[path] for path in way}
    return made


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
