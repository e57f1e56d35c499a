"""How sure is a comparison of sets of pictures? Pictures are drawn anew, the same ones for every way of sampling, and each way's training seeds among its own
(traps 34)."""
from dataclasses import dataclass

import torch

from .distances import frechet


@dataclass
class Made:
    """What one way of sampling with one training seed made: features [N, F], squared error of each picture [N], pictures in the same order for all."""

    features: torch.Tensor
    squared: torch.Tensor


def largest_ratios(own: list[Made], peers: list[list[Made]], other: torch.Tensor, draws: int = 300) -> dict[str, tuple[float, float]]:
    """{"fd", "error"}: 95 % interval of the largest of the peers' ratios own ÷ peer, of the Fréchet distance to `other` [M, F] and of the root of the mean
    squared error. A list has one `Made` for each training seed; a way's value is their mean. The ratio to one peer where the list has one."""
    generator, found = torch.Generator().manual_seed(0), {"fd": [], "error": []}
    for _ in range(draws):
        index = torch.randint(len(own[0].squared), (len(own[0].squared),), generator=generator)
        measured = [means(way, index, other, generator) for way in (own, *peers)]
        for name, values in zip(found, zip(*measured, strict=True), strict=True):
            found[name].append(max(values[0] / value for value in values[1:]))
    level = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: tuple(torch.tensor(values, dtype=torch.float64).quantile(level).tolist()) for name, values in found.items()}


def ratio_above(own: list[Made], peer: list[Made], floor: Made, other: torch.Tensor, draws: int = 300) -> tuple[float, float]:
    """95 % interval of own ÷ peer, of what their Fréchet distance to `other` [M, F] is above that of `floor`; lists as for `largest_ratios`."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        index = torch.randint(len(floor.features), (len(floor.features),), generator=generator)
        distances = [means(way, index, other, generator)[0] for way in (own, peer, [floor])]
        found.append((distances[0] - distances[2]) / (distances[1] - distances[2]))
    return tuple(torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


def matched(fd: float, plain: dict[int, float]) -> int:
    """The largest number of plain evaluations that a Fréchet distance, with those of all fewer ones, is not behind; 0: none. plain: theirs."""
    return max((steps for steps in plain if all(other >= fd for fewer, other in plain.items() if fewer <= steps)), default=0)


def matched_interval(own: Made, plain: dict[int, Made], other: torch.Tensor, draws: int = 300) -> tuple[int, int]:
    """95 % interval of what `matched` says of the Fréchet distances to `other` [M, F]."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        index = torch.randint(len(own.features), (len(own.features),), generator=generator)
        found.append(matched(frechet(own.features[index], other), {steps: frechet(made.features[index], other) for steps, made in plain.items()}))
    return tuple(sorted(found)[round(share * (draws - 1))] for share in (0.025, 0.975))


def means(way: list[Made], index: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> tuple[float, float]:
    """(Fréchet distance, root of the mean squared error) of the pictures `index`, the mean of as many seeds as there are, drawn anew."""
    drawn = [way[i] for i in torch.randint(len(way), (len(way),), generator=generator)]
    distances = [frechet(made.features[index], other) for made in drawn]
    errors = [float(made.squared[index].mean().sqrt()) for made in drawn]
    return sum(distances) / len(drawn), sum(errors) / len(drawn)
