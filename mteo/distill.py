"""Learn the offsets: the student's K steps against the teacher's end points, with the solver's rows beside them.

Stage A goes step by step: the student's own state, one step, the teacher's next state as target. Stage B goes end to end.
The caller gives `denoise(x, call, sigma, batch)`, which reads the trainable offsets; weights are frozen, so a step costs a
forward and an activation-only backward.
"""
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .errors import MTEOError
from .recipe import Recipe
from .tableau import Tableau, combine, with_matrix
from .teacher import Trajectories

INNER = "solver.inner"  # the learned correction of the solver's inner rows, beside the sites
INNER_UNIT = 0.3  # a correction of 1 is this much on a coefficient of D; on x_T it is this ÷ σ_0, as x_T is σ_0 times larger


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


def fresh_state(parameters: dict[str, torch.Tensor], calls: int, recipe: Recipe) -> State:
    """Zero offsets (= the plain model) in the shapes of `parameters`; `calls` network calls of the solver."""
    zeros = lambda: {path: torch.zeros_like(value, requires_grad=False) for path, value in parameters.items()}
    ones, twos = zeros(), zeros()
    size = calls + 1
    gram, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    return State(zeros(), zeros(), {path: (ones[path], twos[path]) for path in ones}, gram, right, torch.Generator().manual_seed(recipe.seed).get_state())


def save_state(state: State, path: Path) -> None:
    """Under a temporary name, then renamed."""
    new = Path(path).with_suffix(".new")
    torch.save({name: getattr(state, name) for name in state.__dataclass_fields__}, new)
    new.replace(path)


def load_state(path: Path, device) -> State | None:
    """The state at `path`, or None where there is none; MTEOError where it cannot be read."""
    if not Path(path).is_file():
        return None
    try:
        values = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise MTEOError(f"The training state {Path(path).name} cannot be read: delete it to train from the start.") from error
    values["generator"], values["gram"], values["right"] = (values[name].cpu() for name in ("generator", "gram", "right"))
    return State(**values)


def inner_matrix(tableau: Tableau, correction: torch.Tensor) -> torch.Tensor:
    """The solver's matrix with `correction` [N−1, N+1] on the rows of calls 1 … N−1, strictly causal; differentiable."""
    matrix = tableau.matrix.to(correction.device)
    calls = len(tableau.sigmas)
    causal = torch.ones(calls - 1, calls + 1, device=correction.device).tril(1)  # the x of call j knows x_T and D_0 … D_{j−1}
    unit = torch.full((calls + 1,), INNER_UNIT, device=correction.device)
    unit[0] /= float(tableau.sigmas[0])
    return torch.cat([matrix[:1], matrix[1:-1] + (correction * causal * unit).double(), matrix[-1:]])


def student_terms(tableau: Tableau, denoise, start: torch.Tensor, calls: int | None = None, matrix: torch.Tensor | None = None) -> list[torch.Tensor]:
    """[x_T, D_0, …, D_{calls-1}] of the student; denoise(x, call, sigma) -> D; `matrix` in place of the solver's."""
    matrix, terms = (tableau.matrix if matrix is None else matrix).to(start.device), [start]
    for call, sigma in enumerate(tableau.sigmas.tolist()[:calls]):
        terms.append(denoise(combine(matrix[call], terms), call, sigma))
    return terms


def picture_loss(end: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over pictures of the RMSE of each: linear in a picture's error, so that no few hard pictures rule the sum [26]."""
    return (end - target).flatten(1).pow(2).mean(1).add(1e-12).sqrt().mean()


def distill(denoise, offsets: dict[str, torch.Tensor], tableau: Tableau, train: Trajectories, validation: Trajectories, recipe: Recipe,
            state: State | None = None, progress=None) -> tuple[dict[str, torch.Tensor], Tableau, State]:
    """Train `offsets` (the tensors [R, D] that `denoise` reads, changed in place) and return the best of the validation.

    denoise(x, call, sigma, batch) -> D, `batch` a part of the trajectories. progress(state, line) is called after every step,
    `line` being a dict after a validation and else None; it may raise to cancel. `state` goes on where an earlier run stopped.
    Returns (offsets, tableau with what was learned of its rows, state).
    """
    calls, solving = len(tableau.sigmas), recipe.rows != "solver"
    parameters = {path: value.requires_grad_(True) for path, value in offsets.items()}
    if recipe.rows == "all" and calls > 1:
        first = next(iter(offsets.values()))
        parameters[INNER] = torch.zeros(calls - 1, calls + 1, device=first.device, requires_grad=True)
    state = state or fresh_state(parameters, calls, recipe)
    generator = torch.Generator()
    generator.set_state(state.generator)
    total = recipe.sequential + recipe.iterations
    load(parameters, state.offsets)
    if not state.best_offsets:
        line = keep_best(state, parameters, tableau, denoise, validation, recipe)
        if progress is not None:
            progress(state, line)
    while state.iteration < total:
        batch = train.part(torch.randint(len(train), (recipe.batch,), generator=generator))
        matrix = student_matrix(tableau, parameters)
        if state.iteration < recipe.sequential:
            loss = step_loss(state.iteration * calls // recipe.sequential, tableau, matrix, denoise, batch)
        else:
            terms = student_terms(tableau, lambda x, call, sigma, batch=batch: denoise(x, call, sigma, batch), batch.start, matrix=matrix)
            row = solved_row(state, terms, batch.end, tableau) if solving else tableau.matrix[-1]
            loss = picture_loss(combine(row.to(batch.start.device), terms), batch.end)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        step_adam(parameters, gradients, state, recipe, total)
        state.iteration += 1
        state.generator = generator.get_state()
        line = None
        if state.iteration % recipe.validate_every == 0 or state.iteration == total:
            line = keep_best(state, parameters, tableau, denoise, validation, recipe, float(loss.detach()))
        if progress is not None:
            progress(state, line)
    load(parameters, state.best_offsets)
    best = {path: value.detach().clone() for path, value in parameters.items()}
    inner = student_matrix(tableau, best)
    best.pop(INNER, None)
    return best, with_last_row(with_matrix(tableau, inner.cpu()), state.best_row), state


def student_matrix(tableau: Tableau, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    return inner_matrix(tableau, parameters[INNER]) if INNER in parameters else tableau.matrix


def step_loss(step: int, tableau: Tableau, matrix: torch.Tensor, denoise, batch: Trajectories) -> torch.Tensor:
    """Stage A: the calls before `step` only bring the student's own state; the teacher's next state is the target."""

    def one_step(x, call, sigma):
        with torch.set_grad_enabled(call == step):
            return denoise(x, call, sigma, batch)

    terms = student_terms(tableau, one_step, batch.start, step + 1, matrix)
    calls = len(tableau.sigmas)
    target = batch.states[:, step] if step + 1 < calls and calls == batch.states.shape[1] + 1 else batch.end
    return picture_loss(combine(matrix[step + 1].to(batch.start.device), terms), target)


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


def step_adam(parameters, gradients, state: State, recipe: Recipe, total: int) -> None:
    """Adam with a cosine rate and one clip over all sites; the averaged offsets follow."""
    gradients = [torch.zeros_like(p) if g is None else g.nan_to_num(0.0) for p, g in zip(parameters.values(), gradients, strict=True)]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    scale = (recipe.clip / (norm + 1e-12)).clamp(max=1.0)
    count = state.iteration + 1
    rate = recipe.rate * 0.5 * (1 + math.cos(math.pi * state.iteration / total))
    with torch.no_grad():
        for (path, value), gradient in zip(parameters.items(), gradients, strict=True):
            gradient = gradient * scale
            first, second = state.moments[path]
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient * gradient, 0.01)
            value -= rate * (first / (1 - 0.9**count)) / ((second / (1 - 0.99**count)).sqrt() + 1e-8)
            state.offsets[path] = value.detach().clone()
            state.averaged[path].lerp_(value, 1 - min(recipe.average, count / (count + 10)))


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


def keep_best(state: State, parameters, tableau, denoise, validation, recipe: Recipe, loss=None) -> dict:
    """Validate the averaged offsets with the row of the training batches; keep them if they are the best so far."""
    load(parameters, state.averaged if state.iteration else state.offsets)
    solving = recipe.rows != "solver" and state.iteration > recipe.sequential
    row = ridge(state.gram, state.right, tableau.matrix[-1]) if solving else tableau.matrix[-1]
    with torch.no_grad():
        tested = with_last_row(with_matrix(tableau, student_matrix(tableau, parameters).cpu()), row)
    error, row = evaluate(denoise, tested, validation)
    if error < state.best_error:
        state.best_error, state.best_row = error, row
        state.best_offsets = {path: value.detach().clone() for path, value in parameters.items()}
    load(parameters, state.offsets)
    state.log.append(dict(iteration=state.iteration, loss=loss, held_out=error, best=state.best_error))
    return state.log[-1]


def with_last_row(tableau: Tableau, row: torch.Tensor) -> Tableau:
    matrix = tableau.matrix.clone()
    matrix[-1] = row.to(matrix)
    return with_matrix(tableau, matrix)


def load(parameters: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Copy values into the tensors that the hooks read."""
    with torch.no_grad():
        for path, value in parameters.items():
            value.copy_(values[path])
