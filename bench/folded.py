"""Can one evaluation do the work of a cfg pair? A table is trained whose every step evaluates the prompt alone, against the teacher with guidance.

It has six single evaluations where the shipped table has three pairs. Before that, how much of what guidance adds to an answer can offsets give at all (traps 37):
the share of E|D_cfg − D_cond|², cross-fitted, on the teacher's own states.
"""
import argparse
from dataclasses import replace

import torch

from mteo.diagnose import offsets_share
from mteo.embeddings import Embeddings, load_embeddings
from mteo.metrics import nrmse, paired_bootstrap_ratio, per_picture
from mteo.recipe import Recipe
from mteo.tableau import euler_tableau
from mteo.teacher import Trajectories
from reference.objects import weights_file

from .parts import (
    ROOT,
    TEACHER_STEPS,
    ends_of,
    error_line,
    name_of,
    named_grids,
    parts,
    stage,
    table_file,
    teacher_pairs,
    train_embeddings,
    untrained,
    write_result,
)

STEPS, SHARE_PAIRS = 6, 64


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench folded", description=__doc__)
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--cfg", type=float, default=4.0, help="the guidance to fold; the shipped table is its rival")
    parser.add_argument("--pictures", type=int, default=512, help="training pairs")
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--space", default=Recipe().space)
    told = parser.parse_args(arguments)
    folder = ROOT / "runs" / "bench" / f"folded-{name_of(weights_file(told.model))}-{told.cfg:g}-{told.pictures}"
    seen, fresh = parts(1, 1024, False, told.model), parts(3, 1024, True, told.model)
    grid = named_grids(seen.model.get_model_object("model_sampling"), STEPS)["sgm_uniform"]
    through = tuple(grid.tolist())
    train, held_out = (stage(folder, name, teacher_pairs, seen, count, told.cfg, seed, TEACHER_STEPS, through) for name, count, seed in (("train", told.pictures, 1), ("held-out", 128, 2)))
    test = stage(folder, "test", teacher_pairs, fresh, 512, told.cfg, 1004)
    recipe, plain = Recipe(steps=STEPS, rows="all", space=told.space, guidance=(1.0,), iterations=told.iterations), euler_tableau(grid)
    shares = stage(folder, f"shares-{told.space}", guidance_shares, seen, untrained(seen, recipe, plain), train.part(slice(0, SHARE_PAIRS)))
    folded = stage(folder, f"table-{told.space}-{told.iterations}", train_embeddings, seen, recipe, plain, single(train), single(held_out))
    pairs = load_embeddings(table_file(told.model))
    rows = {"one evaluation a step, no offsets, 6": ends_of(fresh, single(test), plain), "folded, 6": ends_of(fresh, single(test), folded.tables[STEPS].tableau_at(1.0), folded),
            "the shipped table, 3 pairs": ends_of(fresh, test, pairs.tables[3].tableau_at(told.cfg), pairs)}
    errors = {name: nrmse(ends, test.end) for name, ends in rows.items()}
    for name, error in errors.items():
        print(error_line(name, error))
    ratio = paired_bootstrap_ratio(*(per_picture(rows[name], test.end) for name in ("folded, 6", "the shipped table, 3 pairs")))
    result = dict(model=told.model, cfg=told.cfg, weights=name_of(weights_file(told.model)), folded_vs_pairs=round(ratio[0], 4), folded_vs_pairs_low=round(ratio[1], 4),
                  folded_vs_pairs_high=round(ratio[2], 4), share_of_guidance={f"{sigma:.4g}": round(share, 4) for sigma, share in shares.items()})
    write_result(f"folded-{told.model}", result | {"rows": errors})
    return result


def single(pairs: Trajectories) -> Trajectories:
    """The same ends, to be reached by evaluations of the prompt alone."""
    return replace(pairs, guidance=torch.ones_like(pairs.guidance))


def guidance_shares(seen, zero: Embeddings, pairs: Trajectories) -> dict[float, float]:
    """σ -> the share of what guidance adds to an answer there that offsets can give, on the teacher's states."""

    def work(session):
        shares, alone = {}, single(pairs)
        states = [pairs.start, *pairs.states.unbind(1)]
        for sigma, x in zip(zero.tables[STEPS].sigmas[:-1], states, strict=True):
            session.patch.offsets.scale = 0.0
            with torch.no_grad():
                wanted = session.denoise(x, sigma, pairs.item, pairs.guidance)
            session.patch.offsets.scale = 1.0

            def answer(part, offsets, x=x, sigma=sigma):
                session.patch.offsets.replace(offsets)
                return session.denoise(x[part], sigma, alone.item[part], alone.guidance[part])

            shares[sigma] = offsets_share(answer, dict(session.patch.offsets.table), wanted).best
        return shares

    return seen.session(work, zero)
