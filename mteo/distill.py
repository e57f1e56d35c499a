"""Learn the offsets: the student's K steps against the teacher's end points, with the last solver row solved beside them.

Stage A goes step by step: the student's own state, one step, the teacher's next state as target. Stage B goes end to end.
The caller gives `denoise(x, call, sigma, batch)`, which reads the trainable offsets; weights are frozen, so a step costs a
forward and an activation-only backward.
"""
import math
from dataclasses import asdict, dataclass, field

import torch

from .tableau import Tableau, combine, with_matrix
from .teacher import Trajectories


@dataclass(frozen=True)
class Settings:
    """iterations ≥ 0 of each stage; rate = Adam's peak step on Δ (units of the site's input); clip = largest gradient norm."""

    sequential: int = 0
    end_to_end: int = 160
    batch: int = 48
    rate: float = 0.01
    clip: float = 1.0
    average: float = 0.95
    solve_last_row: bool = True
    validate_every: int = 20
    seed: int = 0


@dataclass
class State:
    """All that a run needs to go on: exact resume means the same bytes as an uninterrupted run."""

    offsets: dict[str, torch.Tensor]
    averaged: dict[str, torch.Tensor]
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]]
    gram: torch.Tensor
    right: torch.Tensor
    generator: torch.Tensor
    iteration: int = 0
    best_error: float = math.inf
    best_offsets: dict[str, torch.Tensor] = field(default_factory=dict)
    best_row: torch.Tensor | None = None
    log: list[dict] = field(default_factory=list)


def fresh_state(widths: dict[str, int], rows: int, calls: int, settings: Settings, device="cpu") -> State:
    """Zero offsets (= the plain model) for sites of the given widths; `rows` distinct σ, `calls` network calls."""
    zeros = lambda: {path: torch.zeros(rows, width, device=device) for path, width in widths.items()}
    moments = {path: (torch.zeros(rows, width, device=device), torch.zeros(rows, width, device=device)) for path, width in widths.items()}
    generator = torch.Generator().manual_seed(settings.seed)
    size = calls + 1
    gram, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    return State(zeros(), zeros(), moments, gram, right, generator.get_state())


def student_terms(tableau: Tableau, denoise, start: torch.Tensor, calls: int | None = None) -> list[torch.Tensor]:
    """[x_T, D_0, …, D_{calls-1}] of the student; denoise(x, call, sigma) -> D."""
    matrix, terms = tableau.matrix.to(start.device), [start]
    for call, sigma in enumerate(tableau.sigmas.tolist()[:calls]):
        terms.append(denoise(combine(matrix[call], terms), call, sigma))
    return terms


def picture_loss(end: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over pictures of the RMSE of each: linear in a picture's error, so that no few hard pictures rule the sum [26]."""
    return (end - target).flatten(1).pow(2).mean(1).add(1e-12).sqrt().mean()


def distill(denoise, offsets: dict[str, torch.Tensor], tableau: Tableau, train: Trajectories, validation: Trajectories, settings: Settings,
            state: State | None = None, progress=None) -> tuple[dict[str, torch.Tensor], Tableau, State]:
    """Train `offsets` (the tensors [R, D] that `denoise` reads, changed in place) and return the best of the validation.

    denoise(x, call, sigma, batch) -> D, `batch` a part of the trajectories. progress(state, line) is called after every
    validation and may raise to cancel; `state` goes on where an earlier run stopped.
    Returns (offsets, tableau with the solved last row, state).
    """
    calls, rows = len(tableau.sigmas), len(tableau.row_sigmas)
    state = state or fresh_state({path: value.shape[1] for path, value in offsets.items()}, rows, calls, settings, train.start.device)
    generator = torch.Generator()
    generator.set_state(state.generator)
    total = settings.sequential + settings.end_to_end
    parameters = {path: value.requires_grad_(True) for path, value in offsets.items()}
    load(parameters, state.offsets)
    if not state.best_offsets:
        keep_best(state, parameters, tableau, denoise, validation, settings, progress)
    while state.iteration < total:
        index = torch.randint(len(train), (settings.batch,), generator=generator)
        batch = train.part(index)
        stage_a = state.iteration < settings.sequential
        if stage_a:
            step = state.iteration * calls // settings.sequential
            terms = student_terms(tableau, without_gradient_before(step, denoise, batch), batch.start, step + 1)
            target = batch.states[:, step] if step + 1 < calls and calls == batch.states.shape[1] + 1 else batch.end
            loss = picture_loss(combine(tableau.matrix[step + 1], terms), target)
        else:
            terms = student_terms(tableau, lambda x, call, sigma: denoise(x, call, sigma, batch), batch.start)
            row = solved_row(state, terms, batch.end, tableau) if settings.solve_last_row else tableau.matrix[-1]
            loss = picture_loss(combine(row.to(batch.start), terms), batch.end)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        step_adam(parameters, gradients, state, settings, total)
        state.iteration += 1
        state.generator = generator.get_state()
        if state.iteration % settings.validate_every == 0 or state.iteration == total:
            keep_best(state, parameters, tableau, denoise, validation, settings, progress, float(loss.detach()))
    load(parameters, state.best_offsets)
    best = {path: value.detach().clone() for path, value in parameters.items()}
    return best, with_last_row(tableau, state.best_row), state


def without_gradient_before(step: int, denoise, batch):
    """Stage A trains one step: the calls before it only bring the student's own state."""

    def one_step(x, call, sigma):
        if call == step:
            return denoise(x, call, sigma, batch)
        with torch.no_grad():
            return denoise(x, call, sigma, batch)

    return one_step


def solved_row(state: State, terms: list[torch.Tensor], target: torch.Tensor, tableau: Tableau, memory: float = 0.9) -> torch.Tensor:
    """Least squares for the last row over a fading memory of batches, float64; a little ridge towards the solver's own row."""
    columns = torch.stack([term.detach().flatten().double().cpu() for term in terms], 1)
    state.gram = memory * state.gram + columns.T @ columns
    state.right = memory * state.right + columns.T @ target.flatten().double().cpu()
    return ridge(state.gram, state.right, tableau.matrix[-1])


def ridge(gram: torch.Tensor, right: torch.Tensor, prior: torch.Tensor, weight: float = 1e-4) -> torch.Tensor:
    """argmin |A row − b|² + weight·tr(AᵀA)/n·|row − prior|² (float64)."""
    prior = prior.double().cpu()
    damp = weight * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram + damp, right + damp @ prior)


def step_adam(parameters, gradients, state: State, settings: Settings, total: int) -> None:
    """Adam with a cosine rate and one clip over all sites; the averaged offsets follow."""
    gradients = [torch.zeros_like(p) if g is None else g.nan_to_num(0.0) for p, g in zip(parameters.values(), gradients, strict=True)]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    scale = (settings.clip / (norm + 1e-12)).clamp(max=1.0)
    count = state.iteration + 1
    rate = settings.rate * 0.5 * (1 + math.cos(math.pi * state.iteration / total))
    with torch.no_grad():
        for (path, value), gradient in zip(parameters.items(), gradients, strict=True):
            gradient = gradient * scale
            first, second = state.moments[path]
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient * gradient, 0.01)
            value -= rate * (first / (1 - 0.9**count)) / ((second / (1 - 0.99**count)).sqrt() + 1e-8)
            state.offsets[path] = value.detach().clone()
            state.averaged[path].lerp_(value, 1 - min(settings.average, count / (count + 10)))


@torch.no_grad()
def evaluate(denoise, tableau: Tableau, pairs: Trajectories, batch: int = 64, solve: bool = False) -> tuple[float, torch.Tensor]:
    """(pooled RMSE ÷ std of the teacher's end points, last row). With `solve` the row is the least-squares one of these pairs."""
    size = len(tableau.sigmas) + 1
    gram, right, square, count = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 0.0, 0
    for begin in range(0, len(pairs), batch):
        part = pairs.part(slice(begin, begin + batch))
        terms = student_terms(tableau, lambda x, call, sigma, part=part: denoise(x, call, sigma, part), part.start)
        columns, target = torch.stack([term.flatten().double().cpu() for term in terms], 1), part.end.flatten().double().cpu()
        gram, right = gram + columns.T @ columns, right + columns.T @ target
        square, count = square + float(target @ target), count + len(target)
    row = ridge(gram, right, tableau.matrix[-1]) if solve else tableau.matrix[-1].double()
    error = max(float(row @ gram @ row - 2 * row @ right) + square, 0.0) / count
    return math.sqrt(error) / float(pairs.end.double().std()), row


def keep_best(state: State, parameters, tableau, denoise, validation, settings: Settings, progress, loss=None) -> None:
    """Validate the averaged offsets with the row of the training batches; keep them if they are the best so far."""
    tested = state.averaged if state.iteration else state.offsets
    load(parameters, tested)
    solving = settings.solve_last_row and state.iteration > settings.sequential
    row = ridge(state.gram, state.right, tableau.matrix[-1]) if solving else tableau.matrix[-1]
    error, row = evaluate(denoise, with_last_row(tableau, row), validation)
    if error < state.best_error:
        state.best_error, state.best_row = error, row
        state.best_offsets = {path: value.detach().clone() for path, value in parameters.items()}
    load(parameters, state.offsets)
    line = dict(iteration=state.iteration, loss=loss, held_out=error, best=state.best_error)
    state.log.append(line)
    if progress is not None:
        progress(state, line)


def with_last_row(tableau: Tableau, row: torch.Tensor) -> Tableau:
    matrix = tableau.matrix.clone()
    matrix[-1] = row.to(matrix)
    return with_matrix(tableau, matrix)


def load(parameters: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Copy values into the tensors that the hooks read."""
    with torch.no_grad():
        for path, value in parameters.items():
            value.copy_(values[path])


def describe(settings: Settings) -> dict:
    """The settings as JSON for the training record."""
    return asdict(settings)
