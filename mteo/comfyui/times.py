"""The time that a model reads at a σ, where gradients have to reach the σ or the network is told another one."""
from contextlib import contextmanager

import torch
from comfy.model_sampling import ModelSamplingDiscrete


def is_discrete(sampling) -> bool:
    """Whether the time is the number of the nearest of the model's steps; else it is a function of σ (flow, EDM)."""
    return type(sampling).timestep is ModelSamplingDiscrete.timestep


def time_of(sampling, sigma: torch.Tensor) -> torch.Tensor:
    """timestep(σ), between the model's discrete steps too and differentiable: linear in ln σ, as its own inverse `sigma(t)` is."""
    if not is_discrete(sampling):
        return sampling.timestep(sigma)
    grid, at = sampling.log_sigmas, sigma.to(sampling.log_sigmas).log()
    low = (torch.searchsorted(grid, at.detach()) - 1).clamp(0, len(grid) - 2)
    return (low + (at - grid[low]) / (grid[low + 1] - grid[low])).clamp(0, len(grid) - 1)


@contextmanager
def telling(sampling, told):
    """Inside, the network reads the time of the noise level `told`; None = of the σ that it is called with."""
    if told is None:
        yield
        return
    time = time_of(sampling, torch.as_tensor(told))
    with reading(sampling, lambda sigma: time.to(sigma).expand(len(sigma)) if time.dim() == 0 else time.to(sigma).repeat(len(sigma) // len(time))):
        yield


@contextmanager
def following(sampling, sigma):
    """Inside, the time that the network reads is the model's own at σ, rounded as it rounds, and has the slope of `time_of` where σ is being learned."""
    if not (torch.is_tensor(sigma) and sigma.requires_grad and is_discrete(sampling)):
        yield
        return
    own = sampling.timestep

    def timestep(sigma: torch.Tensor) -> torch.Tensor:
        time = time_of(sampling, sigma)
        return own(sigma.detach()).to(time) + (time - time.detach())

    with reading(sampling, timestep):
        yield


@contextmanager
def reading(sampling, timestep):
    """Inside, this is sampling.timestep."""
    before = vars(sampling).get("timestep")  # None: the class's own
    sampling.timestep = timestep
    try:
        yield
    finally:
        if before is None:
            del sampling.timestep
        else:
            sampling.timestep = before
