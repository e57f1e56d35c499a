"""A diffusion model whose denoiser is known in closed form: a mixture of Gaussians; and its flow, integrated to rounding."""
import torch

from mteo.tableau import Tableau, combine


class Mixture:
    """Points [B, d] of `modes` Gaussians of deviation `spread` at random places; float64."""

    def __init__(self, modes: int = 6, width: int = 2, spread: float = 0.15, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.means = torch.randn(modes, width, generator=generator, dtype=torch.float64)
        self.spread = spread

    def start(self, count: int, sigma: float, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        points = self.means[torch.randint(len(self.means), (count,), generator=generator)]
        return points + (self.spread**2 + sigma**2) ** 0.5 * torch.randn(points.shape, generator=generator, dtype=torch.float64)

    def denoise(self, x: torch.Tensor, sigma) -> torch.Tensor:
        """E[data | data + σ·noise = x]: each mode's own, by the probability that x is of it. σ a number, or a tensor that broadcasts to x[:, :1]."""
        variance = self.spread**2 + torch.as_tensor(sigma, dtype=torch.float64) ** 2
        apart = x[:, None] - self.means
        share = (-apart.square().sum(2) / (2 * variance)).softmax(1)
        return (share[..., None] * (self.means + self.spread**2 / variance[..., None] * apart)).sum(1)

    def flow(self, x: torch.Tensor, high: float, low: float, steps: int = 200) -> torch.Tensor:
        """Ψ: dx/dσ = (x − D)/σ from σ = high to low by Runge–Kutta of order 4 in ln σ; low may be 0 (1e-4 then, and the denoised)."""
        if low == 0:
            return self.denoise(self.flow(x, high, 1e-4, steps), 1e-4)
        slope = lambda y, u: y - self.denoise(y, u.exp())
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        high, low = torch.tensor(high, dtype=torch.float64).log(), torch.tensor(low, dtype=torch.float64).log()
        for u, v in zip((high + grid * (low - high))[:-1], (high + grid * (low - high))[1:], strict=True):
            h = v - u
            one = slope(x, u)
            two = slope(x + h / 2 * one, u + h / 2)
            three = slope(x + h / 2 * two, u + h / 2)
            x = x + h / 6 * (one + 2 * two + 2 * three + slope(x + h * three, v))
        return x


def exact_answers(tableau: Tableau, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """D*_k of docs/theory.md §1: what the network has to answer at every call for the solver to go through the teacher's states
    [x_T, Ψ_1, …, Ψ_K]; a solver whose call k reads what the calls before it were answered."""
    answers = []
    for row, state in zip(tableau.matrix[1:], states[1:], strict=True):
        known = combine(row[: len(answers) + 1], [states[0], *answers])
        answers.append((state - known) / row[len(answers) + 1])
    return answers
