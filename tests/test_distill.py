"""Distillation inside ComfyUI's sampling, on the reference model."""
import pytest
import torch


@pytest.fixture(scope="module")
def distilled(comfyui_root):
    with torch.inference_mode():
        import nodes

        from mteo.comfyui.training import distill_model
        from mteo.distill import Settings
        from reference.objects import make_clip, make_model

        clip, model = make_clip(), make_model()
        encode = lambda text: nodes.CLIPTextEncode().encode(clip, text)[0]
        weights = {name: value.clone() for name, value in model.model.diffusion_model.state_dict().items()}
        lines = []
        embeddings = distill_model(
            model, [encode("cat and apple"), encode("car")], encode(""), torch.zeros(1, 32, 8, 8), 3, "euler", "sgm_uniform",
            Settings(end_to_end=8, batch=8, validate_every=4), pictures=32, held_out=32, teacher_steps=8, progress=lambda state, line: lines.append(line),
        )
        return model, weights, embeddings, lines


def test_a_short_distillation_lowers_the_held_out_error(distilled):
    *_, lines = distilled
    assert lines[-1]["iteration"] == 8 and lines[-1]["best"] < 0.8 * lines[0]["held_out"]


def test_the_users_model_is_as_it_was(distilled):
    model, weights, *_ = distilled
    network = model.model.diffusion_model
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_the_file_is_small_and_comes_back(distilled, tmp_path):
    from mteo.embeddings import load_embeddings, save_embeddings

    path = tmp_path / "table.safetensors"
    save_embeddings(distilled[2], path)
    assert path.stat().st_size <= 200_000
    assert load_embeddings(path).tables[3].corrected
