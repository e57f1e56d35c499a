"""What another node on the model, the sampler or a conditioning does to a table: it acts as without the table, or is refused or named."""
import pytest
import torch

from .test_again import named_table, sampled
from .test_graphs import table_of


@pytest.mark.parametrize("changing", [False, True])
def test_a_soft_mask_weighs_as_with_comfyuis_euler(parts, no_gradients, changing):
    """A table whose coefficients are Euler's and whose offsets are 0."""
    import comfy.samplers
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    from mteo.comfyui.sampling import applied

    model, empty = parts[0], parts[3]
    embeddings = named_table(model, fill=0.0)
    embeddings.tables[3].learned = [embeddings.tables[3].tableau]
    patched, sampler, sigmas = applied(DifferentialDiffusion.execute(model)[0] if changing else model, embeddings)
    source, mask = torch.randn(empty.shape, generator=torch.Generator().manual_seed(3)), torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    take = lambda sampler: sampled(patched, (*parts[:3], source), sampler, sigmas, noise_mask=mask)
    assert take(sampler).allclose(take(comfy.samplers.sampler_object("euler")), atol=1e-4) and (take(sampler) - source).std() > 0.1


def test_a_mask_blends_what_any_last_row_makes(no_gradients):
    from types import SimpleNamespace

    from mteo.comfyui.solver import kept
    from mteo.tableau import combine

    draw, row = lambda: torch.randn(2, 4, 8, 8, generator=generator), [0.3, -0.5, 0.2, 1.4]
    generator = torch.Generator().manual_seed(0)
    start, latent, *answers = (draw() for _ in range(5))
    mask = torch.rand(1, 1, 8, 8, generator=generator)
    blend = lambda picture: mask * picture + (1 - mask) * latent
    made = combine(torch.tensor(row), [start, *map(blend, answers)])
    wanted = blend(combine(torch.tensor(row), [start, *answers]))
    assert kept(SimpleNamespace(latent_image=latent), made, start, row, None, None, denoise_mask=mask).allclose(wanted, atol=1e-5)


def test_a_mask_behind_a_wrapped_sampler_is_refused(parts, no_gradients):
    """Lying Sigma and its kind hand on a plain function in the model's place."""
    import comfy.samplers

    from mteo.comfyui.sampling import applied
    from mteo.errors import MTEOError

    patched, sampler, sigmas = applied(parts[0], table_of())

    def sample_lying(model, x, sigmas, **options):
        def lying(x, sigma, **more):
            return model(x, sigma, **more)

        lying.inner_model, lying.sigmas = model.inner_model, sigmas
        return sampler.sampler_function(lying, x, sigmas, **options)

    take = lambda **more: sampled(patched, parts, comfy.samplers.KSAMPLER(sample_lying), sigmas, **more)
    assert torch.equal(take(), sampled(patched, parts, sampler, sigmas))
    with pytest.raises(MTEOError, match="The latent has a mask, and a node wraps the SAMPLER"):
        take(noise_mask=torch.ones(1, 1, 64, 64))


def test_a_call_for_the_prompt_alone_mixes_no_branches(parts, no_gradients):
    """A node's own way to mix them (RescaleCFG, PerpNeg) would be given an empty one, in sampling and in a training."""
    from mteo.comfyui.sampling import sample_latent
    from mteo.comfyui.training import distill_model
    from mteo.recipe import Recipe

    model, positives, negative, empty = parts
    mixed, seen = model.clone(), []

    def mix(args):
        seen.append(bool(args["uncond_denoised"].any()))
        return args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]

    mixed.set_model_sampler_cfg_function(mix)
    take = lambda of: sample_latent(of, table_of("reference-4steps-guided-1-3"), dict(samples=empty), 7, positives[0], negative, cfg=4.0)["samples"]
    assert take(mixed).allclose(take(model), atol=1e-4) and seen == [True, True]
    recipe = Recipe(grid="karras", guided=(1,), guidance=(4.0,), rows="last", pictures=4, held_out=2, teacher_steps=4, iterations=1, batch=4, validate_every=1)
    distill_model(mixed, positives, negative, empty, recipe)
    assert all(seen)


def test_a_merge_is_another_model(parts, no_gradients, caplog):
    from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeSimple

    from mteo.comfyui.identity import model_fingerprint
    from mteo.comfyui.patch import apply_embeddings
    from mteo.comfyui.sampling import applied
    from mteo.errors import MTEOError
    from mteo.fingerprint import difference
    from reference.objects import make_model

    model, other, paths = parts[0], make_model(), list(table_of().model["fingerprint"])
    generator = torch.Generator().manual_seed(0)
    for weight in other.model.diffusion_model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std(correction=0))
    merged = lambda first, ratio: ModelMergeSimple().merge(first, other, ratio)[0]
    assert difference(model_fingerprint(merged(model, 0.0), paths), model_fingerprint(other, paths)) < 1e-3
    for ratio in (0.0, 0.3):
        with pytest.raises(MTEOError, match="This table was distilled for another model"):
            apply_embeddings(merged(model, ratio), table_of())
    with pytest.raises(MTEOError, match="This table was distilled for another model"):
        apply_embeddings(ModelAdd().merge(model, other)[0], table_of())
    patched, sampler, sigmas = applied(model, table_of())
    with pytest.raises(MTEOError, match="This table was distilled for another model"):
        sampled(merged(patched, 0.0), parts, sampler, sigmas)
    assert not caplog.records
    assert torch.equal(sampled(ModelMergeSimple().merge(patched, model, 1.0)[0], parts, sampler, sigmas), sampled(patched, parts, sampler, sigmas))
    sampled(merged(patched, 0.9), parts, sampler, sigmas)
    assert "for a sibling of this model" in caplog.text


@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_a_cache_of_evaluations_is_refused(parts, no_gradients, name):
    from comfy_extras import nodes_easycache

    from mteo.comfyui.sampling import sample_latent
    from mteo.errors import MTEOError

    model, positives, negative, empty = parts
    cached = getattr(nodes_easycache, f"{name}Node").execute(model, 0.2, 0.15, 0.95, False)[0]
    with pytest.raises(MTEOError, match=f"{name} leaves out some evaluations"):
        sample_latent(cached, table_of(), dict(samples=empty), 7, positives[0], negative, cfg=4.0)


def test_what_is_for_a_part_without_evaluations_is_said(parts, no_gradients, caplog):
    """The calls of a table with guidance are all in the first half of the schedule."""
    import nodes
    from mteo.comfyui.sampling import sample_latent

    model, positives, negative, empty = parts
    timed = lambda start, end: nodes.ConditioningSetTimestepRange().set_range(positives[1], start, end)[0]
    take = lambda *more: sample_latent(model, table_of(), dict(samples=empty), 7, [*positives[0], *more], negative, cfg=4.0)["samples"]
    whole = take()
    assert torch.equal(take(*timed(0.6, 1.0)), whole) and "is for 60 to 100 % of the sampling, and does nothing" in caplog.text
    caplog.clear()
    assert not torch.equal(take(*timed(0.1, 1.0)), whole) and not caplog.records
