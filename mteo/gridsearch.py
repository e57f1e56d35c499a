"""The plain model's best few steps: where the inner σ lie and what the solver's coefficients are, with no offset at all.

It is where a table with grid "free" starts from, and the honest rival that a table has to beat.
"""
import itertools
import math

import torch
from scipy.optimize import minimize

from .distill import ridge
from .schedule import karras, ratio_of, sigma_of
from .tableau import Tableau, combine, euler_tableau, with_matrix
from .teacher import Trajectories

LEVELS = 12  # σ that each inner step may take
SPREAD = 4.0  # they span the reference grid's noise ÷ signal ÷ SPREAD … × SPREAD
TOP, BOTTOM = 20.0, 0.1  # noise ÷ signal at the ends of the reference grid, at most and at least
LOWEST = 0.03  # no inner σ below this


def no_progress(stage: str, done: int, total: int, **facts) -> None:
    """What `progress` is: called at every chunk, trial and step; may raise to cancel. part=(i, n): the stage is of cfg value i of n.
    A validation of the training brings facts: iteration, loss, held_out, best, picture."""


def levels(steps: int, sigma_max: float, flow: bool = False) -> list[list[float]]:
    """LEVELS values for each inner step, geometric in noise ÷ signal around a Karras-like grid of ρ = 2 (between sgm_uniform and Karras)."""
    ends = sigma_of(BOTTOM, flow), min(sigma_of(TOP, flow), sigma_max)
    reference = ratio_of(karras(steps + 1, *ends, rho=2.0, flow=flow)[1:-2], flow).tolist()
    ramp = torch.linspace(-1, 1, LEVELS, dtype=torch.float64)
    return [[min(float(sigma_of(ratio * SPREAD**r, flow)), sigma_of(0.95 * ratio_of(ends[1], flow), flow)) for r in ramp] for ratio in reference]


def multistep_row(rows, units: torch.Tensor, sigma, k: int) -> torch.Tensor:
    """The row after call k of second-order multistep on denoised in λ = −ln σ between the inner σ (DPM++ 2M, Lu et al. 2022, algorithm 2), Euler first
    and to 0; rows 0 … k are those before, units [·, N] one for each of x_T, D_0 … Differentiable in rows and σ."""
    ratio, denoised = sigma[k + 1] / sigma[k], units[k + 1]
    if 0 < k < len(sigma) - 2:
        over = (sigma[k] / sigma[k + 1]).log() / (sigma[k - 1] / sigma[k]).log() / 2  # 1/(2r)
        denoised = (1 + over) * units[k + 1] - over * units[k]
    return ratio * rows[k] + (1 - ratio) * denoised


def multistep_tableau(grid: torch.Tensor) -> Tableau:
    """DPM++ 2M on `grid` [K + 1], the last σ 0."""
    sigma, units = grid.double(), torch.eye(len(grid), dtype=torch.float64)
    rows = [units[0]]
    for k in range(len(grid) - 1):
        rows.append(multistep_row(rows, units, sigma, k))
    return with_matrix(euler_tableau(grid), torch.stack(rows))


class Plain:
    """Calls of the plain model on the same pairs, each made once; denoise(x, call, sigma, pairs) -> D."""

    def __init__(self, denoise, pairs: Trajectories):
        self.denoise, self.pairs, self.known = denoise, pairs, {}

    def terms(self, tableau: Tableau) -> list[torch.Tensor]:
        """[x_T, D_0, …]; all calls but the last are remembered."""
        terms, past = [self.pairs.start], ()
        for call, sigma in enumerate(tableau.sigmas.tolist()):
            past = (*past, round(sigma, 7), *(round(value, 9) for value in tableau.matrix[call].tolist()))
            denoised = self.known.get(past)
            if denoised is None:
                denoised = self.denoise(combine(tableau.matrix[call], terms), call, sigma, self.pairs)
                if call + 1 < len(tableau.sigmas) and len(self.known) < 64:
                    self.known[past] = denoised
            terms.append(denoised)
        return terms

    def solved(self, tableau: Tableau) -> tuple[float, Tableau]:
        """(RMSE with the best last row, the tableau with it); float64 least squares."""
        columns = torch.stack([term.flatten().double().cpu() for term in self.terms(tableau)], 1)
        target = self.pairs.end.flatten().double().cpu()
        matrix = tableau.matrix.clone()
        matrix[-1] = ridge(columns.T @ columns, columns.T @ target, matrix[-1])
        return float((columns @ matrix[-1] - target).square().mean().sqrt()), with_matrix(tableau, matrix)


def search_grid(plains: list[Plain], steps: int, sigma_max: float, flow: bool = False, progress=no_progress) -> list[Tableau]:
    """The best of LEVELS × LEVELS inner σ for three steps, two rounds of one σ at a time for more. Several plains, one for each cfg value, get one grid: the one with the least
    product of their errors, so that a cfg with large errors does not decide alone. Last rows solved, for each plain its own."""
    choices = levels(steps, sigma_max, flow)

    def best_of(candidates: list[tuple[float, ...]]) -> tuple[float, ...]:
        falling = [inner for inner in candidates if all(ratio_of(a, flow) > 1.05 * ratio_of(b, flow) for a, b in itertools.pairwise(inner))]
        scores = []
        for i, inner in enumerate(falling):
            progress("grid", i, len(falling))
            scores.append((math.prod(plain.solved(multistep_tableau(torch.tensor([sigma_max, *inner, 0.0])))[0] for plain in plains), inner))
        return min(scores)[1]

    if steps <= 3:
        best = best_of(list(itertools.product(*choices)))
    else:
        best = tuple(values[LEVELS // 2] for values in choices)
        for _ in range(2):
            for i in range(len(best)):
                best = best_of([(*best[:i], value, *best[i + 1 :]) for value in choices[i]] + [best])
    return [plain.solved(multistep_tableau(torch.tensor([sigma_max, *best, 0.0])))[1] for plain in plains]


def refine(plain: Plain, start: Tableau, trials: int, flow: bool = False, progress=no_progress, keep_sigmas: bool = False) -> Tableau:
    """Inner σ (unless kept) and all inner coefficients by Nelder–Mead from `start`, the last row solved at each of `trials` trials."""
    calls, sigma_max = len(start.sigmas), float(start.sigmas[0])
    moved = 0 if keep_sigmas else calls - 1
    places = [(row, column) for row in range(1, calls) for column in range(row + 1)]
    done = itertools.count()

    def tableau_of(change) -> Tableau:
        steps = change[:moved] if moved else [0.0] * (calls - 1)
        inner = [float(sigma_of(ratio_of(sigma, flow) * 2.0**step, flow)) for sigma, step in zip(start.sigmas[1:].tolist(), steps, strict=True)]
        tableau = multistep_tableau(torch.tensor([sigma_max, *inner, 0.0], dtype=torch.float64))
        matrix = tableau.matrix.clone()
        for (row, column), value in zip(places, change[moved:], strict=True):
            matrix[row, column] += value / (sigma_max if column == 0 else 1.0)
        matrix[-1] = start.matrix[-1]
        return with_matrix(tableau, matrix)

    def error(change) -> float:
        progress("solver's rows", min(next(done), trials), trials)
        tableau = tableau_of(change)
        falling = [*tableau.sigmas.tolist(), LOWEST]
        if not all(a > b for a, b in itertools.pairwise(falling)):
            return 1e3
        return plain.solved(tableau)[0]

    size = moved + len(places)
    simplex = [[0.0] * size] + [[0.2 * (i == j) for j in range(size)] for i in range(size)]
    found = minimize(error, simplex[0], method="Nelder-Mead", options=dict(maxfev=trials, initial_simplex=simplex, xatol=1e-3, fatol=1e-5))
    return plain.solved(tableau_of(found.x))[1]
