"""Sites: the places where one layer of a network takes in the timestep, and the normalisations whose gain may go with the step."""
import re
from dataclasses import dataclass

import torch

from .errors import MTEOError

SPACES = ("embedding", "modulation", "gains")

# Module paths of the projection Linear of each layer, by family (paths as in ComfyUI, without "diffusion_model.").
FAMILIES = (
    ("unet", re.compile(r"(input_blocks\.\d+\.0|middle_block\.[02]|output_blocks\.\d+\.0)\.emb_layers\.1")),
    ("sd3", re.compile(r"(joint_blocks\.\d+\.(context_block|x_block)|final_layer)\.adaLN_modulation\.1")),
)
# Normalisations with a gain of their own, after a layer took in the time and before attention; in the other families the modulation is that gain.
GAINS = {"unet": re.compile(r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.\d+\.(out_layers\.0|transformer_blocks\.\d+\.norm[123])")}

# The block that a site belongs to: what it puts out is a picture of features.
BLOCKS = {"unet": re.compile(r"(.+)\.emb_layers\.1"), "sd3": re.compile(r"(joint_blocks\.\d+)\.x_block\.adaLN_modulation\.1")}


@dataclass(frozen=True)
class Site:
    """A projection Linear, or a normalisation, by its module path; width = numbers that an offset has there (a Linear's inputs or outputs, a normalisation's
    channels)."""

    path: str
    width: int


def find_family(network: torch.nn.Module) -> str:
    """The family's name by the paths of its layers; MTEOError for a network of no known family."""
    for name, pattern in FAMILIES:
        if any(pattern.fullmatch(path) for path, _ in network.named_modules()):
            return name
    known = ", ".join(name for name, _ in FAMILIES)
    raise MTEOError(f"The model {type(network).__name__} is of no family that MTEO knows ({known}): nothing was changed.")


def is_gain(path: str) -> bool:
    """Whether a site's rows scale what a normalisation puts out, in place of being added to a Linear."""
    return any(pattern.fullmatch(path) for pattern in GAINS.values())


def find_sites(network: torch.nn.Module, space: str) -> list[Site]:
    """All sites of the network in its own order. `space`: "embedding" = the Linear's input (after SiLU), "modulation" = its output, "gains" = the Linear's
    input and the gains of normalisations, where the family has them. MTEOError for an unknown space or a network of no known family."""
    if space not in SPACES:
        raise MTEOError(f'The space "{space}" is not known: choose one of {", ".join(SPACES)}.')
    pattern = dict(FAMILIES)[find_family(network)]
    wanted = lambda path: pattern.fullmatch(path) or (space == "gains" and is_gain(path))
    return [Site(path, width_of(path, module, space)) for path, module in network.named_modules() if wanted(path)]


def find_blocks(network: torch.nn.Module) -> list[str]:
    """Paths of the blocks whose output shows the picture, in the network's own order; MTEOError as `find_sites`."""
    pattern = BLOCKS[find_family(network)]
    return [found[1] for path, _ in network.named_modules() if (found := pattern.fullmatch(path))]


def width_of(path: str, module: torch.nn.Module, space: str) -> int:
    """Numbers that an offset has at the site; AttributeError where the module is of another kind."""
    if is_gain(path):
        return module.weight.shape[0]
    return module.out_features if space == "modulation" else module.in_features
