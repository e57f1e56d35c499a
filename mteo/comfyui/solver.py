"""ComfyUI's samplers read as tables of coefficients, and a ComfyUI sampler that executes such a table."""
from collections.abc import Sequence
from contextlib import contextmanager

import comfy.samplers
import torch
from tqdm.auto import trange

from ..embeddings import Table
from ..errors import MTEOError
from ..schedule import SAME_SIGMA, require_schedule
from ..tableau import MAX_CALLS, Tableau, combine, probe, stopped

KEY = "mteo"  # what is under it in a MODEL is the pack's
OWN = "mteo"  # the name of a SAMPLER that runs a table of coefficients


class _ProbeModel:
    """What a k-diffusion sampler may ask of `model`, around a plain `denoise(x, sigma)`. linear: that a sampler leaves away what it adds to any x_T."""

    linear = True

    def __init__(self, denoise, model_sampling, name: str, cfg: float):
        self._denoise, self._name = denoise, name
        self.model_sampling = model_sampling
        self.inner_model = self.model_patcher = self  # samplers look for model_sampling one and two levels down
        self.cfg = cfg

    def get_model_object(self, name: str):
        if name != "model_sampling":
            raise MTEOError(
                f"The sampler {self._name} asks the model for {name}, so it cannot be read as a table: choose an ODE sampler such as euler or dpmpp_2m."
            )
        return self.model_sampling

    def __call__(self, x, sigma, model_options=None, **kwargs):
        if (model_options or {}).get("sampler_post_cfg_function"):
            raise MTEOError(f"The sampler {self._name} works on both guidance branches (post-cfg), so it is not a plain ODE solver: choose one without cfg_pp.")
        return self._denoise(x, sigma)


def sampler_name(sampler) -> str:
    """The name to show for a SAMPLER object: its function's name without k-diffusion's prefix."""
    function = getattr(sampler, "sampler_function", None)
    return getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")


def named_sampler(name: str):
    """The SAMPLER of that name; MTEOError where ComfyUI has none."""
    if name not in comfy.samplers.SAMPLER_NAMES:
        raise MTEOError(f"The sampler {name} is not known to ComfyUI: choose an ODE sampler such as euler, dpmpp_2m or ipndm.")
    return comfy.samplers.sampler_object(name)


def cfg_of(guider) -> float:
    """The cfg that a guider samples with, of two (DualCFGGuider) the first; 1 where it has none."""
    return float(getattr(guider, "cfg1", getattr(guider, "cfg", 1.0)))


def read_tableau(sampler, sigmas: torch.Tensor, model_sampling, name: str | None = None, cfg: float = 1.0) -> Tableau:
    """The coefficients of a SAMPLER object on `sigmas` [K+1], with the model's own model_sampling, under a guider with `cfg`.

    Raises MTEOError by name where the sampler adds noise, adapts its steps, registers a post-cfg function or is not linear.
    """
    name = name or sampler_name(sampler)
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        raise MTEOError(f"The sampler {name} has a loop of its own, so it cannot be read as a table: choose one from KSamplerSelect.")
    def run(denoise, x, grid):
        model = _ProbeModel(denoise, model_sampling, name, cfg)
        return sampler.sampler_function(model, x, grid, extra_args={"model_options": {}, "seed": 0}, callback=None, disable=True, **sampler.extra_options)

    return probe(run, sigmas, name, max(MAX_CALLS, 2 * len(sigmas)))


def tableau_sampler(
    tableau_at, schedule: Sequence[float], places: Sequence[float], alone: Sequence[int] = (), offsets: bool = False
) -> comfy.samplers.KSAMPLER:
    """A SAMPLER that runs the table of coefficients tableau_at(cfg of its guider) on `schedule` [K + 1], and no other; the calls `alone` ask for the prompt
    alone, as cfg 1 does. places [N]: where in the schedule each call is, whatever σ the table tells there; a schedule that ends early stops at the last call
    with its last σ (`stopped`). offsets: whether it goes with a table on the model, without which it is refused."""

    def sample_mteo(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        require_schedule(schedule, sigmas.tolist())
        guider, last, ones, extra_args = model.inner_model, float(sigmas[-1]), x.new_ones(len(x)), extra_args or {}
        if extra_args.get("denoise_mask") is not None and not hasattr(model, "latent_image"):
            raise MTEOError("The latent has a mask, and a node wraps the SAMPLER so that what the mask keeps does not come through: remove that node.")
        if offsets and not getattr(guider, "linear", False) and patch_of(guider) is None:
            raise MTEOError("The SAMPLER of Apply MTEO is connected, but the model has no table: connect the MODEL output of Apply MTEO, too.")
        cfg = cfg_of(guider)
        tableau = tableau_at(cfg)
        calls = max((call for call, sigma in enumerate(places) if abs(sigma - last) <= SAME_SIGMA * last), default=len(places))
        terms, matrix = [x if getattr(guider, "linear", False) else tableau.begun(x)], stopped(tableau, calls, last)
        told_sigmas = tableau.sigmas.to(x)  # all at once: each copy to a graphics card waits for what is under way there

        x = combine(matrix[0], terms)
        for call in trange(calls, disable=disable):
            sigma = told_sigmas[call]
            with guided_by(guider, 1.0 if call in alone else cfg), told(guider, float(tableau.sigmas[call])):
                shown = model(x, sigma * ones, **(unguided(extra_args) if call in alone else extra_args))
            terms.append(shown)
            after = combine(matrix[call + 1], terms)
            if call + 1 == len(places):
                shown = after = kept(model, after, terms[0], matrix[-1].tolist(), sigma * ones, sigmas, **extra_args)
            if callback is not None:
                callback({"x": x, "i": call * (len(sigmas) - 1) // calls, "sigma": sigma, "sigma_hat": sigma, "denoised": shown, "steps": len(sigmas) - 1})
            x = after
        return x

    return comfy.samplers.KSAMPLER(sample_mteo)


def unguided(extra_args: dict) -> dict:
    """A sampler's extra arguments for a call that asks for the prompt alone: a node's own way to mix two branches (RescaleCFG, PerpNeg) would have one of them
    empty."""
    options = {name: value for name, value in extra_args.get("model_options", {}).items() if name != "sampler_cfg_function"}
    return extra_args | dict(model_options=options)


def kept(model, x, start, row, sigma, sigmas, denoise_mask=None, model_options=None, **options):
    """The picture x [B, …] = row[0]·start + Σ row[1 + i]·D_i with what a mask protects as it was. ComfyUI sees to that in each evaluation
    (`KSamplerX0Inpaint`): D_i = mask·D + (1 − mask)·latent, which is enough where the last evaluation is the picture; of a learned last row, which takes of
    start, too, and whose weights need not sum to 1, it makes mask·picture + (1 − mask)·latent with what is added here."""
    if denoise_mask is None:
        return x
    if change := (model_options or {}).get("denoise_mask_function"):
        denoise_mask = change(sigma, denoise_mask, extra_options={"model": model.inner_model, "sigmas": sigmas})
    return x + (1 - denoise_mask) * ((1 - sum(row[1:])) * model.latent_image - row[0] * start)


def patch_of(guider):
    """The table on the guider's model, None where there is none."""
    get = getattr(getattr(guider, "model_patcher", None), "get_attachment", None)
    return get(KEY) if get else None


@contextmanager
def told(guider, sigma: float | None):
    """Inside, the table on the guider's model knows the σ of the evaluations; to read it from a graphics card would be a wait. None: it is not known."""
    patch = patch_of(guider)
    if patch is None:
        yield
        return
    patch.told = sigma
    try:
        yield
    finally:
        patch.told = None


@contextmanager
def guided_by(guider, cfg: float):
    """Inside, the guider has this cfg."""
    before = cfg_of(guider)
    if cfg == before:
        yield
        return
    guider.cfg = cfg
    try:
        yield
    finally:
        guider.cfg = before


def table_sampler(table: Table, strength: float = 1.0) -> comfy.samplers.KSAMPLER:
    """The SAMPLER of a table: the named one where nothing was learned of it and all calls are guided, else one that executes its coefficients."""
    if table.learned is not None or table.alone or table.solver_options or table.solver not in comfy.samplers.SAMPLER_NAMES:
        places = table.tableau.sigmas.tolist()
        return tableau_sampler(lambda cfg: table.tableau_at(cfg, strength), table.sigmas, places, table.alone if strength else (), strength > 0)
    return comfy.samplers.sampler_object(table.solver)
