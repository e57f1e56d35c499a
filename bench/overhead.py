"""What a table costs in sampling: pairs of runs in random order, the same model, solver and steps; 1 = nothing."""
import argparse
import random
import time

import comfy.samplers
import torch

from mteo.comfyui.sampling import applied
from mteo.recipe import Recipe

from .exactness import latent, table_of
from .parts import Parts, named_grids, parts, write_result


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench overhead", description=__doc__)
    parser.add_argument("--pairs", type=int, default=80)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--space", default=Recipe().space, help="where the table acts")
    told = parser.parse_args(arguments)
    found = ratios_of(parts(5, 1, True, told.model), told.pairs, told.batch, told.space)
    for key, what in (("", "MTEO ÷ plain"), ("named_", "MTEO with ComfyUI's Euler ÷ plain"), ("noise_", "plain ÷ plain")):
        print(f"{what:36} {found[f'{key}ratio']:.4f} [{found[f'{key}low']:.4f}, {found[f'{key}high']:.4f}]")
    write_result(f"overhead-{told.model}-{told.space}", dict(batch=told.batch, threads=torch.get_num_threads()) | found)
    return found


def ratios_of(own: Parts, pairs: int, batch: int, space: str) -> dict[str, float]:
    """Time of a sampling of three steps at cfg 4 with a table ÷ without: of a table that has a sampler of its own, as one whose rows were learned, or one that
    goes with ComfyUI's Euler ("named"); and of without ÷ without ("noise")."""
    shuffle = random.Random(0)
    with torch.inference_mode():
        sigmas, sampler = named_grids(own.model.get_model_object("model_sampling"), 3)["sgm_uniform"], comfy.samplers.sampler_object("euler")
        named, learned = (table_of(own, "euler", sigmas, 0.1, space) for _ in range(2))
        learned.tables[3].learned = [learned.tables[3].tableau]

        def seconds(model, sampler) -> float:
            # Neither ComfyUI's switch from one clone to another nor the check that a new schedule gets once is timed.
            latent(own, sampler, sigmas, 4.0, 1, model)
            begin = time.perf_counter()
            latent(own, sampler, sigmas, 4.0, batch, model)
            return time.perf_counter() - begin

        kinds = {"plain": (own.model, sampler), "again": (own.model, sampler), "mteo": applied(own.model, learned)[:2], "named": applied(own.model, named)[:2]}
        for kind in kinds.values():
            seconds(*kind)
        times = {name: [] for name in kinds}
        for _ in range(pairs):
            for name in shuffle.sample(list(kinds), len(kinds)):
                times[name].append(seconds(*kinds[name]))
    found = {"pairs": pairs}
    for name, key in (("mteo", ""), ("named", "named_"), ("again", "noise_")):
        found |= dict(zip((f"{key}ratio", f"{key}low", f"{key}high"), median_ratio(times[name], times["plain"]), strict=True))
    return found


def median_ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median of the paired ratios with a bootstrap interval of 95 %."""
    ratios = torch.tensor(a, dtype=torch.float64) / torch.tensor(b, dtype=torch.float64)
    draws = torch.randint(len(ratios), (2000, len(ratios)), generator=torch.Generator().manual_seed(0))
    low, high = ratios[draws].median(1).values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(ratios.median()), low, high
