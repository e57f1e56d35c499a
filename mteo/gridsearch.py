"""Where the inner σ of a few steps should lie: tried on the plain model, with the solver's rows solved anew for each choice."""
import itertools

import torch

from .distill import ridge
from .schedule import karras
from .tableau import combine, euler_tableau
from .teacher import Trajectories

LEVELS = 12  # σ that each inner step may take
SPREAD = 4.0  # they span the reference grid's σ ÷ SPREAD … × SPREAD


def levels(steps: int, sigma_max: float) -> list[list[float]]:
    """LEVELS values for each inner step, geometric around a Karras-like grid of ρ = 2 (between sgm_uniform and Karras)."""
    reference = karras(steps, 0.1, sigma_max, rho=2.0)[1:-1].tolist()
    ramp = torch.linspace(-1, 1, LEVELS, dtype=torch.float64)
    return [[min(float(sigma * SPREAD**r), 0.95 * sigma_max) for r in ramp] for sigma in reference]


def solved_error(terms: list[torch.Tensor], end: torch.Tensor, prior: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(RMSE of the best last row on these terms, the row); float64."""
    columns = torch.stack([term.flatten().double().cpu() for term in terms], 1)
    target = end.flatten().double().cpu()
    row = ridge(columns.T @ columns, columns.T @ target, prior)
    return float((columns @ row - target).square().mean().sqrt()), row


def search_grid(denoise, pairs: Trajectories, steps: int, sigma_max: float, progress=lambda *a, **k: None) -> torch.Tensor:
    """[steps + 1] σ: the best of LEVELS × LEVELS for three steps, two rounds of one σ at a time for more.

    denoise(x, sigma, pairs) -> D of the plain model. Euler between the steps, the last row solved for each grid.
    """
    choices, memory = levels(steps, sigma_max), {}

    def error(inner: tuple[float, ...]) -> float:
        grid = torch.tensor([sigma_max, *inner, 0.0], dtype=torch.float64)
        tableau, terms = euler_tableau(grid), [pairs.start]
        for call, sigma in enumerate(grid[:-1].tolist()):
            known = (*inner[:call], "D")
            if known not in memory:  # D of a call depends on the σ up to it alone
                if call + 1 == steps:
                    terms.append(denoise(combine(tableau.matrix[call], terms), sigma, pairs))
                    continue
                memory[known] = denoise(combine(tableau.matrix[call], terms), sigma, pairs)
            terms.append(memory[known])
        return solved_error(terms, pairs.end, tableau.matrix[-1])[0]

    def best_of(candidates: list[tuple[float, ...]]) -> tuple[float, ...]:
        falling = [inner for inner in candidates if all(a > 1.05 * b for a, b in itertools.pairwise(inner))]
        scores = []
        for i, inner in enumerate(falling):
            progress("grid", i, len(falling))
            scores.append((error(inner), inner))
        return min(scores)[1]

    if steps <= 3:
        best = best_of(list(itertools.product(*choices)))
    else:
        best = tuple(values[LEVELS // 2] for values in choices)
        for _ in range(2):
            for i in range(len(best)):
                best = best_of([(*best[:i], value, *best[i + 1 :]) for value in choices[i]] + [best])
                memory.clear()
    return torch.tensor([sigma_max, *best, 0.0])
