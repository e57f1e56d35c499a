"""How many network evaluations does a table cost? Error on unseen pairs over all that was spent: search, teacher, student, a backward pass one more; validation apart.

A budget is divided as `divided` says; the gain is over the best named plain sampler, and the largest budget's is the whole.
"""
import argparse
from dataclasses import dataclass

from mteo.gridsearch import refine, search_grid
from mteo.metrics import nrmse
from mteo.recipe import Recipe
from mteo.tableau import Tableau
from mteo.teacher import Trajectories
from reference.objects import weights_file

from .heldout import STEPS, best_named, named
from .parts import ROOT, TEACHER_STEPS, calls_of, ends_of, name_of, named_grids, parts, solver_tableau, stage, teacher_pairs, train_embeddings, write_result

TEACHER_SHARE = 0.4  # of what is left after the search
SEARCH_PAIRS, TRIALS = 32, 0


@dataclass
class Start:
    """Searched σ and coefficients, and the evaluations that finding them took."""

    tableau: Tableau
    spent: int


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench cost", description=__doc__)
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--budgets", type=int, nargs="+", default=[15_000, 30_000, 60_000, 120_000, 300_000], help="network evaluations")
    parser.add_argument("--test", type=int, default=512)
    told = parser.parse_args(arguments)
    branches = 1 if told.cfg == 1 else 2
    folder = ROOT / "runs" / "bench" / f"cost-{name_of(weights_file(told.model))}-{told.cfg:g}"
    seen, fresh = parts(1, 1024, False, told.model), parts(3, 1024, True, told.model)
    held_out, test = stage(folder, "held-out", teacher_pairs, seen, 128, told.cfg, 2), stage(folder, f"test-{told.test}", teacher_pairs, fresh, told.test, told.cfg, 1004)
    start = stage(folder, "start", searched, seen, held_out.part(slice(0, SEARCH_PAIRS)))
    shares = {budget: divided(budget - start.spent, branches) for budget in told.budgets}
    pairs = stage(folder, f"train-{max(told.budgets)}", teacher_pairs, seen, max(pictures for pictures, _ in shares.values()), told.cfg, 1)
    solver, grid = best_named(stage(folder, "named", named, seen, held_out))
    sampling = seen.model.get_model_object("model_sampling")
    plain = nrmse(ends_of(fresh, test, solver_tableau(solver, named_grids(sampling, STEPS)[grid], sampling)), test.end)
    rows = {"plain, best named": plain, f"searched, {start.spent}": nrmse(ends_of(fresh, test, start.tableau), test.end)}
    errors = {}
    for budget, (pictures, iterations) in shares.items():
        recipe = Recipe(steps=STEPS, rows="all", guidance=(told.cfg,), pictures=pictures, iterations=iterations)
        made = stage(folder, f"table-{pictures}-{iterations}", train_embeddings, seen, recipe, start.tableau, pairs.part(slice(0, pictures)), held_out)
        rows[f"{budget}: {pictures} pictures, {iterations} steps"] = nrmse(ends_of(fresh, test, made.tables[STEPS].tableau_at(told.cfg), made), test.end)
        errors[budget] = list(rows.values())[-1]["pooled"]
    for name, row in rows.items():
        print(f"{name:40}" + "  ".join(f"{key} {value:.4f}" for key, value in row.items()))
    gains = {budget: plain["pooled"] - error for budget, error in errors.items()}
    enough = min(budget for budget, gain in gains.items() if gain >= 0.9 * max(gains.values()))
    result = dict(model=told.model, cfg=told.cfg, weights=name_of(weights_file(told.model)), evaluations_to_90=enough, gain_share={budget: round(gain / max(gains.values()), 4) for budget, gain in gains.items()})
    write_result(f"cost-{told.model}-cfg{told.cfg:g}", result | {"rows": {name: {key: round(value, 4) for key, value in row.items()} for name, row in rows.items()}})
    return result


def divided(budget: int, branches: int) -> tuple[int, int]:
    """(pictures, optimiser steps) for that many evaluations: a picture is the teacher's steps, an optimiser step a batch of the student's with its backward."""
    pictures = round(TEACHER_SHARE * budget / (TEACHER_STEPS * branches) / 32) * 32
    left = budget - pictures * TEACHER_STEPS * branches
    return max(pictures, 32), max(left // (2 * STEPS * Recipe().batch * branches), 1)


def searched(seen, pairs: Trajectories) -> Start:
    """Where a table starts from, with every call counted."""
    spent = len(pairs) * TEACHER_STEPS

    def work(session):
        nonlocal spent
        plain = calls_of(session, pairs)
        denoise = plain.denoise

        def counted(x, sigma, part):
            nonlocal spent
            spent += len(x)
            return denoise(x, sigma, part)

        plain.denoise = counted
        [found] = search_grid([plain], STEPS, float(session.sampling.sigma_max), session.flow)
        return refine(plain, found, TRIALS, session.flow) if TRIALS else found

    tableau = seen.session(work)
    return Start(tableau, spent * (1 if float(pairs.guidance[0]) == 1 else 2))
