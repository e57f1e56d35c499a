"""What can be known of a training before it: which share of the student's squared error rows, grid and offsets can remove, and where it lies.

Shares are cross-fitted: found on one half of the pictures, counted on the other, both ways; 1 = all of it, 0 = none.
"""
from dataclasses import dataclass
from functools import partial

import torch

from .distill import ridge
from .gradient import Room, fitted
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
    really gives there, so that no share is promised that only a straight line has. Stopping early is the regulariser: a round takes the iteration that is
    best on the other halves, and the last round is the last that is better there, the whole way, half or a quarter of it.
    """
    both, room = halves(len(target)), Room(8)
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
            found.append(steps(ends, both[half], at[half], left[half], target, iterations, room))
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
    room: Room,
) -> list[tuple[dict, float, dict]]:
    """After each iteration: (Δ, what is then left of the other half's squared error to first order, gᵀΔ of each site).

    Conjugate gradients on min Σ_i |r_i − J_iΔ|² / |r_i|² (docs/theory.md §3; Hestenes & Stiefel 1952, as CGLS): Jᵀ by a backward pass, J by a finite
    difference; without the weights a few hard pictures rule the sum [26]."""
    (fit, test), (left, rest), made = half, left, []
    plain, plain_rest = target[fit] - left, target[test] - rest
    weight = 1 / left.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (left.dim() - 1))
    weight = weight / weight.mean()
    left = weight * left
    probe, push = [0.0], partial(pushed, ends, offsets=offsets, spread=float(target.cpu().double().std()))
    solution = {path: torch.zeros_like(value) for path, value in offsets.items()}
    first = gradient = pulled_back(ends, fit, offsets, weight * left, room)
    way, size = gradient, dot(gradient, gradient)
    for step in range(iterations):
        moved = weight * push(part=fit, way=way, plain=plain, probe=probe)
        length = size / max(energy(moved), 1e-30)
        solution = {path: value + length * way[path] for path, value in solution.items()}
        left = left - length * moved
        rest = rest - length * push(part=test, way=way, plain=plain_rest, probe=probe)
        made.append((solution, energy(rest), {path: dot({path: first[path]}, {path: value}) for path, value in solution.items()}))
        if step + 1 < iterations:
            gradient = pulled_back(ends, fit, offsets, weight * left, room)
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
            gradients = torch.autograd.grad((made * cotangent[rows]).sum(), list(leaves.values()), allow_unused=True)
            for path, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    total[path] += gradient
        return total

    return fitted(room, work)


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
