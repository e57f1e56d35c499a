"""Tables that evaluate the cfg pair in some steps only."""
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from mteo.recipe import Recipe

RECIPE = Recipe(steps=3, guided=(1,), guidance=(4.0,), iterations=24, batch=12, validate_every=12, pictures=64, held_out=32, teacher_steps=8)


@pytest.fixture(scope="module")
def made(parts):
    from mteo.comfyui.training import distill_model

    with torch.inference_mode():
        return distill_model(*parts, RECIPE)


class Rows:
    """How many pictures the network is asked for, call by call."""

    def __init__(self, network):
        self.network, self.seen = network, []

    def __enter__(self):
        self.handle = self.network.register_forward_pre_hook(lambda module, arguments: self.seen.append(len(arguments[0])))
        return self.seen

    def __exit__(self, *error):
        self.handle.remove()


def test_a_table_guided_in_its_first_step_is_learned(made):
    table = made.embeddings.tables[3]
    assert table.alone == [1, 2] and made.log[-1]["best"] < 0.95 * made.log[0]["held_out"]


@pytest.mark.parametrize("strength, cfg, rows", [(1.0, 4.0, [2, 1, 1]), (0.0, 4.0, [2, 2, 2]), (1.0, 1.0, [1, 1, 1])])
def test_later_steps_ask_for_the_prompt_alone(parts, made, strength, cfg, rows):
    from mteo.comfyui.sampling import sample_latent

    model, positives, negative, latent = parts
    with torch.inference_mode(), Rows(model.model.diffusion_model) as seen:
        sample_latent(model, made.embeddings, {"samples": latent}, 5, positives[0], negative, cfg=cfg, strength=strength)
    assert seen == rows
    if strength and cfg != 1:
        assert sum(seen) == RECIPE.evaluations(cfg)


def test_sampling_gives_what_was_trained(parts, made, monkeypatch):
    """ComfyUI's sampling of the training's noise and prompt: the picture that its previews show, where the session computes in float32 too."""
    import comfy.sample

    from mteo.comfyui import session
    from mteo.comfyui.sampling import applied
    from mteo.comfyui.training import compare_model

    model, positives, negative, latent = parts
    monkeypatch.setattr(session, "short_floats", lambda *told: nullcontext())
    with torch.inference_mode():
        told = compare_model(model, made.embeddings, positives[:1], negative, latent, RECIPE, 1, seed=9)["mteo"]
        patched, sampler, sigmas = applied(model, made.embeddings)
        noise = torch.randn(1, *latent.shape[1:], generator=torch.Generator().manual_seed(9))
        sampled = comfy.sample.sample_custom(patched, noise, 4.0, sampler, sigmas, positives[0], negative, latent, seed=0, disable_pbar=True)
    assert (sampled - told).norm() < 1e-3 * told.norm()


def test_the_file_keeps_which_steps_are_guided(made, tmp_path):
    from mteo.embeddings import load_embeddings, save_embeddings

    save_embeddings(made.embeddings, tmp_path / "table.safetensors")
    assert load_embeddings(tmp_path / "table.safetensors").tables[3].alone == [1, 2]


def test_another_sampler_or_guider_is_refused(parts, made):
    """They would take the pair in every step, where the table stands in for guidance."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    from mteo.comfyui.sampling import applied
    from mteo.errors import MTEOError

    model, positives, negative, latent = parts
    euler = replace(made.embeddings, tables={3: replace(made.embeddings.tables[3], learned=None)})
    with torch.inference_mode():
        patched, sampler, sigmas = applied(model, euler)
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(positives[0], negative)
        guider.set_cfg(4.0)
        noise = torch.randn(latent.shape)
        assert torch.isfinite(guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0)).all()
        with pytest.raises(MTEOError, match="connect the SAMPLER output of Apply MTEO"):
            guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)
        dual = Guider_DualCFG(patched)
        dual.set_conds(positives[0], positives[1], negative)
        dual.set_cfg(4.0, 2.0)
        with pytest.raises(MTEOError, match="Guider_DualCFG cannot"):
            dual.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0)
        with pytest.raises(MTEOError, match="set off_grid to error, not nearest"):
            applied(model, made.embeddings, off_grid="nearest")


def test_any_steps_can_be_guided(parts):
    """The second of three alone."""
    from mteo.comfyui.sampling import sample_latent
    from mteo.comfyui.training import distill_model

    model, positives, negative, latent = parts
    recipe = replace(RECIPE, guided=(2,), iterations=4, validate_every=2)
    with torch.inference_mode():
        made = distill_model(*parts, recipe)
        with Rows(model.model.diffusion_model) as seen:
            sample_latent(model, made.embeddings, {"samples": latent}, 5, positives[0], negative, cfg=4.0)
    assert made.embeddings.tables[3].alone == [0, 2] and seen == [1, 2, 1] and sum(seen) == recipe.evaluations(4.0)


def test_evaluations_are_counted_by_branch():
    assert [Recipe(steps=5, guided=guided).evaluations(4.0) for guided in ("none", (), 2, (1, 3), [5, 4, 3, 2, 1], "all")] == [5, 5, 6, 7, 10, 10]
    assert Recipe(steps=5, guided=1).evaluations(1.0) == 5 and Recipe(steps=4, guided=(3, 1)).alone == [1, 3]


@pytest.mark.parametrize("told, read", [("all", "all"), ("none", ()), ("1 3", (1, 3)), ("3, 1", (1, 3)), (2, (2,)), ([1, 2, 3, 4], "all"), ((), ())])
def test_guided_steps_are_read_as_they_are_written(told, read):
    from mteo.guided import read_guided

    assert read_guided(told, 4) == read


@pytest.mark.parametrize("told", ["", "first", "0", 5, [1, 5], "1 two"])
def test_guided_steps_that_are_none_are_named(told):
    from mteo.errors import MTEOError

    with pytest.raises(MTEOError, match="numbers of steps from 1 to 4"):
        Recipe(steps=4, guided=told)


def test_the_benches_keys_are_of_the_mean_of_all_trainings(comfyui_root):
    from bench.guided import PAIRS, SINGLE, keys_of

    of = lambda fd, error, evaluations=6: {"fd": fd, "error pooled": error, "evaluations": evaluations}
    rows = {"teacher": of(0.1, 0, 48), SINGLE: of(0.3, 0.6), f"{SINGLE}, seed 1": of(0.5, 0.8), "4 steps, guided: 1 3": of(0.2, 0.4)}
    assert keys_of(rows) == {}
    rows |= {"3 steps, guided: 1": of(0.1, 0.1, 4), PAIRS: of(0.4, 0.5), f"{PAIRS}, seed 1": of(0.6, 0.5)}
    assert keys_of(rows) == dict(best="4 steps, guided: 1 3", folded_vs_pairs=0.75, folded_vs_pairs_error=1.4, best_vs_pairs=0.25, best_vs_pairs_error=0.8)
