"""Put a table on a MODEL and take it off again, through ComfyUI's own patcher.

Per model instance the hooks read one small state; a wrapper around `apply_model` finds the row of each batch row by its σ.
Handles are kept by patcher: clones share the model, and a clone that dies ejects, so handles kept by model would be taken off
a model that is being sampled.
"""
import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP

from ..embeddings import Embeddings, Table
from ..errors import MTEOError
from ..injection import Offsets, attach, detach

KEY = "mteo"
SAME_SIGMA = 1e-4  # relative distance under which two σ are one: samplers differ by float32 rounding


class Patch:
    """One table on one MODEL: owns the offsets on the device and the hook handles, one set per patcher."""

    def __init__(self, table: Table, space: str, strength: float):
        self.table, self.space, self.strength = table, space, strength
        self.offsets = Offsets({path: rows.detach().clone() for path, rows in table.offsets.items()})
        self.offsets.scale = strength
        self.row_sigmas = table.tableau.row_sigmas.float()
        self.handles: dict[int, list] = {}

    def inject(self, patcher) -> None:
        if id(patcher) not in self.handles:
            self.handles[id(patcher)] = attach(patcher.model.diffusion_model, self.offsets, self.space)

    def eject(self, patcher) -> None:
        detach(self.handles.pop(id(patcher), []))

    def find_rows(self, sigma: torch.Tensor) -> torch.Tensor:
        """Row of the table for each σ [B]; −1 where the table has none."""
        rows = self.row_sigmas.to(sigma.device)
        distance = (sigma.float()[:, None] / rows[None] - 1).abs()
        nearest = distance.min(dim=1)
        return torch.where(nearest.values < SAME_SIGMA, nearest.indices, -1)

    def apply_model(self, executor, x, t, *args, **kwargs):
        """APPLY_MODEL wrapper: t is σ [B] of each batch row."""
        self.offsets.row = self.find_rows(t)
        try:
            return executor(x, t, *args, **kwargs)
        finally:
            self.offsets.row = None

    def check_sampling(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """OUTER_SAMPLE wrapper: before any evaluation, the schedule and the sampler must be the table's."""
        require_schedule(self.table, sigmas)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def require_schedule(table: Table, sigmas: torch.Tensor) -> None:
    """MTEOError unless `sigmas` is the table's whole schedule; a later start is another solver and needs rows of its own."""
    asked, own = [float(s) for s in sigmas], table.sigmas
    same = len(asked) == len(own) and all(abs(a - b) <= SAME_SIGMA * max(b, 1e-3) for a, b in zip(asked, own, strict=True))
    if same:
        return
    show = lambda values: "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
    starts = [i for i in range(1, len(own)) if len(asked) == len(own) - i and all(abs(a - b) <= SAME_SIGMA * max(b, 1e-3) for a, b in zip(asked, own[i:], strict=True))]
    if starts:
        raise MTEOError(f"This table was not trained for a start at step {starts[0]}: sample all {table.steps} steps, or use the plain model for a partial denoise.")
    raise MTEOError(f"The schedule {show(asked)} is not the one this table was trained for, {show(own)}: connect the SIGMAS output of Apply MTEO to the sampler.")


def apply_embeddings(model, embeddings: Embeddings, steps: int = 0, strength: float = 1.0):
    """A clone of MODEL that reads the table for `steps` (0 = the file's smallest); strength 0 gives the clone unpatched.

    A table that was applied before is replaced: the last one wins. Raises MTEOError where the file lacks `steps` or a site
    is missing from the model or has another width.
    """
    table = choose_table(embeddings, steps)
    patched = remove_embeddings(model.clone())
    if strength == 0:
        return patched, table
    require_sites(model.model.diffusion_model, table, embeddings.space)
    patch = Patch(table, embeddings.space, strength)
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


def require_sites(network: torch.nn.Module, table: Table, space: str) -> None:
    """MTEOError where a site of the table is not in the network or has another width."""
    modules = dict(network.named_modules())
    for path, rows in table.offsets.items():
        width = getattr(modules.get(path), "in_features" if space == "embedding" else "out_features", None)
        if width is None:
            raise MTEOError(f"This table is for another architecture: the model has no layer {path}. Load the table that was distilled for this model.")
        if width != rows.shape[1]:
            raise MTEOError(f"This table is for another model: layer {path} takes {width} numbers, the table has {rows.shape[1]}. Load the table that was distilled for this model.")
