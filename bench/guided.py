"""Which steps need the pair that guidance takes? Tables that guide in some steps only, beside one that guides in all, of the same cfg, pairs and optimiser
steps.

Error on unseen pairs, and as sets against the teacher's of other noise. Before it, how much of what guidance adds to an answer can offsets give at all (traps
37): the share of E|D_cfg − D_cond|², cross-fitted, on the teacher's own states.
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

VARIANTS = ((3, "all"), (3, "1"), (3, "none"), (4, "1 2"), (4, "1 3"), (4, "1 4"), (5, "1"), (6, "none"))  # (steps, those that are guided)
PAIRS, SINGLE = "3 steps, guided: all", "6 steps, guided: none"
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
    train, held_out = (
        stage(folder, name, teacher_pairs, seen, count, told.cfg, seed) for name, count, seed in (("train", told.pictures, 1), ("held-out", 128, 2))
    )
    test, other = (stage(folder, name, teacher_pairs, own, told.count, told.cfg, seed) for name, seed in (("test", 2001), ("other", 2002)))
    judge = Judge(told.model, told.count // SEEDS)
    judge.against(test.end, other.end)
    rows = {"teacher": dict(evaluations=2 * TEACHER_STEPS) | judge(test.end)}
    for steps, guided in VARIANTS:
        recipe = Recipe(steps=steps, rows="all", guided=guided, guidance=(told.cfg,), iterations=told.iterations)
        name = f"{steps}-{guided.replace(' ', '-')}-{told.iterations}"
        table = stage(folder, f"table-{name}", searched_and_trained, seen, recipe, train, held_out)
        ends = stage(folder, f"ends-{name}", ends_of, own, test, table.tables[steps].tableau_at(told.cfg), table)
        rows[f"{steps} steps, guided: {guided}"] = dict(evaluations=recipe.evaluations(told.cfg)) | judge(ends)
    names = ("evaluations", "error pooled", "fd", "precision", "recall", "diversity", "spectrum", "accuracy")
    print(f"{'':26}" + " ".join(f"{name:>13}" for name in names))
    for name, row in rows.items():
        print(f"{name:26}" + " ".join(f"{row[key]:13.4f}" for key in names))
    above = {name: row["fd"] - rows["teacher"]["fd"] for name, row in rows.items()}
    best = min((name for name, row in rows.items() if row["evaluations"] == rows[PAIRS]["evaluations"] and name != PAIRS), key=above.get)
    shares = stage(folder, "shares", guidance_shares, seen, told.cfg)
    result = dict(
        model=told.model,
        cfg=told.cfg,
        weights=name_of(weights_file(told.model)),
        folded_vs_pairs=round(above[SINGLE] / above[PAIRS], 4),
        best=best,
        best_vs_pairs=round(above[best] / above[PAIRS], 4),
        folded_vs_pairs_error=round(rows[SINGLE]["error pooled"] / rows[PAIRS]["error pooled"], 4),
        best_vs_pairs_error=round(rows[best]["error pooled"] / rows[PAIRS]["error pooled"], 4),
        share_of_guidance={f"{sigma:.4g}": round(share, 4) for sigma, share in shares.items()},
    )
    write_result(
        f"guided-{told.model}-cfg{told.cfg:g}", result | dict(pictures=told.pictures, iterations=told.iterations, count=told.count, rows=rounded(rows))
    )
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
