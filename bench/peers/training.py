"""How every peer with a gradient is trained: end to end to the teacher's end points, the same for all; what differs are loss and freedom."""
import torch

from mteo.distill import LATE, SEEN, picture_loss, seen_apart
from mteo.metrics import nrmse
from mteo.teacher import Trajectories

from ..parts import BATCH
from .lab import Lab


def fit(lab: Lab, sample, learned: dict[str, torch.Tensor], pairs: Trajectories, held_out: Trajectories, budget: int, seed: int, rate: float,
        batch: int = 32, loss: str = "squared", ball: float = 0.0, turns: list[set[str]] | None = None,
        view: float = 0.0) -> tuple[dict[str, torch.Tensor], float]:
    """(the best `learned` on the held-out pairs, its error) after `budget` evaluations: Adam, rate along a cosine, gradient cut at 1, averaged.

    sample(learned, batch, start) -> end points. loss: "squared" or "absolute". ball: a start may move by this share of its noise to meet the teacher's
    end (LD3's soft target: one step of gradient descent each time it is drawn). turns: sets of names that are learned in turn, ten times. view: in the second
    half the loss, and the error that chooses, is a table's: how unlike the network finds the pictures, with this weight, beside the mean error of a picture.
    """
    learned = {name: value.clone().requires_grad_(True) for name, value in learned.items()}
    optimiser = torch.optim.Adam(learned.values(), lr=rate, betas=(0.9, 0.99))
    generator, moved, first = torch.Generator().manual_seed(seed), torch.zeros_like(pairs.start), lab.spent
    average = {name: value.detach().clone() for name, value in learned.items()}
    best, checks = (error_of(lab, sample, average, held_out), {name: own.clone() for name, own in average.items()}), 1
    spread, step, seeing = float(pairs.end.std()), 0, False
    while (spent := lab.spent - first) < budget:
        step += 1
        late = view and spent >= (1 - LATE) * budget
        for group in optimiser.param_groups:
            group["lr"] = rate * 0.5 * (1 + torch.cos(torch.tensor(spent / budget * torch.pi)).item())
        index = torch.randint(len(pairs), (batch,), generator=generator)
        part, shift = pairs.part(index), moved[index].requires_grad_(ball > 0)
        end = sample(learned, part, part.start + shift)
        if late:
            value = picture_loss(end, part.end) / spread + view * seen_apart(lab.perceive, end, part, torch.randn(end.shape, generator=generator))
        else:
            value = (end - part.end).square().mean() if loss == "squared" else (end - part.end).abs().mean()
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        if ball:
            moved[index] = into_ball(shift.detach() - shift.numel() / 2 * shift.grad, ball * lab.sigma_max)
        for name in turns[int(10 * spent / budget) % len(turns)] ^ set(learned) if turns else ():
            learned[name].grad = None
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimiser.step()
        for name, own in learned.items():
            average[name].lerp_(own.detach(), max(0.02, 1 / step))
        if lab.spent - first >= checks * budget / 10:
            checks += 1
            error = score_of(lab, sample, average, held_out, view) if late else error_of(lab, sample, average, held_out)
            if error < best[0] or late and not seeing:
                best, seeing = (error, {name: own.clone() for name, own in average.items()}), late
    return best[1], best[0]


def into_ball(shift: torch.Tensor, radius: float) -> torch.Tensor:
    """[B, …] cut to a root mean square of `radius` a picture."""
    size = shift.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (shift.dim() - 1))
    return shift * (radius / size.clamp_min(1e-12)).clamp_max(1)


@torch.no_grad()
def in_batches(pairs: Trajectories, sample) -> torch.Tensor:
    """sample(part) of all pairs, in parts."""
    return torch.cat([sample(pairs.part(slice(i, i + BATCH))) for i in range(0, len(pairs), BATCH)])


@torch.no_grad()
def error_of(lab: Lab, sample, learned, pairs: Trajectories) -> float:
    """Pooled RMSE ÷ the teacher's spread; a validation is not counted as spent."""
    with lab.uncounted():
        return nrmse(in_batches(pairs, lambda part: sample(learned, part, part.start)), pairs.end)["pooled"]


@torch.no_grad()
def score_of(lab: Lab, sample, learned, pairs: Trajectories, view: float) -> float:
    """What a table is chosen by: the mean error of a picture ÷ the teacher's spread + view · how unlike the network finds them."""
    unlike = 0.0
    with lab.uncounted():
        ends = in_batches(pairs, lambda part: sample(learned, part, part.start))
        noise = torch.randn(ends.shape, generator=torch.Generator().manual_seed(0))
        for few in torch.arange(len(pairs)).split(SEEN):
            unlike += len(few) / len(pairs) * float(seen_apart(lab.perceive, ends[few], pairs.part(few), noise[few]))
    return nrmse(ends, pairs.end)["mean"] + view * unlike
