"""Sites: the places where one layer of a network takes in the timestep."""
import re
from dataclasses import dataclass

import torch

from .errors import MTEOError

SPACES = ("embedding", "modulation")

# Module paths of the projection Linear of each layer, by family (paths as in ComfyUI, without "diffusion_model.").
FAMILIES = (
    ("unet", re.compile(r"(input_blocks\.\d+\.0|middle_block\.[02]|output_blocks\.\d+\.0)\.emb_layers\.1")),
    ("sd3", re.compile(r"(joint_blocks\.\d+\.(context_block|x_block)|final_layer)\.adaLN_modulation\.1")),
)


@dataclass(frozen=True)
class Site:
    """A projection Linear by its module path; width = numbers that an offset has there (its inputs or its outputs)."""

    path: str
    width: int


def find_family(network: torch.nn.Module) -> str:
    """The family's name by the paths of its layers; MTEOError for a network of no known family."""
    for name, pattern in FAMILIES:
        if any(pattern.fullmatch(path) for path, _ in network.named_modules()):
            return name
    known = ", ".join(name for name, _ in FAMILIES)
    raise MTEOError(f"The model {type(network).__name__} is of no family that MTEO knows ({known}): nothing was changed.")


def find_sites(network: torch.nn.Module, space: str) -> list[Site]:
    """All sites of the network in its own order. `space`: "embedding" = the Linear's input (after SiLU), "modulation" = its
    output. MTEOError for an unknown space or a network of no known family."""
    if space not in SPACES:
        raise MTEOError(f'The space "{space}" is not known: choose one of {", ".join(SPACES)}.')
    pattern = dict(FAMILIES)[find_family(network)]
    found = [(path, module) for path, module in network.named_modules() if pattern.fullmatch(path)]
    return [Site(path, module.in_features if space == "embedding" else module.out_features) for path, module in found]
