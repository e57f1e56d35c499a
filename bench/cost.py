"""How many network evaluations does a table cost? Error on unseen pairs over all that was spent: search, teacher, student, a backward pass one more; validation
apart.

A budget is divided as `affordable` says; the gain is over the best named plain sampler, and the best budget's is the whole. EPD, whose first step is free as
the table's is, has the same pairs and budgets up to its own: what it takes to come within SAME of its last error is its cost.
"""
import argparse
from dataclasses import replace

import torch

from mteo.coefficients import moves_sigmas
from mteo.distill import LATE, SOLVED
from mteo.gridsearch import SEARCHED, Plain, search_grid
from mteo.metrics import nrmse
from mteo.recipe import Recipe
from mteo.tableau import Tableau
from mteo.teacher import Trajectories
from reference.objects import weights_file

from .heldout import STEPS, best_named, named
from .parts import (
    ROOT,
    TEACHER_STEPS,
    ends_of,
    error_line,
    name_of,
    named_grids,
    parts,
    rounded,
    solver_tableau,
    stage,
    teacher_pairs,
    train_embeddings,
    write_result,
)
from .peers import methods
from .peers.lab import Lab

TEACHER_SHARE = 0.4  # of what is left after the search
BATCH, RATE = 24, 0.02  # of the tables that `quality` compares with peers: at cfg 4 few evaluations go further so (docs/ablations.md)
EPD, MOST, SAME = "EPD" + methods.ANALYTIC, 60_000, 1.01


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench cost", description=__doc__)
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--budgets", type=int, nargs="+", default=[15_000, 30_000, 60_000, 120_000, 300_000], help="network evaluations")
    parser.add_argument("--test", type=int, default=512)
    parser.add_argument("--batch", type=int, default=Recipe().batch, help="of an optimiser step")
    parser.add_argument("--rate", type=float, default=Recipe().rate, help="of the first one")
    told = parser.parse_args(arguments)
    if min(told.budgets) > MOST:
        parser.error(f"--budgets needs one of at most {MOST:,}: {EPD} is trained up to there.")
    folder = ROOT / "runs" / "bench" / f"cost-{name_of(weights_file(told.model))}-{told.cfg:g}"
    seen, fresh = parts(1, 1024, False, told.model), parts(3, 1024, True, told.model)
    held_out = stage(folder, "held-out", teacher_pairs, seen, 128, told.cfg, 2)
    test = stage(folder, f"test-{told.test}", teacher_pairs, fresh, told.test, told.cfg, 1004)
    start, spent = stage(folder, "start", searched, seen, held_out.part(slice(0, SEARCHED)))
    recipes = {budget: affordable(budget - spent, told.cfg, batch=told.batch, rate=told.rate) for budget in told.budgets}
    most = max(recipe.pictures for recipe in recipes.values())
    pairs = stage(folder, f"train-{most}", teacher_pairs, seen, most, told.cfg, 1)
    grids = {steps: stage(folder, f"named-{steps}", named, seen, held_out, steps) for steps in (STEPS, STEPS + 1)}
    solver, grid = best_named(grids[STEPS])
    sampling = seen.model.get_model_object("model_sampling")
    plain = nrmse(ends_of(fresh, test, solver_tableau(solver, named_grids(sampling, STEPS)[grid], sampling)), test.end)
    rows = {"plain, best named": plain, f"searched, {spent}": nrmse(ends_of(fresh, test, start), test.end)}
    errors, peer = {}, {}
    for budget, recipe in recipes.items():
        name, own = f"table-{recipe.pictures}-{recipe.iterations}-{told.batch}-{told.rate:g}", pairs.part(slice(0, recipe.pictures))
        made = stage(folder, name, train_embeddings, seen, recipe, start, own, held_out)
        rows[f"{budget}: {recipe.pictures} pictures, {recipe.iterations} steps"] = nrmse(
            ends_of(fresh, test, made.tables[STEPS].tableau_at(told.cfg), made), test.end
        )
        errors[budget] = list(rows.values())[-1]["pooled"]
        if budget <= MOST:
            made = stage(folder, f"epd-{recipe.pictures}-{budget}", methods.train, seen, EPD, pairs.part(slice(0, recipe.pictures)), held_out, grids, budget, 0)
            rows[f"{EPD}, {budget}"] = nrmse(methods.ends_of(fresh, EPD, made, test), test.end)
            peer[budget] = rows[f"{EPD}, {budget}"]["pooled"]
    for name, row in rows.items():
        print(error_line(name, row))
    gains = {budget: plain["pooled"] - error for budget, error in errors.items()}
    enough = min(budget for budget, gain in gains.items() if gain >= 0.9 * max(gains.values()))
    within = lambda made, wanted: [budget for budget, error in made.items() if error <= wanted]
    last = peer[max(peer)]
    reached, cost = within(errors, last), within(peer, SAME * last)
    result = dict(
        model=told.model,
        cfg=told.cfg,
        vs_epd_cost=round(min(reached) / min(cost), 4) if reached else None,
        weights=name_of(weights_file(told.model)),
        evaluations_to_90=enough,
        gain_share={budget: round(gain / max(gains.values()), 4) for budget, gain in gains.items()},
    )
    usual = (told.batch, told.rate) == (Recipe().batch, Recipe().rate)
    write_result(f"cost-{told.model}-cfg{told.cfg:g}" + ("" if usual else f"-batch{told.batch}-rate{told.rate:g}"), result | {"rows": rounded(rows)})
    return result


def affordable(budget: int, cfg: float, seed: int = 0, batch: int = BATCH, rate: float = RATE, steps: int = STEPS) -> Recipe:
    """The recipe for one cfg that takes that many evaluations after the search: a picture is the teacher's steps, the last row is solved on SOLVED pictures and
    the rates are found on them (with a backward), an optimiser step is what `step_cost` says."""
    recipe = Recipe(steps=steps, rows="all", guidance=(cfg,), batch=batch, rate=rate, seed=seed)
    teacher, student = TEACHER_STEPS * (1 if cfg == 1 else 2), recipe.evaluations(cfg)
    pictures = max(round(TEACHER_SHARE * budget / teacher / 32) * 32, 32)
    left = budget - pictures * teacher - 3 * min(SOLVED, pictures) * student
    return replace(recipe, pictures=pictures, iterations=max(int(left // step_cost(recipe, cfg)), 1))


def step_cost(recipe: Recipe, cfg: float) -> float:
    """Evaluations of an optimiser step, on average: a batch of the student's with its backward; one that perceives also has, in the late part of the training,
    a look at the student's picture with its backward and one at the teacher's."""
    return recipe.batch * (2 * recipe.evaluations(cfg) + (3 * LATE if recipe.perceives(cfg) else 0))


def searched(seen, pairs: Trajectories, analytic: bool = True, steps: int = STEPS) -> tuple[Tableau, int]:
    """Where a table starts from, and the evaluations that finding it took, those of the teacher included; not analytic: its first call is told sigma_max."""

    def work(session):
        lab = Lab(session)
        with torch.no_grad():
            plain, rough = Plain(lambda x, call, sigma, batch: lab.denoise(x, sigma, batch), pairs), moves_sigmas(Recipe(steps=steps), steps)
            [found] = search_grid([plain], steps, lab.sigma_max, session.flow, analytic=analytic, rough=rough)
        return found, lab.spent + methods.teacher_cost(pairs)

    return seen.session(work)
