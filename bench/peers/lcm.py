"""LCM-LoRA (Luo et al. 2023, arXiv 2311.05556, after 2310.04378): low-rank updates of every layer are trained so that the answer to the prompt alone, from any
σ of the teacher's guided path, is where that path ends.

It is no peer, as it changes the weights: a bound. It takes one evaluation a step where guidance takes a pair, and draws fresh noise between its steps, so that
it is near the teacher's pictures as a set, and far from each of them.
"""
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

from mteo.comfyui.training import teacher_sigmas
from mteo.teacher import Trajectories

from .lab import Lab

RANK = 32  # of an update
LEVELS = 48  # steps of the teacher's path
HUBER = 1e-3  # where the loss (LCM eq. 14's distance) goes from square to absolute
TARGET = 0.95  # memory of the answer aimed at (LCM algorithm 1)


def layers_of(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every Linear and Conv2d of the network, by path."""
    return {path: module for path, module in network.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}


def parameters_of(network: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """{path + ".down": [RANK, inputs, …], path + ".up": [outputs, RANK]}: an update of 0."""
    generator, values = torch.Generator().manual_seed(seed), {}
    for path, module in layers_of(network).items():
        shape = (RANK, *module.weight.shape[1:])
        values[f"{path}.down"] = torch.randn(shape, generator=generator) / module.weight[0].numel() ** 0.5
        values[f"{path}.up"] = torch.zeros(module.weight.shape[0], RANK)
    return values


@contextmanager
def updated(network: torch.nn.Module, values: dict[str, torch.Tensor]):
    """Inside, each layer also puts out up · down · its input."""

    def update(path):
        down, up = values[f"{path}.down"], values[f"{path}.up"]

        def hook(module, arguments, output):
            x = arguments[0]
            if isinstance(module, torch.nn.Conv2d):
                return output + F.conv2d(F.conv2d(x, down.to(x), None, module.stride, module.padding), up.to(x)[:, :, None, None]).to(output)
            return output + F.linear(F.linear(x, down.to(x)), up.to(x)).to(output)

        return hook

    handles = [module.register_forward_hook(update(path)) for path, module in layers_of(network).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ending(lab: Lab, x: torch.Tensor, sigma: torch.Tensor, batch: Trajectories) -> torch.Tensor:
    """f(x, σ): the network's answer to the prompt alone, at σ = 0 x itself; sigma [B]."""
    alone = replace(batch, guidance=torch.ones_like(batch.guidance))
    return torch.where(each(sigma) > 0, lab.denoise(x, sigma.clamp_min(lab.sigma_min), alone), x)


def each(sigma: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, 1, 1]"""
    return sigma.view(-1, 1, 1, 1)


@torch.no_grad()
def sample(
    lab: Lab, sigmas: list[float], values: dict[str, torch.Tensor], batch: Trajectories, start: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """End points by f and fresh noise in turn on `sigmas` [K + 1], the last 0 (LCM algorithm 3)."""
    x = start
    with updated(lab.network, values):
        for high, low in zip(sigmas[:-1], sigmas[1:], strict=True):
            x = ending(lab, x, torch.full((len(x),), high), batch)
            if low > 0:
                x = lab.session.sampling.noise_scaling(torch.full((len(x),), low), torch.randn(x.shape, generator=generator), x)
    return x


def train(lab: Lab, pairs: Trajectories, budget: int, seed: int, rate: float = 1e-4, batch: int = 32, memory: float = 0.99) -> dict[str, torch.Tensor]:
    """The averaged updates after `budget` evaluations; pictures are the pairs' end points."""
    values = {name: value.requires_grad_(True) for name, value in parameters_of(lab.network, seed).items()}
    average, target = ({name: value.detach().clone() for name, value in values.items()} for _ in range(2))
    optimiser, generator, first, step = torch.optim.Adam(values.values(), lr=rate), torch.Generator().manual_seed(seed), lab.spent, 0
    levels = teacher_sigmas(lab.session, LEVELS).float()
    while (spent := lab.spent - first) < budget:
        step += 1
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, step / 10) * 0.5 * (1 + torch.cos(torch.tensor(spent / budget * torch.pi)).item())
        part = pairs.part(torch.randint(len(pairs), (batch,), generator=generator))
        level = torch.randint(LEVELS, (batch,), generator=generator)
        high, low = levels[level], levels[level + 1]
        x = lab.session.sampling.noise_scaling(high, torch.randn(part.end.shape, generator=generator), part.end)
        with torch.no_grad():
            next_x = x + each(low / high - 1) * (x - lab.denoise(x, high, part))  # one Euler step of the guided teacher (LCM eq. 13)
            with updated(lab.network, target):
                wanted = ending(lab, next_x, low, part)
        with updated(lab.network, values):
            apart = ending(lab, x, high, part) - wanted
        optimiser.zero_grad(set_to_none=True)
        ((apart.square() + HUBER**2).sqrt() - HUBER).mean().backward()
        torch.nn.utils.clip_grad_norm_(values.values(), 1.0)
        optimiser.step()
        for name, value in values.items():
            average[name].lerp_(value.detach(), max(1 - memory, 1 / step))
            target[name].lerp_(value.detach(), 1 - TARGET)
    return average
