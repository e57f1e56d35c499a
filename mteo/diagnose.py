"""What can be known of a training before it: which share of the student's squared error rows, grid and offsets can remove, and where it lies.

Shares are cross-fitted: found on one half of the pictures, counted on the other, both ways; 1 = all of it, 0 = none.
"""
import math
from dataclasses import dataclass

import torch

from .distill import ridge
from .gradient import Room, finite
from .tableau import Tableau

PROBE = 0.003  # how far the end points go in a finite difference, root mean square ÷ the target's spread: rounding (float32) and curvature are both small


def halves(count: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(indices to fit on, indices to count on), both ways; by twos, as starts of image to image are of two kinds by turns."""
    place = torch.arange(count)
    one, two = place[place // 2 % 2 == 0], place[place // 2 % 2 == 1]
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

    ends(part, offsets) -> end points of the pictures `part`, differentiable; with recompute=True it keeps nothing of an evaluation (mteo/gradient.py).
    Gauss–Newton: each round solves the linearised problem by conjugate gradients (`steps`), goes there, and is counted by the end points that the network
    really gives there, so that no share is promised that only a straight line has. Stopping early is the regulariser: a round takes the iteration whose end
    points are best on the other halves, and the last round is the last that is better there, the whole way, half or a quarter of it.
    """
    both, room = halves(len(target)), Room(8)
    at, reduction = [dict(offsets), dict(offsets)], {path: 0.0 for path in offsets}

    @torch.no_grad()
    def missing(part: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
        """What is left of the target."""
        return target[part] - ends(part, own)

    def beyond(half: int, change: dict[str, torch.Tensor], length: float = 1.0) -> dict[str, torch.Tensor]:
        return {path: value + length * change[path] for path, value in at[half].items()}

    def counted(own: list[dict[str, torch.Tensor]]) -> float:
        """What is left of the squared error on the other halves."""
        error = sum(energy(missing(test, one)) for (_, test), one in zip(both, own, strict=True))
        return error if math.isfinite(error) else math.inf

    left = [missing(fit, own) for (fit, _), own in zip(both, at, strict=True)]
    before = counted(at)
    share = [0.0]
    for number in range(rounds):
        found = []
        for half in (0, 1):
            found.append(steps(ends, both[half][0], at[half], left[half], target, iterations, room))
            if progress is not None:
                progress("offsets", 2 * number + half + 1, 2 * rounds)
        errors = [counted([beyond(half, found[half][i][0]) for half in (0, 1)]) for i in range(iterations)]
        length, error, taken = 1.0, min(errors), errors.index(min(errors))
        while 1 - error / before <= share[-1] and length > 0.25:
            length /= 2
            error = counted([beyond(half, found[half][taken][0], length) for half in (0, 1)])
        if 1 - error / before <= share[-1]:
            break
        at = [beyond(half, found[half][taken][0], length) for half in (0, 1)]
        left = [missing(fit, own) for (fit, _), own in zip(both, at, strict=True)]
        share.append(1 - error / before)
        for half in (0, 1):
            for path, value in found[half][taken][1].items():
                reduction[path] += length * value
    if progress is not None:
        progress("offsets", 2 * rounds, 2 * rounds)
    whole = sum(reduction.values())
    return OffsetsShare(share[1:], share[-1], {path: value / max(whole, 1e-30) for path, value in reduction.items()})


def steps(
    ends, part: torch.Tensor, offsets: dict[str, torch.Tensor], left: torch.Tensor, target: torch.Tensor, iterations: int, room: Room
) -> list[tuple[dict[str, torch.Tensor], dict[str, float]]]:
    """After each iteration: (Δ, gᵀΔ of each site), for what is `left` of the target of the pictures `part`.

    Conjugate gradients on min Σ_i |r_i − J_iΔ|² / |r_i|² (docs/theory.md §3; Hestenes & Stiefel 1952, as CGLS): Jᵀ by a backward pass, J by a finite
    difference; without the weights a few hard pictures rule the sum [26]."""
    plain, made = target[part] - left, []
    weight = 1 / left.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (left.dim() - 1))
    weight = weight / weight.mean()
    left = weight * left
    probe, spread = [0.0], float(target.cpu().double().std())
    solution = {path: torch.zeros_like(value) for path, value in offsets.items()}
    first = gradient = pulled_back(ends, part, offsets, weight * left, room)
    way, size = gradient, dot(gradient, gradient)
    for step in range(iterations):
        moved = weight * pushed(ends, part, offsets, way, plain, spread, probe)
        length = size / max(energy(moved), 1e-30)
        solution = {path: value + length * way[path] for path, value in solution.items()}
        left = left - length * moved
        made.append((solution, {path: dot({path: first[path]}, {path: value}) for path, value in solution.items()}))
        if step + 1 < iterations:
            gradient = pulled_back(ends, part, offsets, weight * left, room)
            size, last = dot(gradient, gradient), size
            way = {path: gradient[path] + size / max(last, 1e-30) * way[path] for path in way}
    return made


def dot(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[path].cpu().double() * b[path].cpu().double()).sum()) for path in a)


def energy(x: torch.Tensor) -> float:
    return float(x.cpu().double().square().sum())


def pulled_back(ends, part: torch.Tensor, offsets: dict[str, torch.Tensor], cotangent: torch.Tensor, room: Room) -> dict[str, torch.Tensor]:
    """Jᵀ · cotangent, a few pictures at a time."""

    def work() -> dict[str, torch.Tensor]:
        leaves = {path: value.detach().clone().requires_grad_(True) for path, value in offsets.items()}
        total = {path: torch.zeros_like(value) for path, value in offsets.items()}
        for begin in range(0, len(part), room.together):
            rows = slice(begin, begin + room.together)
            made = ends(part[rows], leaves, recompute=True) if room.recompute else ends(part[rows], leaves)
            scale = room.scale / 16  # as a training's: a sum over all of a picture's numbers is large for float16
            gradients = torch.autograd.grad((made * cotangent[rows]).sum() * scale, list(leaves.values()), allow_unused=True)
            for path, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    total[path] += gradient / scale
        return total

    return finite(room, work, dict.values)


@torch.no_grad()
def pushed(
    ends, part: torch.Tensor, offsets: dict[str, torch.Tensor], way: dict[str, torch.Tensor], plain: torch.Tensor, spread: float, probe: list[float]
) -> torch.Tensor:
    """J · way by a finite difference from `plain` = the end points at `offsets`. probe [1]: how far it goes along a way of length 1, 0 = not known yet; it
    is made longer or shorter until the end points go about as far as PROBE says."""
    size = max(dot(way, way) ** 0.5, 1e-30)
    for _ in range(6):
        scale = (probe[0] or 1e-2) / size
        change = ends(part, {path: value + scale * way[path] for path, value in offsets.items()}) - plain
        went = (energy(change) / change.numel()) ** 0.5 / spread
        if went == 0:
            break
        probe[0] = scale * size * min(max(PROBE / max(went, 1e-30), 1e-2), 1e2)
        if PROBE / 3 <= went <= 3 * PROBE:
            break
    return change / scale
