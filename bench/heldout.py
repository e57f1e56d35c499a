"""Does the table help on noise and prompts that nothing was chosen on? Three steps, cfg 1 and 4, against every plain rival.

Solver, grid, σ and stopping are chosen on validation pairs, figures are of test pairs: RMSE to the 24-step teacher ÷ its spread.
"""
import argparse
from pathlib import Path

import torch

from mteo.comfyui.training import joined
from mteo.embeddings import Embeddings, load_embeddings
from mteo.gridsearch import search_grid
from mteo.metrics import nrmse, paired_bootstrap_ratio, per_picture
from mteo.recipe import Recipe
from mteo.tableau import Tableau, combine, euler_tableau, started_at
from mteo.teacher import Trajectories
from reference.objects import weights_file

from .parts import ROOT, calls_of, ends_of, name_of, named_grids, parts, solver_tableau, stage, table_file, teacher_pairs, train_embeddings, write_result
from .rival import refine

SOLVERS = ("euler", "dpmpp_2m", "ipndm", "deis", "uni_pc", "res_multistep")
SAME = ("euler", "ipndm", "dpmpp_2m")
CFGS, BETWEEN = (1.0, 4.0), 2.5  # a table is trained at the first two
STEPS = 3
SHIPPED, NAMED, FREE = "offsets with rows, free grid", "plain, best named: ", "plain, free "
TRIALS = 180  # of σ and coefficients for the rival


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench heldout", description=__doc__)
    parser.add_argument("--validation", type=int, default=512)
    parser.add_argument("--test", type=int, default=1024)
    parser.add_argument("--search", type=int, default=128, help="validation pairs that the search for σ and rows looks at")
    parser.add_argument("--pictures", type=int, default=1024, help="training pairs of each cfg, for the tables that are trained here")
    parser.add_argument("--iterations", type=int, default=120, help="optimiser steps of them, for each cfg")
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--table", type=Path, help="default: the model's own")
    parser.add_argument("--cfg", type=float, help="only what is of this cfg, for a second process beside; the report needs both")
    parser.add_argument(
        "--until", choices=("rivals", "tables", "report"), default="report", help="stop after the plain rivals or the tables, kept for the next run"
    )
    told = parser.parse_args(arguments)
    told.table = told.table or table_file(told.model)
    cfgs = CFGS if told.cfg is None else (told.cfg,)
    folder = ROOT / "runs" / "bench" / f"heldout-{name_of(weights_file(told.model))}-{told.validation}-{told.test}-{told.search}"
    seen, fresh = parts(1, 1024, False, told.model), {"validation": parts(2, told.validation, True, told.model), "test": parts(3, told.test, True, told.model)}
    pairs = {
        split: {cfg: stage(folder, f"pairs-{split}-{cfg:g}", teacher_pairs, fresh[split], getattr(told, split), cfg, 1000 + len(split)) for cfg in cfgs}
        for split in fresh
    }
    plain = {cfg: stage(folder, f"named-{cfg:g}", named, fresh["validation"], pairs["validation"][cfg]) for cfg in cfgs}
    free = {cfg: stage(folder, f"free-{cfg:g}", free_rival, fresh["validation"], pairs["validation"][cfg], told.search) for cfg in cfgs}
    if told.until == "rivals":
        return {"cfg": cfgs}
    train = {cfg: stage(folder, f"pairs-train-{cfg:g}-{told.pictures}", teacher_pairs, seen, told.pictures, cfg, 1) for cfg in cfgs}
    held_out = {cfg: stage(folder, f"pairs-held-out-{cfg:g}", teacher_pairs, seen, 128, cfg, 2) for cfg in cfgs}
    tables = {f"offsets with rows, {solver}": (solver, "last") for solver in SAME} | {"offsets only, euler": ("euler", "solver")}
    grids = {solver: named_grid_of(folder, solver) for solver in SAME}
    kept = lambda name, make, *arguments: stage(folder, f"{name}-{told.pictures}-{told.iterations}", make, *arguments)
    made = {
        name: {
            cfg: kept(f"table-{solver}-{rows}-{cfg:g}", train_table, seen, solver, grids[solver], rows, train[cfg], held_out[cfg], told.iterations)
            for cfg in cfgs
        }
        for name, (solver, rows) in tables.items()
    }
    if told.until == "tables":
        return {"cfg": cfgs}
    shipped = load_embeddings(told.table)
    every = lambda cfg: {SHIPPED: shipped} | {label: Embeddings({STEPS: own[cfg]}, Recipe().space) for label, own in made.items()}
    errors = {
        cfg: kept(f"test-{cfg:g}-{name_of(told.table)}", errors_at, cfg, folder, fresh["test"], pairs["test"][cfg], plain[cfg], free[cfg], every(cfg))
        for cfg in cfgs
    }
    if told.cfg is not None:
        return {"cfg": cfgs}
    logs = {SHIPPED: shipped.tables[STEPS].record["log"]} | {label: joined(list(own.values())).record["log"] for label, own in made.items()}
    return report(told, folder, fresh["test"], shipped, plain, errors, logs)


def named_grid_of(folder: Path, solver: str) -> str:
    """The named grid on which the plain solver does best, both cfg values together: one table has one grid."""
    files = [folder / f"named-{cfg:g}.pt" for cfg in CFGS]
    if not all(file.is_file() for file in files):
        raise SystemExit("The named grids of both cfg values are needed first: run the same command with --until rivals for each.")
    plain = [torch.load(file, weights_only=False)[solver] for file in files]
    return min(plain[0], key=lambda grid: sum(own[grid] for own in plain))


def named(own, pairs: Trajectories, steps: int = STEPS, grids_of=named_grids) -> dict[str, dict[str, float]]:
    """{solver: {grid: nRMSE}} of the plain model, on grids_of(model sampling, steps)."""

    def work(session):
        memory, grids = calls_of(session, pairs), grids_of(session.sampling, steps)
        return {
            solver: {
                grid: nrmse(combine((tableau := solver_tableau(solver, sigmas, session.sampling)).matrix[-1], memory.terms(tableau)), pairs.end)["pooled"]
                for grid, sigmas in grids.items()
            }
            for solver in SOLVERS
        }

    return own.session(work)


def free_rival(own, pairs: Trajectories, count: int) -> dict[str, Tableau]:
    """The plain model at its best, for this cfg alone: {"grid only" (Euler on the searched σ), "grid, last row", "grid, all rows"}.
    The search that a free grid starts from; then σ and all inner coefficients by Nelder–Mead on `count` pairs, the last
    row solved each time; the last row once more on all validation pairs."""

    def work(session):
        some, more, whole = (calls_of(session, pairs.part(slice(0, n))) for n in (count // 2, count, len(pairs)))
        [found] = search_grid([some], STEPS, float(session.sampling.sigma_max), session.flow)
        euler = started_at(euler_tableau(torch.cat([found.sigmas, torch.zeros(1, dtype=torch.float64)])), float(session.sampling.sigma_max), found.mean)
        return {"grid only": euler, "grid, last row": whole.solved(found)[1], "grid, all rows": whole.solved(refine(more, found, TRIALS, session.flow))[1]}

    return own.session(work)


def train_table(seen, solver: str, grid: str, rows: str, train: Trajectories, held_out: Trajectories, iterations: int):
    """A table for a named solver on a named grid, for the cfg of the pairs, which all such tables share."""
    cfg = float(train.guidance[0])
    recipe = Recipe(steps=STEPS, solver=solver, grid=grid, rows=rows, guidance=(cfg,), iterations=iterations)
    sampling = seen.model.get_model_object("model_sampling")

    def tell(state, line):
        if line:
            print(f"[bench] {solver}/{grid} {rows}, cfg {cfg:g}: {line}", flush=True)

    return train_embeddings(seen, recipe, solver_tableau(solver, named_grids(sampling, STEPS)[grid], sampling), train, held_out, tell).tables[STEPS]


def test_errors(own, pairs: Trajectories, tableau, embeddings: Embeddings | None = None) -> torch.Tensor:
    """nRMSE of each test picture."""
    return per_picture(ends_of(own, pairs, tableau, embeddings), pairs.end)


def errors_at(cfg: float, folder: Path, own, test: Trajectories, plain: dict, free: dict, tables: dict[str, Embeddings]) -> dict[str, torch.Tensor]:
    """nRMSE of each test picture, by what made it; the teacher's own against twice its steps."""
    sampling = own.model.get_model_object("model_sampling")
    grids = named_grids(sampling, STEPS)
    errors = {name: test_errors(own, test, embeddings.tables[STEPS].tableau_at(cfg), embeddings) for name, embeddings in tables.items()}
    solver, grid = best_named(plain)
    errors[f"{NAMED}{solver}/{grid}"] = test_errors(own, test, solver_tableau(solver, grids[grid], sampling))
    for name, tableau in free.items():
        errors[f"{FREE}{name}"] = test_errors(own, test, tableau)
    for solver in SAME:
        errors[f"plain, {solver}"] = test_errors(own, test, solver_tableau(solver, grids[named_grid_of(folder, solver)], sampling))
    coarse, finer = (teacher_pairs(own, 64, cfg, 1004, steps).end for steps in (24, 48))
    return errors | {"teacher, 24 steps to 48": per_picture(coarse, finer)}


def best_named(plain: dict[str, dict[str, float]]) -> tuple[str, str]:
    """(solver, grid) with the least error on validation pairs."""
    return min(((solver, grid) for solver, grids in plain.items() for grid in grids), key=lambda pair: plain[pair[0]][pair[1]])


def report(told, folder: Path, own, shipped: Embeddings, plain, errors, logs) -> dict:
    """Every row on the test pairs; the three ratios are of the worst cfg, with that cfg's interval. Of the free rivals the one that is best on the test
    pairs counts; the table is the shipped one."""
    ratios = {"same": [], "named": [], "free": []}
    for made in errors.values():
        pooled = lambda name, made=made: float(made[name].square().mean())
        ratios["same"] += [paired_bootstrap_ratio(made[f"offsets with rows, {solver}"], made[f"plain, {solver}"]) for solver in SAME]
        for kind, start in (("named", NAMED), ("free", FREE)):
            ratios[kind].append(paired_bootstrap_ratio(made[SHIPPED], made[min((name for name in made if name.startswith(start)), key=pooled)]))
    result = {}
    for name, values in ratios.items():
        worst = max(values)
        result |= {
            f"ratio_{name}": round(worst[0], 4),
            f"ratio_{name}_low": round(worst[1], 4),
            f"ratio_{name}_high": round(max(value[2] for value in values), 4),
        }
    result |= {
        f"ratio_{name}_by_cfg": {f"{cfg:g}": [round(value, 4) for value in values[i]] for i, cfg in enumerate(CFGS)}
        for name, values in ratios.items()
        if name != "same"
    }
    result |= dict(
        ratio_same_by_cfg={f"{cfg:g}": {solver: round(ratios["same"][i * len(SAME) + j][0], 4) for j, solver in enumerate(SAME)} for i, cfg in enumerate(CFGS)}
    )
    result |= dict(
        validation=told.validation,
        test=told.test,
        weights=name_of(weights_file(told.model)),
        named_grid_of={solver: named_grid_of(folder, solver) for solver in SAME},
    )
    rows = {f"cfg {cfg:g}": {name: summary(value) for name, value in made.items()} for cfg, made in errors.items()}
    rows[f"cfg {BETWEEN:g}"] = stage(folder, f"between-{name_of(told.table)}", between, folder, own, shipped, plain)
    training = {
        name: [{key: value if isinstance(value, int) else round(value, 4) for key, value in line.items() if value is not None} for line in log]
        for name, log in logs.items()
    }
    show(rows, plain)
    whole = result | dict(rows=rows, named_on_validation={f"cfg {cfg:g}": plain[cfg] for cfg in CFGS}, training=training)
    write_result(f"heldout-{told.model}", whole)
    return result


def between(folder: Path, own, shipped: Embeddings, plain) -> dict:
    """The shipped table at a cfg that it was not trained at, beside each plain sampler that is best at a neighbouring cfg."""
    pairs, sampling = stage(folder, f"pairs-test-{BETWEEN:g}", teacher_pairs, own, 256, BETWEEN, 1005), own.model.get_model_object("model_sampling")
    errors = {"offsets with rows, blended": test_errors(own, pairs, shipped.tables[STEPS].tableau_at(BETWEEN), shipped)}
    for solver, grid in {best_named(plain[cfg]) for cfg in CFGS}:
        errors[f"plain, {solver}/{grid}"] = test_errors(own, pairs, solver_tableau(solver, named_grids(sampling, STEPS)[grid], sampling))
    return {name: summary(value) for name, value in errors.items()}


def summary(errors: torch.Tensor) -> dict[str, float]:
    return dict(pooled=round(float(errors.square().mean().sqrt()), 4), mean=round(float(errors.mean()), 4), median=round(float(errors.median()), 4))


def show(rows, plain) -> None:
    for cfg, own in rows.items():
        print(f"\n{cfg}, test pairs: nRMSE pooled, mean, median")
        for name, value in sorted(own.items(), key=lambda entry: -entry[1]["pooled"]):
            print(f"  {name:48} {value['pooled']:.4f} {value['mean']:.4f} {value['median']:.4f}")
    for cfg, own in plain.items():
        print(f"\ncfg {cfg:g}, validation pairs, plain named grids: nRMSE pooled")
        print("  " + " " * 14 + " ".join(f"{grid:>11}" for grid in next(iter(own.values()))))
        for solver, values in own.items():
            print(f"  {solver:14}" + " ".join(f"{value:11.4f}" for value in values.values()))
