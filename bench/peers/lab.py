"""What every peer trains and samples with: the frozen model, its evaluations counted, and a noise level to be told that is not the input's own."""
from contextlib import contextmanager

import torch

from mteo.comfyui.times import telling
from mteo.schedule import HIGHEST, ratio_of, sigma_of
from mteo.teacher import Trajectories


class Lab:
    """spent: network evaluations of pictures so far; a cfg pair is 2, a backward pass one more of each (traps 36)."""

    def __init__(self, session):
        self.session, self.spent = session, 0
        self.network = session.network
        self.sigma_max, self.sigma_min = float(session.sampling.sigma_max), float(session.sampling.sigma_min)

    def denoise(self, x: torch.Tensor, sigma, batch: Trajectories, told=None) -> torch.Tensor:
        """D(x; σ) [B, …] of a network that is told the noise level `told`: a number or [B], differentiable in x, σ and `told`."""
        self.spent += len(x) * (2 if torch.is_grad_enabled() else 1) * branches(batch)
        with telling(self.session.sampling, told):
            return self.session.denoise(x, sigma, batch.item, batch.guidance)

    def perceive(self, x: torch.Tensor, noise: torch.Tensor, batch: Trajectories) -> list[torch.Tensor]:
        """What the network's blocks make of pictures x with `noise` on them (mteo/perception.py), without guidance."""
        self.spent += len(x) * (2 if torch.is_grad_enabled() else 1)
        return self.session.perceived(x, noise, batch.item)

    @contextmanager
    def uncounted(self):
        """Inside, as in a validation, no evaluation counts as spent."""
        before = self.spent
        yield
        self.spent = before

    def first_slope(self, x: torch.Tensor, batch: Trajectories, analytic: bool) -> torch.Tensor:
        """d = (x − D)/σ at sigma_max; analytic, without an evaluation: x/√(1 + σ²), that of data of mean 0 and variance 1 under variance-exploding noise; x for
        a flow model, which starts at pure noise, where D is the mean of all pictures, 0."""
        if analytic:
            return x if self.session.flow else x / (1 + self.sigma_max**2) ** 0.5
        return (x - self.denoise(x, self.sigma_max, batch)) / self.sigma_max

    def middle(self, move: torch.Tensor, share: float = 0.5) -> torch.Tensor:
        """A learned σ: `move` = ln of its noise ÷ signal, relative to what is geometrically between the highest (share 0) and the lowest (1) one's."""
        return sigma_of(self.ratio(self.sigma_min) ** share * self.ratio(self.sigma_max) ** (1 - share) * move.exp(), self.session.flow)

    def between(self, low, high, share: torch.Tensor) -> torch.Tensor:
        """The σ whose noise ÷ signal is geometrically between those of low (share 1) and high (share 0)."""
        return sigma_of(self.ratio(low) ** share * self.ratio(high) ** (1 - share), self.session.flow)

    def ratio(self, sigma) -> torch.Tensor:
        """Noise ÷ signal at σ, where it is finite."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32)
        return ratio_of(sigma.clamp_max(sigma_of(HIGHEST, True)), True) if self.session.flow else sigma


def branches(batch: Trajectories) -> int:
    """Network evaluations that one of a picture is: a cfg pair is 2."""
    return 1 if float(batch.guidance[0]) == 1 else 2
