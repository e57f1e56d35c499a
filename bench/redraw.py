"""Is a table for image to image nearer to the model's own many steps than plain samplers are? The model's pictures, every second one of another prompt, with
noise on them, redrawn in three steps; prompts that no training saw.

Solver, grid, σ and coefficients are chosen on validation pairs, figures are of test pairs: RMSE to the 24-step teacher from the same start ÷ its spread.
"""
import argparse
from functools import partial
from pathlib import Path

import torch

from mteo.comfyui.training import named_grid
from mteo.embeddings import load_embeddings
from mteo.gridsearch import search_grid
from mteo.metrics import paired_bootstrap_ratio
from mteo.schedule import karras
from mteo.tableau import Tableau
from mteo.teacher import Trajectories
from reference.objects import weights_file

from .heldout import CFGS, STEPS, best_named, named, summary, test_errors
from .parts import ROOT, calls_of, name_of, parts, solver_tableau, stage, teacher_pairs, write_result
from .rival import refine

TABLE = ROOT / "reference" / "tables" / "reference-3steps-denoise-0.6.safetensors"
SCHEDULERS = ("normal", "simple", "exponential", "sgm_uniform", "beta", "kl_optimal")
TRIALS = 90  # of σ and coefficients for the rival


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench redraw", description=__doc__)
    parser.add_argument("--validation", type=int, default=64)
    parser.add_argument("--test", type=int, default=256)
    parser.add_argument("--table", type=Path, default=TABLE, help="a table of the UNet for image to image, of 3 steps")
    told = parser.parse_args(arguments)
    embeddings = load_embeddings(told.table)
    table, weights = embeddings.tables[STEPS], name_of(weights_file("unet"))
    denoise, start = table.denoise, table.sigmas[0]
    folder = ROOT / "runs" / "bench" / f"redraw-{weights}-{denoise:g}-{told.validation}-{told.test}"
    own = {"validation": parts(2, told.validation, True), "test": parts(3, told.test, True)}
    redrawn, grids_of = partial(teacher_pairs, denoise=denoise), partial(grids_from, denoise=denoise, start=start)
    rows, ratios = {}, {}
    for cfg in CFGS:
        pairs = {split: stage(folder, f"{split}-{cfg:g}", redrawn, one, len(one.positives), cfg, 3000 + len(one.positives)) for split, one in own.items()}
        plain = stage(folder, f"named-{cfg:g}", named, own["validation"], pairs["validation"], STEPS, grids_of)
        free = stage(folder, f"free-{cfg:g}", searched, own["validation"], pairs["validation"], start)
        solver, grid = best_named(plain)
        sampling = own["test"].model.get_model_object("model_sampling")
        named_best = solver_tableau(solver, grids_of(sampling, STEPS)[grid], sampling)
        tables = {f"plain, {solver}/{grid}": (named_best,), "plain, searched": (free,), "MTEO": (table.tableau_at(cfg), embeddings)}
        best, rival, mteo = errors = [test_errors(own["test"], pairs["test"], *one) for one in tables.values()]
        rows[f"cfg {cfg:g}"] = dict(zip(tables, map(summary, errors), strict=True))
        ratios[f"cfg {cfg:g}"] = {
            key: [round(value, 4) for value in paired_bootstrap_ratio(mteo, other)] for key, other in (("named", best), ("free", rival))
        }
        print(f"cfg {cfg:g}: {rows[f'cfg {cfg:g}']}", flush=True)
    worst = {key: max(by[key] for by in ratios.values()) for key in ("named", "free")}
    result = {f"ratio_{key}{end}": value for key, values in worst.items() for end, value in zip(("", "_low", "_high"), values, strict=True)}
    write_result("redraw-unet", result | dict(denoise=denoise, weights=weights, table=name_of(told.table), by_cfg=ratios, rows=rows))
    return result


def grids_from(sampling, steps: int, denoise: float, start: float) -> dict[str, torch.Tensor]:
    """[steps + 1] σ by name, from σ `start`: Karras' between it and the smallest, those of a KSampler with this denoise, moved to it where they then fall."""
    grids = {name: named_grid(sampling, name, steps, denoise) for name in SCHEDULERS}
    grids["karras"] = karras(steps, float(sampling.sigma_min), start)
    for sigmas in grids.values():
        sigmas[0] = start
    return {name: sigmas for name, sigmas in grids.items() if (sigmas.diff() < 0).all()}


def searched(own, pairs: Trajectories, start: float) -> Tableau:
    """The plain model at its best for this cfg alone: σ by the search that a table starts from, then σ and all coefficients by Nelder–Mead."""

    def work(session):
        memory = calls_of(session, pairs)
        [found] = search_grid([memory], STEPS, start, session.flow, analytic=False)
        return memory.solved(refine(memory, found, TRIALS, session.flow))[1]

    return own.session(work)
