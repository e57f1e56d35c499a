"""A model under ComfyUI's own guider, open for as many evaluations as one likes: training, its teacher and the benches run in here.

A `Sampler` whose `sample` is the work: the guider loads the model and prepares the conditions, then hands over a `model_wrap(x, σ)`
that gives a differentiable denoised; conditioning, LoRA and wrappers act as they do in a sampling.
"""
import copy
import inspect
import sys
from contextlib import contextmanager

import comfy.model_management
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import MTEOError
from ..gradient import full
from ..perception import NOISE, watched
from ..precision import multiplies_bfloat16
from ..schedule import sigma_of
from .conditions import normal, stack, stackable
from .patch import KEPT, remove_embeddings
from .solver import KEY, told, unguided

SPEEDING = ("torch.compile", "easycache", "lazycache")  # what makes a sampling quicker and is in the way of a training: keys of wrappers


def is_flow(sampling) -> bool:
    """Whether the model's x is (1 − σ)·picture + σ·noise."""
    return isinstance(sampling, comfy.model_sampling.CONST)


def short_floats(device: torch.device, wanted: bool = True):
    """Inside, a processor that multiplies bfloat16 itself (AVX-512 BF16, with or without AMX) does so: 1.8 to 3.5 times as many evaluations of the reference
    models a second, each .2 % to 1.4 % off float32's answer. A graphics card computes as ComfyUI chose."""
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted and device.type == "cpu" and multiplies_bfloat16())


class Session:
    """What `work` gets: the device that its pictures are on, the model's sampling and network, and `denoise`."""

    def __init__(self, guider, model_wrap, extra_args, latent, prompts: int):
        self._guider, self._wrap, self._extra = guider, model_wrap, extra_args
        self.latent, self.device, self._computing = latent, latent.device, latent.device
        self._together = sys.maxsize  # pictures that are evaluated at once, at most
        self.sampling, self.network = model_wrap.inner_model.model_sampling, model_wrap.inner_model.diffusion_model
        self.short = next(self.network.parameters()).dtype != torch.float16  # whether a processor that multiplies bfloat16 does so
        self.flow = is_flow(self.sampling)
        self.patch = guider.model_patcher.get_attachment(KEY)  # the table on the model, if there is one
        self._prompts = [guider.conds[f"prompt{i}"] for i in range(prompts)]
        self._stackable = stackable(self._prompts)

    def keep_on(self, device: torch.device) -> None:
        """Pictures are on this device from now on; the network computes where it was."""
        self.latent, self.device = self.latent.to(device), device

    def noise(self, count: int, seed: int) -> torch.Tensor:
        """[count, …] in the model's latent space, made on the processor as ComfyUI makes it."""
        return torch.randn((count, *self.latent.shape[1:]), generator=torch.Generator().manual_seed(seed)).to(self.device)

    def start(self, noise: torch.Tensor, sigma: torch.Tensor, pictures: torch.Tensor | None = None) -> torch.Tensor:
        """x_T as the sampler would get it at σ_0 [9]: noise alone, at the model's largest σ, or on pictures [B, …]."""
        latent = self.latent.expand_as(noise) if pictures is None else pictures
        return self.sampling.noise_scaling(sigma.float().to(self.device), noise, latent, pictures is None)

    def out(self, x: torch.Tensor) -> torch.Tensor:
        """Sampled latents as a LATENT holds them."""
        return self._wrap.inner_model.process_latent_out(x.float()).cpu()

    def denoise(
        self, x: torch.Tensor, sigma: float | torch.Tensor, item: torch.Tensor, guidance: torch.Tensor, row: float | None = None, forget=lambda: None
    ) -> torch.Tensor:
        """D(x; σ) [B, …]: row b with prompt item[b] and cfg guidance[b]; `row`: the σ whose row of a table acts, where it is not σ itself. Rows of one cfg
        (and, where prompts do not stack, of one prompt) are evaluated together, fewer where the card's memory does not hold them; with a gradient it is the
        caller who asks for fewer (mteo/gradient.py). forget() is called before what was evaluated is evaluated anew."""
        while True:
            try:
                return self._denoise(x, sigma, item, guidance, row)
            except RuntimeError as error:
                if not full(error) or torch.is_grad_enabled() or min(len(x), self._together) == 1:
                    raise
            forget()
            self._together = min(len(x), self._together) // 2
            torch.cuda.empty_cache()

    def _denoise(self, x: torch.Tensor, sigma: float | torch.Tensor, item: torch.Tensor, guidance: torch.Tensor, row: float | None) -> torch.Tensor:
        keys = list(zip(guidance.tolist(), [0] * len(item) if self._stackable else item.tolist(), strict=True))
        pieces, order = [], []
        groups = ((key, torch.tensor([row for row, it in enumerate(keys) if it == key])) for key in sorted(set(keys)))
        for key, own in ((key, own) for key, rows in groups for own in rows.split(self._together)):
            rows = own.to(x.device)
            part, items = x[rows], item[own].tolist()
            self._guider.conds["positive"] = stack(self._prompts, items) if self._stackable else self._prompts[items[0]]
            self._guider.cfg = key[0]
            own_sigma = sigma.to(part) if torch.is_tensor(sigma) else sigma  # a learned one is float64, of which Apple's cards know nothing
            sigmas = (own_sigma * part.new_ones(len(part))).to(self._computing)
            with short_floats(self._computing, self.short), told(self._guider, sigma if row is None and isinstance(sigma, float) else row):
                pieces.append(self._wrap(part.to(self._computing), sigmas, **self._extra).to(x.device))
            order.append(own)
        return torch.cat(pieces)[torch.cat(order).argsort().to(x.device)]

    @contextmanager
    def prompt_alone(self, wanted: bool = True):
        """Inside, where wanted, nothing mixes the two branches of guidance, as in a sampling's call that asks for the prompt alone; such a call has cfg 1."""
        before = self._extra
        if wanted:
            self._extra = unguided(before)
        try:
            yield
        finally:
            self._extra = before

    @contextmanager
    def plain(self):
        """Inside, the network's table, if there is one on it, does nothing."""
        if self.patch is None:
            yield
            return
        strength, self.patch.offsets.scale = self.patch.offsets.scale, 0.0
        try:
            yield
        finally:
            self.patch.offsets.scale = strength

    def perceived(self, x: torch.Tensor, noise: torch.Tensor, item: torch.Tensor) -> list[torch.Tensor]:
        """What each block of the plain network puts out for latents x [B, …] with `noise` on them (mteo/perception.py), each with its prompt and cfg 1."""
        sigma = sigma_of(NOISE, self.flow)
        noised = self.sampling.noise_scaling(torch.tensor(sigma, device=x.device), noise, x)
        with self.plain(), self.prompt_alone(), watched(self.network) as seen:
            forget = lambda: [own.clear() for own in seen.values()]
            self.denoise(noised, sigma, item, torch.ones(len(x), dtype=torch.float64), forget=forget)
        return [own[0] if len(own) == 1 else torch.cat(own) for own in seen.values() if own]


class _Work(comfy.samplers.Sampler):
    def __init__(self, open_session, work):
        self.open_session, self.work, self.result = open_session, work, None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        self.result = self.work(self.open_session(model_wrap, extra_args, latent_image))
        return latent_image


def private_copy(model):
    """A MODEL of its own with normal tensors (made outside inference mode), so that gradients can flow and nothing is shared [14]; without a table that is on
    the model, not compiled (what TorchCompileModel puts in the network's place is the user's own one), and without EasyCache, which gives an earlier answer."""
    if "bypass_lora" in getattr(model, "injections", {}):
        raise MTEOError("This model has a LoRA in bypass mode, which hooks the shared layers: load the LoRA with the usual LoRA loader.")
    comfy.model_management.unload_all_models()  # text encoders and the like, whose room a backward needs
    if "force_deepcopy" in inspect.signature(type(model).clone).parameters and getattr(model, "cached_patcher_init", None):
        private = model.clone(disable_dynamic=True, force_deepcopy=True)
    else:
        private = deep_copy(model)
    private.model.requires_grad_(False)
    private.remove_additional_models("multigpu")  # their threads run without gradients
    for kind in private.wrappers:
        for key in SPEEDING:
            private.remove_wrappers_with_key(kind, key)
    private.model_options.pop("torch_compile_kwargs", None)
    return remove_embeddings(private)


def deep_copy(model):
    """For a MODEL that cannot make itself anew (ComfyUI 0.3.75, GGUF) and is unloaded, so that no LoRA is in its weights: its network is copied, with as much
    memory again."""
    private, base = model.clone(), model.model
    private.model = copy.copy(base)
    private.model._modules = dict(base._modules)  # a copied module shares this with the original
    private.model.diffusion_model = copy.deepcopy(base.diffusion_model)
    private.model.__dict__.pop(KEPT, None)  # the hooks that stay on a compiled network are the user's
    private.backup, private.parent = {}, None
    return private


@contextmanager
def training_mode():
    """Gradients on; off are fused kernels without a backward, and the buffers through which the weights of a model that is loaded in parts come, one over
    the other, while a backward needs them all. As before afterwards."""
    management = comfy.model_management
    before, streams = getattr(management, "in_training", False), management.NUM_STREAMS
    management.in_training, management.NUM_STREAMS = True, 0
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        management.in_training, management.NUM_STREAMS = before, streams


def plain_attention(function, q, *args, **kwargs):
    """Attention with a backward pass, whatever kernel the user chose for sampling. On a processor PyTorch's fused kernel takes a third of a training step for
    its backward pass, so that the plain sum is taken there."""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        with sdpa_kernel(SDPBackend.MATH):
            return attention_pytorch(q, *args, **kwargs)
    return attention_pytorch(q, *args, **kwargs)


def run_session(model, positives: list, negative, latent: torch.Tensor, work):
    """work(session) under a CFGGuider on `model` (a private copy), one prompt for each conditioning of `positives`; its result."""
    if not positives:
        raise MTEOError("No prompt was given: connect at least one conditioning to positive.")
    model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = plain_attention
    guider = comfy.samplers.CFGGuider(model)
    positives, negative, latent = normal(positives), normal(negative), latent.clone()
    guider.set_conds(positives[0], negative)
    guider.set_cfg(1.0)
    for i, positive in enumerate(positives):
        guider.original_conds[f"prompt{i}"] = comfy.sampler_helpers.convert_cond(positive)
    own = _Work(lambda wrap, extra, latent_image: Session(guider, wrap, extra, latent_image, len(positives)), work)
    ends = torch.tensor([float(model.get_model_object("model_sampling").sigma_max), 0.0])
    guider.sample(torch.zeros_like(latent), latent, own, ends, disable_pbar=True, seed=0)
    return own.result
