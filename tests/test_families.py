"""The networks of SDXL, SD 2 and SD 3.5 medium in small, with random weights: ComfyUI's own classes, with what they ask of a conditioning and each kind of
prediction."""
import pytest
import torch

NETWORK = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2], transformer_depth=[0, 1],
    transformer_depth_output=[0, 0, 1, 1], transformer_depth_middle=1, use_linear_in_transformer=True, context_dim=32, num_heads=-1, num_head_channels=32,
    use_spatial_transformer=True, legacy=False, dtype=torch.float32,
)
SDXL = dict(NETWORK, num_classes="sequential", adm_in_channels=2816)
SD2 = dict(NETWORK, adm_in_channels=None)
SD35 = dict(
    input_size=None, patch_size=2, in_channels=16, depth=2, adm_in_channels=2048, qk_norm="rms", x_block_self_attn_layers=[0], dtype=torch.float32,
    context_embedder_config=dict(target="torch.nn.Linear", params=dict(in_features=32, out_features=128)),
)
V_OF_SD2 = {"model.output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.linspace(-1, 1, 32)}  # by its spread ComfyUI knows SD 2's v-prediction
ONE = torch.tensor(1.0)

# ComfyUI's class, its network's numbers, what its checkpoint says of the prediction, the prediction's name there, the largest σ, layers that take in time
FAMILIES = {
    "SDXL": ("SDXL", SDXL, {}, "EPS", 14.6146, 8),
    "SDXL, v, zero terminal SNR": ("SDXL", SDXL, {"v_pred": ONE, "ztsnr": ONE}, "V_PREDICTION", 4518.76, 8),
    "SDXL, EDM": ("SDXL", SDXL, {"edm_mean": ONE, "edm_std": ONE}, "EDM", 80.0, 8),
    "SD 2, v": ("SD20", SD2, V_OF_SD2, "V_PREDICTION", 14.6146, 8),
    "SD 3.5 medium": ("SD3", SD35, {}, "FLOW", 1.0, 5),
}


def build(name: str, disable_dynamic: bool = False):
    """The MODEL as ComfyUI's loader makes it, and as an in-graph training asks for a copy of it."""
    import comfy.supported_models

    from reference.network import fill_randomly
    from reference.objects import as_patcher

    kind, numbers, checkpoint, *_ = FAMILIES[name]
    family = getattr(comfy.supported_models, kind)(dict(numbers))
    model = family.get_model(checkpoint, "model.")
    fill_randomly(model.diffusion_model)
    patcher = as_patcher(model, disable_dynamic)
    patcher.cached_patcher_init = build, (name,)
    return patcher


def conditioning(pooled: int, seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, 77, 32, generator=generator), dict(pooled_output=torch.randn(1, pooled, generator=generator), width=512, height=512)]]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_table_is_distilled_and_acts(name, comfyui_root):
    import comfy.sample

    from mteo.comfyui.sampling import applied
    from mteo.comfyui.training import distill_model
    from mteo.recipe import Recipe
    from mteo.sites import is_gain
    from trainer.comfyui import empty_latent

    recipe = Recipe(guidance=(5.0,), pictures=4, held_out=4, iterations=2, batch=4, validate_every=2, teacher_steps=6)
    with torch.inference_mode():
        model = build(name)
        prompt, negative = (conditioning(2048 if name.startswith("SD 3") else 1280, seed) for seed in (1, 2))
        latent = empty_latent(model, 64, 64)
        made = distill_model(model, [prompt], negative, latent, recipe)
    table, (*_, prediction, sigma_max, layers) = made.embeddings.tables[3], FAMILIES[name]
    assert model.model.model_type.name == prediction
    assert table.sigmas[0] == pytest.approx(sigma_max, rel=1e-5)
    assert sum(not is_gain(path) for path in table.offsets) == layers
    assert all(torch.isfinite(torch.tensor([line["loss"], line["held_out"], line["unlike"]])).all() for line in made.log[1:])

    for rows in table.offsets.values():
        rows.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    noise = comfy.sample.prepare_noise(latent, 4)

    @torch.inference_mode()
    def picture(strength: float, on=None):
        patched, sampler, sigmas = applied(model, made.embeddings, strength=strength)
        return comfy.sample.sample_custom(on or patched, noise, 5.0, sampler, sigmas, prompt, negative, latent, disable_pbar=True)

    plain = picture(0.0)
    assert torch.equal(plain, picture(0.0, on=model)), "strength 0 is the plain model, bit for bit"
    assert plain.isfinite().all() and (picture(1.0) - plain).norm() > 1e-3 * plain.norm()
