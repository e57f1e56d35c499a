"""What a table costs in sampling: pairs of runs in random order, the same model, solver and steps; 1 = nothing."""
import argparse
import random
import time

import comfy.samplers
import torch

from mteo.comfyui.patch import apply_embeddings
from mteo.recipe import Recipe

from .exactness import latent, table_of
from .parts import named_grids, parts


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench overhead", description=__doc__)
    parser.add_argument("--pairs", type=int, default=80)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--space", default=Recipe().space, help="where the table acts")
    told = parser.parse_args(arguments)
    own, shuffle = parts(5, 1, True, told.model), random.Random(0)
    with torch.inference_mode():
        sigmas, sampler = named_grids(own.model.get_model_object("model_sampling"), 3)["sgm_uniform"], comfy.samplers.sampler_object("euler")
        patched, _ = apply_embeddings(own.model, table_of(own, "euler", sigmas, 0.1, told.space))

        def seconds(model) -> float:
            latent(own, sampler, sigmas, 4.0, 1, model)  # neither ComfyUI's switch from one clone to another nor the check that a new schedule gets once is timed
            begin = time.perf_counter()
            latent(own, sampler, sigmas, 4.0, told.batch, model)
            return time.perf_counter() - begin

        kinds = {"plain": own.model, "again": own.model, "mteo": patched}
        for model in kinds.values():
            seconds(model)
        times = {name: [] for name in kinds}
        for _ in range(told.pairs):
            for name in shuffle.sample(list(kinds), len(kinds)):
                times[name].append(seconds(kinds[name]))
    ratio, noise = median_ratio(times["mteo"], times["plain"]), median_ratio(times["again"], times["plain"])
    print(f"MTEO ÷ plain {ratio[0]:.4f} [{ratio[1]:.4f}, {ratio[2]:.4f}]; plain ÷ plain {noise[0]:.4f} [{noise[1]:.4f}, {noise[2]:.4f}]")
    return {"ratio": ratio[0], "low": ratio[1], "high": ratio[2], "pairs": told.pairs, "noise_ratio": noise[0], "noise_low": noise[1], "noise_high": noise[2]}


def median_ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median of the paired ratios with a bootstrap interval of 95 %."""
    ratios = torch.tensor(a, dtype=torch.float64) / torch.tensor(b, dtype=torch.float64)
    draws = torch.randint(len(ratios), (2000, len(ratios)), generator=torch.Generator().manual_seed(0))
    low, high = ratios[draws].median(1).values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(ratios.median()), low, high
