"""Put a table on a MODEL and take it off again, through ComfyUI's own patcher.

Per model instance the hooks read one small state; a wrapper around `apply_model` sets it from the σ of each batch row.
Who has injected is kept by patcher: clones share the model, and a clone that dies ejects, which must not take the hooks off a
model that is being sampled [1]. Hooks are put on at the first evaluation, as ComfyUI injects three times for one sampling.
"""
import logging
import math
from bisect import bisect_left
from contextlib import contextmanager
from itertools import chain

import comfy.lora
import comfy.samplers
import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP

from ..embeddings import Embeddings, Table
from ..errors import MTEOError
from ..fingerprint import SITES, difference, fingerprint, verdict
from ..folding import Folded, foldable
from ..injection import Offsets, attach, detach, find_modules, gain_paths
from ..schedule import SAME_SIGMA, require_schedule
from ..tableau import stopped
from .solver import KEY, OWN, cfg_of, read_tableau, sampler_name

KEPT = "mteo_compiled"  # on a compiled model: {Patch: handles} of the hooks that stay
SEVERAL = 3  # tables, such as one for a picture and one for its second pass, that a compiled model keeps
SAME_SOLVER = 1e-4  # largest difference of two solvers' coefficients that are one, relative to the largest coefficient
POLICIES = ("error", "interpolate", "nearest", "off")


class Patch:
    """One table on one MODEL: owns the offsets on the device and the hooks."""

    def __init__(self, table: Table, space: str, strength: float = 1.0, off_grid: str = "error"):
        if off_grid not in POLICIES:
            raise MTEOError(f'off_grid is "{off_grid}": choose one of {", ".join(POLICIES)}.')
        self.table, self.space, self.off_grid, self.strength = table, space, off_grid, strength
        self.cfg = table.guidance[0]
        self.look_at(self.cfg)
        self.offsets = Offsets(table.offsets_at(self.cfg), self.row_of_window if off_grid in ("error", "off") else None)
        self.offsets.scale, self.gains = strength, gain_paths(self.offsets.table)
        self.modules = (None, {})  # (the network, its module of each site)
        self.users: dict[int, torch.nn.Module] = {}  # by id: patchers that have injected, with their network
        self.handles: dict[torch.nn.Module, list] = {}  # network -> its hooks
        self.scaling: set[torch.nn.Module] = set()  # networks that also have those of the gains
        self.folded = (None, None)  # (what it was made of, the gains in a network's own weights or None where they cannot be)
        self.told: float | None = None  # σ of the evaluations to come, where it is known without asking the card
        self.made_for, self.known_patches = None, None  # the fingerprint of its model; the patches of weights with which that was compared last
        self.passed = None  # the last (model sampling, SAMPLER, sigmas, cfg) that were found to be the table's

    def is_for(self, table: Table, strength: float, off_grid: str) -> bool:
        """Whether it would be the same one made anew: a compiled model then needs not be compiled again."""
        return self.table is table and (self.strength, self.off_grid) == (strength, off_grid)

    def at(self, cfg: float) -> None:
        """From now on the offsets for this cfg, at the σ of their calls at it."""
        if cfg != self.cfg:
            self.cfg = cfg
            self.offsets.replace(self.table.offsets_at(cfg))
            self.look_at(cfg)

    def look_at(self, cfg: float) -> None:
        """Where the rows are at this cfg; their order is that of the table's at any."""
        self.row_sigmas = self.table.tableau_at(cfg, self.strength).row_sigmas.float()
        self.windows, self.row_of_window = windows(self.row_sigmas)
        self.bounds = self.windows.tolist()

    def inject(self, patcher) -> None:
        kept = patcher.model.__dict__.get(KEPT, {})
        if self in kept:
            return
        if "torch_compile_kwargs" in patcher.model_options:
            # Dynamo does not guard on hooks: what was compiled without them is forgotten once, then the hooks stay (and do nothing
            # while no offset is selected), so that no variant without them is compiled in between [2].
            while len(kept) >= SEVERAL:
                detach(kept.pop(next(iter(kept))))
            torch._dynamo.reset()
            config = torch._dynamo.config  # what is compiled once for each site of a class is not given up after the eighth
            config.cache_size_limit = max(config.cache_size_limit, 2 * len(self.offsets.table))
            kept[self] = attach(self.find(patcher.model.diffusion_model), self.offsets, self.space)
            setattr(patcher.model, KEPT, kept)
        else:
            self.users[id(patcher)] = patcher.model.diffusion_model

    def find(self, network: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The network's module of each site, looked up once; MTEOError where the table is for another network."""
        if self.modules[0] is not network:
            self.modules = network, find_modules(network, self.offsets.table, self.space)
        return self.modules[1]

    def eject(self, patcher) -> None:
        network = self.users.pop(id(patcher), None)
        if network not in self.users.values():
            detach(self.handles.pop(network, []))
            self.scaling.discard(network)

    def rows(self, sigma: torch.Tensor) -> tuple:
        """What `Offsets.select` takes for σ [B], one for each or one for all; no row where the table has none. On the device of σ, without a wait."""
        if self.row_sigmas.device != sigma.device:
            self.row_sigmas, self.windows, self.row_of_window = (own.to(sigma.device) for own in (self.row_sigmas, self.windows, self.row_of_window))
        if self.off_grid in ("error", "off"):  # one for the whole batch, where it is known
            values = {self.told} if self.told is not None else set(sigma.tolist()) if sigma.device.type == "cpu" else ()
            if len(values) == 1:
                return (bisect_left(self.bounds, values.pop()),)
        rows, sigma = self.row_sigmas, sigma.float()
        if self.off_grid == "nearest":
            return ((sigma.clamp_min(1e-10)[:, None] / rows).log().abs().argmin(1),)
        window = torch.bucketize(sigma, self.windows)
        if self.off_grid in ("error", "off"):
            return (window,)  # the offsets are in the order of the windows
        row = self.row_of_window[window]
        low, high, share = between(rows, sigma.clamp_min(1e-10))
        on_grid = row < len(rows)
        return row.where(on_grid, low), high, share.where(~on_grid, 0.0)

    def apply_model(self, executor, x, t, *args, **kwargs):
        """APPLY_MODEL wrapper: t is σ [B] of each batch row."""
        rows = self.rows(t)
        self.offsets.select(*rows, device=t.device)
        try:
            with self.hooked(executor.class_obj, rows, t.device):
                return executor(x, t, *args, **kwargs)
        finally:
            self.offsets.select(None)

    @contextmanager
    def hooked(self, base, rows: tuple, device: torch.device):
        """Inside, the network of ComfyUI's BaseModel has the hooks of its sites. One row for the whole batch: gains are in the normalisations' own weights,
        where they can be, and need none. A compiled network has had its hooks since it was injected."""
        network = base.diffusion_model
        if network not in self.users.values() or self.offsets.current is None:
            yield
            return
        modules = self.find(network)
        if network not in self.handles:
            self.handles[network] = attach({path: module for path, module in modules.items() if path not in self.gains}, self.offsets, self.space)
        folded = self.fold(base, device) if isinstance(rows[0], int) and not self.offsets.trained else None
        if folded:
            self.offsets.folded = True
            try:
                with folded.row(rows[0]):
                    yield
            finally:
                self.offsets.folded = False
            return
        if network not in self.scaling:
            self.scaling.add(network)
            self.handles[network] += attach({path: modules[path] for path in self.gains}, self.offsets, self.space)
        yield

    def fold(self, base, device: torch.device) -> Folded | None:
        """The gains in the weights of the network's normalisations, made once for a table and a set of LoRAs, which ComfyUI numbers; None where they cannot
        be."""
        if getattr(base.current_patcher, "hook_patches", None):
            return None  # LoRAs that come and go within a sampling
        made_of, (known, folded) = (base.diffusion_model, self.offsets.joined(device), base.current_weight_patches_uuid), self.folded
        if known is None or any(a is not b for a, b in zip(known, made_of, strict=True)) or (folded and not folded.current):
            modules = [self.find(base.diffusion_model)[path] for path in self.gains]
            able = foldable(modules) and modules[0].weight.device == device
            self.folded = made_of, Folded(modules, self.offsets.gains(device)) if able else None
        return self.folded[1]

    def check_sampling(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """OUTER_SAMPLE wrapper: the offsets of the guider's cfg; before any evaluation, the schedule and the sampler must be the table's [3]."""
        guider = executor.class_obj
        if guider.model_patcher.get_additional_models_with_key("multigpu"):
            raise MTEOError("A table works on one graphics card, and this model is split over several: remove the MultiGPU node.")
        self.at(cfg_of(guider))
        if guider.model_patcher.patches_uuid != self.known_patches and any(map(is_merge, chain(*guider.model_patcher.patches.values()))):
            require_model(guider.model_patcher, self.made_for)
        self.known_patches = guider.model_patcher.patches_uuid
        if self.off_grid == "error":
            require_each_evaluation(guider)
        require_guider(self.table, guider)
        if self.off_grid != "off":  # as in a training
            warn_of_cfg(self.table, self.cfg)
        if self.off_grid == "error":
            if self.table.denoise < 1 and not latent_image.any():
                raise MTEOError("This table starts from a picture, but the latent is empty: connect the latent of a picture, as VAE Encode gives it.")
            sampling = guider.model_patcher.get_model_object("model_sampling")
            asked = (sampling, sampler, sigmas.tolist(), self.cfg)
            if asked != self.passed:  # what passed once is not probed again
                require_schedule(self.table.sigmas, sigmas.tolist())
                require_timesteps(self.table, sampling)
                require_solver(self.table, self.strength, sampler, sigmas, sampling, self.cfg)
                self.passed = asked
            warn_of_times(guider, sampling, self.row_sigmas.tolist())
        return executor(noise, latent_image, sampler, sigmas.clone(), *args, **kwargs)  # uni_pc writes into what it is given [5]


def windows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bounds [2R], rising, of the σ that are one with a row's; the row between two bounds [2R + 1], R = none): one search finds all rows of a batch."""
    order, count = rows.argsort(), len(rows)
    sigmas = rows[order]
    middle = (sigmas[:-1] + sigmas[1:]) / 2  # two rows may be as close as float32's rounding of σ is allowed to be [6]
    low, high = sigmas * (1 - SAME_SIGMA), sigmas * (1 + SAME_SIGMA)
    low[1:], high[:-1] = torch.maximum(low[1:], middle), torch.minimum(high[:-1], middle)
    row_of = torch.full((2 * count + 1,), count)
    row_of[1::2] = order
    return torch.stack([low, high], 1).flatten(), row_of


def between(rows: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two rows around each σ [B] and the share of the second, linear in log σ; beyond the ends the end row alone."""
    order = rows.argsort()
    grid, at = rows[order].log().contiguous(), sigma.log()
    high = torch.searchsorted(grid, at).clamp(1, max(1, len(rows) - 1)).clamp_max(len(rows) - 1)
    low = (high - 1).clamp_min(0)
    return order[low], order[high], ((at - grid[low]) / (grid[high] - grid[low]).clamp_min(1e-10)).clamp(0, 1)


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


def apply_embeddings(model, embeddings: Embeddings, steps: int = 0, strength: float = 1.0, off_grid: str = "error"):
    """(A clone of MODEL that reads the table for `steps`, the table); steps 0 = the file's smallest.

    strength scales offsets and, up to 1, solver corrections: 0 gives the clone unpatched, 1 as trained. A table that was applied before is
    replaced: the last one wins [10]. Raises MTEOError where the file lacks `steps`, a site is missing from the model or has another
    width, or the model is not the one (or a sibling of the one) that the table was made for.
    """
    table = choose_table(embeddings, steps)
    if table.alone and off_grid in ("interpolate", "nearest"):
        raise MTEOError(f"This table guides in some steps only, so that it works with its own sampler and sigmas: set off_grid to error, not {off_grid}.")
    same = (patch for patch in model.model.__dict__.get(KEPT, ()) if patch.is_for(table, strength, off_grid))
    patch = next(same, None) or Patch(table, embeddings.space, strength, off_grid)
    patch.find(model.model.diffusion_model)
    patch.made_for, patch.known_patches = embeddings.model.get("fingerprint"), model.patches_uuid
    require_model(model, patch.made_for)
    if KEY in model.attachments:
        logging.info("MTEO: this model had a table already, the new one takes its place")
    patched = remove_embeddings(model.clone())
    if strength == 0:
        return patched, table
    patched.set_attachments(KEY, patch)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, patch.apply_model)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, patch.check_sampling)
    patched.set_injections(KEY, [PatcherInjection(patch.inject, patch.eject)])
    return patched, table


def remove_embeddings(patched):
    """Take everything under the pack's key off a patcher (in place) and return it."""
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.OUTER_SAMPLE):
        patched.remove_wrappers_with_key(kind, KEY)
    patched.remove_injections(KEY)
    patched.remove_attachments(KEY)
    return patched


def choose_table(embeddings: Embeddings, steps: int) -> Table:
    """The table for `steps`; 0 = the smallest number of steps in the file."""
    steps = steps or min(embeddings.tables)
    if steps not in embeddings.tables:
        has = ", ".join(map(str, sorted(embeddings.tables)))
        raise MTEOError(f"These embeddings have no table for {steps} steps: they hold {has}.")
    return embeddings.tables[steps]


def model_fingerprint(model, paths: list[str], sites: int = SITES) -> dict[str, list[float]]:
    """`fingerprint` of a MODEL's weights without its LoRAs, also while one is in them, but with what other models a merging node brings; without the paths
    that it does not have."""
    modules = dict(model.model.diffusion_model.named_modules())

    def weight_of(path):
        backup, module = model.backup.get(f"diffusion_model.{path}.weight"), modules[path]
        weight = module.weight if backup is None else backup.weight
        weight = dequantized(module, weight) if getattr(weight, "tensor_type", None) is not None else weight
        others = [patch for patch in model.patches.get(f"diffusion_model.{path}.weight", ()) if is_merge(patch)]
        return comfy.lora.calculate_weight(others, weight.detach().float().clone(), path) if others else weight

    return fingerprint([path for path in paths if path in modules], weight_of, sites)


def is_merge(patch: tuple) -> bool:
    """Whether a patch of a weight, as ComfyUI keeps it, is another model's weight (ModelMergeSimple and all of its kind), and no LoRA."""
    _, value, strength_model, *_ = patch
    return strength_model != 1.0 or isinstance(value, list)


def dequantized(module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The numbers of a layer of ComfyUI-GGUF, which holds its weight as packed bytes, without the LoRAs that come on top of them."""
    patches, weight.patches = weight.patches, []
    try:
        return module.get_weight(weight, torch.float32)
    finally:
        weight.patches = patches


def require_model(model, trained: dict[str, list[float]] | None) -> None:
    """MTEOError where the table was made for another model than one of the fingerprint `trained`; a warning where for a sibling (fine-tune) of this one."""
    if not trained:
        return
    relative = difference(model_fingerprint(model, list(trained)), trained)
    if verdict(relative) == "other":
        how = f"its weights differ by {100 * relative:.0f} %" if math.isfinite(relative) else "it has other layers"
        raise MTEOError(f"This table was distilled for another model ({how}): load the table of this model, or distil one.")
    if verdict(relative) == "sibling":
        logging.warning(
            f"MTEO: this table was distilled for a sibling of this model (weights differ by {100 * relative:.0f} %): "
            "compare with the plain model, and distil a table for this one if that is nearer."
        )
