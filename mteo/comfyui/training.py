"""Distil a table for a MODEL: teacher trajectories, the student's grid and rows, the offsets; resumable in a run folder.

The node and the headless trainer both call `distill_model`.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import comfy.samplers
import torch

from ..distill import State, distill, load_state, save_state
from ..embeddings import Embeddings, Table, load_embeddings, save_embeddings
from ..errors import MTEOError
from ..gridsearch import Plain, no_progress, refine, search_grid
from ..recipe import FREE, Recipe
from ..schedule import karras, refined
from ..sites import find_family, find_sites
from ..tableau import Tableau, euler_tableau, execute, with_matrix
from ..teacher import Trajectories, follow, join, load_trajectories, save_trajectories
from .conditions import content_hash
from .patch import KEY, apply_embeddings, model_fingerprint
from .session import Session, private_copy, run_session, training_mode
from .solver import read_tableau, sampler_name

CHUNK = 32  # trajectories that are followed and stored together
SHOWN = 4  # pictures of a preview
TRAIN, VALIDATION, SEARCH = 1, 2, 3  # which noise: independent streams of one seed


@dataclass
class Distilled:
    """embeddings; log: lines of the training; previews: latents [SHOWN, …] of one noise by "teacher", "plain", "mteo" (as LATENT)."""

    embeddings: Embeddings
    log: list[dict]
    previews: dict[str, torch.Tensor]


def distill_model(model, positives: list, negative, latent: torch.Tensor, recipe: Recipe, folder: Path | None = None, sampler=None, progress=no_progress) -> Distilled:
    """Embeddings for `recipe.steps` steps, from the model's own trajectories. The model is not changed.

    positives: a list of conditionings, one a prompt; negative: one; latent [1, C, H, W] gives the size. sampler: a SAMPLER in place
    of recipe.solver. folder: what was computed is kept there; the same call goes on where it was stopped and gives the same bytes.
    MTEOError where the folder belongs to another run, or the model, sampler or recipe cannot be distilled.
    """
    with training_mode():
        sites = find_sites(model.model.diffusion_model, recipe.space)
        about = dict(family=find_family(model.model.diffusion_model), sampling=type(model.get_model_object("model_sampling")).__name__, guidance=list(recipe.guidance),
                     fingerprint=model_fingerprint(model, [site.path for site in sites]))
        name = recipe.solver if sampler is None else sampler_name(sampler)
        run = dict(recipe=recipe.facts(), solver=name, conditions=content_hash([positives, negative]), latent=list(latent.shape), model=about)
        store = RunFolder(folder, run)
        private = private_copy(model)
        sampling = private.get_model_object("model_sampling")
        embeddings = store.finished()
        if embeddings is None:
            embeddings = store.started()
            if embeddings is None:
                grid = FREE if recipe.grid == FREE else named_grid(sampling, recipe.grid, recipe.steps)
                table = run_session(private, positives, negative, latent, lambda session: choose_solver(session, private.model.diffusion_model, recipe, grid, sampler, name, len(positives), progress))
                embeddings = Embeddings({recipe.steps: table}, recipe.space, about)
                store.start(embeddings)
            table = embeddings.tables[recipe.steps]
            patched, patch = with_table(private, embeddings)
            run_session(patched, positives, negative, latent, lambda session: train(session, patch, table, recipe, len(positives), store, progress))
            store.finish(embeddings)
        patched, patch = with_table(private, embeddings)
        previews = run_session(patched, positives, negative, latent, lambda session: compare(session, patch, embeddings.tables[recipe.steps], recipe, len(positives), SHOWN, recipe.seed + 77))
    return Distilled(embeddings, embeddings.tables[recipe.steps].record["log"], previews)


def named_grid(sampling, scheduler: str, steps: int) -> torch.Tensor:
    """[steps + 1] σ of a ComfyUI scheduler; MTEOError for an unknown name or a grid that does not start at the model's sigma_max."""
    if scheduler not in comfy.samplers.SCHEDULER_NAMES:
        raise MTEOError(f"The grid {scheduler} is not known: choose {FREE} or one of {', '.join(comfy.samplers.SCHEDULER_NAMES)}.")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps).clone().float()
    if len(sigmas) != steps + 1 or abs(float(sigmas[0] / sampling.sigma_max) - 1) > 1e-5:
        raise MTEOError(f"The grid {scheduler} gives {len(sigmas) - 1} steps from sigma {float(sigmas[0]):.4g} for this model: choose another grid, such as sgm_uniform.")
    return sigmas


def with_table(private, embeddings: Embeddings):
    """(the private MODEL with the table on it and no check of schedule or sampler, its Patch)."""
    patched, _ = apply_embeddings(private, embeddings, off_grid="off")
    return patched, patched.get_attachment(KEY)


def untrained_table(network: torch.nn.Module, sampling, space: str, sigmas: torch.Tensor, solver: str, tableau: Tableau) -> Table:
    """Zero offsets at every site, for `tableau` on `sigmas` [K + 1]: the plain model."""
    offsets = {site.path: torch.zeros(len(tableau.row_sigmas), site.width) for site in find_sites(network, space)}
    timesteps = [float(sampling.timestep(sigma.float())) for sigma in tableau.row_sigmas]
    return Table(len(sigmas) - 1, sigmas.tolist(), timesteps, solver, tableau, offsets)


def choose_solver(session: Session, network: torch.nn.Module, recipe: Recipe, grid, sampler, name: str, prompts: int, progress) -> Table:
    """The student before training: its σ (given or searched for on the plain model with re-solved rows) and its coefficients."""
    if isinstance(grid, str):
        teacher = teacher_tableau(session, karras_of(session, recipe.teacher_steps))
        pairs = gather(session, teacher, None, recipe, SEARCH, min(64, recipe.pictures), prompts, None, progress)
        plain = Plain(lambda x, sigma, batch: session.denoise(x, sigma, batch.item, batch.guidance), pairs)
        with torch.no_grad():
            tableau = search_grid(plain, recipe.steps, float(session.sampling.sigma_max), progress)
            if recipe.rows == "all":
                tableau = refine(plain, tableau, 20 * recipe.steps**2, progress)
        grid = torch.cat([tableau.sigmas, torch.zeros(1, dtype=torch.float64)]).float()
    if sampler is None and recipe.solver == "euler":
        base = euler_tableau(grid)
    else:
        base = read_tableau(sampler or comfy.samplers.sampler_object(recipe.solver), grid, session.sampling, name)
    if recipe.grid == FREE and recipe.rows == "all" and len(base.sigmas) == recipe.steps:
        tableau = with_matrix(base, tableau.matrix)  # training starts from the rows that were found
    else:
        tableau = base
    table = untrained_table(network, session.sampling, recipe.space, grid, name, tableau)
    table.base, table.solver_options = base, dict(getattr(sampler, "extra_options", {}))
    return table


def karras_of(session: Session, steps: int) -> torch.Tensor:
    return karras(steps, float(session.sampling.sigma_min), float(session.sampling.sigma_max))


def teacher_tableau(session: Session, sigmas: torch.Tensor) -> Tableau:
    """DPM++ 2M, as ComfyUI has it, on a fine grid."""
    return read_tableau(comfy.samplers.sampler_object("dpmpp_2m"), sigmas, session.sampling, "dpmpp_2m")


def gather(session: Session, teacher: Tableau, student_sigmas, recipe: Recipe, stream: int, count: int, prompts: int, store, progress) -> Trajectories:
    """`count` teacher trajectories of the noise stream; prompts in turn, cfg values in turn. Chunks that the store has are read."""
    parts, stage = [], {TRAIN: "teacher", VALIDATION: "teacher, held out", SEARCH: "teacher, for the grid"}[stream]
    for chunk in range(-(-count // CHUNK)):
        progress(stage, chunk * CHUNK, count)
        size = min(CHUNK, count - chunk * CHUNK)
        part = store.read_chunk(stream, chunk, size) if store else None
        if part is None:
            index = torch.arange(chunk * CHUNK, chunk * CHUNK + size)
            item = (index // len(recipe.guidance) + 7919 * (stream - 1)) % prompts
            guidance = torch.tensor(recipe.guidance, dtype=torch.float64)[index % len(recipe.guidance)]
            start = session.start(session.noise(size, (recipe.seed * 4 + stream) * 100_003 + chunk), teacher.sigmas[0])
            with torch.no_grad():
                states, end = follow(teacher, lambda x, call, sigma, i=item, g=guidance: session.denoise(x, sigma, i, g), start, [] if student_sigmas is None else student_sigmas)
            part = Trajectories(start, states, end, item, guidance)
            if store:
                store.write_chunk(stream, chunk, part)
        parts.append(part.to(session.device))
    progress(stage, count, count)
    return join(parts)


def train(session: Session, patch, table: Table, recipe: Recipe, prompts: int, store: "RunFolder", progress) -> None:
    """Fill `table` with what was learned."""
    sigmas = torch.tensor(table.sigmas)
    teacher = teacher_tableau(session, refined(sigmas, recipe.teacher_steps, float(session.sampling.sigma_min)))
    pairs = gather(session, teacher, sigmas, recipe, TRAIN, recipe.pictures, prompts, store, progress)
    held_out = gather(session, teacher, sigmas, recipe, VALIDATION, recipe.held_out, prompts, store, progress)
    total = recipe.sequential + recipe.iterations
    offsets = patch.offsets.table = {path: rows.to(session.device) for path, rows in patch.offsets.table.items()}

    denoise = lambda x, call, sigma, batch: session.denoise(x, sigma, batch.item, batch.guidance)

    def told(state: State, line: dict | None) -> None:
        if line is None:
            return progress("training", state.iteration, total)
        store.write_state(state)
        with torch.no_grad():
            one = held_out.part(slice(0, 1))
            picture = execute(table.tableau, lambda x, call, sigma: denoise(x, call, sigma, one), one.start)
        progress("training", state.iteration, total, picture=picture, **line)

    best, tableau, state = distill(denoise, offsets, table.tableau, pairs, held_out, recipe,
                                   state=store.read_state(session.device), progress=told)
    table.base = table.base if recipe.rows != "solver" else None
    table.offsets, table.tableau = {path: rows.detach().cpu() for path, rows in best.items()}, tableau
    table.record = dict(recipe=recipe.facts(), log=state.log, prompts=prompts, teacher=f"dpmpp_2m, {len(teacher.sigmas)} steps")


def compare_model(model, embeddings: Embeddings, positives: list, negative, latent: torch.Tensor, recipe: Recipe, count: int, seed: int) -> dict[str, torch.Tensor]:
    """`count` pictures as LATENT by "teacher", "plain" (the named solver on the table's grid) and "mteo", of the same noise."""
    with training_mode():
        patched, patch = with_table(private_copy(model), embeddings)
        table = embeddings.tables[recipe.steps]
        return run_session(patched, positives, negative, latent, lambda session: compare(session, patch, table, recipe, len(positives), count, seed))


@torch.no_grad()
def compare(session: Session, patch, table: Table, recipe: Recipe, prompts: int, count: int, seed: int) -> dict[str, torch.Tensor]:
    """As `compare_model`, at the largest cfg of the recipe, in chunks."""
    fine = teacher_tableau(session, refined(torch.tensor(table.sigmas), recipe.teacher_steps, float(session.sampling.sigma_min)))
    noise, made = session.noise(count, seed), {"teacher": [], "plain": [], "mteo": []}
    for begin in range(0, count, CHUNK):
        item = torch.arange(begin, min(begin + CHUNK, count)) % prompts
        guidance = torch.full((len(item),), max(recipe.guidance), dtype=torch.float64)
        start = session.start(noise[begin : begin + CHUNK], torch.tensor(table.sigmas[0]))
        denoise = lambda x, call, sigma, i=item, g=guidance: session.denoise(x, sigma, i, g)
        for name, tableau, strength in (("teacher", fine, 0.0), ("plain", table.base or table.tableau, 0.0), ("mteo", table.tableau, 1.0)):
            patch.offsets.scale = strength
            made[name].append(session.out(execute(tableau, denoise, start)))
    return {name: torch.cat(parts) for name, parts in made.items()}


class RunFolder:
    """What a run leaves on disk: run.json, start.safetensors, teacher/*.safetensors, state.pt, log.jsonl, table.safetensors. None = nowhere."""

    def __init__(self, folder: Path | None, run: dict):
        self.folder, self.note = folder and Path(folder), json.dumps(run, sort_keys=True, indent=1)
        if self.folder is None:
            return
        own = self.folder / "run.json"
        if own.is_file() and own.read_text() != self.note:
            raise MTEOError(f"The run folder {self.folder.name} belongs to a run with another recipe, model or prompts: choose another folder or delete it.")
        (self.folder / "teacher").mkdir(parents=True, exist_ok=True)
        if not own.is_file():
            own.write_text(self.note)

    def chunk(self, stream: int, number: int) -> Path:
        return self.folder / "teacher" / f"{('train', 'held_out')[stream - 1]}-{number:05}.safetensors"

    def read_chunk(self, stream: int, number: int, size: int) -> Trajectories | None:
        part = load_trajectories(self.chunk(stream, number), self.note) if self.folder else None
        return part if part is not None and len(part) == size else None

    def write_chunk(self, stream: int, number: int, part: Trajectories) -> None:
        if self.folder:
            save_trajectories(part, self.chunk(stream, number), self.note)

    def read_state(self, device) -> State | None:
        return load_state(self.folder / "state.pt", device) if self.folder else None

    def write_state(self, state: State) -> None:
        if self.folder:
            save_state(state, self.folder / "state.pt")
            (self.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in state.log))

    def started(self) -> Embeddings | None:
        """What training starts from: its search is not made twice."""
        return self._read("start.safetensors")

    def start(self, embeddings: Embeddings) -> None:
        self._write("start.safetensors", embeddings)

    def finished(self) -> Embeddings | None:
        return self._read("table.safetensors")

    def finish(self, embeddings: Embeddings) -> None:
        self._write("table.safetensors", embeddings)

    def _read(self, name: str) -> Embeddings | None:
        return load_embeddings(self.folder / name) if self.folder and (self.folder / name).is_file() else None

    def _write(self, name: str, embeddings: Embeddings) -> None:
        if self.folder:
            save_embeddings(embeddings, self.folder / name)
