"""Peers that leave the network as it is and learn numbers about it: where σ lie, the solver's coefficients, the σ that the network is told.

All are one table of coefficients trained end to end; they differ by what is free, from which solver they start, and the loss.
LD3 (arXiv 2405.15506), GS (2510.17699), S4S-Alt (2502.17423), DyWeight.
"""
from dataclasses import dataclass, field

import torch

from mteo.coefficients import multistep_row
from mteo.schedule import ratio_of, sigma_of
from mteo.tableau import combine
from mteo.teacher import Trajectories

from .lab import Lab


@dataclass(frozen=True)
class Freedom:
    """grid: inner σ. told: the σ that the network is told at each call. rows: "solver" = of the base solver on the grid, "added" = a correction of each
    coefficient of x_T and D (GS), "weights" = free weights of all slopes so far (DyWeight). analytic: the first step of the grid takes D = 0 in place of an
    evaluation, and the first call's σ is free with the others. training: what `fit` is told."""

    base: str
    rows: str = "solver"
    grid: bool = True
    told: bool = False
    analytic: bool = False
    training: dict = field(default_factory=dict)


PEERS = {
    "LD3": Freedom("dpmpp_2m", told=True, training=dict(ball=0.02)),
    "GS": Freedom("dpmpp_2m", rows="added", told=True, training=dict(loss="absolute")),
    "S4S-Alt": Freedom("dpmpp_2m", rows="added", training=dict(ball=0.02, turns=[{"rows"}, {"grid"}])),
    "DyWeight": Freedom("ipndm", rows="weights", grid=False, told=True),
}


def parameters_of(freedom: Freedom, sigmas: list[float]) -> dict[str, torch.Tensor]:
    """What is learned, at zero: the base solver on `sigmas`, [K + 1] for K calls, analytic [K + 2], the last 0."""
    steps = len(sigmas) - 1 - freedom.analytic
    zero = {"grid": torch.zeros(steps - (not freedom.analytic)), "rows": torch.zeros(steps, steps + 1), "told": torch.zeros(steps)}
    return {name: zero[name] for name, free in (("grid", freedom.grid), ("rows", freedom.rows != "solver"), ("told", freedom.told)) if free}


def table_of(freedom: Freedom, learned: dict[str, torch.Tensor], sigmas: list[float], flow: bool = False) -> tuple[list, list[torch.Tensor], list]:
    """(σ of each call, row of each call and of the result [K + 1] over x_T, D_0 … D_{K−1}, σ told: also of a free σ, as the model rounds its own),
    differentiable in `learned`."""
    steps = len(sigmas) - 1 - freedom.analytic
    top, *rest = (torch.tensor(sigma, dtype=torch.float64) for sigma in sigmas)
    if "grid" in learned:
        rest[:-1] = [sigma_of(ratio_of(sigma, flow) * move.double().exp(), flow) for sigma, move in zip(rest[:-1], learned["grid"], strict=True)]
    grid = rest if freedom.analytic else [top, *rest]
    unit = torch.eye(steps + 1, dtype=torch.float64)
    rows, slopes = [unit[0] * grid[0] / top], []
    for k in range(steps):
        slopes.append((rows[k] - unit[1 + k]) / grid[k])  # d_k = (x_k − D_k)/σ_k as a row
        if freedom.rows == "weights":
            weights = slope_weights(k, steps) + learned["rows"][k, : k + 1].double()
            row = rows[k] + (grid[k + 1] - grid[k]) * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
        elif freedom.base == "ipndm":
            row = rows[k] + (grid[k + 1] - grid[k]) * sum(weight * slope for weight, slope in zip(slope_weights(k, steps), slopes, strict=True))
        else:
            row = multistep_row(rows, unit, grid, k)
        if freedom.rows == "added":
            size = torch.ones(steps + 1, dtype=torch.float64)
            size[0] = 1 / top  # x_T is that much larger than a D
            size[k + 2 :] = 0
            row = row + learned["rows"][k].double() * size
        rows.append(row)
    told = [sigma * learned["told"][k].double().exp() if "told" in learned else sigma if "grid" in learned else None for k, sigma in enumerate(grid[:-1])]
    return grid[:-1], rows, told


def slope_weights(k: int, steps: int) -> torch.Tensor:
    """Weights of d_0 … d_k as ComfyUI's iPNDM takes them (Zhang & Chen 2022): Adams–Bashforth of order k + 1, at most 4; Euler at the end."""
    known = [[1.0], [-1 / 2, 3 / 2], [5 / 12, -16 / 12, 23 / 12], [-9 / 24, 37 / 24, -59 / 24, 55 / 24]][min(k, 3) if k < steps - 1 else 0]
    return torch.tensor([0.0] * (k + 1 - len(known)) + known, dtype=torch.float64)


def sample(lab: Lab, freedom: Freedom, sigmas: list[float], learned: dict[str, torch.Tensor], batch: Trajectories, start: torch.Tensor) -> torch.Tensor:
    """End points of the starts."""
    grid, rows, told = table_of(freedom, learned, sigmas, lab.session.flow)
    terms = [start]
    for sigma, row, said in zip(grid, rows, told, strict=False):
        terms.append(lab.denoise(combine(row, terms), sigma.float(), batch, said))
    return combine(rows[-1], terms)
