"""ComfyUI for a headless run: find its root, import it, load a model, encode prompts."""
import sys
from pathlib import Path

import torch

from mteo.errors import MTEOError

REFERENCE = {"reference": "unet", "reference-mmdit": "mmdit"}


def find_root(given: str | None) -> Path:
    """--comfyui, else the ComfyUI that this pack is installed in; MTEOError where it is not there."""
    root = Path(given) if given else Path(__file__).resolve().parent / "../../.."
    if (root / "comfy" / "samplers.py").is_file():
        return root.resolve()
    raise MTEOError(f"{given} is not ComfyUI's root: it has no comfy/samplers.py." if given else "ComfyUI was not found: give its root with --comfyui.")


def open_comfyui(root: Path) -> None:
    """Import ComfyUI from `root`, which goes before everything on sys.path: this pack's `nodes` would hide ComfyUI's nodes.py [20]."""
    sys.path.insert(0, str(root))
    sys.modules.pop("nodes", None)
    card = torch.cuda.is_available() or torch.backends.mps.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
    own, sys.argv = sys.argv, [sys.argv[0], *([] if card else ["--cpu"])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  reads sys.argv once

    sys.argv = own


def load(model: str):
    """(MODEL, CLIP, VAE) of a reference model of the pack or of a checkpoint file; MTEOError where that lacks one of them."""
    if model in REFERENCE:
        from reference.objects import make_clip, make_model, make_vae

        return tuple(make(REFERENCE[model]) for make in (make_model, make_clip, make_vae))
    if not Path(model).is_file():
        raise MTEOError(f"The model {model} is not there: give a checkpoint file, or {' or '.join(REFERENCE)} for a model of the pack.")
    import comfy.sd

    try:
        made, clip, vae = comfy.sd.load_checkpoint_guess_config(model)[:3]
        vae.throw_exception_if_invalid()
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise MTEOError(f"{Path(model).name} is no checkpoint with a network and a VAE that ComfyUI knows ({why}).") from error
    if clip is None:
        raise MTEOError(f"{Path(model).name} has no text encoder: give a checkpoint with it, or distil in a graph, whose loaders put the parts together.")
    return made, clip, vae


def encode(clip, text: str):
    """CONDITIONING of a prompt, as CLIPTextEncode makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def encode_image(vae, path: Path) -> torch.Tensor:
    """LATENT values [1, C, H, W] of a picture file, as VAEEncode makes them; MTEOError where it cannot be read."""
    import numpy as np
    from PIL import Image

    try:
        picture = Image.open(path).convert("RGB")
    except OSError as error:
        raise MTEOError(f"The picture {path} cannot be read: {error}.") from error
    return vae.encode(torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None])


def empty_latent(model, width: int, height: int, count: int = 1) -> torch.Tensor:
    """Zeros [count, C, height ÷ ratio, width ÷ ratio] of the model's latent format."""
    latent_format = model.model.latent_format
    ratio = getattr(latent_format, "spacial_downscale_ratio", 8)
    return torch.zeros(count, latent_format.latent_channels, height // ratio, width // ratio)
