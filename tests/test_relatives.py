"""Fine-tunes and LoRAs of the reference model, as the generality bench makes them."""
import pytest
import torch


@pytest.fixture(scope="module")
def fine_tune(comfyui_root, tmp_path_factory):
    """Weights with noise of rank 4 on one projection and on one layer of the text encoder."""
    from safetensors.torch import load_file, save_file

    from reference.objects import weights_file

    values, generator = load_file(weights_file("unet")), torch.Generator().manual_seed(1)
    for name in CHANGED:
        down, up = torch.randn(4, values[name].shape[1], generator=generator), torch.randn(values[name].shape[0], 4, generator=generator)
        values[name] = (values[name].float() + 0.02 * up @ down).half()
    path = tmp_path_factory.mktemp("weights") / "tuned.safetensors"
    save_file(values, path)
    return path, values


NETWORK, TEXT = CHANGED = ("unet.middle_block.1.transformer_blocks.0.attn2.to_k.weight", "text.text_model.encoder.layers.0.mlp.fc1.weight")


def test_a_fine_tune_is_loaded_and_copied_with_its_own_weights(fine_tune):
    from mteo.comfyui.session import private_copy, training_mode
    from reference.objects import make_clip, make_model

    path, values = fine_tune
    model, words = make_model(weights=path), make_clip(weights=path).cond_stage_model
    with training_mode():
        private = private_copy(model)
    for one in (model, private):
        assert torch.equal(one.model.diffusion_model.state_dict()[NETWORK.removeprefix("unet.")], values[NETWORK].float())
    assert torch.equal(getattr(words, words.clip).transformer.state_dict()[TEXT.removeprefix("text.")], values[TEXT].float())
    assert not torch.equal(make_model().model.diffusion_model.state_dict()[NETWORK.removeprefix("unet.")], values[NETWORK].float())


def test_the_lora_of_a_fine_tune_brings_the_base_to_it(fine_tune):
    """What ComfyUI extracts and loads again: with it the base answers nearly as the fine-tune does; the extraction cuts the largest hundredth of the
    numbers."""
    import comfy.sd

    from bench.generality import RANK, extracted
    from bench.parts import parts_of, teacher_pairs
    from reference.objects import make_clip, make_model

    path, _ = fine_tune
    lora = extracted("unet", path)
    assert RANK >= 4 and any(name.startswith("text_encoders.") for name in lora)
    ends = [
        teacher_pairs(parts_of(model, clip, ["cat", "dog and tree"]), 2, 2.0, 1, 4).end
        for model, clip in (
            (make_model(), make_clip()),
            (make_model(weights=path), make_clip(weights=path)),
            comfy.sd.load_lora_for_models(make_model(), make_clip(), lora, 1.0, 1.0),
        )
    ]
    base, tuned, adapted = ends
    assert (adapted - tuned).norm() < 0.5 * (base - tuned).norm()


def test_ink_is_another_style_of_the_same_scene_at_any_size(comfyui_root):
    from reference import scenes

    names = scenes.draw_names(2, torch.Generator().manual_seed(0))
    sprites = torch.rand(1 + int(names.max()), 4, scenes.SPRITE, scenes.SPRITE)
    for size in (64, 96):
        pictures = scenes.compose(names, sprites, torch.Generator().manual_seed(1), size)
        inked = scenes.ink(pictures)
        assert pictures.shape == inked.shape == (2, 3, size, size) and inked.abs().max() <= 1
        assert inked.diff(dim=1).abs().mean() < pictures.diff(dim=1).abs().mean(), "less colour"
