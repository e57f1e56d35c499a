"""DPM-Solver-v3 (Zheng et al. 2023, arXiv 2310.13268): the part of the flow that is linear, on average over the model's own trajectories, is solved in closed
form.

In λ = −ln σ and variance-exploding x, dx/dλ = −(x − D) = −(l·x + f): l is the mean diagonal of ∂(x − D)/∂x (eq. 9), and f changes along a trajectory as
df/dλ ≈ s·f + b, s and b by linear regression (eq. 11); all are arrays of one picture's shape. What is left, g = e^(−∫s)·f − ∫e^(−∫s)·b, hardly moves, and is a
polynomial through the last evaluations. The integrals are sums here, the paper's are closed over the same statistics.
"""
import itertools

import torch

from mteo.comfyui.training import teacher_tableau
from mteo.schedule import karras
from mteo.tableau import execute
from mteo.teacher import Trajectories

from ..parts import BATCH
from .lab import Lab
from .training import error_of

LEVELS, POINTS, ORDERS = 40, 33, (1, 2)


def statistics(lab: Lab, pairs: Trajectories, seed: int = 0) -> dict[str, torch.Tensor]:
    """{"levels": λ [M], "l", "s", "b": [M, …]} of the teacher's trajectories from the pairs' starts; a forward, a backward pass and a step each."""
    sigmas, generator = karras(LEVELS, lab.sigma_min, lab.sigma_max, flow=lab.session.flow), torch.Generator().manual_seed(seed)
    levels, slopes, states = -sigmas[:-1].double().log(), [], []

    def denoise(x, call, sigma):
        answers, diagonals = [], []
        for begin in range(0, len(x), BATCH):
            part = x[begin : begin + BATCH].detach().requires_grad_(True)
            answer = lab.denoise(part, sigma, pairs.part(slice(begin, begin + BATCH)))
            sign = torch.randint(2, part.shape, generator=generator).to(part) * 2 - 1
            diagonals.append(sign * torch.autograd.grad((answer * sign).sum(), part)[0])  # Hutchinson
            answers.append(answer.detach())
        slopes.append(1 - torch.cat(diagonals).mean(0).double())
        states.append((x, torch.cat(answers)))
        return states[-1][1]

    execute(teacher_tableau(lab.session, sigmas), denoise, pairs.start)
    linear = torch.stack(slopes)
    rest = [(x - answer - linear[i] * x).double() for i, (x, answer) in enumerate(states)]  # f
    slope, shift = [], []
    for i, f in enumerate(rest):
        low, high = max(i - 1, 0), min(i + 1, len(rest) - 1)
        change = (rest[high] - rest[low]) / (levels[high] - levels[low])
        centred = f - f.mean(0)
        s = (centred * change).mean(0) / centred.square().mean(0).clamp_min(1e-12)
        slope.append(s)
        shift.append(change.mean(0) - s * f.mean(0))
    return dict(levels=levels, l=linear, s=torch.stack(slope), b=torch.stack(shift))


def at(statistics: dict[str, torch.Tensor], name: str, levels: torch.Tensor) -> torch.Tensor:
    """A statistic [P, …] at any λ [P], linear between its own, the end one beyond."""
    own, values = statistics["levels"], statistics[name]
    low = (torch.searchsorted(own, levels) - 1).clamp(0, len(own) - 2)
    share = ((levels - own[low]) / (own[low + 1] - own[low])).clamp(0, 1).view(-1, *[1] * (values.dim() - 1))
    return (1 - share) * values[low] + share * values[low + 1]


def so_far(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """∫ from the first λ to each [P, …], by trapezoids."""
    steps = (levels[1:] - levels[:-1]).view(-1, *[1] * (values.dim() - 1))
    return torch.cat([torch.zeros_like(values[:1]), ((values[1:] + values[:-1]) / 2 * steps).cumsum(0)])


def frame(statistics: dict[str, torch.Tensor], start: float, end: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(λ [P] from start to end, ∫s, ∫e^(−∫s)·b) so far."""
    levels = torch.linspace(start, end, POINTS, dtype=torch.float64)
    s = so_far(at(statistics, "s", levels), levels)
    return levels, s, so_far((-s).exp() * at(statistics, "b", levels), levels)


def step(statistics: dict[str, torch.Tensor], x: torch.Tensor, start: float, end: float, known: list[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """x [B, …] from λ = start to end; known: (λ, f) of the evaluations that g goes through."""
    levels, s, b = frame(statistics, start, end)
    linear = so_far(at(statistics, "l", levels), levels)
    carried = (linear - linear[-1]).exp()  # e^(−∫l) from each λ to the end
    total = (-linear[-1]).exp() * x.double()
    weights = trapezoids(levels).view(-1, *[1] * (s.dim() - 1)) * carried * s.exp()
    total = total - (weights * b).sum(0)
    for i, (own, f) in enumerate(known):
        _, own_s, own_b = frame(statistics, start, own)
        g = (-own_s[-1]).exp() * f - own_b[-1]
        share = torch.ones_like(levels)
        for j, (other, _) in enumerate(known):
            if j != i:
                share = share * (levels - other) / (own - other)  # Lagrange
        total = total - (weights * share.view(-1, *[1] * (s.dim() - 1))).sum(0) * g
    return total.to(x)


def trapezoids(levels: torch.Tensor) -> torch.Tensor:
    weights = torch.ones_like(levels)
    weights[0] = weights[-1] = 0.5
    return weights * (levels[1] - levels[0])


def sample(lab: Lab, sigmas: list[float], learned: dict[str, torch.Tensor], batch: Trajectories, start: torch.Tensor) -> torch.Tensor:
    """End points of the starts on `sigmas` [K + 1]; the last step ends at sigma_min and is of the first order, as in the paper's code. learned: the
    statistics, "order", and "corrected": whether an evaluation also mends the step that led to it."""
    x = before = start
    known, order = [], int(learned["order"])
    levels = [-float(torch.tensor(sigma).log()) for sigma in (*sigmas[:-1], lab.sigma_min)]
    for number, (sigma, now, after) in enumerate(zip(sigmas[:-1], levels[:-1], levels[1:], strict=True), 1):
        answer = lab.denoise(x, sigma, batch)
        f = (x - answer).double() - at(learned, "l", torch.tensor([now], dtype=torch.float64))[0] * x.double()
        if known and learned["corrected"]:
            x = step(learned, before, known[-1][0], now, [*known[-order:], (now, f)])
        known = [*known, (now, f)]
        before, x = x, step(learned, x, now, after, known[-min(order, len(sigmas) - number) :])
    return x


def train(lab: Lab, pairs: Trajectories, held_out: Trajectories, grids: list[list[float]]) -> tuple[list[float], dict[str, torch.Tensor], float]:
    """(grid, learned, error): the grid and order, with or without the corrector, that do best on the held-out pairs."""
    numbers = statistics(lab, pairs)
    tried = []
    for sigmas in grids:
        if sigmas[-2] > 1.05 * lab.sigma_min:
            for order, corrected in itertools.product(ORDERS, (False, True)):
                learned = numbers | {"order": torch.tensor(order), "corrected": torch.tensor(corrected)}
                tried.append(
                    (error_of(lab, lambda own, part, start, grid=sigmas: sample(lab, grid, own, part, start), learned, held_out), len(tried), sigmas, learned)
                )
    error, _, sigmas, learned = min(tried)
    return sigmas, learned, error
