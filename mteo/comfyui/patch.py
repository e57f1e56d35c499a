"""Put a table on a MODEL and take it off again, through ComfyUI's own patcher.

Per model instance the hooks read one small state; a wrapper around `apply_model` sets it from the σ of each batch row.
Who has injected is kept by patcher: clones share the model, and a clone that dies ejects, which must not take the hooks off a
model that is being sampled [1]. Hooks are put on at the first evaluation, as ComfyUI injects three times for one sampling.
"""
import logging
from bisect import bisect_left
from contextlib import contextmanager

import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP

from ..embeddings import Embeddings, Table
from ..errors import MTEOError
from ..folding import Folded, foldable
from ..injection import Offsets, attach, detach, find_modules, gain_paths
from ..schedule import SAME_SIGMA, require_schedule
from .checks import require_each_evaluation, require_guider, require_solver, require_timesteps, warn_of_cfg, warn_of_times
from .identity import is_merged, require_model
from .solver import KEY, cfg_of

KEPT = "mteo_compiled"  # on a compiled model: {Patch: handles} of the hooks that stay
SEVERAL = 3  # tables, such as one for a picture and one for its second pass, that a compiled model keeps
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
        if guider.model_patcher.patches_uuid != self.known_patches and is_merged(guider.model_patcher):
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
