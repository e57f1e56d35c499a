"""One MODEL with a table, sampled again, otherwise or by another sampler: nothing of the time before stays, and nothing is taken for known that is not."""
import pytest
import torch

from .test_graphs import table_of


def sampled(patched, parts, sampler, sigmas, cfg: float = 4.0, **more) -> torch.Tensor:
    import comfy.sample

    _, positives, negative, empty = parts
    noise = comfy.sample.prepare_noise(empty, 7)
    return comfy.sample.sample_custom(patched, noise, cfg, sampler, sigmas.clone(), positives[0], negative, empty, seed=7, disable_pbar=True, **more)


def named_table(model, solver: str = "euler", fill: float = 0.1):
    """Offsets for a sampler of ComfyUI's with nothing learned of it, three steps of sgm_uniform."""
    import comfy.samplers

    from mteo.comfyui.solver import read_tableau
    from mteo.comfyui.training import named_grid, untrained_table
    from mteo.embeddings import Embeddings

    sampling = model.get_model_object("model_sampling")
    sigmas = named_grid(sampling, "sgm_uniform", 3)
    tableau = read_tableau(comfy.samplers.sampler_object(solver), sigmas, sampling)
    table = untrained_table(model.model.diffusion_model, sampling, "gains", sigmas, solver, tableau)
    table.offsets = {path: rows + fill for path, rows in table.offsets.items()}
    return Embeddings({3: table}, "gains")


def test_where_comfyui_says_no_ratio_an_empty_latent_has_the_models_size(transformer_parts, no_gradients, monkeypatch):
    """0.3.75, whose Empty Latent Image has four channels and an eighth of the size; the reference transformer's latent has a quarter."""
    import comfy.sample

    from mteo.comfyui.sampling import samples_for

    model, *_, empty = transformer_parts
    own = comfy.sample.fix_empty_latent_channels
    monkeypatch.setattr(comfy.sample, "fix_empty_latent_channels", lambda model, latent_image: own(model, latent_image))
    assert samples_for(model, dict(samples=torch.zeros(2, 4, 8, 8))).shape == (2, *empty.shape[1:])
    picture = torch.ones(1, *empty.shape[1:])
    assert samples_for(model, dict(samples=picture)) is picture


def test_at_half_strength_the_rows_are_where_the_sampler_calls(parts, no_gradients):
    """Of a table with σ of its own: halfway between the schedule's and its own."""
    from mteo.comfyui.patch import Patch
    from mteo.comfyui.sampling import sample_latent

    model, positives, negative, empty = parts
    embeddings = table_of()
    table = embeddings.tables[3]
    patch = Patch(table, embeddings.space, 0.5)
    patch.at(4.0)
    for call, sigma in enumerate(table.tableau_at(4.0, 0.5).sigmas.tolist()):
        [window] = patch.rows(torch.tensor([sigma]))
        assert patch.row_of_window[window] == table.tableau.rows[call]
    take = lambda strength: sample_latent(model, embeddings, dict(samples=empty), 7, positives[0], negative, cfg=4.0, strength=strength)["samples"]
    assert not any(torch.equal(take(0.5), take(other)) for other in (0.0, 1.0))


def test_another_cfg_gets_its_own_gains(parts, no_gradients):
    from mteo.comfyui.sampling import applied

    patched, sampler, sigmas = applied(parts[0], table_of())
    one, four, again = (sampled(patched, parts, sampler, sigmas, cfg) for cfg in (1.0, 4.0, 1.0))
    assert torch.equal(one, again) and torch.equal(four, sampled(applied(parts[0], table_of())[0], parts, sampler, sigmas, 4.0))


def test_gains_that_are_hooks_are_there_the_second_time_too(parts, no_gradients, monkeypatch):
    from mteo.comfyui import patch
    from mteo.comfyui.sampling import applied

    monkeypatch.setattr(patch, "foldable", lambda modules: False)
    patched, sampler, sigmas = applied(parts[0], table_of())
    assert torch.equal(sampled(patched, parts, sampler, sigmas), sampled(patched, parts, sampler, sigmas))


def test_gains_are_not_folded_into_weights_that_scheduled_loras_change(parts, no_gradients, monkeypatch):
    import comfy.hooks

    from mteo.comfyui.sampling import applied
    from mteo.folding import Folded

    model, positives, negative, empty = parts
    name = "diffusion_model.middle_block.0.out_layers.0.weight"
    lora = {name.replace("weight", "diff"): torch.full_like(model.model.state_dict()[name], 0.3)}
    hooked = comfy.hooks.set_hooks_for_conditioning(positives[0], comfy.hooks.create_hook_lora(lora, 1.0, 0.0))
    patched, sampler, sigmas = applied(model, table_of())
    plain = sampled(patched, parts, sampler, sigmas)
    monkeypatch.setattr(Folded, "row", lambda self, row: pytest.fail("the weights would not be these in the next evaluation"))
    assert not torch.equal(plain, sampled(patched, (model, [hooked], negative, empty), sampler, sigmas))


def test_what_passed_once_does_not_pass_with_another_sampler_or_model_sampling(parts, no_gradients):
    import comfy.samplers
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    from mteo.comfyui.patch import apply_embeddings
    from mteo.errors import MTEOError

    embeddings = named_table(parts[0])
    patched, sigmas = apply_embeddings(parts[0], embeddings)[0], torch.tensor(embeddings.tables[3].sigmas)
    euler, heun = (comfy.samplers.sampler_object(name) for name in ("euler", "heun"))
    sampled(patched, parts, euler, sigmas)
    with pytest.raises(MTEOError, match="The sampler heun is not the one"):
        sampled(patched, parts, heun, sigmas)
    with pytest.raises(MTEOError, match="remove the node that changes the model's sampling"):
        sampled(ModelSamplingDiscrete().patch(patched, "v_prediction", True)[0], parts, euler, sigmas)


def test_a_sigma_that_was_told_is_forgotten(parts, no_gradients):
    """A stock sampler after the table's own asks the evaluations for σ."""
    import comfy.samplers

    from mteo.comfyui.sampling import applied

    patched, sampler, sigmas = applied(parts[0], table_of(), off_grid="off")
    fresh = applied(parts[0], table_of(), off_grid="off")[0]
    sampled(patched, parts, sampler, sigmas)
    assert patched.get_attachment("mteo").told is None
    euler = comfy.samplers.sampler_object("euler")
    assert torch.equal(sampled(patched, parts, euler, sigmas), sampled(fresh, parts, euler, sigmas))


def test_the_numbers_of_the_steps_do_not_run_past_the_last_one(parts, no_gradients):
    """Heun's five calls are three steps."""
    from mteo.comfyui.sampling import applied

    embeddings, told = named_table(parts[0], "heun"), []
    table = embeddings.tables[3]
    table.learned = [table.tableau]
    patched, sampler, sigmas = applied(parts[0], embeddings)
    sampled(patched, parts, sampler, sigmas, callback=lambda step, denoised, x, steps: told.append((step, steps)))
    assert told == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3)]


def test_a_batch_takes_the_noise_that_the_latent_says(parts, no_gradients):
    from mteo.comfyui.sampling import sample_latent

    model, positives, negative, empty = parts
    take = lambda latent, seed=7, **more: sample_latent(model, table_of(), latent, seed, positives[0], negative, cfg=4.0, **more)["samples"]
    both, second = take(dict(samples=empty.repeat(2, 1, 1, 1))), take(dict(samples=empty, batch_index=[1]))
    assert second.allclose(both[1:], atol=1e-4) and not second.allclose(both[:1], atol=1e-2)
    noisy = dict(samples=torch.randn(empty.shape, generator=torch.Generator().manual_seed(3)))
    without = [take(noisy, seed, add_noise=False) for seed in (7, 8)]
    assert torch.equal(*without) and not torch.equal(without[0], take(noisy))


def test_between_two_rows_the_nearer_one_has_the_larger_share(comfyui_root):
    from math import log

    from mteo.comfyui.patch import Patch, between
    from mteo.injection import Offsets

    low, high, share = between(torch.tensor([8.0, 2.0]), torch.tensor([3.0, 4.0, 20.0, 1.0]))
    assert low.tolist() == [1] * 4 and high.tolist() == [0] * 4
    assert share.tolist() == pytest.approx([log(1.5) / log(4), 0.5, 1.0, 0.0])
    offsets = Offsets({"middle_block.0.emb_layers.1": torch.tensor([[8.0], [4.0]])})
    offsets.select(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.25]))
    assert offsets.current["middle_block.0.emb_layers.1"].item() == 0.75 * 8 + 0.25 * 4
    embeddings = table_of()
    patch = Patch(embeddings.tables[3], embeddings.space, off_grid="nearest")
    first, second = patch.row_sigmas[:2].tolist()
    middle = (first * second) ** 0.5  # by ln σ; the mean of both is larger
    assert [int(patch.rows(torch.tensor([sigma]))[0]) for sigma in (1.05 * middle, 0.95 * middle)] == [0, 1]


def test_a_lora_that_is_merged_does_not_make_another_model(parts, no_gradients):
    import comfy.model_management

    from mteo.comfyui.identity import model_fingerprint
    from reference.objects import make_model

    path, model = "middle_block.0.emb_layers.1", make_model(disable_dynamic=True)
    module = model.model.diffusion_model.get_submodule(path)
    plain, weight = model_fingerprint(model, [path]), module.weight.clone()
    lora = model.clone()
    lora.add_patches({f"diffusion_model.{path}.weight": (torch.full_like(weight, 3.0),)}, 1.0)
    comfy.model_management.load_models_gpu([lora])
    try:
        assert not torch.equal(module.weight, weight), "it is merged"
        assert model_fingerprint(lora, [path]) == plain
    finally:
        comfy.model_management.unload_all_models()


@pytest.mark.parametrize("fails", [False, True])
def test_loras_on_packed_weights_are_there_afterwards(comfyui_root, fails):
    from types import SimpleNamespace

    from mteo.comfyui.identity import dequantized

    loras = [("a LoRA", "its key")]
    weight = SimpleNamespace(patches=loras)

    def unpack(packed, dtype):
        assert packed.patches == []
        if fails:
            raise RuntimeError("unknown packing")
        return torch.ones(2, dtype=dtype)

    if fails:
        with pytest.raises(RuntimeError):
            dequantized(SimpleNamespace(get_weight=unpack), weight)
    else:
        assert dequantized(SimpleNamespace(get_weight=unpack), weight).tolist() == [1, 1]
    assert weight.patches is loras
