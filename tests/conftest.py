"""ComfyUI's real sources on the path, set up for the processor, before any test imports them."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def comfyui_root() -> Path:
    """ComfyUI's root, first on sys.path; `python dev.py test` says where it is."""
    root = Path(os.environ["COMFYUI_PATH"]).resolve()
    sys.path.insert(0, str(root))
    own, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  reads sys.argv once

    sys.argv = own
    return root


@pytest.fixture
def no_gradients(comfyui_root):
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def parts(comfyui_root):
    """What a distillation of the reference UNet is given."""
    return parts_of("unet")


@pytest.fixture(scope="module")
def transformer_parts(comfyui_root):
    """What a distillation of the reference transformer is given."""
    return parts_of("mmdit")


@torch.inference_mode()
def parts_of(kind: str) -> tuple:
    """MODEL, two prompts, the negative, an empty latent."""
    import nodes
    from reference.objects import make_clip, make_model
    from trainer.comfyui import empty_latent

    clip, model = make_clip(kind), make_model(kind)
    encode = lambda text: nodes.CLIPTextEncode().encode(clip, text)[0]
    return model, [encode("cat and apple"), encode("car")], encode(""), empty_latent(model, 64, 64)
