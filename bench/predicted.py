"""Does `trainer diagnose` say before a training what it will give? The share of the squared error, of what the searched σ and coefficients leave, that it says
offsets and coefficients remove, and that a trained table removed, at several numbers of steps."""
import argparse

from mteo.comfyui.diagnosis import diagnose_model
from mteo.recipe import Recipe
from reference.objects import weights_file

from .parts import ROOT, name_of, parts, searched_and_trained, stage, teacher_pairs, write_result


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench predicted", description=__doc__)
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--trajectories", type=int, default=128, help="that the diagnosis looks at")
    parser.add_argument("--pictures", type=int, default=512, help="training pairs")
    parser.add_argument("--iterations", type=int, default=60, help="optimiser steps")
    told = parser.parse_args(arguments)
    folder = ROOT / "runs" / "bench" / f"predicted-{name_of(weights_file(told.model))}-{told.cfg:g}-{told.pictures}-{told.iterations}"
    seen = parts(1, 1024, False, told.model)
    train, held_out = stage(folder, "train", teacher_pairs, seen, told.pictures, told.cfg, 1), stage(folder, "held-out", teacher_pairs, seen, 128, told.cfg, 2)
    rows = {}
    for steps in told.steps:
        recipe = Recipe(steps=steps, guidance=(told.cfg,), pictures=told.pictures, iterations=told.iterations)
        table = stage(folder, f"table-{steps}", searched_and_trained, seen, recipe, train, held_out)
        asked = seen.model, seen.positives, seen.negative, seen.latent
        [found] = stage(folder, f"diagnosis-{steps}-{told.trajectories}", diagnose_model, *asked, recipe, told.trajectories, table)
        row = dict(predicted=found.offsets, achieved=found.achieved, plain=list(found.errors.values())[-2], table=found.table)
        rows[steps] = {key: round(value, 4) for key, value in row.items()}
        print(f"{steps} steps: {rows[steps]}", flush=True)
    result = dict(
        predicted_minus_achieved=round(max((row["predicted"] - row["achieved"] for row in rows.values()), key=abs), 4),
        model=told.model,
        cfg=told.cfg,
        weights=name_of(weights_file(told.model)),
    )
    write_result(f"predicted-{told.model}-cfg{told.cfg:g}", result | {"rows": rows})
    return result
