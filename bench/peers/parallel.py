"""EPD (arXiv 2507.14797): several evaluations at once inside a long step, at learned places and with learned weights.

From x at σ: d there, then at n places `Lab.between` on the straight line along `direction`·d; the network is told `told`·σ_i; the step
goes along the weighted mean of the slopes found there. Three evaluations are one step of 1 + 2; where the first d is the analytic one
(`Lab.first_slope`) they are a step of 0 + 2 and a plain one; other numbers are divided as `places_of` says.
"""
import torch

from mteo.teacher import Trajectories

from .lab import Lab

PLACES = 2
SHIFTS = (0.0, -1.5, -3.0)  # of the places' logits at the start: the nearer all lie to where their step begins, the less a long one goes astray at first


def places_of(evaluations: int, analytic: bool) -> list[int]:
    """Of each step the places beside its own evaluation, as many as there may be; 0: a plain step. An analytic first step has none of its own."""
    places, left = ([PLACES], evaluations - PLACES) if analytic else ([], evaluations)
    while left:
        places.append(min(left - 1, PLACES))
        left -= places[-1] + 1
    return places


def parameters_of(evaluations: int, analytic: bool, shift: float = 0.0) -> dict[str, torch.Tensor]:
    """Of all places in turn: place: logit of r, at first `shift` and one more for the second of a step; weight: logits of a step's weights; direction, told:
    logarithms. middle: of each later step's start (`Lab.middle`)."""
    places = places_of(evaluations, analytic)
    zeros = lambda: torch.zeros(sum(places))
    return dict(place=shift + torch.cat([torch.arange(0.0, count) for count in places]), weight=zeros(), direction=zeros(), told=zeros()) | (
        {"middle": torch.zeros(len(places) - 1)} if len(places) > 1 else {}
    )


def sample(lab: Lab, evaluations: int, analytic: bool, learned: dict[str, torch.Tensor], batch: Trajectories, start: torch.Tensor) -> torch.Tensor:
    """End points of the starts."""
    places = places_of(evaluations, analytic)
    x, low, numbers = start, torch.tensor(lab.sigma_max), {name: learned[name].split(places) for name in ("place", "weight", "direction", "told")}
    for number, count in enumerate(places):
        first, last = number == 0, number + 1 == len(places)
        high, low = low, torch.tensor(0.0) if last else lab.middle(learned["middle"].view(-1)[number], (number + 1) / len(places))
        slope = lab.first_slope(x, batch, analytic) if first else (x - lab.denoise(x, high, batch, high)) / high
        if not count:
            x = x + (low - high) * slope
            continue
        floor = torch.tensor(lab.sigma_min) if last else low  # a place needs a σ above 0
        mean = 0
        for place, weight, direction, told in zip(
            numbers["place"][number].sigmoid(),
            numbers["weight"][number].softmax(0),
            numbers["direction"][number].exp(),
            numbers["told"][number].exp(),
            strict=True,
        ):
            at = lab.between(floor, high, place)
            y = x + (at - high) * direction * slope
            mean = mean + weight * (y - lab.denoise(y, at, batch, told * at)) / at
        x = x + (low - high) * mean
    return x
