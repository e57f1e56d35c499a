"""SFD (Zhou et al. 2024, arXiv 2409.19681): all weights are fine-tuned so that each Euler step lands on the teacher's state, from the student's own state.

It is no peer, as it changes the weights: an upper bound. Absolute error at every step, Adam, averaged weights. Its first step may be for nothing.
"""
import torch

from mteo.teacher import Trajectories

from .lab import Lab
from .training import error_of


def sample(lab: Lab, sigmas: list[float], analytic: bool, batch: Trajectories, start: torch.Tensor) -> torch.Tensor:
    """End points by Euler on `sigmas` [K + 1], [K + 2] with the first step for nothing, with the weights that the network has."""
    x = start
    for k, (high, low) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x = euler(lab, x, high, low, batch, analytic and k == 0)
    return x


def euler(lab: Lab, x, high: float, low: float, batch, analytic: bool) -> torch.Tensor:
    if analytic:
        return x + (low - high) * lab.first_slope(x, batch, True)
    return low / high * x + (1 - low / high) * lab.denoise(x, high, batch)


def train(
    lab: Lab,
    sigmas: list[float],
    pairs: Trajectories,
    held_out: Trajectories,
    budget: int,
    seed: int,
    analytic: bool = False,
    rate: float = 5e-5,
    batch: int = 32,
    memory: float = 0.99,
) -> tuple[dict, float, dict]:
    """(the averaged weights with the least held-out error, that error, the averaged weights at the end) after `budget` evaluations; pairs.states are the
    teacher's at the inner σ. The network of `lab` is trained in place: a private copy."""
    named = dict(lab.network.named_parameters())
    for value in named.values():
        value.requires_grad_(True)
    optimiser, generator, first = torch.optim.Adam(named.values(), lr=rate), torch.Generator().manual_seed(seed), lab.spent
    average = {name: value.detach().clone() for name, value in named.items()}
    held_out_error = lambda: error_of(lab, lambda _, part, start: sample(lab, sigmas, analytic, part, start), None, held_out)
    best, checks, step = (held_out_error(), {name: value.clone() for name, value in average.items()}), 1, 0
    while (spent := lab.spent - first) < budget:
        step += 1
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, step / 10) * (0.1 if spent > budget / 2 else 1.0)
        part = pairs.part(torch.randint(len(pairs), (batch,), generator=generator))
        optimiser.zero_grad(set_to_none=True)
        x = part.start
        for k, (high, low) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            x = euler(lab, x, high, low, part, analytic and k == 0)
            if analytic and k == 0:
                continue
            (x - (part.states[:, k] if k + 2 < len(sigmas) else part.end)).abs().mean().backward()
            x = x.detach()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimiser.step()
        for name, value in named.items():
            average[name].lerp_(value.detach(), max(1 - memory, 1 / step))
        if lab.spent - first >= checks * budget / 10:
            checks += 1
            now = {name: value.detach().clone() for name, value in named.items()}
            lab.network.load_state_dict(average, strict=False)
            error = held_out_error()
            print(f"[bench] SFD: held-out error {error:.4f} after {lab.spent - first:,} evaluations", flush=True)  # to see whether it still falls
            lab.network.load_state_dict(now, strict=False)
            if error < best[0]:
                best = error, {name: value.clone() for name, value in average.items()}
    for value in named.values():
        value.requires_grad_(False)
    return best[1], best[0], average
