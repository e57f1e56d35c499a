"""Does a table that does nothing change no bit, and does a solver's table give what the solver gives? On the processor."""
import argparse
import gc

import comfy.sample
import comfy.samplers
import torch

from mteo.comfyui.patch import apply_embeddings, remove_embeddings
from mteo.comfyui.solver import read_tableau, tableau_sampler
from mteo.comfyui.training import untrained_table
from mteo.embeddings import Embeddings
from mteo.recipe import Recipe
from mteo.tableau import combine

from .parts import named_grids, parts

# ComfyUI's UniPC sets the caller's last σ to .001, by which a flow model's result is then divided: .1 % off its own coefficients [5]
BRIGHTER = ("uni_pc", "mmdit")
SOLVERS = ("euler", "heun", "dpmpp_2m", "ipndm", "deis", "res_multistep", "uni_pc")


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench exactness", description=__doc__)
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--space", default=Recipe().space, help="where the tables act")
    told = parser.parse_args(arguments)
    own, failures, cases = parts(5, 1, True, told.model), [], 0
    with torch.inference_mode():
        for solver in SOLVERS:
            for cfg in (1.0, 4.0):
                for batch in (1, 4):
                    for start in (0, 2):  # a full denoise, and one that starts at the third of five steps
                        for case, equal in unchanged(own, told.space, solver, cfg, batch, start):
                            cases += 1
                            if not equal:
                                failures.append(f"{case}: {solver}, cfg {cfg:g}, batch {batch}, start {start}")
        errors = {
            f"{solver}/{grid}/{steps}": solver_errors(own, solver, grid, steps)
            for solver in SOLVERS
            if (solver, told.model) != BRIGHTER
            for grid in ("normal", "karras", "sgm_uniform", "beta")
            for steps in (3, 4)
        }
    worst = [max(errors, key=lambda name, which=which: errors[name][which]) for which in (0, 1)]
    solver, whole = (errors[name][which] for which, name in enumerate(worst))
    print(f"{cases} cases, {len(failures)} failed; largest solver error {solver:.2g} at {worst[0]}, with the network answering each {whole:.2g} at {worst[1]}")
    return {"bit_identical": not failures, "solver_error": solver, "sampling_error": whole, "cases": cases, "failures": failures}


def latent(own, sampler, sigmas, cfg, batch=1, model=None, callback=None, full=True):
    """The sampled latent; a partial denoise starts from a latent that is not empty."""
    empty = own.latent.expand(batch, -1, -1, -1).contiguous()
    start = empty if full else 0.3 * comfy.sample.prepare_noise(empty, 5)
    noise = comfy.sample.prepare_noise(empty, 3)
    return comfy.sample.sample_custom(
        model or own.model, noise, cfg, sampler, sigmas.clone(), own.positives[0], own.negative, start, callback=callback, disable_pbar=True, seed=3
    )


def table_of(own, solver: str, sigmas, fill: float, space: str) -> Embeddings:
    sampling = own.model.get_model_object("model_sampling")
    tableau = read_tableau(comfy.samplers.sampler_object(solver), sigmas, sampling, solver)
    table = untrained_table(own.model.model.diffusion_model, sampling, space, sigmas, solver, tableau)
    table.offsets = {path: rows + fill for path, rows in table.offsets.items()}
    return Embeddings({table.steps: table}, space)


def unchanged(own, space: str, solver: str, cfg: float, batch: int, start: int):
    """(case, is it bit for bit the unpatched model's latent)"""
    sigmas = named_grids(own.model.get_model_object("model_sampling"), 5 if start else 3)["sgm_uniform"][start:]
    sampler = comfy.samplers.sampler_object(solver)
    take = lambda model, **more: latent(own, sampler, sigmas, cfg, batch, model, full=not start, **more)
    plain = take(own.model)
    zero, _ = apply_embeddings(own.model, table_of(own, solver, sigmas, 0.0, space))
    filled, _ = apply_embeddings(own.model, table_of(own, solver, sigmas, 0.2, space))
    moved = take(filled)
    yield "a table that is not zero acts", not torch.equal(moved, plain)
    yield "zero table", torch.equal(take(zero), plain)
    off, _ = apply_embeddings(own.model, table_of(own, solver, sigmas, 0.2, space), strength=0.0)
    yield "strength 0", torch.equal(take(off), plain)
    yield "removed", torch.equal(take(remove_embeddings(filled.clone())), plain)

    def drop_a_clone(*told):
        clone = filled.clone()
        del clone
        gc.collect()

    yield "a clone dropped in mid-sampling", torch.equal(take(filled, callback=drop_a_clone), moved)
    yield "the unpatched model afterwards", torch.equal(take(own.model), plain)


def recording(sampler):
    """(the same SAMPLER, a list that gets x_T and then every denoised of its next run)."""
    seen = []

    class Listening:
        def __init__(self, model):
            self.model = model

        def __getattr__(self, name):
            return getattr(self.model, name)

        def __call__(self, x, sigma, **kwargs):
            if not seen:
                seen.append(x.clone())
            seen.append(self.model(x, sigma, **kwargs).clone())
            return seen[-1]

    return comfy.samplers.KSAMPLER(lambda model, *rest, **options: sampler.sampler_function(Listening(model), *rest, **options)), seen


def solver_errors(own, solver: str, grid: str, steps: int) -> tuple[float, float]:
    """(solver, sampling): largest difference of ComfyUI's sampler and its table, relative to the largest value: for the same answers of
    the network, and with the network answering each (which adds how much it enlarges float32's rounding)."""
    sampling = own.model.get_model_object("model_sampling")
    sigmas, sampler = named_grids(sampling, steps)[grid], comfy.samplers.sampler_object(solver)
    listening, seen = recording(sampler)
    one, tableau = latent(own, listening, sigmas, 4.0), read_tableau(sampler, sigmas, sampling, solver)
    same = own.model.model.process_latent_out(combine(tableau.matrix[-1], seen))
    two = latent(own, tableau_sampler(lambda cfg: tableau, sigmas.tolist(), tableau.sigmas.tolist()), sigmas, 4.0)
    return tuple(float((one - other).abs().max() / one.abs().max()) for other in (same, two))
