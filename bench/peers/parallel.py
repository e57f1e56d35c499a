"""EPD (arXiv 2507.14797): several evaluations at once inside a long step, at learned places and with learned weights.

From x at σ: d there, then at n places `Lab.between` on the straight line along `direction`·d; the network is told `told`·σ_i; the step
goes along the weighted mean of the slopes found there. Three evaluations are one step of 1 + 2; where the first d is the analytic one
(`Lab.first_slope`) they are a step of 0 + 2 and a plain one.
"""
import torch

from mteo.teacher import Trajectories

from .lab import Lab

PLACES = 2


def parameters_of(analytic: bool) -> dict[str, torch.Tensor]:
    """place: logit of r at each point; weight: logits of the weights; direction, told: logarithms; middle: of the second step's start (`Lab.middle`)."""
    own = dict(place=torch.tensor([0.0, 1.0]), weight=torch.zeros(PLACES), direction=torch.zeros(PLACES), told=torch.zeros(PLACES))
    return own | ({"middle": torch.zeros(())} if analytic else {})


def sample(lab: Lab, analytic: bool, learned: dict[str, torch.Tensor], batch: Trajectories, start: torch.Tensor) -> torch.Tensor:
    """End points of the starts."""
    x, sigma = start, torch.tensor(lab.sigma_max)
    slope = lab.first_slope(x, batch, analytic)
    low = lab.middle(learned["middle"]) if analytic else torch.tensor(0.0)
    floor = low if analytic else torch.tensor(lab.sigma_min)  # a place needs a σ above 0
    mean = 0
    for place, weight, direction, told in zip(learned["place"].sigmoid(), learned["weight"].softmax(0), learned["direction"].exp(), learned["told"].exp(), strict=True):
        at = lab.between(floor, sigma, place)
        y = x + (at - sigma) * direction * slope
        mean = mean + weight * (y - lab.denoise(y, at, batch, told * at)) / at
    x = x + (low - sigma) * mean
    return lab.denoise(x, low, batch, low) if analytic else x
