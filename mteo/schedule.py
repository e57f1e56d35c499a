"""Grids of σ: the teacher's fine grid and where a student's steps lie in it. Named grids are ComfyUI's own."""
from collections.abc import Sequence

import torch

from .errors import MTEOError

SAME_SIGMA = 1e-4  # relative distance under which two σ are one: samplers differ by float32 rounding
HIGHEST = 80.0  # noise ÷ signal to which the first step of a flow model goes, from pure noise: Karras' sigma_max


def ratio_of(sigma, flow: bool):
    """Noise ÷ signal at σ, by which levels of different models compare: σ itself, or σ/(1 − σ) where x = (1 − σ)·picture + σ·noise (flow)."""
    return sigma / (1 - sigma) if flow else sigma


def sigma_of(ratio, flow: bool):
    """The σ of a ratio of noise to signal."""
    return ratio / (1 + ratio) if flow else ratio


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0, flow: bool = False) -> torch.Tensor:
    """[steps + 1] σ from sigma_max to sigma_min and 0 (Karras et al. 2022, eq. 5), even in ρ-th roots of noise ÷ signal."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = (ratio_of(min(sigma, sigma_of(HIGHEST, True)) if flow else sigma, flow) ** (1 / rho) for sigma in (sigma_min, sigma_max))
    grid = torch.cat([sigma_of((high + ramp * (low - high)) ** rho, flow), torch.zeros(1, dtype=torch.float64)])
    grid[0] = sigma_max
    return grid.float()


def refined(student: torch.Tensor, fine: torch.Tensor, flow: bool = False) -> torch.Tensor:
    """The grid `fine` [n + 1] with every σ of the student's in it (so that the teacher passes through its states); both start at one σ and end at 0.

    Points of it closer than 5 % (of noise ÷ signal) to one of the student's give way to it.
    """
    own, fine = student[student > 0].unique(), fine[:-1]  # two calls of a step may be at one σ
    apart = ((ratio_of(fine[:, None], flow) / ratio_of(own[None], flow) - 1).abs() > 0.05).all(1)  # the first of both are one: ∞/∞ is not apart
    return torch.cat([torch.cat([fine[apart], own]).sort(descending=True).values, torch.zeros(1)])


def require_schedule(own: Sequence[float], asked: Sequence[float]) -> None:
    """MTEOError unless `asked` is the schedule `own` of a table from its start on (it may stop early); a later start is another solver and needs rows of its
    own [4]."""
    close = lambda part: len(asked) == len(part) >= 2 and all(abs(a - b) <= SAME_SIGMA * max(b, 1e-3) for a, b in zip(asked, part, strict=True))
    if close(own[: len(asked)]):
        return
    show = lambda values: "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
    starts = [i for i in range(1, len(own) - 1) if close(own[i : i + len(asked)])]
    if starts:
        raise MTEOError(
            f"This table was not trained for a start at step {starts[0]}: sample from step 0, or for image to image distil a table with denoise below 1."
        )
    raise MTEOError(
        f"The schedule {show(asked)} is not the one this table was trained for, {show(own)}: connect the SIGMAS output of Apply MTEO to "
        "the sampler, or for another pass with a sampler of its own give it the model from before Apply MTEO."
    )
