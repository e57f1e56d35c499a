"""Distillation inside ComfyUI's own sampling: conditioning, ControlNet, LoRA and wrappers act as they do in a sampling.

A `Sampler` whose `sample` is the training: the guider loads the model and prepares the conditions, then hands over a
`model_wrap(x, σ)` that gives a differentiable denoised.
"""
from contextlib import contextmanager

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch

from ..distill import Settings, distill
from ..embeddings import Embeddings, Table
from ..errors import MTEOError
from ..schedule import refined
from ..sites import find_sites
from ..teacher import Trajectories, follow
from .patch import apply_embeddings
from .solver import read_tableau


class _Training(comfy.samplers.Sampler):
    """Runs `work(denoise, start_of)` where a sampler would run, and keeps its result."""

    def __init__(self, work):
        self.work, self.result = work, None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        self.result = self.work(model_wrap, sigmas, extra_args, latent_image)
        return latent_image


def private_copy(model):
    """A MODEL of its own with normal tensors (made outside inference mode), so that gradients can flow and nothing is shared."""
    try:
        copy = model.clone(disable_dynamic=True, force_deepcopy=True)
    except (TypeError, RuntimeError) as error:
        raise MTEOError("This model cannot be copied for training: load it with a stock loader of ComfyUI.") from error
    copy.model.requires_grad_(False)
    return copy


@contextmanager
def training_mode():
    """Gradients on, fused kernels without a backward off; as before afterwards."""
    management, before = comfy.model_management, getattr(comfy.model_management, "in_training", False)
    management.in_training = True
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        management.in_training = before


def plain_attention(function, *args, **kwargs):
    """Attention with a backward pass, whatever kernel the user chose for sampling."""
    return attention_pytorch(*args, **kwargs)


def normal(value):
    """Conditioning made under inference mode, as normal tensors."""
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, dict):
        return {key: normal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(normal(item) for item in value)
    return value


def distill_model(model, positives: list, negative, latent: torch.Tensor, steps: int, solver: str, scheduler: str, settings: Settings,
                  guidance: tuple[float, ...] = (1.0,), teacher_steps: int = 24, pictures: int = 256, held_out: int = 64, space: str = "embedding", progress=None) -> Embeddings:
    """Embeddings for `steps` steps of `solver` on the named grid, from the model's own trajectories.

    positives: a list of conditionings, one a prompt; negative: one; latent [1, C, H, W] gives the size. guidance: the cfg values
    that the table serves, drawn in turn. pictures / held_out: trajectories to train on and to choose by.
    """
    with training_mode():
        private = private_copy(model)
        sampling = private.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps).clone()
        tableau = read_tableau(comfy.samplers.sampler_object(solver), sigmas, sampling, solver)
        offsets = {site.path: torch.zeros(len(tableau.row_sigmas), site.width) for site in find_sites(private.model.diffusion_model, space)}
        timesteps = [float(sampling.timestep(sigma.float())) for sigma in tableau.row_sigmas]
        table = Table(steps, sigmas.tolist(), timesteps, solver, tableau, offsets)
        patched, _ = apply_embeddings(private, Embeddings({steps: table}, space))
        patch = patched.get_attachment("mteo")
        fine = refined(sigmas, teacher_steps, float(sampling.sigma_min))
        teacher = read_tableau(comfy.samplers.sampler_object("dpmpp_2m"), fine, sampling, "dpmpp_2m")
        patched.remove_wrappers_with_key("outer_sample", "mteo")  # the schedule of training is the teacher's and the student's
        patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = plain_attention
        guider = comfy.samplers.CFGGuider(patched)
        positives, negative, latent = normal(positives), normal(negative), latent.clone()

        def work(model_wrap, sigmas_on_device, extra_args, latent_image):
            return _work(model_wrap, extra_args, latent_image, guider, patch, table, teacher, settings, guidance, pictures, held_out, len(positives), progress)

        # All prompts become conditions of one guider; a batch uses one of them and the negative.
        guider.set_conds(positives[0], negative)
        guider.set_cfg(guidance[0])
        guider.original_conds = {**{f"prompt{i}": guider.original_conds["positive"] if i == 0 else convert(p) for i, p in enumerate(positives)},
                                 "positive": guider.original_conds["positive"], "negative": guider.original_conds["negative"]}
        training = _Training(work)
        guider.sample(torch.zeros_like(latent), latent, training, sigmas, disable_pbar=True, seed=settings.seed)
        best, solved, record = training.result
    table.offsets, table.tableau, table.corrected, table.record = best, solved, settings.solve_last_row, record
    return Embeddings({steps: table}, space, {"family": "unet", "sampling": type(sampling).__name__, "guidance": list(guidance)})


def convert(conditioning):
    return comfy.samplers.sampler_helpers.convert_cond(conditioning) if hasattr(comfy.samplers, "sampler_helpers") else comfy.sampler_helpers.convert_cond(conditioning)


def _work(model_wrap, extra_args, latent_image, guider, patch, table, teacher, settings, guidance, pictures, held_out, prompts, progress):
    device = latent_image.device
    sampling = model_wrap.inner_model.model_sampling

    def denoise(x, sigma, item, cfg):
        guider.conds["positive"], guider.cfg = guider.conds[f"prompt{item}"], cfg
        return model_wrap(x, sigma * x.new_ones(len(x)), **extra_args)

    def gather(count, seed, batch=16):
        generator, parts = torch.Generator().manual_seed(seed), []
        for begin in range(0, count, batch):
            size, turn = min(batch, count - begin), begin // batch
            noise = torch.randn((size, *latent_image.shape[1:]), generator=generator).to(device)
            start = sampling.noise_scaling(teacher.sigmas[0].float().to(device), noise, latent_image.expand_as(noise), True)
            item, cfg = turn % prompts, guidance[turn % len(guidance)]
            scale, patch.offsets.scale = patch.offsets.scale, 0.0
            states, end = follow(teacher, lambda x, call, sigma: denoise(x, sigma, item, cfg), start, table.sigmas)
            patch.offsets.scale = scale
            parts.append(Trajectories(start, states, end, torch.full((size,), item), torch.full((size,), float(cfg))))
        return Trajectories(*(torch.cat([getattr(part, name) for part in parts]) for name in ("start", "states", "end", "item", "guidance")))

    train, validation = gather(pictures, settings.seed * 2 + 1), gather(held_out, settings.seed * 2 + 2)

    def student(x, call, sigma, batch):
        """Batch rows of one prompt and one cfg go together."""
        out = torch.empty_like(x)
        pieces = []
        keys = sorted(set(zip(batch.item.tolist(), batch.guidance.tolist(), strict=True)))
        order = []
        for item, cfg in keys:
            own = ((batch.item == item) & (batch.guidance == cfg)).nonzero().flatten()
            pieces.append(denoise(x[own.to(x.device)], sigma, item, cfg))
            order.append(own)
        return torch.cat(pieces)[torch.cat(order).argsort().to(out.device)]

    best, solved, state = distill(student, patch.offsets.table, table.tableau, train, validation, settings, progress=progress)
    return best, solved, dict(log=state.log, pictures=pictures, teacher_steps=len(teacher.sigmas))
