"""A table with a denoise below 1 starts from a picture with noise on it, as KSampler does."""
import pytest
import torch

from mteo.errors import MTEOError
from mteo.metrics import nrmse
from mteo.recipe import Recipe
from mteo.tableau import execute

RECIPE = Recipe(denoise=0.6, iterations=16, batch=12, validate_every=8, pictures=32, held_out=16, teacher_steps=8)


@pytest.fixture(scope="module")
def distilled(parts):
    from mteo.comfyui.training import distill_model

    with torch.inference_mode():
        return distill_model(*parts, RECIPE)


def ksampler(model, seed: int, steps: int, solver: str, scheduler: str, positive, negative, latent, denoise: float) -> torch.Tensor:
    """ComfyUI's own KSampler at cfg 1."""
    import nodes

    return nodes.common_ksampler(model, seed, steps, 1.0, solver, scheduler, positive, negative, {"samples": latent}, denoise=denoise)[0]["samples"]


@torch.inference_mode()
def test_it_is_nearer_to_many_steps_than_the_stock_ksampler(distilled, parts):
    """Pictures of one prompt redrawn for another one, from the same noise."""
    from mteo.comfyui.sampling import sample_latent

    model, (positive, other), negative, empty = parts
    pictures = ksampler(model, 1, 24, "dpmpp_2m", "karras", other, negative, empty.expand(16, -1, -1, -1), 1.0)
    redrawn = lambda steps, solver, scheduler: ksampler(model, 2, steps, solver, scheduler, positive, negative, pictures, RECIPE.denoise)
    many = redrawn(24, "dpmpp_2m", "simple")
    error = lambda made: nrmse(made, many)["pooled"]
    plain = min(error(redrawn(3, solver, scheduler)) for solver in ("euler", "dpmpp_2m", "ipndm") for scheduler in ("simple", "sgm_uniform", "karras"))
    assert error(sample_latent(model, distilled.embeddings, {"samples": pictures}, 2, positive)["samples"]) < 0.9 * plain


def test_it_starts_where_the_ksampler_does(distilled, parts):
    sampling, table = parts[0].get_model_object("model_sampling"), distilled.embeddings.tables[3]
    assert table.sigmas[0] == pytest.approx(sampling.percent_to_sigma(1 - RECIPE.denoise), rel=1e-6) and table.sigmas[0] < sampling.sigma_max
    assert float(table.tableau_at(1.0).sigmas[0]) == pytest.approx(table.sigmas[0]), "of a picture under noise more is seen than its mean"
    assert distilled.log[-1]["best"] < 0.9 * distilled.log[0]["held_out"]


@pytest.mark.parametrize("scheduler", ["simple", "sgm_uniform", "karras", "beta"])
def test_a_named_grid_is_the_ksamplers(parts, scheduler):
    import comfy.samplers

    from mteo.comfyui.training import named_grid, start_sigma

    model, steps, denoise = parts[0], 3, 0.7
    stock = comfy.samplers.KSampler(model, steps, "cpu", "euler", scheduler, denoise).sigmas
    sampling = model.get_model_object("model_sampling")
    assert torch.equal(named_grid(sampling, scheduler, steps, denoise), stock)
    assert start_sigma(sampling, Recipe(grid=scheduler, denoise=denoise)) == float(stock[0])


@pytest.mark.parametrize("kind", ["parts", "transformer_parts"])
def test_its_training_starts_from_the_models_own_pictures(kind, request):
    """Of the prompt and of another one by turns, with noise; the teacher goes on from there in about as many steps."""
    from mteo.comfyui.session import private_copy, run_session, training_mode
    from mteo.comfyui.training import start_sigma, starts, teacher_sigmas, teacher_tableau

    model, positives, negative, latent = request.getfixturevalue(kind)

    def look(session):
        item, cfg = torch.tensor([0, 0]), torch.ones(2, dtype=torch.float64)  # of the first two rounds of two prompts
        sigma = torch.tensor(start_sigma(session.sampling, RECIPE))
        made = starts(session, RECIPE, sigma, torch.tensor([0, 2]), item, cfg, 2, 5)
        noise = session.noise(4, 5)[2:]
        pictures = (made - sigma * noise) / (1 - sigma) if session.flow else made - sigma * noise
        many = teacher_tableau(session, teacher_sigmas(session, RECIPE.teacher_steps))
        first = session.start(session.noise(4, 5)[:2], session.sampling.sigma_max)
        drawn = execute(many, lambda x, call, sigma: session.denoise(x, sigma, torch.tensor([0, 1]), cfg), first)
        return pictures, drawn, teacher_sigmas(session, 24, float(sigma)), float(sigma)

    with training_mode(), torch.no_grad():
        pictures, drawn, grid, sigma = run_session(private_copy(model), positives, negative, latent, look)
    assert torch.allclose(pictures, drawn, atol=1e-4)
    assert float(grid[0]) == pytest.approx(sigma) and float(grid[-1]) == 0 and (grid.diff() < 0).all() and 23 <= len(grid) - 1 <= 25


def test_the_benchs_grids_start_at_one_sigma(parts):
    from bench.redraw import grids_from

    sampling = parts[0].get_model_object("model_sampling")
    grids = grids_from(sampling, 3, 0.6, 2.5)
    assert {"karras", "simple", "sgm_uniform"} <= set(grids) and all(float(sigmas[0]) == 2.5 and (sigmas.diff() < 0).all() for sigmas in grids.values())


@torch.inference_mode()
def test_bad_input_gets_one_sentence(distilled, parts):
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    from mteo.comfyui.sampling import applied, sample_latent

    model, (positive, _), _, empty = parts
    with pytest.raises(MTEOError, match="^This table starts from a picture, but the latent is empty"):
        sample_latent(model, distilled.embeddings, {"samples": empty}, 0, positive)
    patched, sampler, sigmas = applied(model, distilled.embeddings)
    with pytest.raises(MTEOError, match="^This table starts from a picture"):
        SamplerCustom.execute(patched, True, 7, 1.0, positive, positive, sampler, sigmas, {"samples": empty})
    with pytest.raises(MTEOError, match="^denoise is 0.01: give a number from 0.05 to 1"):
        Recipe(denoise=0.01)


def test_a_grid_that_starts_below_the_largest_sigma_is_refused(parts, monkeypatch):
    """Some of ComfyUI's schedulers do, with some models."""
    import comfy.samplers

    from mteo.comfyui.training import named_grid

    sampling, stock = parts[0].get_model_object("model_sampling"), comfy.samplers.calculate_sigmas
    monkeypatch.setattr(comfy.samplers, "calculate_sigmas", lambda *facts: 0.9 * stock(*facts))
    with pytest.raises(MTEOError, match="The grid karras gives 3 steps from sigma .*: choose another grid"):
        named_grid(sampling, "karras", 3)
