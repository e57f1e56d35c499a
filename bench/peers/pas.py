"""PAS (Wang et al., ICML 2025): the slope of each step is corrected along the few directions that a trajectory has: itself, the start, the slopes so far.

All of a picture's own lie in their span, so they are made orthonormal one after another (with three steps this is the span of the paper's four principal
components); the coordinates, in units of the slope's length, are shared by all pictures.
"""
import torch

from mteo.teacher import Trajectories

from .lab import Lab


def parameters_of(steps: int) -> dict[str, torch.Tensor]:
    """[step, direction]: what is added to the slope's own coordinates (1, 0, 0, …)."""
    return {"coordinates": torch.zeros(steps, steps + 1)}


def sample(lab: Lab, sigmas: list[float], learned: dict[str, torch.Tensor], batch: Trajectories, start: torch.Tensor) -> torch.Tensor:
    """End points of the starts by Euler on `sigmas` [K + 1]."""
    x, known = start, [start.flatten(1)]
    for k, (high, low) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        slope = ((x - lab.denoise(x, high, batch)) / high).flatten(1)
        axes = orthonormal([slope, *known])
        length = slope.norm(dim=1, keepdim=True)
        corrected = slope + length * sum(move * axis for move, axis in zip(learned["coordinates"][k], axes, strict=False))
        known.append(slope)
        x = x + (low - high) * corrected.view_as(x)
    return x


def orthonormal(vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gram–Schmidt of each picture's vectors [B, numbers], in order."""
    axes = []
    for vector in vectors:
        for axis in axes:
            vector = vector - (vector * axis).sum(1, keepdim=True) * axis
        axes.append(vector / vector.norm(dim=1, keepdim=True).clamp_min(1e-6))
    return axes
