"""What a sampling has to be for a table: told before any evaluation, as an error or a warning."""
import logging

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ..embeddings import Table
from ..errors import MTEOError
from ..tableau import stopped
from .solver import OWN, read_tableau, sampler_name

SAME_SOLVER = 1e-4  # largest difference of two solvers' coefficients that are one, relative to the largest coefficient


def require_timesteps(table: Table, sampling) -> None:
    """MTEOError where the model reads other times at the table's σ: zero-SNR, EDM or another multiplier; a shift changes nothing [16]."""
    for sigma, trained in zip(table.tableau.row_sigmas.tolist(), table.timesteps, strict=True):
        now = float(sampling.timestep(torch.tensor(sigma)))
        if abs(now - trained) > 1e-3 * max(abs(trained), 1e-3):
            raise MTEOError(
                f"The model reads sigma {sigma:.4g} as time {now:.4g}, this table was trained with {trained:.4g}: "
                "remove the node that changes the model's sampling."
            )


def require_solver(table: Table, strength: float, sampler, sigmas: torch.Tensor, sampling, cfg: float) -> None:
    """MTEOError unless the SAMPLER's coefficients on `sigmas` are the table's at `cfg`."""
    own = sampler_name(sampler)
    wrong = MTEOError(
        f"The sampler {own} is not the one this table was trained for, {table.solver}: connect the SAMPLER output of Apply MTEO to the sampler node."
    )
    if table.alone and own != OWN:
        raise wrong
    try:
        asked = read_tableau(sampler, sigmas, sampling, own, cfg)
    except MTEOError as error:
        raise wrong from error
    calls = min(len(asked.sigmas), len(table.tableau.sigmas))
    trained = stopped(table.tableau_at(cfg, strength), calls, float(sigmas[-1]))
    if trained.shape != asked.matrix.shape or not (asked.matrix - trained).abs().max() <= SAME_SOLVER * trained.abs().max():
        raise wrong


def require_each_evaluation(guider) -> None:
    """MTEOError where a node on the model leaves out evaluations that it finds alike."""
    cache = guider.model_options.get("transformer_options", {}).get("easycache")
    if cache is not None:
        raise MTEOError(f"{getattr(cache, 'name', 'EasyCache')} leaves out some evaluations of the model, and a table has but a few: remove that node.")


def require_guider(table: Table, guider) -> None:
    """MTEOError where some calls ask for the prompt alone and the guider, or a node on the model, has another rule than one cfg for two branches; a warning
    where a node may change the guidance of the others."""
    if table.alone and type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        raise MTEOError(f"This table guides in some steps only, which {type(guider).__name__} cannot: use MTEO KSampler, SamplerCustom or CFGGuider.")
    overridden = guider.model_patcher.get_all_wrappers(WrappersMP.PREDICT_NOISE)
    if overridden and table.alone:
        raise MTEOError("This table guides in some steps only, and a node on the model, such as CFG Override, changes the guidance: remove that node.")
    if overridden or (table.alone and guider.model_options.get("sampler_pre_cfg_function")):
        logging.warning("MTEO: a node on the model, such as CFG Override or APG, may change the guidance in a way that this table was not trained for.")


def warn_of_cfg(table: Table, cfg: float) -> None:
    """A warning where cfg is beyond the values that the table was trained for."""
    low, high = table.guidance[0], table.guidance[-1]
    if not low <= cfg <= high:
        trained = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        logging.warning(f"MTEO: cfg is {cfg:g}, and this table was trained for {trained}: what it learned at the nearest value acts.")


def warn_of_times(guider, sampling, sigmas: list[float]) -> None:
    """A warning where a conditioning, or a ControlNet in one, is for a part of the schedule in which the network is not evaluated."""
    percent = lambda sigma: next((own for own in range(100) if float(sampling.percent_to_sigma(own / 100)) <= sigma), 100)
    for start, end in {times for conds in guider.conds.values() for cond in conds for times in times_of(cond)}:
        if not any(float(sampling.percent_to_sigma(end)) <= sigma <= float(sampling.percent_to_sigma(start)) for sigma in sigmas):
            at = ", ".join(f"{percent(sigma)}" for sigma in sigmas)
            logging.warning(
                f"MTEO: a conditioning or ControlNet is for {100 * start:.0f} to {100 * end:.0f} % of the sampling, and does nothing: this table's evaluations "
                f"are at {at} %."
            )


def times_of(cond: dict):
    """(start, end), as shares of the schedule, of a condition and of its ControlNets."""
    yield cond.get("start_percent", 0.0), cond.get("end_percent", 1.0)
    control = cond.get("control")
    while control is not None:
        yield tuple(control.timestep_percent_range)
        control = control.previous_controlnet
