"""What only a CUDA card shows, on a network of SD 1.5's size: what a table costs in sampling, and what a distillation costs in time and memory.

The weights are random, as neither depends on what is drawn; the latents are 64 × 64, the numbers float16. With --memory the card holds no more than that, as
one that artists have does.
"""
import argparse
import time

import comfy.model_management
import comfy.supported_models
import torch

from mteo.comfyui.training import distill_model
from mteo.recipe import Recipe
from reference.network import fill_randomly
from reference.objects import as_patcher

from .cost import affordable
from .overhead import ratios_of
from .parts import TEACHER_STEPS, Parts, write_result

GUIDANCE, BUDGET = 7.5, 60_000
SD15 = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    num_res_blocks=[2, 2, 2, 2],
    channel_mult=[1, 2, 4, 4],
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_middle=1,
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    context_dim=768,
    num_heads=8,
    use_spatial_transformer=True,
    use_linear_in_transformer=False,
    adm_in_channels=None,
    use_checkpoint=False,
    legacy=False,
    use_temporal_attention=False,
    use_temporal_resblock=False,
)


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--memory", type=float, nargs="*", default=[12.0], help="GiB that the card may hold, one after the other; all that it has comes before")
    parser.add_argument("--pairs", type=int, default=40, help="samplings of each kind")
    parser.add_argument("--iterations", type=int, default=4, help="optimiser steps that are timed")
    parser.add_argument("--channels", type=int, default=320, help="of the network; 320 is SD 1.5's")
    told = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench gpu needs a CUDA card, and PyTorch finds none.")
    card, whole = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()[1]
    own = random_parts(told.channels)
    result = dict(card=card.name, torch=torch.__version__, channels=told.channels, sampling={})
    for batch in (1, 4):
        result["sampling"][f"batch {batch}"] = row = ratios_of(own, told.pairs, batch, Recipe().space)
        print(f"batch {batch}    " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    for name, share in [("all", 1.0), *((f"{memory:g} GiB", memory * 2**30 / whole) for memory in told.memory)]:
        comfy.model_management.unload_all_models()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
        result[f"distillation, {name}"] = row = costs(own, told.iterations)
        print(f"{name:10} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
        write_result("gpu", result)  # what there is, where the next one is cut off
    return result


def costs(own: Parts, iterations: int) -> dict[str, float]:
    """Seconds of a network evaluation of the teacher and of an optimiser step of three guided steps, GiB that were in use at most, and the minutes that BUDGET
    evaluations are."""
    recipe = affordable(BUDGET, GUIDANCE)
    short = Recipe(
        **{**recipe.facts(), "rows": "last", "grid": "sgm_uniform", "pictures": recipe.batch, "held_out": 4, "iterations": iterations, "validate_every": 1000}
    )
    ends: dict[str, list[float]] = {}

    def progress(stage: str, done: int, total: int, **facts) -> None:
        torch.cuda.synchronize()
        ends.setdefault(stage, []).append(time.perf_counter())

    torch.cuda.reset_peak_memory_stats()
    distill_model(own.model, own.positives, own.negative, own.latent, short, progress=progress)
    spans = {stage: [b - a for a, b in zip(times[:-1], times[1:], strict=True)] for stage, times in ends.items()}
    teacher = spans["teacher"][-1] / (short.pictures * TEACHER_STEPS * 2)
    step = sorted(spans["training"])[len(spans["training"]) // 2]
    minutes = (recipe.pictures * TEACHER_STEPS * 2 * teacher + recipe.iterations * step) / 60
    return dict(teacher_seconds=teacher, step_seconds=step, most_gib=torch.cuda.max_memory_allocated() / 2**30, minutes=minutes)


@torch.inference_mode(False)
def random_parts(channels: int, dtype: torch.dtype = torch.float16) -> Parts:
    """A network of SD 1.5's shape with random weights, one random prompt and an empty latent."""
    family = comfy.supported_models.SD15(dict(SD15, model_channels=channels, dtype=dtype))
    model, generator = family.get_model({}, "model."), torch.Generator().manual_seed(0)
    fill_randomly(model.diffusion_model)
    text = lambda: [[torch.randn(1, 77, SD15["context_dim"], generator=generator), {}]]
    return Parts(as_patcher(model), [text()], text(), torch.zeros(1, 4, 64, 64))
