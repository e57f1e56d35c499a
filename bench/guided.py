"""Which steps need the pair that guidance takes? Tables that guide in their first steps only, beside one that guides in all, of the same cfg, pairs and optimiser steps.

Error on unseen pairs, and as sets against the teacher's of other noise. Before it, how much of what guidance adds to an answer can offsets give at all (traps 37): the share of E|D_cfg − D_cond|²,
cross-fitted, on the teacher's own states.
"""
import argparse
from dataclasses import replace

import torch

from mteo.diagnose import offsets_share
from mteo.recipe import Recipe
from mteo.tableau import euler_tableau
from reference.objects import weights_file

from .judge import SEEDS, Judge
from .parts import (
    ROOT,
    TEACHER_STEPS,
    Parts,
    ends_of,
    name_of,
    named_grids,
    parts,
    rounded,
    searched_and_trained,
    stage,
    teacher_pairs,
    untrained,
    write_result,
)

VARIANTS = ((3, 3), (3, 1), (3, 0), (4, 2), (5, 1), (6, 0))  # (steps, the first of them that are guided)
SHARE_PAIRS = 64


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench guided", description=__doc__)
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--pictures", type=int, default=1024, help="training pairs")
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--count", type=int, default=2048, help="pictures of a set")
    told = parser.parse_args(arguments)
    folder = ROOT / "runs" / "bench" / f"guided-{name_of(weights_file(told.model))}-{told.cfg:g}-{told.pictures}-{told.count}"
    seen, own = parts(1, 1024, False, told.model), parts(5, told.count // SEEDS, True, told.model)
    train, held_out = (stage(folder, name, teacher_pairs, seen, count, told.cfg, seed) for name, count, seed in (("train", told.pictures, 1), ("held-out", 128, 2)))
    test, other = (stage(folder, name, teacher_pairs, own, told.count, told.cfg, seed) for name, seed in (("test", 2001), ("other", 2002)))
    judge = Judge(told.model, told.count // SEEDS)
    judge.against(test.end, other.end)
    rows = {"teacher": dict(evaluations=2 * TEACHER_STEPS) | judge(test.end)}
    for steps, guided in VARIANTS:
        recipe = Recipe(steps=steps, rows="all", guided=guided, guidance=(told.cfg,), iterations=told.iterations)
        table = stage(folder, f"table-{steps}-{guided}-{told.iterations}", searched_and_trained, seen, recipe, train, held_out)
        ends = stage(folder, f"ends-{steps}-{guided}-{told.iterations}", ends_of, own, test, table.tables[steps].tableau_at(told.cfg), table)
        rows[f"{steps} steps, {guided} guided"] = dict(evaluations=recipe.evaluations(told.cfg)) | judge(ends)
    names = ("evaluations", "error pooled", "fd", "precision", "recall", "diversity", "spectrum", "accuracy")
    print(f"{'':24}" + " ".join(f"{name:>13}" for name in names))
    for name, row in rows.items():
        print(f"{name:24}" + " ".join(f"{row[key]:13.4f}" for key in names))
    floor, pairs, folded = (rows[name]["fd"] for name in ("teacher", "3 steps, 3 guided", "6 steps, 0 guided"))
    shares = stage(folder, "shares", guidance_shares, seen, told.cfg)
    result = dict(model=told.model, cfg=told.cfg, weights=name_of(weights_file(told.model)), folded_vs_pairs=round((folded - floor) / (pairs - floor), 4),
                  folded_vs_pairs_error=round(rows["6 steps, 0 guided"]["error pooled"] / rows["3 steps, 3 guided"]["error pooled"], 4),
                  share_of_guidance={f"{sigma:.4g}": round(share, 4) for sigma, share in shares.items()})
    write_result(f"guided-{told.model}-cfg{told.cfg:g}", result | dict(pictures=told.pictures, iterations=told.iterations, count=told.count, rows=rounded(rows)))
    return result


def guidance_shares(seen: Parts, cfg: float, steps: int = 6) -> dict[float, float]:
    """σ of a trailing grid -> the share of what guidance adds to an answer there that offsets can give, on the teacher's states."""
    grid = named_grids(seen.model.get_model_object("model_sampling"), steps)["sgm_uniform"]
    pairs = teacher_pairs(seen, SHARE_PAIRS, cfg, 3, TEACHER_STEPS, tuple(grid.tolist()))
    alone = replace(pairs, guidance=torch.ones_like(pairs.guidance))

    def work(session):
        shares, offsets = {}, session.patch.offsets
        for sigma, x in zip(grid.tolist(), [pairs.start, *pairs.states.unbind(1)], strict=False):
            offsets.scale = 0.0
            with torch.no_grad():
                wanted = session.denoise(x, sigma, pairs.item, pairs.guidance)
            offsets.scale = 1.0

            def answer(part, table, x=x, sigma=sigma):
                offsets.replace(table)
                return session.denoise(x[part], sigma, alone.item[part], alone.guidance[part])

            shares[sigma] = offsets_share(answer, dict(offsets.table), wanted).best
        return shares

    return seen.session(work, untrained(seen, Recipe(steps=steps), euler_tableau(grid)))
