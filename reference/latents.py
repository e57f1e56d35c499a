"""A linear, exactly decodable "VAE": principal components of square patches of pixels."""
import math

import torch
import torch.nn.functional as F

SHAPES = {"unet": (8, 32), "mmdit": (4, 16)}  # (pixels on a side of a patch, its components that are kept); ComfyUI's MMDiT takes 2 x 2 of them as a token
SPREAD = 0.8  # standard deviation of each latent channel after LatentFormat.process_in


def fit(pictures: torch.Tensor, patch: int, channels: int) -> dict[str, torch.Tensor]:
    """basis [channels, 3·patch²], mean and scale [channels] from pictures [N, 3, H, W] in -1..1 (float64 inside)."""
    patches = F.pixel_unshuffle(pictures, patch).permute(0, 2, 3, 1).reshape(-1, 3 * patch * patch).double()
    covariance = torch.cov(patches.T)
    basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :channels].T
    raw = patches @ basis.T
    return {"basis": basis.float(), "mean": raw.mean(0).float(), "scale": (SPREAD / raw.std(0)).float()}


def scaled(raw: torch.Tensor, numbers: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the VAE encodes -> what the network reads: mean 0 and a deviation of SPREAD in every channel; numbers as from `fit`."""
    return (raw - numbers["mean"].view(1, -1, 1, 1).to(raw)) * numbers["scale"].view(1, -1, 1, 1).to(raw)


def unscaled(x: torch.Tensor, numbers: dict[str, torch.Tensor]) -> torch.Tensor:
    """The way back."""
    return x / numbers["scale"].view(1, -1, 1, 1).to(x) + numbers["mean"].view(1, -1, 1, 1).to(x)


class LinearVAE(torch.nn.Module):
    """encode and decode as ComfyUI's VAE calls them; pictures [B, 3, H, W] in -1..1, latents [B, channels, H/patch, W/patch]."""

    def __init__(self, basis: torch.Tensor):
        super().__init__()
        self.patch = math.isqrt(basis.shape[1] // 3)
        self.register_buffer("basis", basis)

    def encode(self, pictures: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return torch.einsum("cp,bphw->bchw", self.basis.to(pictures), F.pixel_unshuffle(pictures, self.patch))

    def decode(self, latents: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return F.pixel_shuffle(torch.einsum("cp,bchw->bphw", self.basis.to(latents), latents), self.patch)
