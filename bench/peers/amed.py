"""AMED-Solver (Zhou et al. 2024, arXiv 2312.00094): a very small network reads the big one's bottleneck and says, for each picture, where the second
evaluation of a step lies, how far the step goes along the slope found there, and which σ is told.

Three evaluations are such a step (2) and a plain one (1); where the first slope is the analytic one (x/√(1 + σ²)) they are two such steps, of 1 and 2.
"""
import torch
from torch.nn.functional import silu

from mteo.sites import find_family
from mteo.teacher import Trajectories

from .lab import Lab

EVALUATIONS, HIDDEN, SCALE = 3, 32, 0.2  # of a sampling; width of the small network; how far from 1 it may move direction and time


def parameters_of(lab: Lab, analytic: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """The small network, whose answer is the same for every picture at first; inner: σ of the second step (`Lab.middle`)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = (lab.session.latent.shape[-1] // 2) ** 2 + 2  # the middle of both reference networks has half the latent's side
    return dict(
        inner=torch.zeros(()),
        weight=torch.randn(HIDDEN, inputs, generator=generator) / inputs**0.5,
        bias=torch.zeros(HIDDEN),
        out=torch.zeros(3, HIDDEN),
        out_bias=torch.zeros(3),
    )


class Bottleneck:
    """[B, places]: what the last evaluation had in the middle of the network, the mean over channels (and over the two of a cfg pair)."""

    def __init__(self, lab: Lab):
        blocks = lab.network.joint_blocks if find_family(lab.network) == "sd3" else None
        self.device = lab.session.device
        self.handle = (blocks[len(blocks) // 2 - 1] if blocks else lab.network.middle_block[-1]).register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        self.seen = output[1].mean(2) if isinstance(output, tuple) else output.mean(1).flatten(1)

    def of(self, count: int) -> torch.Tensor:
        return self.seen.detach().view(-1, count, self.seen.shape[-1]).mean(0).to(self.device)


def sample(lab: Lab, analytic: bool, learned: dict[str, torch.Tensor], batch: Trajectories, start: torch.Tensor) -> torch.Tensor:
    """End points of the starts."""
    inner = lab.middle(learned["inner"])
    bottleneck, x, count = Bottleneck(lab), start, len(start)
    try:
        high = torch.tensor(lab.sigma_max)
        slope = lab.first_slope(x, batch, analytic)
        seen = x.new_zeros(count, learned["weight"].shape[1] - 2) if analytic else bottleneck.of(count)
        x = step(lab, learned, batch, x, slope, seen, high, inner)
        answer = lab.denoise(x, inner, batch, inner)
        if not analytic:
            return answer
        return step(lab, learned, batch, x, (x - answer) / inner, bottleneck.of(count), inner, torch.tensor(lab.sigma_min))
    finally:
        bottleneck.handle.remove()


def step(lab: Lab, learned, batch, x, slope, seen, high, low) -> torch.Tensor:
    """From σ = high to low along the slope at a σ between them."""
    levels = torch.stack([torch.as_tensor(high).float().log(), torch.as_tensor(low).float().log()]).expand(len(x), 2)
    answer = silu(torch.cat([seen, levels], 1) @ learned["weight"].T + learned["bias"]) @ learned["out"].T + learned["out_bias"]
    share, direction, told = answer[:, 0].sigmoid(), 1 + SCALE * answer[:, 1].tanh(), 1 + SCALE * answer[:, 2].tanh()
    between = lab.between(low, high, share)
    wide = lambda value: value.view(-1, *[1] * (x.dim() - 1))
    y = x + wide(between - high) * slope
    middle = (y - lab.denoise(y, between, batch, told * between)) / wide(between)
    return x + (low - high) * wide(direction) * middle
