"""The gradient of a batch in the memory that there is: fewer pictures at a time where it is full, then each evaluation made twice."""
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from .errors import MTEOError
from .teacher import Trajectories

FULL = ("out of memory", "out of device memory", "not enough gpu video memory", "cublas_status_alloc_failed")
SMALLER = 6  # times that a gradient is tried with a scale of a sixteenth: one that is no number then is so for another reason
TOO_SMALL = "The graphics card's memory does not hold one evaluation of one picture with its gradient: give a smaller latent, or close what else uses the card."


@dataclass
class Room:
    """together: pictures whose evaluations are kept for the backward pass. recompute: nothing of an evaluation is kept but its input, it is made once more in
    the backward pass (Chen et al. 2016, arXiv 1604.06174): a third more time. scale: of the gradients inside the network, 1 = as the code has it; float16
    holds no more than 65,504."""

    together: int
    recompute: bool = False
    scale: float = 1.0

    def shrink(self) -> None:
        """MTEOError where it is the smallest already."""
        torch.cuda.empty_cache()
        if self.together > 1:
            self.together = -(-self.together // 2)
        elif not self.recompute:
            self.recompute = True
        else:
            raise MTEOError(TOO_SMALL)


def gradient_of(loss_of, denoise, batch: Trajectories, parameters: list[torch.Tensor], room: Room) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(loss, its gradient for each parameter) of loss_of(rows, denoise) -> mean over the pictures `rows`, a slice of the batch. `room` shrinks where it has to,
    and stays so."""
    return finite(room, lambda: in_room(loss_of, denoise, batch, parameters, room), lambda made: made[1] if made[0].isfinite() else ())


def finite(room: Room, work, gradients_of):
    """As `fitted`, and again with a smaller scale, which stays, where one of the tensors gradients_of(what was made) is not finite; as it was where that does
    not help."""
    before = room.scale
    for _ in range(SMALLER + 1):
        made = fitted(room, work)
        gradients = [gradient.isfinite().all() for gradient in gradients_of(made)]
        if not gradients or torch.stack(gradients).all():
            return made
        room.scale /= 16
    room.scale = before
    return made


def fitted(room: Room, work):
    """work(), again with less room as long as the memory is full."""
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not full(error):
                raise  # else go on below: its traceback holds what was computed until here
        room.shrink()


def full(error: RuntimeError) -> bool:
    """Whether it says that a device's memory is full: a class of its own with CUDA, a sentence with Apple's MPS, DirectML and other backends."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(sentence in str(error).lower() for sentence in FULL)


def in_room(loss_of, denoise, batch: Trajectories, parameters: list[torch.Tensor], room: Room) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As `gradient_of`, in the room that is given."""
    # float16 has nothing below 6e-8, and a mean over so many numbers has: undone below, to the last bit
    scale = room.scale * 2.0 ** round(math.log2(max(batch.end.numel() / 16, 1)))
    denoise = partial(recomputed, denoise) if room.recompute else denoise
    loss, total = 0.0, [torch.zeros_like(value) for value in parameters]
    for begin in range(0, len(batch), room.together):
        rows = slice(begin, min(begin + room.together, len(batch)))
        own = loss_of(rows, denoise) * ((rows.stop - begin) / len(batch))
        for value, gradient in zip(total, torch.autograd.grad(own * scale, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                value += gradient / scale
        loss = loss + own.detach()
    return loss, total


def recomputed(denoise, x: torch.Tensor, call: int, sigma: float, batch: Trajectories) -> torch.Tensor:
    """denoise(x, call, sigma, batch), of which only x is kept for the backward pass."""
    return checkpoint(denoise, x, call, sigma, batch, use_reentrant=False)
