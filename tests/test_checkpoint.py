"""The headless trainer on a checkpoint file, through ComfyUI's own loader: SD 1.5's layout with fewer blocks and random weights."""
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from .test_trainer import trainer

NETWORK = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1, 1], channel_mult=[1, 1], transformer_depth=[1, 0],
    transformer_depth_output=[1, 1, 0, 0], transformer_depth_middle=1, use_linear_in_transformer=False, context_dim=768, num_heads=8, num_head_channels=-1,
    use_spatial_transformer=True, legacy=False, adm_in_channels=None, dtype=torch.float32,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(comfyui_root, tmp_path_factory):
    """Network, CLIP ViT-L and TAESD in one file, as ComfyUI's loader reads them."""
    import comfy.sd1_clip
    import comfy.supported_models
    from comfy.taesd.taesd import TAESD

    from reference.network import fill_randomly

    network = comfy.supported_models.SD15(dict(NETWORK)).get_model({}, "model.").diffusion_model
    text = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32).transformer
    tensors, vae = {}, TAESD()
    for prefix, module in (("model.diffusion_model.", network), ("cond_stage_model.transformer.", text), ("first_stage_model.", vae)):
        fill_randomly(module)
        tensors |= {prefix + name: value.half().contiguous() for name, value in module.state_dict().items()}
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    save_file(tensors, path)
    (path.parent / "prompts.txt").write_text("a cat\na red car\n")
    return path


def test_a_checkpoint_is_distilled_and_sampled(checkpoint):
    place = checkpoint.parent
    size = ("--width", 64, "--height", 64)
    few = ("--guidance", 4, "--pictures", 4, "--held-out", 2, "--teacher-steps", 4, "--iterations", 2, "--batch", 2, "--validate-every", 1)
    told = trainer("distill", "--model", checkpoint, "--prompts", place / "prompts.txt", "--folder", place / "run", *size, *few)
    assert told.returncode == 0, told.stderr[-3000:]
    assert len(list((place / "run" / "previews").glob("*.png"))) == 3 and Image.open(place / "run" / "sheet.png").width > 100
    table, picture = place / "run" / "table.safetensors", place / "cat.png"
    told = trainer("sample", table, "a cat", "--model", checkpoint, *size, "--cfg", 4, "--count", 1, "--out", picture)
    assert told.returncode == 0 and picture.is_file(), told.stderr[-3000:]


def test_what_a_checkpoint_lacks_is_said(checkpoint, tmp_path):
    tensors = load_file(checkpoint)
    for lacking, sentence in (("cond_stage_model.", "has no text encoder"), ("first_stage_model.", "is no checkpoint with a network and a VAE")):
        part = tmp_path / "part.safetensors"
        save_file({name: value for name, value in tensors.items() if not name.startswith(lacking)}, part)
        told = trainer("diagnose", "--model", part, "--prompts", checkpoint.parent / "prompts.txt", "--width", 64, "--height", 64)
        assert told.returncode == 1 and sentence in told.stderr and "Traceback" not in told.stderr, told.stderr[-2000:]
