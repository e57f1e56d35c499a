"""Rough pictures of latents, as ComfyUI's own previews: no VAE is loaded beside a model that trains."""
import latent_preview
import torch
from PIL import Image


def previewer(model):
    """The linear previewer of a MODEL's latent format."""
    latent_format = model.model.latent_format
    return latent_preview.Latent2RGBPreviewer(latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias, latent_format.latent_rgb_factors_reshape)


def rough(previewer, latents: torch.Tensor) -> Image.Image:
    """The first of `latents` [B, C, H, W], as they are inside the model, a pixel for each place."""
    return previewer.decode_latent_to_preview(latents[:1].detach().float().cpu())
