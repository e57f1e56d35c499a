"""What each choice of the recipe is worth: the same pairs, the same start, the same number of optimiser steps; error and spectrum on unseen noise and prompts.

All start from the plain model's searched σ and coefficients. One training seed unless told: small differences may be its own.
"""
import argparse
from dataclasses import replace

import torch

from mteo.metrics import nrmse
from mteo.recipe import Recipe
from mteo.sites import find_sites, is_gain
from mteo.teacher import Trajectories
from reference.objects import weights_file

from .distances import spectrum_gap
from .heldout import STEPS, free_rival
from .parts import ROOT, TEACHER_STEPS, ends_of, error_line, name_of, parts, rounded, rows_before, stage, teacher_pairs, train_embeddings, write_result

BANDS = 4
VARIANTS = {
    "as the recipe": {},
    "offsets on what the projection puts out": dict(space="modulation"),
    "no gains": dict(space="embedding"),
    "last row only": dict(rows="last"),
    "no row": dict(rows="solver"),
    "first third step by step (stage A)": dict(sequential=1 / 3, iterations=2 / 3),
    "no perception": dict(perception=0.0),
    "perception ÷ 3": dict(perception=50 / 3),
    "perception × 3": dict(perception=150.0),
    "rate × 3": dict(rate=0.03),
    "rate ÷ 3": dict(rate=0.003),
    "half the batch, twice the steps": dict(batch=24, iterations=2),
    "twice the batch, half the steps": dict(batch=96, iterations=1 / 2),
    "no average": dict(average=0.0),
}


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench ablations", description=__doc__)
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--pictures", type=int, default=512, help="training pairs")
    parser.add_argument("--iterations", type=int, default=60, help="optimiser steps of batch 48, or as many pictures in other batches")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="these variants only; the file keeps the others of the same weights and numbers")
    told = parser.parse_args(arguments)
    folder = ROOT / "runs" / "bench" / f"ablations-{name_of(weights_file(told.model))}-{told.cfg:g}-{told.pictures}"
    seen, fresh = parts(1, 1024, False, told.model), parts(3, 1024, True, told.model)
    held_out, test = stage(folder, "held-out", teacher_pairs, seen, 128, told.cfg, 2), stage(folder, "test", teacher_pairs, fresh, 512, told.cfg, 1004)
    start = stage(folder, "free", free_rival, seen, held_out, 64)["grid, all rows"]
    train = stage(folder, "train", teacher_pairs, seen, told.pictures, told.cfg, 1, TEACHER_STEPS, tuple(start.schedule.tolist()[:-1]))
    base = Recipe(steps=STEPS, rows="all", guidance=(told.cfg,), iterations=told.iterations)
    result = dict(
        model=told.model, cfg=told.cfg, weights=name_of(weights_file(told.model)), pictures=told.pictures, iterations=told.iterations, seeds=told.seeds
    )
    rows = rows_before(f"ablations-{told.model}-cfg{told.cfg:g}", result) if told.only else {}
    rows["no training"] = errors_of([ends_of(fresh, test, start)], test)
    for name in told.only or VARIANTS:
        if "perception" in VARIANTS[name] and not base.perceives(told.cfg):
            continue  # it is not asked at this cfg anyway
        if VARIANTS[name].get("space") == "embedding" and not any(is_gain(site.path) for site in find_sites(seen.model.model.diffusion_model, base.space)):
            continue  # this family has no gains anyway
        made = [
            stage(folder, f"{name}-{told.iterations}-{seed}", train_embeddings, seen, replace(changed(base, VARIANTS[name]), seed=seed), start, train, held_out)
            for seed in range(told.seeds)
        ]
        rows[name] = errors_of([ends_of(fresh, test, one.tables[STEPS].tableau_at(told.cfg), one) for one in made], test)
        print(error_line(name, rows[name]), flush=True)
    write_result(f"ablations-{told.model}-cfg{told.cfg:g}", result | {"rows": rounded(rows)})
    return result | {"pooled": {name: round(row["pooled"], 4) for name, row in rows.items()}}


def changed(base: Recipe, told: dict) -> Recipe:
    """The recipe with other values; sequential and iterations are told as shares of the base's iterations."""
    return replace(base, **{name: round(value * base.iterations) if name in ("sequential", "iterations") else value for name, value in told.items()})


def errors_of(ends: list[torch.Tensor], pairs: Trajectories) -> dict[str, float]:
    """nRMSE, and the largest |ln ratio| of the energy in a band of frequency of the latents; the mean over seeds."""
    all_of = [nrmse(one, pairs.end) | {"spectrum": spectrum_gap(one, pairs.end, BANDS)} for one in ends]
    return {name: sum(one[name] for one in all_of) / len(all_of) for name in all_of[0]}
