"""GITS (Chen et al. 2024, arXiv 2405.11326): the grid is a shortest path over the teacher's fine one, then iPNDM runs on it.

The cost of going from σ_i to σ_j: how much further from the straight line between start and end one Euler step from the teacher's state at σ_i lands
than the teacher's state at σ_j lies. The cost of each later step counts `weight` times more.
"""
import torch

from mteo.comfyui.training import teacher_sigmas, teacher_tableau
from mteo.teacher import Trajectories, follow

from .lab import Lab

FINE, WEIGHT = 40, 1.15  # steps of the teacher; the paper's coefficient


@torch.no_grad()
def find_grid(lab: Lab, pairs: Trajectories, steps: int, weight: float = WEIGHT) -> list[float]:
    """[steps + 1] σ, the last 0."""
    sigmas = teacher_sigmas(lab.session, FINE)
    tableau = teacher_tableau(lab.session, sigmas)
    answers = []

    def denoise(x, call, sigma):
        answers.append(lab.denoise(x, sigma, pairs))
        return answers[-1]

    inner, end = follow(tableau, denoise, pairs.start, sigmas)
    return shortest_path(costs([pairs.start, *inner.unbind(1), end], answers, sigmas.tolist()), sigmas.tolist(), steps, weight)


def costs(states: list[torch.Tensor], denoised: list[torch.Tensor], sigmas: list[float]) -> torch.Tensor:
    """[i, j]: the cost of one step; infinite where j ≤ i."""
    table = torch.full((len(sigmas), len(sigmas)), torch.inf, dtype=torch.float64)
    chord = torch.nn.functional.normalize((states[-1] - states[0]).double().flatten(1), dim=1)

    def aside(x):
        """Mean distance from the line through the end along the chord."""
        away = (states[-1] - x).double().flatten(1)
        return (away - (away * chord).sum(1, keepdim=True) * chord).norm(dim=1).mean()

    teacher = [aside(state) for state in states]
    for i, (x, answer, sigma) in enumerate(zip(states, denoised, sigmas, strict=False)):
        for j in range(i + 1, len(sigmas)):
            ratio = sigmas[j] / sigma
            table[i, j] = aside(ratio * x + (1 - ratio) * answer) - teacher[j]
    return table


def shortest_path(cost: torch.Tensor, sigmas: list[float], steps: int, weight: float) -> list[float]:
    """Dynamic programming from the end: V_1[i] = cost[i, end], V_k[i] = min_j cost[i, j] + weight · V_{k−1}[j]."""
    value, after = cost[:, -1], []
    for _ in range(steps - 1):
        value, where = (cost[:, :-1] + weight * value[:-1]).min(1)
        after.append(where)
    path = [0]
    for where in reversed(after):
        path.append(int(where[path[-1]]))
    return [*(sigmas[i] for i in path), sigmas[-1]]
