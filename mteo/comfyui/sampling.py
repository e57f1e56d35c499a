"""Sample a LATENT with a table, as the stock KSampler does with a named schedule."""
import inspect

import comfy.sample
import comfy.utils
import latent_preview
import torch

from ..embeddings import Embeddings
from ..errors import MTEOError
from .patch import apply_embeddings
from .solver import table_sampler


def applied(model, embeddings: Embeddings, steps: int = 0, strength: float = 1.0, off_grid: str = "error"):
    """(MODEL, SAMPLER, SIGMAS [K+1]) of Apply MTEO."""
    patched, table = apply_embeddings(model, embeddings, steps, strength, off_grid)
    return patched, table_sampler(table, strength), torch.tensor(table.sigmas)


def samples_for(model, latent: dict) -> torch.Tensor:
    """The values of a LATENT; an empty one in the model's channels and size."""
    samples, ratios = latent["samples"], [latent.get(name) for name in ("downscale_ratio_spacial", "downscale_ratio_temporal")]
    known = len(inspect.signature(comfy.sample.fix_empty_latent_channels).parameters) - 2
    if known <= 0 and not samples.any():  # 0.3.75, whose Empty Latent Image has an eighth of the size and says nothing of it
        ratio = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
        samples = samples.new_zeros(*samples.shape[:-2], *(8 * side // ratio for side in samples.shape[-2:]))
    return comfy.sample.fix_empty_latent_channels(model, samples, *ratios[: max(known, 0)])


def sample_latent(
    model,
    embeddings: Embeddings,
    latent: dict,
    seed: int,
    positive,
    negative=None,
    steps: int = 0,
    cfg: float = 1.0,
    strength: float = 1.0,
    start_step: int = 0,
    end_step: int = 10000,
    add_noise: bool = True,
    return_with_leftover_noise: bool = False,
    off_grid: str = "error",
) -> dict:
    """A LATENT. Mask, batch index and ratios travel in `latent`. negative may be missing at cfg 1, where it is not used.

    A table that was trained with denoise below 1 starts from the picture in `latent`.
    end_step below K stops early: with return_with_leftover_noise the noisy latent, without it the model's last denoised.
    """
    patched, sampler, sigmas = applied(model, embeddings, steps, strength, off_grid)
    total = len(sigmas) - 1
    if negative is None and cfg != 1.0:
        raise MTEOError(f"cfg is {cfg:g} but no negative is connected: connect one, or set cfg to 1.")
    if not 0 <= start_step < min(end_step, total):
        raise MTEOError(f"start_step is {start_step}: give a step from 0 to {min(end_step, total) - 1}, below end_step.")
    samples = samples_for(model, latent)
    sigmas = sigmas[start_step : end_step + 1]
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")) if add_noise else torch.zeros_like(samples, device="cpu")
    x0 = {}
    callback = latent_preview.prepare_callback(patched, len(sigmas) - 1, x0)
    out = comfy.sample.sample_custom(
        patched,
        noise,
        cfg,
        sampler,
        sigmas,
        positive,
        positive if negative is None else negative,
        samples,
        noise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    if end_step < total and not return_with_leftover_noise:
        out = patched.model.process_latent_out(x0["x0"].cpu())
    kept = {name: value for name, value in latent.items() if name not in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    return {**kept, "samples": out}
