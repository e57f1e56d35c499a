"""Which model a MODEL is, whatever LoRAs are on it: a table belongs to one."""
import logging
import math
from itertools import chain

import comfy.lora
import torch

from ..errors import MTEOError
from ..fingerprint import SITES, difference, fingerprint, verdict


def model_fingerprint(model, paths: list[str], sites: int = SITES) -> dict[str, list[float]]:
    """`fingerprint` of a MODEL's weights without its LoRAs, also while one is in them, but with what other models a merging node brings; without the paths
    that it does not have."""
    modules = dict(model.model.diffusion_model.named_modules())

    def weight_of(path):
        backup, module = model.backup.get(f"diffusion_model.{path}.weight"), modules[path]
        weight = module.weight if backup is None else backup.weight
        weight = dequantized(module, weight) if getattr(weight, "tensor_type", None) is not None else weight
        others = [patch for patch in model.patches.get(f"diffusion_model.{path}.weight", ()) if is_merge(patch)]
        return comfy.lora.calculate_weight(others, weight.detach().float().clone(), path) if others else weight

    return fingerprint([path for path in paths if path in modules], weight_of, sites)


def is_merged(model) -> bool:
    """Whether a MODEL is a merge with another one."""
    return any(map(is_merge, chain(*model.patches.values())))


def is_merge(patch: tuple) -> bool:
    """Whether a patch of a weight, as ComfyUI keeps it, is another model's weight (ModelMergeSimple and all of its kind), and no LoRA."""
    _, value, strength_model, *_ = patch
    return strength_model != 1.0 or isinstance(value, list)


def dequantized(module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The numbers of a layer of ComfyUI-GGUF, which holds its weight as packed bytes, without the LoRAs that come on top of them."""
    patches, weight.patches = weight.patches, []
    try:
        return module.get_weight(weight, torch.float32)
    finally:
        weight.patches = patches


def require_model(model, trained: dict[str, list[float]] | None) -> None:
    """MTEOError where the table was made for another model than one of the fingerprint `trained`; a warning where for a sibling (fine-tune) of this one."""
    if not trained:
        return
    relative = difference(model_fingerprint(model, list(trained)), trained)
    if verdict(relative) == "other":
        how = f"its weights differ by {100 * relative:.0f} %" if math.isfinite(relative) else "it has other layers"
        raise MTEOError(f"This table was distilled for another model ({how}): load the table of this model, or distil one.")
    if verdict(relative) == "sibling":
        logging.warning(
            f"MTEO: this table was distilled for a sibling of this model (weights differ by {100 * relative:.0f} %): "
            "compare with the plain model, and distil a table for this one if that is nearer."
        )
