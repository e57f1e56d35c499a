"""How alike two pictures are to the network that draws them: what its own blocks put out for both, with the same noise on them.

After the self-perceptual loss of "Diffusion Model with Perceptual Loss" (Lin and Yang, arXiv 2401.00110): no other network is needed. An error of latents alone
is least where a picture that cannot be told is blurred; to the blocks a blurred picture looks like no picture of the teacher's.
"""
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F

from .sites import find_blocks

NOISE = 2.5  # standard deviation of the noise ÷ that of the picture's own scale: what is drawn can be seen, its texture less


@contextmanager
def watched(network: torch.nn.Module):
    """Yields {block: a list that fills with what it puts out, [B, C, H, W] or [B, T, C] of the picture, evaluation by evaluation}."""
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in find_blocks(network)}

    def keep(module, arguments, output, own):
        own.append(output[1] if isinstance(output, tuple) else output)  # SD 3's block: (text, picture)

    handles = [network.get_submodule(path).register_forward_hook(partial(keep, own=own)) for path, own in seen.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def unlikeness(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """1 − the cosine between the channels of both at each place, the mean over places, pictures and blocks: 0 = alike, 1 = unrelated. Both lists have
    one tensor for each block."""
    each = [(1 - F.cosine_similarity(a.float(), b.float(), dim=1 if a.dim() == 4 else -1)).flatten(1).mean(1) for a, b in zip(student, teacher, strict=True)]
    return torch.cat(each).mean()
