"""Which steps need the pair that guidance takes? Tables that guide in some steps only, beside one that guides in all, of the same cfg, pairs and optimiser
steps.

Error on unseen pairs, and as sets against the teacher's of other noise. Before it, how much of what guidance adds to an answer can offsets give at all (traps
37): the share of E|D_cfg − D_cond|², cross-fitted, on the teacher's own states.
"""
import argparse
from dataclasses import replace
from functools import partial

import torch

from mteo.diagnose import offsets_share
from mteo.recipe import Recipe
from mteo.tableau import euler_tableau
from reference.objects import weights_file

from .intervals import ratio_above
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
    rows_before,
    searched_start,
    stage,
    teacher_pairs,
    train_embeddings,
    untrained,
    write_result,
)
from .ways import of_seed

VARIANTS = {
    f"{steps} steps, guided: {guided}": (steps, guided)
    for steps, guided in ((3, "all"), (3, "1"), (3, "none"), (4, "1 2"), (4, "1 3"), (4, "1 4"), (5, "1"), (6, "none"))
}
PAIRS, SINGLE = "3 steps, guided: all", "6 steps, guided: none"
SHARE_PAIRS = 64


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench guided", description=__doc__)
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--pictures", type=int, default=1024, help="training pairs")
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--count", type=int, default=2048, help="pictures of a set")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each table; the keys are of their means")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="the file keeps others of the same weights, judge and numbers")
    told = parser.parse_args(arguments)
    folder = ROOT / "runs" / "bench" / f"guided-{name_of(weights_file(told.model))}-{told.cfg:g}-{told.pictures}-{told.count}"
    kept, file = partial(stage, folder), f"guided-{told.model}-cfg{told.cfg:g}"
    seen, own = parts(1, 1024, False, told.model), parts(5, told.count // SEEDS, True, told.model)
    train, held_out = (kept(name, teacher_pairs, seen, count, told.cfg, seed) for name, count, seed in (("train", told.pictures, 1), ("held-out", 128, 2)))
    test, other = (kept(name, teacher_pairs, own, told.count, told.cfg, seed) for name, seed in (("test", 2001), ("other", 2002)))
    judge = Judge(told.model, told.count // SEEDS)
    judge.against(test.end, other.end)
    about = dict(model=told.model, cfg=told.cfg, weights=name_of(weights_file(told.model)), judge=judge.name)
    about |= {number: getattr(told, number) for number in ("pictures", "iterations", "count")}

    def judged(recipe: Recipe, plan: str, tag: str):
        start = kept(f"start-{plan}", searched_start, seen, recipe, held_out)
        table = kept(f"table-{tag}", train_embeddings, seen, recipe, start, train, held_out)
        ends = lambda: ends_of(own, test, table.tables[recipe.steps].tableau_at(told.cfg), table)
        return kept(f"set-{tag}-{judge.name}", lambda: judge.judged(ends()))

    floor = kept(f"set-teacher-{judge.name}", lambda: judge.judged(test.end))
    rows = rows_before(file, about) | {"teacher": dict(evaluations=2 * TEACHER_STEPS) | floor.row}
    made = {}
    for name in told.only:
        steps, guided = VARIANTS[name]
        recipe = Recipe(steps=steps, rows="all", guided=guided, guidance=(told.cfg,), iterations=told.iterations)
        plan = f"{steps}-{guided.replace(' ', '-')}"
        made[name] = [judged(replace(recipe, seed=seed), plan, of_seed(f"{plan}-{told.iterations}", seed)) for seed in range(told.seeds)]
        rows |= {of_seed(name, seed): dict(evaluations=recipe.evaluations(told.cfg)) | one.row for seed, one in enumerate(made[name])}
    show(rows)
    result = keys_of(rows)
    if {PAIRS, SINGLE} <= made.keys():
        single, pairs = ([one.made for one in made[name]] for name in (SINGLE, PAIRS))
        low, high = ratio_above(single, pairs, floor.made, judge.other["features"])
        result |= dict(folded_vs_pairs_low=round(low, 4), folded_vs_pairs_high=round(high, 4))
    shares = kept("shares", guidance_shares, seen, told.cfg)
    result["share_of_guidance"] = {f"{sigma:.4g}": round(share, 4) for sigma, share in shares.items()}
    write_result(file, about | result | dict(rows=rounded(rows)))
    return result


def show(rows: dict[str, dict]) -> None:
    names = ("evaluations", "error pooled", "fd", "precision", "recall", "diversity", "spectrum", "accuracy")
    print(f"{'':32}" + " ".join(f"{name:>13}" for name in names))
    for name, row in rows.items():
        print(f"{name:32}" + " ".join(f"{row[key]:13.4f}" for key in names))


def keys_of(rows: dict[str, dict]) -> dict:
    """Of the means of all trainings of a table: six single evaluations, and the best way to spend six, ÷ three pairs, of the Fréchet distance above the
    teacher's own and of the error. Of what is there: a key whose rows are not is left out."""
    trainings = {name: [rows[key] for seed in range(len(rows)) if (key := of_seed(name, seed)) in rows] for name in VARIANTS}
    mean = {name: {key: sum(row[key] for row in own) / len(own) for key in own[0]} for name, own in trainings.items() if own}
    if PAIRS not in mean:
        return {}
    ratio = lambda name: (mean[name]["fd"] - rows["teacher"]["fd"]) / (mean[PAIRS]["fd"] - rows["teacher"]["fd"])
    keys, others = {}, [name for name, row in mean.items() if row["evaluations"] == mean[PAIRS]["evaluations"] and name != PAIRS]
    if others:
        keys["best"] = min(others, key=ratio)
    for key, name in (("folded_vs_pairs", SINGLE), ("best_vs_pairs", keys.get("best"))):
        if name in mean:
            keys |= {key: round(ratio(name), 4), f"{key}_error": round(mean[name]["error pooled"] / mean[PAIRS]["error pooled"], 4)}
    return keys


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
