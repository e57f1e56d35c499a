"""Is a model worth distilling, and what helps it? Measured on a few dozen teacher trajectories before any training; of a trained table, where the rest lies."""
from dataclasses import dataclass, field
from functools import partial

import torch

from ..coefficients import SIGMAS, SOLVERS, corrected, learned_of, moves_sigmas
from ..diagnose import offsets_share, row_error
from ..embeddings import Embeddings, Table
from ..errors import MTEOError
from ..gradient import recomputed
from ..gridsearch import Plain, no_progress, search_grid
from ..metrics import by_frequency, nrmse
from ..recipe import FREE, Recipe
from ..schedule import SAME_SIGMA
from ..tableau import Tableau, combine, execute
from ..teacher import Trajectories, follow
from .conditions import require_trainable
from .patch import choose_table
from .session import Session, private_copy, run_session, training_mode
from .solver import named_sampler, read_tableau
from .times import is_discrete, telling
from .training import SEARCH, denoise_of, gather, named_grid, refined_of, start_sigma, teacher_sigmas, teacher_tableau, untrained_table, with_table

NAMED = "sgm_uniform"  # the grid to compare with where the recipe's is searched for


@dataclass
class Diagnosis:
    """Of one cfg value. Errors are RMSE ÷ the teacher's spread (0 = the teacher's picture), shares of the squared error (1 = all of it).

    teacher: the teacher's own error against twice its steps.
    errors: the plain solver on a named grid, with a solved last row, on the searched grid too (where the recipe asks for one), and with the
        best offsets and, where the recipe learns them, coefficients.
    offsets: the share that these remove; sites: how much of it each layer gives, and the coefficients (sum 1).
    With a table: achieved = the share that it removed, table = its error, states = error of its states at each inner σ and at the end,
        bands = its end error by frequency ÷ the teacher's energy there, low to high."""

    cfg: float
    teacher: float
    errors: dict[str, float]
    offsets: float
    sites: dict[str, float]
    achieved: float | None = None
    table: float | None = None
    states: dict[float, float] = field(default_factory=dict)
    bands: list[float] = field(default_factory=list)


def diagnose_model(
    model, positives: list, negative, latent: torch.Tensor, recipe: Recipe, pictures: int = 128, embeddings: Embeddings | None = None, progress=no_progress
) -> list[Diagnosis]:
    """One for each of the recipe's cfg values, of `pictures` trajectories that no training uses. The model is not changed. MTEOError as `distill_model`."""
    if pictures < 4:
        raise MTEOError(f"trajectories is {pictures}: give 4 or more, as shares are found on one half of them and counted on the other.")
    require_trainable([*positives, negative])
    if embeddings is not None:
        require_start(choose_table(embeddings, recipe.steps), start_sigma(model.get_model_object("model_sampling"), recipe))
    found = []
    with training_mode():
        private = private_copy(model)
        for number, cfg in enumerate(recipe.guidance):
            pairs, tableau, own = run_session(
                private, positives, negative, latent, lambda session, n=number: plain_errors(session, recipe, n, pictures, len(positives), progress)
            )
            network, sampling = private.model.diffusion_model, private.get_model_object("model_sampling")
            table = untrained_table(network, sampling, recipe.space, own.pop("sigmas"), recipe.solver, tableau, recipe.guided)
            patched, patch = with_table(private, Embeddings({recipe.steps: table}, recipe.space))
            share = run_session(
                patched, positives, negative, latent, lambda session, p=patch, t=tableau, q=pairs: of_offsets(session, p, recipe, t, q, progress)
            )
            last = list(own["errors"].values())[-1]
            own["errors"]["and the best offsets"] = last * (1 - share.best) ** 0.5
            diagnosis = Diagnosis(cfg, own["teacher"], own["errors"], share.best, share.sites)
            if embeddings is not None:
                patched, patch = with_table(private, embeddings, recipe.steps)
                run_session(patched, positives, negative, latent, lambda session, p=patch, d=diagnosis, q=pairs: of_table(session, p, recipe, q, d))
                diagnosis.achieved = 1 - (diagnosis.table / last) ** 2
            found.append(diagnosis)
    return found


def require_start(table: Table, start: float) -> None:
    """MTEOError where the table's samplings start at another σ than the recipe's."""
    if abs(table.sigmas[0] / start - 1) > SAME_SIGMA:
        raise MTEOError(f"The table starts at sigma {table.sigmas[0]:.4g}, the recipe at {start:.4g}: give the denoise that the table was made with.")


@torch.no_grad()
def plain_errors(session: Session, recipe: Recipe, number: int, pictures: int, prompts: int, progress) -> tuple[Trajectories, Tableau, dict]:
    """(the pairs, the tableau that offsets are added to, its σ and the errors so far)."""
    start = start_sigma(session.sampling, recipe)
    teacher = lambda times: teacher_tableau(session, teacher_sigmas(session, times * recipe.teacher_steps, start))
    pairs = gather(session, teacher(1), None, recipe, number, SEARCH, pictures, prompts, None, progress).part(slice(None))
    few = pairs.part(slice(0, 16))
    finer = execute(teacher(2), partial(denoise_of(session), batch=few), few.start)
    spread, free = float(pairs.end.cpu().double().std()), recipe.grid == FREE
    root = lambda squares: float(squares.mean().sqrt()) / spread
    plain = Plain(denoise_of(session, recipe.alone), pairs)
    sigmas, name = named_grid(session.sampling, NAMED if free else recipe.grid, recipe.steps, recipe.denoise), recipe.solver
    sigmas[0] = start
    tableau = read_tableau(named_sampler(name), sigmas, session.sampling, name)
    terms = plain.terms(tableau)
    errors = {
        f"plain {name}, {NAMED if free else recipe.grid}": nrmse(combine(tableau.matrix[-1], terms), pairs.end)["pooled"],
        "with a solved last row": root(row_error(terms, pairs.end, tableau)),
    }
    if free:
        [tableau] = search_grid([plain], recipe.steps, start, session.flow, progress, recipe.analytic, moves_sigmas(recipe, recipe.steps))
        sigmas = tableau.schedule.float()
        errors["on the searched grid, too"] = root(row_error(plain.terms(tableau), pairs.end, tableau))
    else:
        _, tableau = plain.solved(tableau)
    return pairs, tableau, dict(sigmas=sigmas, errors=errors, teacher=nrmse(few.end, finer)["pooled"])


def of_offsets(session: Session, patch, recipe: Recipe, tableau: Tableau, pairs: Trajectories, progress):
    zero = {path: rows.to(session.device) for path, rows in patch.offsets.table.items()} | learned_of(recipe, tableau)
    answer, session.short = denoise_of(session, patch.table.alone, tableau), False  # what a small move changes, bfloat16 would round away
    between_steps = SIGMAS in zero and is_discrete(session.sampling)

    def smooth(x: torch.Tensor, call: int, sigma, batch: Trajectories) -> torch.Tensor:
        """With the time between the model's discrete steps: where σ is learned, a small move of it has to be seen."""
        with telling(session.sampling, torch.as_tensor(sigma).detach() if between_steps else None):  # its slope comes from `following`
            return answer(x, call, sigma, batch)

    def ends(part: torch.Tensor, learned: dict[str, torch.Tensor], recompute: bool = False) -> torch.Tensor:
        patch.offsets.replace({path: value for path, value in learned.items() if path not in SOLVERS})
        own, denoise = pairs.part(part), partial(recomputed, smooth) if recompute else smooth
        return execute(corrected(tableau, learned, session.flow), partial(denoise, batch=own), own.start)

    return offsets_share(ends, zero, pairs.end, progress=progress)


@torch.no_grad()
def of_table(session: Session, patch, recipe: Recipe, pairs: Trajectories, diagnosis: Diagnosis) -> None:
    """Fill in what the table does on the pairs."""
    patch.at(diagnosis.cfg)
    table = patch.table
    tableau, spread = table.tableau_at(diagnosis.cfg), float(pairs.end.cpu().double().std())
    patch.offsets.scale = 0.0
    schedule = tableau.schedule.tolist()
    wanted, _ = follow(
        teacher_tableau(session, refined_of(session, schedule, recipe.teacher_steps)), partial(denoise_of(session), batch=pairs), pairs.start, schedule
    )
    patch.offsets.scale = 1.0
    states, end = follow(tableau, partial(denoise_of(session, table.alone), batch=pairs), pairs.start, schedule)
    errors = (states - wanted).cpu().double().square().mean((0, *range(2, states.dim()))).sqrt() / spread
    diagnosis.states = dict(zip(schedule[1:-1], errors.tolist(), strict=True))
    diagnosis.table = diagnosis.states[0.0] = nrmse(end, pairs.end)["pooled"]
    diagnosis.bands = by_frequency(end, pairs.end)
