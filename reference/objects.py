"""MODEL, CLIP and VAE of the reference models, made so that stock CLIPTextEncode, KSampler, VAEDecode and VAEEncode take them."""
from functools import cache, partial
from pathlib import Path

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch
from safetensors.torch import load_file

from . import latents, network
from .vocabulary import END, LENGTH, PAD, START, TOKEN, WORDS, tokenize


def weights_file(kind: str) -> Path:
    """The file that ships: text encoder, network and VAE."""
    return Path(__file__).parent / "weights" / f"{kind}.safetensors"


class Words:
    """A tokenizer with Hugging Face's few methods that ComfyUI's SDTokenizer calls."""

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        return cls()

    def __call__(self, text):
        return {"input_ids": tokenize(text)}

    def get_vocab(self):
        return TOKEN

    def decode(self, tokens, **kwargs):
        return " ".join(WORDS[token] for token in tokens)


class WordTokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__("unused", max_length=LENGTH, pad_with_end=False, pad_token=PAD, embedding_directory=embedding_directory,
                         embedding_size=network.TEXT_WIDTH, embedding_key="mteo", tokenizer_class=Words, tokenizer_data=tokenizer_data or {})


class ReferenceTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=WordTokenizer, name="mteo")


class TextEncoder(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, max_length=LENGTH, textmodel_json_config=dict(network.TEXT), dtype=dtype,
                         special_tokens={"start": START, "end": END, "pad": PAD}, return_projected_pooled=False, model_options=model_options or {})
        network.with_own_words(self.transformer, self.operations)


class ReferenceTextModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, name="mteo", clip_model=TextEncoder)


class ReferenceLatent(comfy.latent_formats.LatentFormat):
    """Mean and scale of the principal components; `process_in` gives every channel a standard deviation of 0.8."""

    scale_factor = 1.0

    def __init__(self, kind: str):
        self.numbers = vae = vae_numbers(kind)
        self.spacial_downscale_ratio, self.latent_channels = latents.SHAPES[kind]
        colour = vae["basis"].reshape(self.latent_channels, 3, -1).mean(2)  # [channel, RGB]: mean colour of a patch
        self.latent_rgb_factors = (colour / vae["scale"][:, None]).tolist()
        self.latent_rgb_factors_bias = (vae["mean"] @ colour).tolist()

    def process_in(self, latent):
        return latents.scaled(latent, self.numbers)

    def process_out(self, latent):
        return latents.unscaled(latent, self.numbers)


@cache
def _file(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"The reference model's weights {path.name} are missing: install the pack again.")
    with torch.inference_mode(False):
        return load_file(path)


def vae_numbers(kind: str) -> dict[str, torch.Tensor]:
    return {name: _file(weights_file(kind))[f"vae.{name}"].float() for name in ("basis", "mean", "scale")}


def _weights(path: Path, part: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{part}."): value.float() for name, value in _file(path).items() if name.startswith(f"{part}.")}


def make_model(kind: str = "unet", disable_dynamic: bool = False, weights: Path | None = None):
    """A MODEL in float32: "unet" (ε-prediction, SD1.x schedule, 32 × H/8 × W/8 latents) or "mmdit" (flow, SD3's shift of 3, 16 × H/4 × W/4).
    weights: a file that `reference.train` wrote for a fine-tune; None: what ships."""
    if kind == "unet":
        family = comfy.supported_models.SD15(dict(network.UNET, dtype=torch.float32))
        family.inpaint_model = lambda: False
    else:
        family = comfy.supported_models.SD3(dict(network.MMDIT, dtype=torch.float32))
    family.latent_format = ReferenceLatent(kind)
    model = family.get_model({}, "model.")
    model.diffusion_model.load_state_dict(_weights(weights or weights_file(kind), kind))
    patcher = as_patcher(model, disable_dynamic)
    # In-graph training asks the patcher for a fresh copy of the model through this pair.
    patcher.cached_patcher_init = partial(make_model, weights=weights), (kind,)
    return patcher


def as_patcher(model, disable_dynamic: bool = False):
    """A MODEL of a network's BaseModel, on ComfyUI's devices; weights are streamed where ComfyUI can."""
    core = comfy.model_patcher.ModelPatcher if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return core(model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device())


def make_clip(kind: str = "unet", weights: Path | None = None):
    """The text encoder as a CLIP: words of the vocabulary, "(word:1.3)" weights work. weights: as of `make_model`."""
    target = comfy.supported_models_base.ClipTarget(ReferenceTokenizer, ReferenceTextModel)
    target.params = {}
    own = _weights(weights or weights_file(kind), "text")
    clip = comfy.sd.CLIP(target, parameters=sum(value.numel() for value in own.values()))
    model = clip.cond_stage_model
    getattr(model, model.clip).transformer.load_state_dict(own)
    return clip


def make_vae(kind: str = "unet"):
    """The linear VAE as a VAE."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    vae.first_stage_model = latents.LinearVAE(vae_numbers(kind)["basis"])
    vae.downscale_ratio = vae.upscale_ratio = vae.first_stage_model.patch
    vae.latent_channels = latents.SHAPES[kind][1]
    vae.patcher = comfy.model_patcher.ModelPatcher(vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device())
    vae.size = None
    return vae
