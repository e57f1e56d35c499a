"""What is learned of the solver beside the offsets: its coefficients, and with four to seven steps the σ that its calls are told."""
from dataclasses import replace

import torch

from .recipe import FREE, Recipe
from .schedule import HIGHEST, ratio_of, sigma_of
from .tableau import Tableau, with_matrix

ROWS = "solver.rows"  # the correction of the solver's rows, among the learned numbers
SIGMAS = "solver.sigmas"  # the moves of its σ
SOLVERS = (ROWS, SIGMAS)
ROW_UNIT = 0.3  # a correction of 1 is this much on a coefficient of D; on x_T it is this ÷ σ_0, as x_T is σ_0 times larger
SIGMA_UNIT = 10.0  # a move of 1 is this ÷ calls of ln(noise ÷ signal): the more they are, the nearer they lie
APART = 1.05  # noise ÷ signal of a call ÷ that of the next, at least
QUICK = 3  # times the rate of the offsets, for rows whose σ are learned
MOVED = range(4, 8)  # steps: the σ that the search finds for fewer cannot be bettered so, and for more not in the time of a training (docs/ablations.md)


def moves_sigmas(recipe: Recipe, calls: int) -> bool:
    """Whether the recipe learns the σ of a solver of so many calls: where it searches for them and the rows may follow; not step by step (stage A), as the
    teacher's states are those at the σ that were found."""
    return recipe.grid == FREE and recipe.rows == "all" and recipe.sequential == 0 and calls == recipe.steps and calls in MOVED


def learned_of(recipe: Recipe, tableau: Tableau) -> dict[str, torch.Tensor]:
    """Zeros for what the recipe learns of the solver, on the processor, as the solver is: ROWS [M, N + 1] of its last M rows, SIGMAS [N]."""
    calls = len(tableau.sigmas)
    rows = {} if recipe.rows == "solver" else {ROWS: torch.zeros(calls if recipe.rows == "all" else 1, calls + 1)}
    return rows | ({SIGMAS: torch.zeros(calls)} if moves_sigmas(recipe, calls) else {})


def row_units(tableau: Tableau, rows: int) -> torch.Tensor:
    """[rows, N + 1]: what a correction of 1 is on the solver's last `rows` rows; 0 where a row knows nothing yet: the x of call j knows x_T and D_0 …
    D_{j−1}."""
    calls = len(tableau.sigmas)
    unit = torch.full((calls, calls + 1), ROW_UNIT).tril(1)
    unit[:, 0] /= float(tableau.start_sigma.detach())
    return unit[-rows:]


def corrected(tableau: Tableau, learned: dict[str, torch.Tensor], flow: bool = False) -> Tableau:
    """The solver with what `learned` has of it; differentiable. flow: what noise ÷ signal is at σ."""
    if SIGMAS in learned:
        tableau = moved(tableau, learned[SIGMAS], flow)
    if ROWS not in learned:
        return tableau
    correction, rows = learned[ROWS], len(learned[ROWS])
    matrix = tableau.matrix
    return with_matrix(tableau, torch.cat([matrix[:-rows], matrix[-rows:] + (correction * row_units(tableau, rows).to(correction)).double()]))


def moved(tableau: Tableau, moves: torch.Tensor, flow: bool) -> Tableau:
    """The solver with its calls told other σ: `moves` [N] of ln(noise ÷ signal) in SIGMA_UNIT ÷ N, each APART below the one before. The rows change by what
    those of DPM++ 2M would. For one call in each row; a first call at the σ of x_T stays there."""
    start, old, sigmas = float(tableau.start_sigma), tableau.sigmas.double(), []
    above = ratio_of(tableau.start_sigma.double(), flow).clamp_max(HIGHEST)
    for sigma, move in zip(old, SIGMA_UNIT / len(old) * moves.double().cpu(), strict=True):
        if sigmas or sigma < 0.999 * start:
            above = torch.minimum(ratio_of(sigma, flow) * move.exp(), above / APART)
            sigma = sigma_of(above, flow)
        sigmas.append(sigma)
    sigma = torch.stack(sigmas)
    matrix = tableau.matrix + multistep_matrix(sigma, start) - multistep_matrix(old, start)
    return replace(with_matrix(tableau, matrix), sigmas=sigma, row_sigmas=sigma)


def multistep_row(rows, units: torch.Tensor, sigma, k: int) -> torch.Tensor:
    """The row after call k of second-order multistep on denoised in λ = −ln σ between the inner σ (DPM++ 2M, Lu et al. 2022, algorithm 2), Euler first
    and to 0; rows 0 … k are those before, units [·, N] one for each of x_T, D_0 … Differentiable in rows and σ."""
    ratio, denoised = sigma[k + 1] / sigma[k], units[k + 1]
    if 0 < k < len(sigma) - 2:
        over = (sigma[k] / sigma[k + 1]).log() / (sigma[k - 1] / sigma[k]).log() / 2  # 1/(2r)
        denoised = (1 + over) * units[k + 1] - over * units[k]
    return ratio * rows[k] + (1 - ratio) * denoised


def multistep_matrix(sigma: torch.Tensor, start: float) -> torch.Tensor:
    """[N + 1, N + 1] of DPM++ 2M, its calls told `sigma` [N], float64, from x_T at σ `start`, the step to the first call with D = 0; differentiable."""
    grid, units = torch.cat([sigma, sigma.new_zeros(1)]), torch.eye(len(sigma) + 1, dtype=torch.float64)
    rows = [units[0] * sigma[0] / start]
    for k in range(len(sigma)):
        rows.append(multistep_row(rows, units, grid, k))
    return torch.stack(rows)
