"""Learn the offsets: the student's K steps against the teacher's end points, with the solver's rows and σ beside them.

Stage A goes step by step: the student's own state, one step, the teacher's next state as target. Stage B goes end to end.
The caller gives `denoise(x, call, sigma, batch)`, which reads the trainable offsets; weights are frozen, so a step costs a
forward and an activation-only backward.
"""
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from .coefficients import QUICK, ROWS, SIGMAS, SOLVERS, corrected, learned_of, row_units
from .errors import MTEOError
from .gradient import Room, fitted, gradient_of
from .perception import unlikeness
from .recipe import Recipe
from .tableau import Tableau, combine, execute
from .teacher import Trajectories

SEEN = 8  # pictures that the network's view is asked of at once outside a training step, at most: what its blocks put out is large
LATE = 0.5  # the part of stage B, at its end, in which the network's own view counts
SOLVED = 128  # training pairs that the last row is solved on, and the rates found, before training
REACH = 0.15  # the part of the loss that a first step takes away at most, to first order: beyond it the network's answer is not linear in the offsets


@dataclass
class State:
    """All that a run needs to go on: exact resume means the same bytes as an uninterrupted run."""

    offsets: dict[str, torch.Tensor]
    averaged: dict[str, torch.Tensor]
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]]
    generator: torch.Tensor
    iteration: int = 0
    rates: dict[str, float] = field(default_factory=dict)  # Adam's first, by path
    best_score: float = math.inf
    best_error: float = math.inf
    best_offsets: dict[str, torch.Tensor] = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)

    def go_beside(self, parameters: dict[str, torch.Tensor]) -> None:
        """Each tensor goes to the device of the parameter that it is of."""
        beside = lambda values: {path: value.to(parameters[path].device) for path, value in values.items()}
        self.offsets, self.averaged, self.best_offsets = beside(self.offsets), beside(self.averaged), beside(self.best_offsets)
        firsts, seconds = (beside({path: moments[i] for path, moments in self.moments.items()}) for i in (0, 1))
        self.moments = {path: (firsts[path], seconds[path]) for path in firsts}


def fresh_state(parameters: dict[str, torch.Tensor], recipe: Recipe) -> State:
    """Zero offsets (= the plain model) in the shapes of `parameters`."""
    zeros = lambda: {path: torch.zeros_like(value, requires_grad=False) for path, value in parameters.items()}
    ones, twos = zeros(), zeros()
    return State(zeros(), zeros(), {path: (ones[path], twos[path]) for path in ones}, torch.Generator().manual_seed(recipe.seed).get_state())


def save_state(state: State, path: Path) -> None:
    """Under a temporary name, then renamed."""
    new = Path(path).with_suffix(".new")
    torch.save({name: getattr(state, name) for name in state.__dataclass_fields__}, new)
    new.replace(path)


def load_state(path: Path) -> State | None:
    """The state at `path`, or None where there is none; MTEOError where it cannot be read."""
    if not Path(path).is_file():
        return None
    try:
        return State(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise MTEOError(f"The training state {Path(path).name} cannot be read: delete it to train from the start.") from error


def student_terms(tableau: Tableau, denoise, start: torch.Tensor, calls: int | None = None) -> list[torch.Tensor]:
    """[x_T, D_0, …, D_{calls-1}] of the student; denoise(x, call, sigma) -> D."""
    terms = [tableau.begun(start)]
    for call, sigma in enumerate(tableau.sigmas.tolist()[:calls]):
        terms.append(denoise(combine(tableau.matrix[call], terms), call, sigma))
    return terms


def picture_loss(end: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over pictures of the RMSE of each: linear in a picture's error, so that no few hard pictures rule the sum [26]."""
    return (end - target).flatten(1).pow(2).mean(1).add(1e-12).sqrt().mean()


def distill(denoise, perceive, offsets: dict[str, torch.Tensor], tableau: Tableau, train: Trajectories, validation: Trajectories, recipe: Recipe,
            state: State | None = None, progress=None, flow: bool = False) -> tuple[dict[str, torch.Tensor], Tableau, State]:
    """Train `offsets` (the tensors [R, D] that `denoise` reads, changed in place) and return the best of the validation.

    denoise(x, call, sigma, batch) -> D, `batch` a part of the trajectories. perceive(x, noise, batch) -> what the plain network's blocks make of pictures x,
    for `unlikeness`; None where the error of the latents is all that counts. progress(state, line) is called after every step, `line` being a dict after a
    validation and else None; it may raise to cancel. `state` goes on where an earlier run stopped. Returns (offsets, tableau with what was learned of it,
    state). flow: whether x is (1 − σ)·picture + σ·noise.
    """
    calls, spread = len(tableau.sigmas), float(train.end.cpu().double().std())
    parameters = {path: value.requires_grad_(True) for path, value in offsets.items()}
    parameters |= {name: value.requires_grad_(True) for name, value in learned_of(recipe, tableau).items()}
    solver = lambda learned: corrected(tableau, learned, flow)
    state = state or fresh_state(parameters, recipe)
    state.go_beside(parameters)
    generator = torch.Generator()
    generator.set_state(state.generator)
    total, room = recipe.sequential + recipe.iterations, Room(recipe.batch)
    late = math.ceil(max(total - LATE * recipe.iterations, recipe.sequential))
    load(parameters, state.offsets)
    if not state.best_offsets:
        line = keep_best(state, parameters, solver, denoise, perceive, validation, recipe, room)  # zero offsets: the plain model
        if not state.best_offsets:
            raise MTEOError("The model's pictures in few steps hold values that are not finite: load it in another precision, or choose another solver or cfg.")
        if recipe.rows != "solver":
            change = solved_row(denoise, tableau, train.part(slice(0, SOLVED))) - tableau.matrix[-1]
            for values in (state.offsets, state.averaged):
                values[ROWS][-1] = (change / row_units(tableau, 1)[-1]).to(values[ROWS])
            load(parameters, state.offsets)
        state.rates = first_rates(denoise, solver, parameters, train.part(slice(0, SOLVED)), recipe, room)
        if progress is not None:
            progress(state, line)
    while state.iteration < total:
        batch, noise = train.part(torch.randint(len(train), (recipe.batch,), generator=generator)), None
        if perceive and state.iteration == late:
            state.best_score = math.inf  # from here on only tables that were trained by the network's view, too: what it gives sets, the score shows in part
        if perceive and state.iteration >= late:
            noise = torch.randn(batch.end.shape, generator=generator).to(batch.end.device)

        def loss_of(rows: slice, denoise, batch=batch, noise=noise) -> torch.Tensor:
            part, student = batch.part(rows), solver(parameters)
            if state.iteration < recipe.sequential:
                return step_loss(state.iteration * calls // recipe.sequential, student, denoise, part)
            end = execute(student, partial(denoise, batch=part), part.start)
            loss = picture_loss(end, part.end)
            return loss if noise is None else loss / spread + recipe.perception * seen_apart(perceive, end, part, noise[rows])

        loss, gradients = gradient_of(loss_of, denoise, batch, list(parameters.values()), room)
        step_adam(parameters, gradients, state, recipe, total)
        state.iteration += 1
        state.generator = generator.get_state()
        line = None
        if state.iteration % recipe.validate_every == 0 or state.iteration == total:
            line = keep_best(state, parameters, solver, denoise, perceive, validation, recipe, room, float(loss))
        if progress is not None:
            progress(state, line)
    load(parameters, state.best_offsets)
    best = {path: value.detach().clone() for path, value in parameters.items()}
    learned = solver(best)
    return {path: value for path, value in best.items() if path not in SOLVERS}, learned, state


def seen_apart(perceive, end: torch.Tensor, batch: Trajectories, noise: torch.Tensor) -> torch.Tensor:
    """How unlike the teacher's ends the network finds the student's, both with the same noise."""
    with torch.no_grad():
        wanted = perceive(batch.end, noise, batch)
    return unlikeness(perceive(end, noise, batch), wanted).to(end.device)


def step_loss(step: int, student: Tableau, denoise, batch: Trajectories) -> torch.Tensor:
    """Stage A: the calls before `step` only bring the student's own state; the teacher's next state is the target."""

    def one_step(x, call, sigma):
        with torch.set_grad_enabled(call == step):
            return denoise(x, call, sigma, batch)

    terms = student_terms(student, one_step, batch.start, step + 1)
    calls = len(student.sigmas)
    target = batch.states[:, step] if step + 1 < calls and calls == batch.states.shape[1] + 1 else batch.end
    return picture_loss(combine(student.matrix[step + 1], terms), target)


@torch.no_grad()
def solved_row(denoise, tableau: Tableau, pairs: Trajectories, batch: int = 64) -> torch.Tensor:
    """The last row [N + 1] that is nearest to the pairs' ends; least squares, float64."""
    size = len(tableau.sigmas) + 1
    gram, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for part in (pairs.part(slice(begin, begin + batch)) for begin in range(0, len(pairs), batch)):
        terms = student_terms(tableau, partial(denoise, batch=part), part.start)
        columns = torch.stack([term.flatten().cpu().double() for term in terms], 1)
        gram, right = gram + columns.T @ columns, right + columns.T @ part.end.flatten().cpu().double()
    return ridge(gram, right, tableau.matrix[-1])


def ridge(gram: torch.Tensor, right: torch.Tensor, prior: torch.Tensor, weight: float = 1e-4) -> torch.Tensor:
    """argmin |A row − b|² + weight·tr(AᵀA)/n·|row − prior|² (float64)."""
    prior = prior.double()
    damp = weight * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram + damp, right + damp @ prior)


def first_rates(denoise, solver, parameters: dict[str, torch.Tensor], pairs: Trajectories, recipe: Recipe, room: Room) -> dict[str, float]:
    """Adam's first step moves each number by its rate, and so makes the loss Σ rate·|gradient| smaller, to first order. One rate for all sites, one for the
    rows and one for σ: that at which it is REACH of the loss, or the recipe's. Networks differ: what is right for one throws another far off
    (docs/ablations.md)."""
    slopes, whole = {path: torch.zeros(value.shape, dtype=torch.float64) for path, value in parameters.items()}, 0.0
    for part in (pairs.part(slice(begin, begin + recipe.batch)) for begin in range(0, len(pairs), recipe.batch)):

        def loss_of(rows: slice, denoise, part=part) -> torch.Tensor:
            few = part.part(rows)
            return picture_loss(execute(solver(parameters), partial(denoise, batch=few), few.start), few.end)

        loss, gradients = gradient_of(loss_of, denoise, part, list(parameters.values()), room)
        share = len(part) / len(pairs)
        whole += share * float(loss)
        for slope, gradient in zip(slopes.values(), gradients, strict=True):
            slope += share * gradient.cpu().double()
    steep = {path: float(slope.abs().sum()) for path, slope in slopes.items()}
    rate = lambda slope, pace=1: min(pace * recipe.rate, REACH * whole / (slope + 1e-12))
    sites = rate(sum(slope for path, slope in steep.items() if path not in SOLVERS))
    pace = {ROWS: QUICK if SIGMAS in steep else 1}
    return {path: rate(slope, pace.get(path, 1)) if path in SOLVERS else sites for path, slope in steep.items()}


def step_adam(parameters, gradients, state: State, recipe: Recipe, total: int) -> None:
    """Adam with a cosine rate and one clip over all sites; the averaged offsets follow."""
    gradients = [gradient.nan_to_num(0.0, 0.0, 0.0) for gradient in gradients]
    norm = torch.stack([g.cpu().double().norm() for g in gradients]).norm()  # float32's last bit would go with where a tensor lies in memory
    scale = (recipe.clip / (norm + 1e-12)).clamp(max=1.0).float()
    count = state.iteration + 1
    left = 0.5 * (1 + math.cos(math.pi * state.iteration / total))
    with torch.no_grad():
        for (path, value), gradient in zip(parameters.items(), gradients, strict=True):
            gradient = gradient * scale
            first, second = state.moments[path]
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient * gradient, 0.01)
            value -= state.rates[path] * left * (first / (1 - 0.9**count)) / ((second / (1 - 0.99**count)).sqrt() + 1e-8)
            state.offsets[path] = value.detach().clone()
            state.averaged[path].lerp_(value, 1 - min(recipe.average, count / (count + 10)))


@torch.no_grad()
def evaluate(denoise, perceive, tableau: Tableau, pairs: Trajectories, together: int, batch: int = 64) -> tuple[torch.Tensor, float | None]:
    """(RMSE of each picture ÷ std of the teacher's end points, how unlike them the network finds the student's, asked of `together` at once; None without
    `perceive`)."""
    errors, unlike, generator = [], 0.0, torch.Generator().manual_seed(0)
    for part in (pairs.part(slice(begin, begin + batch)) for begin in range(0, len(pairs), batch)):
        end = execute(tableau, partial(denoise, batch=part), part.start)
        errors.append((end - part.end).cpu().double().flatten(1).square().mean(1).sqrt())
        if perceive:
            noise = torch.randn(end.shape, generator=generator).to(end.device)
            for rows in (slice(begin, begin + together) for begin in range(0, len(part), together)):
                few = part.part(rows)
                unlike += len(few) * float(seen_apart(perceive, end[rows], few, noise[rows]))
    return torch.cat(errors) / float(pairs.end.cpu().double().std()), unlike / len(pairs) if perceive else None


def keep_best(state: State, parameters, solver, denoise, perceive, validation, recipe: Recipe, room: Room, loss=None) -> dict:
    """Validate the averaged offsets; keep them if they are the best so far, by what the training makes small: a few hard pictures rule the pooled error, which
    is what is told."""
    load(parameters, state.averaged if state.iteration else state.offsets)
    with torch.no_grad():
        errors, unlike = fitted(room, lambda: evaluate(denoise, perceive, solver(parameters), validation, min(SEEN, room.together)))
    error, score = float(errors.square().mean().sqrt()), float(errors.mean()) + recipe.perception * (unlike or 0.0)
    if score < state.best_score:
        state.best_score, state.best_error = score, error
        state.best_offsets = {path: value.detach().clone() for path, value in parameters.items()}
    load(parameters, state.offsets)
    state.log.append(
        dict(
            iteration=state.iteration, loss=loss, held_out=error, mean=float(errors.mean()), median=float(errors.median()), unlike=unlike, best=state.best_error
        )
    )
    return state.log[-1]


def load(parameters: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Copy values into the tensors that the hooks read."""
    with torch.no_grad():
        for path, value in parameters.items():
            value.copy_(values[path])
