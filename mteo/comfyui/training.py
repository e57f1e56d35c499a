"""Distil a table for a MODEL: teacher trajectories, the student's grid and rows, the offsets; resumable in a run folder.

The node and the headless trainer both call `distill_model`.
"""
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import comfy.samplers
import torch

from ..coefficients import corrected, moves_sigmas
from ..distill import State, distill, load_state, save_state
from ..embeddings import FORMAT, Embeddings, Table, as_stored, load_embeddings, save_embeddings
from ..errors import MTEOError
from ..gradient import TOO_SMALL, full
from ..gridsearch import SEARCHED, Plain, no_progress, search_grid
from ..guided import ALL, Guided
from ..recipe import FREE, Recipe
from ..schedule import SAME_SIGMA, karras, refined
from ..sites import find_family, find_sites
from ..tableau import Tableau, euler_tableau, execute, started_at
from ..teacher import Trajectories, follow, join, load_trajectories, save_trajectories
from .conditions import WORDS, content_hash, require_trainable
from .identity import model_fingerprint
from .patch import KEY, apply_embeddings
from .session import Session, private_copy, run_session, training_mode
from .solver import named_sampler, read_tableau, sampler_name
from .times import following

CHUNK = 32  # trajectories that are followed and stored together
SHOWN = 4  # pictures of a preview
TRAIN, VALIDATION, SEARCH = 1, 2, 3  # which noise: independent streams of one seed


@dataclass
class Distilled:
    """embeddings; log: lines of the training; previews: latents [SHOWN, …] of one noise by "teacher", "plain", "mteo" (as LATENT)."""

    embeddings: Embeddings
    log: list[dict]
    previews: dict[str, torch.Tensor]


def distill_model(
    model, positives: list, negative, latent: torch.Tensor, recipe: Recipe, folder: Path | None = None, sampler=None, progress=no_progress
) -> Distilled:
    """Embeddings for `recipe.steps` steps, from the model's own trajectories. The model is not changed.

    positives: a list of conditionings, one a prompt; negative: one; latent [1, C, H, W] gives the size. sampler: a SAMPLER in place
    of recipe.solver. folder: what was computed is kept there; the same call goes on where it was stopped and gives the same bytes.
    MTEOError where the folder belongs to another run, or the model, sampler or recipe cannot be distilled.
    """
    with training_mode():
        require_trainable([*positives, negative])
        sampler or named_sampler(recipe.solver)  # known before the long search
        run = facts_of(model, positives, negative, latent, recipe, sampler)
        store, name, about = RunFolder(folder, run), run["solver"], run["model"]
        private = private_copy(model)
        sampling = private.get_model_object("model_sampling")
        embeddings = store.finished()
        if embeddings is None:
            embeddings = store.started()
            if embeddings is None:
                grid = FREE if recipe.grid == FREE else named_grid(sampling, recipe.grid, recipe.steps, recipe.denoise)
                network, prompts = private.model.diffusion_model, len(positives)

                def choose(session: Session) -> Table:
                    require_gradient(session, max(recipe.guidance) if recipe.guided else 1.0)
                    return choose_solver(session, network, recipe, grid, sampler, name, prompts, progress)

                table = run_session(private, positives, negative, latent, choose)
                embeddings = Embeddings({recipe.steps: table}, recipe.space, about)
                store.start(embeddings)
            parts = []
            for number in range(len(recipe.guidance)):
                patched, patch = with_table(private, embeddings)
                told = partial(progress, part=(number, len(recipe.guidance)))
                learn = lambda session, n=number, p=patch, t=told: train(session, p, recipe, n, len(positives), store, t)
                parts.append(run_session(patched, positives, negative, latent, learn))
            embeddings.tables[recipe.steps] = joined(parts)
            store.finish(embeddings)
        patched, patch = with_table(private, embeddings)
        previews = run_session(patched, positives, negative, latent, lambda session: compare(session, patch, recipe, len(positives), SHOWN, recipe.seed + 77))
    return Distilled(embeddings, embeddings.tables[recipe.steps].record["log"], previews)


def facts_of(model, positives: list, negative, latent: torch.Tensor, recipe: Recipe, sampler=None) -> dict:
    """What a table depends on (JSON): the arguments of `distill_model` by content, the same in another start of ComfyUI."""
    network, sampling = model.model.diffusion_model, model.get_model_object("model_sampling")
    sites = [site.path for site in find_sites(network, "embedding")]
    matrices = [path for path, module in network.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) >= 2]
    return dict(
        recipe=recipe.facts(),
        solver=recipe.solver if sampler is None else sampler_name(sampler),
        solver_options=content_hash(getattr(sampler, "extra_options", {})),
        format=FORMAT,
        conditions=content_hash([positives, negative]),
        latent=list(latent.shape),
        model=dict(family=find_family(network), sampling=type(sampling).__name__, fingerprint=model_fingerprint(model, sites)),
        sigmas=[float(sampling.percent_to_sigma(percent)) for percent in (0.25, 0.5, 0.75)],  # a shift of the schedule
        prediction=[kind.__name__ for kind in type(sampling).__mro__],
        weights=content_hash(model_fingerprint(model, matrices, 64)),
        patches=content_hash(model.patches),
        options=content_hash(model.model_options),
        wrappers=content_hash({(kind, key): own for kind, by_key in model.wrappers.items() for key, own in by_key.items() if own and key != KEY}),
        objects=content_hash(model.object_patches),
    )


def named_grid(sampling, scheduler: str, steps: int, denoise: float = 1.0) -> torch.Tensor:
    """[steps + 1] σ of a ComfyUI scheduler, with a denoise below 1 the last ones of more, as KSampler takes them; MTEOError for an unknown name or a grid that
    does not start at the model's sigma_max."""
    if scheduler not in comfy.samplers.SCHEDULER_NAMES:
        raise MTEOError(f"The grid {scheduler} is not known: choose {FREE} or one of {', '.join(comfy.samplers.SCHEDULER_NAMES)}.")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, int(steps / denoise))[-(steps + 1) :].clone().float()
    if len(sigmas) != steps + 1 or (denoise == 1 and abs(float(sigmas[0] / sampling.sigma_max) - 1) > 1e-5):
        raise MTEOError(
            f"The grid {scheduler} gives {len(sigmas) - 1} steps from sigma {float(sigmas[0]):.4g} for this model: choose another grid, such as sgm_uniform."
        )
    return sigmas


def start_sigma(sampling, recipe: Recipe) -> float:
    """σ at which the recipe's samplings start: the model's largest, or with a denoise below 1 that of its named grid, and where the grid is searched for that
    of the model's own time."""
    if recipe.denoise == 1:
        return float(sampling.sigma_max)
    return float(sampling.percent_to_sigma(1 - recipe.denoise) if recipe.grid == FREE else named_grid(sampling, recipe.grid, recipe.steps, recipe.denoise)[0])


def with_table(private, embeddings: Embeddings, steps: int = 0):
    """(the private MODEL with the table for `steps`, 0 = the file's smallest, on it and no check of schedule or sampler, its Patch)."""
    patched, _ = apply_embeddings(private, embeddings, steps, off_grid="off")
    return patched, patched.get_attachment(KEY)


def untrained_table(network: torch.nn.Module, sampling, space: str, sigmas: torch.Tensor, solver: str, tableau: Tableau, guided: Guided = ALL) -> Table:
    """Zero offsets at every site, for `tableau` on `sigmas` [K + 1]: the plain model, whose rows `guided` evaluate the cfg pair."""
    offsets = {site.path: torch.zeros(1, len(tableau.row_sigmas), site.width) for site in find_sites(network, space)}
    timesteps = [float(sampling.timestep(sigma.float())) for sigma in tableau.row_sigmas]
    return Table(len(sigmas) - 1, sigmas.tolist(), timesteps, solver, tableau, [1.0], offsets, guided=guided)


def require_gradient(session: Session, cfg: float) -> None:
    """MTEOError where, at this cfg, a node on the model, such as FreeU_V2, writes into what a gradient needs: told before the teacher's work, not after it."""
    sigma = float(session.sampling.sigma_max) / 2
    x = session.start(session.noise(1, 0), torch.tensor(sigma)).requires_grad_(True)
    try:
        session.denoise(x, sigma, torch.tensor([0]), torch.tensor([cfg], dtype=torch.float64)).square().mean().backward()
    except RuntimeError as error:
        if full(error):
            raise MTEOError(TOO_SMALL) from None  # a training needs that much at least
        raise MTEOError(
            f"No gradient comes through this model; a node on it, such as FreeU_V2 or NAGuidance, may be why: distil without that node. ({error})"
        ) from error


def denoise_of(session: Session, alone: Sequence[int] = (), placed: Tableau | None = None):
    """denoise(x, call, sigma, batch) -> D of a solver on the session's model, each picture with its prompt and cfg; the calls `alone` ask for the prompt
    alone. placed: the table's solver, by whose σ a call finds its row; None = by the σ that it is told, which is the same but where that is learned."""

    def denoise(x: torch.Tensor, call: int, sigma: float | torch.Tensor, batch: Trajectories) -> torch.Tensor:
        guidance = torch.ones_like(batch.guidance) if call in alone else batch.guidance
        with following(session.sampling, sigma), session.prompt_alone(call in alone):
            return session.denoise(x, sigma, batch.item, guidance, None if placed is None else float(placed.sigmas[call]))

    return denoise


def choose_solver(session: Session, network: torch.nn.Module, recipe: Recipe, grid, sampler, name: str, prompts: int, progress) -> Table:
    """The student before training: its σ (given or searched for on the plain model with re-solved rows) and its coefficients. Where all coefficients are
    learned, each cfg value gets σ of its own; elsewhere the named solver's coefficients go with one grid for all."""
    free = isinstance(grid, str)
    read = lambda sigmas: (
        euler_tableau(sigmas)
        if sampler is None and recipe.solver == "euler"
        else read_tableau(sampler or named_sampler(recipe.solver), sigmas, session.sampling, name)
    )
    if free:
        apart = recipe.rows == "all" and len(read(teacher_sigmas(session, recipe.steps)).sigmas) == recipe.steps
        found = search_solvers(session, recipe, apart, prompts, progress)
        grid = torch.cat([torch.stack([own.sigmas for own in found]).mean(0), torch.zeros(1, dtype=torch.float64)]).float()
    base = read(grid)
    if free:
        start = start_sigma(session.sampling, recipe)
        base = started_at(base, start, None if found[0].mean is None else torch.stack([own.mean for own in found]).mean(0))
        grid[0] = start
    table = untrained_table(network, session.sampling, recipe.space, grid, name, base, recipe.guided)
    table.solver_options = {name: value if isinstance(value, WORDS) else type(value).__name__ for name, value in getattr(sampler, "extra_options", {}).items()}
    if free and recipe.rows != "solver":  # training starts from what was found
        table.guidance, table.learned = sorted(recipe.guidance), found if apart else [replace(base, mean=own.mean) for own in found]
        table.offsets = {path: rows.expand(len(found), -1, -1).clone() for path, rows in table.offsets.items()}
    return table


@torch.no_grad()
def search_solvers(session: Session, recipe: Recipe, apart: bool, prompts: int, progress) -> list[Tableau]:
    """The plain model's best for each cfg value, in rising order of it: `apart` each for itself, or all on one grid."""
    rising = sorted(range(len(recipe.guidance)), key=lambda number: recipe.guidance[number])
    told = [partial(progress, part=(place, len(rising))) for place in range(len(rising))]
    start = start_sigma(session.sampling, recipe)
    teacher = teacher_tableau(session, teacher_sigmas(session, recipe.teacher_steps, start))
    pairs = [
        gather(session, teacher, None, recipe, number, SEARCH, min(SEARCHED, recipe.pictures), prompts, None, tell)
        for number, tell in zip(rising, told, strict=True)
    ]
    plains = [Plain(denoise_of(session, recipe.alone), own.part(slice(None))) for own in pairs]
    search = lambda own, tell: search_grid(own, recipe.steps, start, session.flow, tell, recipe.analytic, apart and moves_sigmas(recipe, recipe.steps))
    return [search([plain], tell)[0] for plain, tell in zip(plains, told, strict=True)] if apart else search(plains, progress)


def teacher_sigmas(session: Session, steps: int, start: float | None = None) -> torch.Tensor:
    """The teacher's grid [steps + 1] from σ `start`, the model's largest if None: Karras', or for a flow model even steps of its own, shifted time (Esser et
    al. 2024, eq. 23), on which 24 steps are twice as near to many (docs/ablations.md); a step more or less from a later start."""
    sampling, largest = session.sampling, float(session.sampling.sigma_max)
    if start is None or abs(start / largest - 1) < SAME_SIGMA:
        start = largest  # to the last bit, as a student's is
    if not session.flow:
        return karras(steps, float(sampling.sigma_min), start)
    grid = named_grid(sampling, "sgm_uniform", round(steps / float((sampling.sigmas <= start * (1 + SAME_SIGMA)).float().mean())))
    return torch.cat([torch.tensor([start]), grid[grid < start * (1 - SAME_SIGMA)]])


def refined_of(session: Session, sigmas, steps: int) -> torch.Tensor:
    """The teacher's grid through a student's σ."""
    return refined(torch.as_tensor(sigmas), teacher_sigmas(session, steps, float(sigmas[0])), session.flow)


def teacher_tableau(session: Session, sigmas: torch.Tensor) -> Tableau:
    """DPM++ 2M, as ComfyUI has it, on a fine grid."""
    return read_tableau(comfy.samplers.sampler_object("dpmpp_2m"), sigmas, session.sampling, "dpmpp_2m")


def gather(
    session: Session, teacher: Tableau, student_sigmas, recipe: Recipe, number: int, stream: int, count: int, prompts: int, store, progress
) -> Trajectories:
    """`count` teacher trajectories of the noise stream at the recipe's cfg value of that number; prompts in turn. Chunks that the store has are read. They
    are on the processor, and a part of them on the session's device."""
    cfg = recipe.guidance[number]
    parts, stage = [], {TRAIN: "teacher", VALIDATION: "teacher, held out", SEARCH: "teacher, for the grid"}[stream]
    for chunk in range(-(-count // CHUNK)):
        progress(stage, chunk * CHUNK, count)
        size = min(CHUNK, count - chunk * CHUNK)
        part = store.read_chunk(stream, number, chunk, size) if store else None
        if part is None:
            place = torch.arange(chunk * CHUNK, chunk * CHUNK + size)
            item = (place + 7919 * (stream - 1)) % prompts
            guidance = torch.full((size,), cfg, dtype=torch.float64)
            seed = (((recipe.seed * 4 + stream) * 100 + number) * 100_003 + chunk) % 2**63
            start = starts(session, recipe, teacher.sigmas[0], place, item, guidance, prompts, seed)
            states, end = follow(
                teacher,
                partial(denoise_of(session), batch=Trajectories(start, start[:, :0], start, item, guidance)),
                start,
                [] if student_sigmas is None else student_sigmas,
            )
            if not end.isfinite().all():
                raise MTEOError("The model's own pictures hold values that are not finite: load it in another precision, or choose another cfg.")
            part = Trajectories(start, states, end, item, guidance, torch.device("cpu")).part(slice(None))
            if store:
                store.write_chunk(stream, number, chunk, part)
        parts.append(part)
    progress(stage, count, count)
    return join(parts).for_device(session.device)


@torch.no_grad()
def starts(
    session: Session, recipe: Recipe, sigma: torch.Tensor, place: torch.Tensor, item: torch.Tensor, guidance: torch.Tensor, prompts: int, seed: int
) -> torch.Tensor:
    """x_T [B, …] at σ of the recipe's samplings, for the prompts `item` [B]: noise; with a denoise below 1 noise on the model's own many-step pictures, of the
    same prompt and of another one by turns, which change with each round of the prompts. place [B]: of each among all."""
    if recipe.denoise == 1:
        return session.start(session.noise(len(item), seed), sigma)
    first, noise = session.noise(2 * len(item), seed).chunk(2)
    other = (place % prompts + place // prompts) % 2
    drawn = (item + other * max(1, prompts // 2)) % prompts
    many = teacher_tableau(session, teacher_sigmas(session, recipe.teacher_steps))
    start = session.start(first, many.sigmas[0])
    pictures = execute(many, partial(denoise_of(session), batch=Trajectories(start, start[:, :0], start, drawn, guidance)), start)
    return session.start(noise, sigma, pictures)


def train(session: Session, patch, recipe: Recipe, number: int, prompts: int, store: "RunFolder", progress) -> Table:
    """The patch's table, trained at the recipe's cfg value of that number, which it then is for."""
    tableau, total = patch.table.tableau_at(recipe.guidance[number]), recipe.sequential + recipe.iterations
    sigmas = tableau.schedule.float()
    teacher = teacher_tableau(session, refined_of(session, sigmas, recipe.teacher_steps))
    inner = sigmas if recipe.sequential else None  # no other training reads the teacher's states on its way
    pairs = gather(session, teacher, inner, recipe, number, TRAIN, recipe.pictures, prompts, store, progress)
    held_out = gather(session, teacher, None, recipe, number, VALIDATION, recipe.held_out, prompts, store, progress)

    def told(state: State, line: dict | None) -> None:
        if line is None:
            return progress("training", state.iteration, total)
        store.write_state(number, state)
        with torch.no_grad():
            one = held_out.part(slice(0, 1))
            student = corrected(tableau, state.offsets, session.flow)
            picture = execute(student, partial(denoise_of(session, patch.table.alone, tableau), batch=one), one.start)
        progress("training", state.iteration, total, picture=picture, **line)

    table = trained(session, patch, recipe, recipe.guidance[number], pairs, held_out, store.read_state(number), told)
    table.record |= dict(recipe=recipe.facts(), prompts=prompts, teacher=f"dpmpp_2m, {len(teacher.sigmas)} steps")
    return table


def trained(session: Session, patch, recipe: Recipe, cfg: float, pairs: Trajectories, held_out: Trajectories, state: State | None, progress) -> Table:
    """The patch's table after `distill` on pairs of one cfg."""
    patch.at(cfg)
    patch.offsets.replace({path: rows.to(session.device) for path, rows in patch.offsets.table.items()})
    perceive = (lambda x, noise, batch: session.perceived(x, noise, batch.item)) if recipe.perceives(cfg) else None
    start = patch.table.tableau_at(cfg)
    best, tableau, state = distill(
        denoise_of(session, patch.table.alone, start), perceive, patch.offsets.table, start, pairs, held_out, recipe, state, progress, session.flow
    )
    return replace(patch.table, guidance=[cfg], offsets={path: as_stored(rows)[None] for path, rows in best.items()},
                   learned=None if recipe.rows == "solver" else [tableau], record=dict(log=[dict(cfg=cfg, **line) for line in state.log]))


def joined(parts: list[Table]) -> Table:
    """One table of those that were trained at one cfg value each, in rising order of it."""
    parts = sorted(parts, key=lambda part: part.guidance[0])
    record = parts[0].record | dict(log=[line for part in parts for line in part.record["log"]])
    return replace(
        parts[0],
        guidance=[part.guidance[0] for part in parts],
        offsets={path: torch.cat([part.offsets[path] for part in parts]) for path in parts[0].offsets},
        learned=None if parts[0].learned is None else [own for part in parts for own in part.learned],
        record=record,
    )


def compare_model(
    model, embeddings: Embeddings, positives: list, negative, latent: torch.Tensor, recipe: Recipe, count: int, seed: int
) -> dict[str, torch.Tensor]:
    """`count` pictures as LATENT by "teacher", "plain" (the named solver on the table's grid) and "mteo", of the same noise."""
    with training_mode():
        patched, patch = with_table(private_copy(model), embeddings)
        return run_session(patched, positives, negative, latent, lambda session: compare(session, patch, recipe, len(positives), count, seed))


@torch.no_grad()
def compare(session: Session, patch, recipe: Recipe, prompts: int, count: int, seed: int) -> dict[str, torch.Tensor]:
    """As `compare_model`, at the largest cfg of the recipe, in chunks."""
    table, cfg = patch.table, max(recipe.guidance)
    patch.at(cfg)
    fine = teacher_tableau(session, refined_of(session, table.sigmas, recipe.teacher_steps))
    made = {"teacher": [], "plain": [], "mteo": []}
    patch.offsets.scale = 0.0
    place, guidance = torch.arange(count), torch.full((count,), cfg, dtype=torch.float64)
    item = place % prompts
    whole = starts(session, recipe, torch.tensor(table.sigmas[0]), place, item, guidance, prompts, seed)
    whole = Trajectories(whole, whole[:, :0], whole, item, guidance)
    for begin in range(0, count, CHUNK):
        part = whole.part(slice(begin, begin + CHUNK))
        for name, tableau, strength, alone in (
            ("teacher", fine, 0.0, ()),
            ("plain", table.tableau, 0.0, ()),
            ("mteo", table.tableau_at(cfg), 1.0, table.alone),
        ):
            patch.offsets.scale = strength
            made[name].append(session.out(execute(tableau, partial(denoise_of(session, alone), batch=part), part.start)))
    return {name: torch.cat(parts) for name, parts in made.items()}


class RunFolder:
    """What a run leaves on disk: run.json, start.safetensors, table.safetensors, until that is done teacher/*.safetensors; for each cfg value, by its number
    in the recipe, state-N.pt and log-N.jsonl. None = nowhere."""

    def __init__(self, folder: Path | None, run: dict):
        self.folder, self.note = folder and Path(folder), json.dumps(run, sort_keys=True, indent=1)
        if self.folder is None:
            return
        own = self.folder / "run.json"
        same = own.is_file() and own.read_text() == self.note
        if own.is_file() and not same and any((self.folder / name).is_file() for name in ("start.safetensors", "table.safetensors")):
            raise MTEOError(f"The run folder {self.folder.name} belongs to a run with another recipe, model or prompts: choose another folder or delete it.")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not same:
            own.with_suffix(".new").write_text(self.note)
            own.with_suffix(".new").replace(own)

    def chunk(self, stream: int, number: int, chunk: int) -> Path:
        return self.folder / "teacher" / f"{('train', 'held_out')[stream - 1]}-{number}-{chunk:05}.safetensors"

    def read_chunk(self, stream: int, number: int, chunk: int, size: int) -> Trajectories | None:
        part = load_trajectories(self.chunk(stream, number, chunk), self.note) if self.folder else None
        return part if part is not None and len(part) == size else None

    def write_chunk(self, stream: int, number: int, chunk: int, part: Trajectories) -> None:
        if self.folder:
            (self.folder / "teacher").mkdir(exist_ok=True)
            save_trajectories(part, self.chunk(stream, number, chunk), self.note)

    def read_state(self, number: int) -> State | None:
        return load_state(self.folder / f"state-{number}.pt") if self.folder else None

    def write_state(self, number: int, state: State) -> None:
        if self.folder:
            save_state(state, self.folder / f"state-{number}.pt")
            (self.folder / f"log-{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in state.log))

    def started(self) -> Embeddings | None:
        """What training starts from: its search is not made twice."""
        return self._read("start.safetensors")

    def start(self, embeddings: Embeddings) -> None:
        self._write("start.safetensors", embeddings)

    def finished(self) -> Embeddings | None:
        return self._read("table.safetensors")

    def finish(self, embeddings: Embeddings) -> None:
        """The teacher's pictures, which may be gigabytes, are of no more use."""
        self._write("table.safetensors", embeddings)
        if self.folder:
            shutil.rmtree(self.folder / "teacher", ignore_errors=True)

    def _read(self, name: str) -> Embeddings | None:
        return load_embeddings(self.folder / name) if self.folder and (self.folder / name).is_file() else None

    def _write(self, name: str, embeddings: Embeddings) -> None:
        if self.folder:
            save_embeddings(embeddings, self.folder / name)
