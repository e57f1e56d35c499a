"""Grids of σ: the teacher's fine grid and where a student's steps lie in it. Named grids are ComfyUI's own."""
import torch


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> torch.Tensor:
    """[steps + 1] σ from sigma_max to sigma_min and 0 (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)]).float()


def refined(student: torch.Tensor, steps: int, sigma_min: float) -> torch.Tensor:
    """A grid of about `steps` steps that holds every σ of the student's (so that the teacher passes through its states).

    Points of the Karras grid closer than 5 % to one of the student's give way to it.
    """
    own = student[student > 0]
    fine = karras(steps, min(sigma_min, float(own[-1])), float(own[0]))[:-1]
    apart = ((fine[:, None] / own[None] - 1).abs() > 0.05).all(1)
    return torch.cat([torch.cat([fine[apart], own]).sort(descending=True).values, torch.zeros(1)])
