"""ComfyUI's samplers read as tables of coefficients, and a ComfyUI sampler that executes such a table."""
import comfy.samplers
import torch

from ..errors import MTEOError
from ..tableau import Tableau, execute, probe


class _ProbeModel:
    """What a k-diffusion sampler may ask of `model`, around a plain `denoise(x, sigma)`."""

    def __init__(self, denoise, model_sampling, name: str):
        self._denoise, self._name = denoise, name
        self.model_sampling = model_sampling
        self.inner_model = self.model_patcher = self  # samplers look for model_sampling one and two levels down
        self.cfg = 1.0

    def get_model_object(self, name: str):
        if name != "model_sampling":
            raise MTEOError(f"The sampler {self._name} asks the model for {name}, so it cannot be read as a table: choose an ODE sampler such as euler or dpmpp_2m.")
        return self.model_sampling

    def __call__(self, x, sigma, model_options=None, **kwargs):
        if (model_options or {}).get("sampler_post_cfg_function"):
            raise MTEOError(f"The sampler {self._name} works on both guidance branches (post-cfg), so it is not a plain ODE solver: choose one without cfg_pp.")
        return self._denoise(x, sigma)


def sampler_name(sampler) -> str:
    """The name to show for a SAMPLER object: its function's name without k-diffusion's prefix."""
    function = getattr(sampler, "sampler_function", None)
    return getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")


def read_tableau(sampler, sigmas: torch.Tensor, model_sampling, name: str | None = None) -> Tableau:
    """The coefficients of a SAMPLER object on `sigmas` [K+1], with the model's own model_sampling.

    Raises MTEOError by name where the sampler adds noise, adapts its steps, registers a post-cfg function or is not linear.
    """
    name = name or sampler_name(sampler)
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        raise MTEOError(f"The sampler {name} has a loop of its own, so it cannot be read as a table: choose one from KSamplerSelect.")
    if sampler.inpaint_options.get("random"):
        sampler = comfy.samplers.KSAMPLER(sampler.sampler_function, sampler.extra_options)  # ddim: inpainting noise only

    def run(denoise, x, grid):
        model = _ProbeModel(denoise, model_sampling, name)
        return sampler.sampler_function(model, x, grid, extra_args={"model_options": {}, "seed": 0}, callback=None, disable=True, **sampler.extra_options)

    return probe(run, sigmas, name)


def tableau_sampler(tableau: Tableau) -> comfy.samplers.KSAMPLER:
    """A SAMPLER that runs the stored table: for solvers whose coefficients were corrected."""

    def sample_mteo(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        ones, calls = x.new_ones(len(x)), len(tableau.sigmas)

        def denoise(x_call, call, sigma):
            denoised = model(x_call, sigma * ones, **(extra_args or {}))
            if callback is not None:
                callback({"x": x_call, "i": call, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised, "steps": calls})
            return denoised

        with torch.no_grad():
            return execute(tableau, denoise, x)

    return comfy.samplers.KSAMPLER(sample_mteo)
