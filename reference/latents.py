"""A linear, exactly decodable "VAE": principal components of 8x8 pixel patches."""
import torch
import torch.nn.functional as F

PATCH = 8  # pixels on a side of a patch, the ratio between picture and latent
CHANNELS = 32
SPREAD = 0.8  # standard deviation of each latent channel after LatentFormat.process_in


def fit(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """basis [CHANNELS, 3·PATCH²], mean and scale [CHANNELS] from pictures [N, 3, H, W] in -1..1 (float64 inside)."""
    patches = F.pixel_unshuffle(pictures, PATCH).permute(0, 2, 3, 1).reshape(-1, 3 * PATCH * PATCH).double()
    covariance = torch.cov(patches.T)
    basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :CHANNELS].T
    raw = patches @ basis.T
    return {"basis": basis.float(), "mean": raw.mean(0).float(), "scale": (SPREAD / raw.std(0)).float()}


class LinearVAE(torch.nn.Module):
    """encode and decode as ComfyUI's VAE calls them; pictures [B, 3, H, W] in -1..1, latents [B, CHANNELS, H/8, W/8]."""

    def __init__(self, basis: torch.Tensor):
        super().__init__()
        self.register_buffer("basis", basis)

    def encode(self, pictures: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return torch.einsum("cp,bphw->bchw", self.basis.to(pictures), F.pixel_unshuffle(pictures, PATCH))

    def decode(self, latents: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return F.pixel_shuffle(torch.einsum("cp,bchw->bphw", self.basis.to(latents), latents), PATCH)
