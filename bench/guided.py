"""Which steps need the pair that guidance takes? Tables that guide in some steps only, beside one that guides in all, of the same cfg, pairs and optimiser
steps.

Error on unseen pairs, and as sets against the teacher's of other noise. Before it, how much of what guidance adds to an answer can offsets give at all: the
share of E|D_cfg − D_cond|², cross-fitted, on the teacher's own states.
"""
import argparse
from dataclasses import replace

import torch

from mteo.diagnose import offsets_share
from mteo.recipe import Recipe
from mteo.tableau import euler_tableau
from reference.objects import weights_file

from .cost import step_cost
from .ground import HELD_OUT, NUMBERS, grounds
from .intervals import ratio_above
from .judge import Judged
from .parts import (
    TEACHER_STEPS,
    Parts,
    ends_of,
    name_of,
    named_grids,
    rounded,
    rows_before,
    searched_start,
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
    parser.add_argument("--cfg", type=float, nargs=1, default=[4.0])
    parser.add_argument("--pictures", type=int, default=1024, help="training pairs")
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--count", type=int, default=2048, help="pictures of a set")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each table; the keys are of their means")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="the file keeps others of the same weights, judge and numbers")
    parser.set_defaults(**NUMBERS)
    told = parser.parse_args(arguments)
    [cfg], [ground] = told.cfg, grounds(told, planned(told))
    tag, file = f"{cfg:g}-{told.pictures}", f"guided-{told.model}-cfg{cfg:g}"
    pairs_of = lambda name, count, seed: ground.stage(f"guided-{name}-{cfg:g}-{count}", teacher_pairs, ground.seen, count, cfg, seed)
    train, held_out = pairs_of("train", told.pictures, 1), pairs_of("held-out", HELD_OUT, 2)
    about = dict(model=told.model, cfg=cfg, weights=name_of(weights_file(told.model)), judge=ground.judge.name)
    about |= {number: getattr(told, number) for number in ("pictures", "iterations", "count")}

    def judged(variant: str, seed: int) -> Judged:
        recipe, plan = replace(recipe_of(variant, told), seed=seed), "-".join(["guided", *map(str, VARIANTS[variant]), tag]).replace(" ", "-")

        def trained():
            start = ground.stage(f"{plan}-start", searched_start, ground.seen, recipe, held_out)
            return train_embeddings(ground.seen, recipe, start, train, held_out)

        name = f"{plan}-{recipe.iterations}-{seed}"
        table = ground.trained.table(name, trained)
        return ground.judged(name, lambda: ends_of(ground.own, ground.pairs, table.tables[recipe.steps].tableau_at(cfg), table))

    floor = ground.judged(f"teacher-{cfg:g}", lambda: ground.pairs.end)
    own = {"teacher": dict(evaluations=2 * TEACHER_STEPS) | floor.row}
    for name in told.only:
        evaluations = recipe_of(name, told).evaluations(cfg)
        own |= {of_seed(name, seed): dict(evaluations=evaluations) | judged(name, seed).row for seed in range(told.seeds)}
    rows = rows_before(file, about) | own  # as late as can be: another process may have written
    show(rows)
    result = keys_of(rows)
    single, pairs = ([judged(name, seed).made for seed in seeds_of(rows, name)] for name in (SINGLE, PAIRS))
    if single and pairs:
        low, high = ratio_above(single, pairs, floor.made, ground.judge.other["features"].cpu())
        result |= dict(folded_vs_pairs_low=round(low, 4), folded_vs_pairs_high=round(high, 4))
    shares = ground.stage(f"guided-shares-{cfg:g}", guidance_shares, ground.seen, cfg)
    result["share_of_guidance"] = {f"{sigma:.4g}": round(share, 4) for sigma, share in shares.items()}
    write_result(file, about | result | dict(rows=rounded(rows)))
    return result


def recipe_of(variant: str, told) -> Recipe:
    steps, guided = VARIANTS[variant]
    return Recipe(steps=steps, rows="all", guided=guided, guidance=tuple(told.cfg), iterations=told.iterations)


def planned(told) -> int:
    """Network evaluations of a run from nothing, at most; searches, the choice of the best table and the shares of guidance apart."""
    [cfg] = told.cfg
    recipes = [recipe_of(name, told) for name in told.only]
    teacher = (2 * told.count + told.pictures + HELD_OUT) * 2 * TEACHER_STEPS
    return round(teacher + sum(told.seeds * (told.iterations * step_cost(one, cfg) + told.count * one.evaluations(cfg)) for one in recipes))


def show(rows: dict[str, dict]) -> None:
    names = ("evaluations", "error pooled", "fd", "precision", "recall", "diversity", "spectrum", "accuracy")
    print(f"{'':32}" + " ".join(f"{name:>13}" for name in names))
    for name, row in rows.items():
        print(f"{name:32}" + " ".join(f"{row[key]:13.4f}" for key in names))


def seeds_of(rows: dict[str, dict], variant: str) -> list[int]:
    """Of the trainings that have a row."""
    return [seed for seed in range(len(rows)) if of_seed(variant, seed) in rows]


def keys_of(rows: dict[str, dict]) -> dict:
    """Of the means of all trainings of a table: six single evaluations, and the best way to spend six, ÷ three pairs, of the Fréchet distance above the
    teacher's own and of the error. Of what is there: a key whose rows are not is left out."""
    trainings = {name: [rows[of_seed(name, seed)] for seed in seeds_of(rows, name)] for name in VARIANTS}
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
        shares, offsets, session.short = {}, session.patch.offsets, False  # what guidance adds at the largest σ bfloat16 would round away
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
