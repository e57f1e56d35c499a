"""The plain model's best few steps: which σ its calls are told and what the solver's coefficients are, with no offset at all.

It is where a table with grid "free" starts from; a rival that a table has to beat goes on from there (bench/rival.py).
"""
import itertools
import math
from collections.abc import Sequence

import torch

from .coefficients import APART, multistep_matrix
from .distill import ridge
from .schedule import karras, ratio_of, sigma_of
from .tableau import Tableau, combine, euler_tableau, started_at, with_matrix
from .teacher import Trajectories

LEVELS, ROUNDS = 12, 3  # σ that each call may be told; how often each is looked for, at most
SHIFT = 4  # levels that all of them are moved together, at most
SPREAD = 4.0  # they span the reference grid's noise ÷ signal ÷ SPREAD … × SPREAD
TOP, BOTTOM = 20.0, 0.1  # noise ÷ signal at the ends of the reference grid, at most; where the start is below 1, the lower end is that share of it
SEARCHED = 64  # pairs that a search looks at
KEPT = 64  # calls that are remembered


def no_progress(stage: str, done: int, total: int, **facts) -> None:
    """What `progress` is: called at every chunk, trial and step; may raise to cancel. part=(i, n): the stage is of cfg value i of n.
    A validation of the training brings facts: iteration, loss, held_out (pooled), mean, median, unlike, best, picture."""


def levels(steps: int, sigma_max: float, flow: bool = False) -> list[list[float]]:
    """LEVELS values for each inner step, geometric in noise ÷ signal around a Karras-like grid of ρ = 2 (between sgm_uniform and Karras)."""
    start = ratio_of(min(sigma_max, sigma_of(1.0, flow)), flow)  # at most 1
    ends = sigma_of(BOTTOM * start, flow), min(sigma_of(TOP, flow), sigma_max)
    reference = ratio_of(karras(steps + 1, *ends, rho=2.0, flow=flow)[1:-2], flow).tolist()
    ramp = torch.linspace(-1, 1, LEVELS, dtype=torch.float64)
    return [[min(float(sigma_of(ratio * SPREAD**r, flow)), sigma_of(0.95 * ratio_of(ends[1], flow), flow)) for r in ramp] for ratio in reference]


def multistep_tableau(grid: torch.Tensor) -> Tableau:
    """DPM++ 2M on `grid` [K + 1], the last σ 0."""
    return with_matrix(euler_tableau(grid), multistep_matrix(grid[:-1].double(), float(grid[0])))


class Plain:
    """Calls of the plain model on the same pairs, each made once; denoise(x, call, sigma, pairs) -> D."""

    def __init__(self, denoise, pairs: Trajectories):
        self.denoise, self.pairs, self.known = denoise, pairs, {}
        self.mean = pairs.end.mean((0, *range(2, pairs.end.dim()))).float().cpu()  # [C]

    def terms(self, tableau: Tableau) -> list[torch.Tensor]:
        """[x_T, D_0, …]; all calls but the last are remembered."""
        terms, past = [tableau.begun(self.pairs.start)], (tableau.mean is None,)
        for call, sigma in enumerate(tableau.sigmas.tolist()):
            past = (*past, round(sigma, 7), *(round(value, 9) for value in tableau.matrix[call].tolist()))
            denoised = self.known.get(past)
            if denoised is None:
                denoised = self.denoise(combine(tableau.matrix[call], terms), call, sigma, self.pairs)
                if call + 1 < len(tableau.sigmas):
                    self.known[past] = denoised.cpu()  # beside the network a card need not hold them
                    if len(self.known) > KEPT:
                        del self.known[next(iter(self.known))]
            terms.append(denoised.to(self.pairs.start.device))
        return terms

    def solved(self, tableau: Tableau) -> tuple[torch.Tensor, Tableau]:
        """(RMSE of each picture with the best last row, the tableau with it); float64 least squares."""
        columns = torch.stack([term.flatten().cpu().double() for term in self.terms(tableau)], 1)
        target = self.pairs.end.flatten().cpu().double()
        matrix = tableau.matrix.clone()
        matrix[-1] = ridge(columns.T @ columns, columns.T @ target, matrix[-1])
        return (columns @ matrix[-1] - target).view(len(self.pairs), -1).square().mean(1).sqrt(), with_matrix(tableau, matrix)


def student_start(sigma_max: float, told: Sequence[float], mean: torch.Tensor | None = None) -> Tableau:
    """DPM++ 2M from x_T at sigma_max, its calls at the σ `told` [K]; the step to the first of them is for nothing and takes `mean` [C] for the denoised."""
    return started_at(multistep_tableau(torch.tensor([*told, 0.0], dtype=torch.float64)), sigma_max, mean)


def search_grid(
    plains: list[Plain], steps: int, sigma_max: float, flow: bool = False, progress=no_progress, analytic: bool = True, rough: bool = False
) -> list[Tableau]:
    """The best σ to tell, out of LEVELS for each call: all moved together, then one at a time, until that finds nothing better; `rough`: one round of it, as
    they are learned on later. The first may also be sigma_max, and is unless `analytic`. By the mean error of a picture, as the training; a few hard ones would
    lead astray. Several plains, one for each cfg value, get one grid: the one with the least product of their errors, so that a cfg with large
    errors does not decide alone. Last rows solved, for each plain its own."""
    choices = levels(steps + 1, sigma_max, flow) if analytic else [[], *levels(steps, sigma_max, flow)]
    choices[0].append(sigma_max)
    known: dict[tuple[float, ...], float] = {}
    solved = lambda plain, sigmas: plain.solved(student_start(sigma_max, sigmas, plain.mean if analytic else None))
    told = lambda place: tuple(values[i] for values, i in zip(choices, place, strict=True))

    def score(place: tuple[int, ...]) -> float:
        sigmas = told(place)
        if sigmas not in known:
            known[sigmas] = math.prod(float(solved(plain, sigmas)[0].mean()) for plain in plains)
        return known[sigmas]

    def allowed(place: tuple[int, ...]) -> bool:
        inside = all(0 <= i < len(values) for i, values in zip(place, choices, strict=True))
        return inside and all(a > sigma_of(APART * ratio_of(b, flow), flow) for a, b in itertools.pairwise(told(place)))

    best = tuple(len(values) // 2 for values in choices)
    moves = [tuple(int(len(values) > 1) for values in choices), *(tuple(int(i == call) for i in range(steps)) for call in range(steps))]
    rounds = 1 if rough else ROUNDS
    for turn in range(rounds):
        before = best
        for number, move in enumerate(moves):
            progress("grid", turn * len(moves) + number, rounds * len(moves))
            reach = SHIFT if number == 0 else LEVELS
            places = (tuple(i + far * by for i, by in zip(best, move, strict=True)) for far in range(-reach, reach + 1))
            best = min(filter(allowed, places), key=score)
        if best == before:
            break
    progress("grid", 1, 1)
    return [solved(plain, told(best))[1] for plain in plains]
