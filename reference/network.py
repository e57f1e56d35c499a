"""The reference networks: ComfyUI's own SD1.x UNet, SD3 MMDiT and CLIP text classes with small numbers."""
import torch

from .latents import SHAPES
from .vocabulary import END, LENGTH, WORDS

TEXT_WIDTH = 128

# 12 sites; 4 channels in every GroupNorm(32) group, so that no site is dead (a bias before a group of one vanishes).
UNET = dict(
    image_size=8, in_channels=SHAPES["unet"][1], out_channels=SHAPES["unet"][1], model_channels=128, num_res_blocks=[2, 2], channel_mult=[1, 1],
    transformer_depth=[0, 1, 0, 1], transformer_depth_output=[0, 0, 1, 0, 0, 1], transformer_depth_middle=1, context_dim=TEXT_WIDTH,
    num_heads=4, num_head_channels=-1, use_spatial_transformer=True, legacy=False, use_linear_in_transformer=False,
    adm_in_channels=None,
)

# 9 sites: two a block and the final layer. 64 tokens of 2 × 2 latents (a patch of 1 is one row short in ComfyUI's class); width = 64 · depth.
MMDIT = dict(
    input_size=None, patch_size=2, in_channels=SHAPES["mmdit"][1], depth=4, adm_in_channels=TEXT_WIDTH, qk_norm="rms",
    context_embedder_config=dict(target="torch.nn.Linear", params=dict(in_features=TEXT_WIDTH, out_features=256)),
)

TEXT = dict(
    num_hidden_layers=2, hidden_size=TEXT_WIDTH, num_attention_heads=4, intermediate_size=2 * TEXT_WIDTH, hidden_act="gelu",
    max_position_embeddings=LENGTH, num_positions=LENGTH, eos_token_id=END, projection_dim=TEXT_WIDTH,
    attention_dropout=0.0, layer_norm_eps=1e-5,
)


def build_unet(operations=None, dtype=torch.float32) -> torch.nn.Module:
    """comfy's UNetModel with the numbers above; ComfyUI must be importable. Initialised as PyTorch initialises."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(**UNET, dtype=dtype, device="cpu", **({"operations": operations} if operations else {}))


def build_mmdit(operations=None, dtype=torch.float32) -> torch.nn.Module:
    """comfy's MMDiT with the numbers above."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    return OpenAISignatureMMDITWrapper(**MMDIT, dtype=dtype, device="cpu", **({"operations": operations} if operations else {}))


BUILD = {"unet": build_unet, "mmdit": build_mmdit}


def build_text_encoder(operations, dtype=torch.float32) -> torch.nn.Module:
    """comfy's CLIPTextModel with the numbers above; called with tokens [B, LENGTH] it returns (states [B, LENGTH, width], …)."""
    from comfy.clip_model import CLIPTextModel

    return with_own_words(CLIPTextModel(dict(TEXT), dtype, "cpu", operations), operations)


def with_own_words(text_encoder, operations) -> torch.nn.Module:
    """CLIPTextModel always makes CLIP's 49,408 token embeddings; put in their place one for each word here."""
    text_encoder.set_input_embeddings(operations.Embedding(len(WORDS), TEXT_WIDTH, dtype=torch.float32, device="cpu"))
    return text_encoder


@torch.no_grad()
def fill_randomly(network: torch.nn.Module) -> None:
    """Gives any network the same random weights at each call, of the size that keeps a signal's; normalisations are left plain."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.named_parameters():
        if value.dim() > 1:
            value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
        else:
            value.fill_(name.endswith("weight"))
