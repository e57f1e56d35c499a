"""Distil a 3-step table for the reference model, sample with it, and write a sheet with its figures.

Teacher, plain 3 steps and MTEO 3 steps of the same noise, on prompts and noise that training has not seen.
"""
import argparse
import hashlib
import sys
from pathlib import Path

from mteo.errors import MTEOError
from mteo.metrics import nrmse
from mteo.recipe import Recipe

from .comfyui import empty_latent, encode, find_root, load, open_comfyui
from .config import Run
from .distill import distill_run

RECIPE = Recipe(pictures=192, held_out=48, iterations=60, batch=32, validate_every=10, guidance=(2.0,))
SHOWN, MEASURED = 8, 64
CAPTION = "error to the teacher (nRMSE, 0 = the same picture), {count} unseen prompts at cfg {cfg:g}: plain {plain:.3f}, MTEO {mteo:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", help="ComfyUI's root")
    parser.add_argument("--out", type=Path, default=Path("output/demo"))
    options = parser.parse_args()
    open_comfyui(find_root(options.comfyui))
    import torch

    from mteo.comfyui.training import compare_model
    from mteo.sheet import sheet
    from reference.objects import weights_file
    from reference.scenes import draw_names, prompts

    seen, unseen = (prompts(draw_names(128, torch.Generator().manual_seed(seed), seed == 2)) for seed in (1, 2))
    folder = options.out / f"run-{hashlib.sha256(weights_file('unet').read_bytes() + str(RECIPE).encode()).hexdigest()[:8]}"
    if (folder / "table.safetensors").is_file():
        print(f"the table of an earlier demo is there and is used again (delete {folder} to distil anew)")
    made = distill_run(Run(prompts=seen, width=64, height=64, folder=folder, recipe=RECIPE))
    with torch.inference_mode():
        model, clip, vae = load("reference")
        unseen = unseen[:MEASURED]
        latents = compare_model(
            model, made.embeddings, [encode(clip, text) for text in unseen], encode(clip, ""), empty_latent(model, 64, 64), RECIPE, MEASURED, seed=12345
        )
        inner = {name: model.model.process_latent_in(value) for name, value in latents.items()}  # the space that the sampler works in
        errors = {name: nrmse(inner[name], inner["teacher"]) for name in ("plain", "mteo")}
        labels = {
            "teacher": f"teacher\n{RECIPE.teacher_steps} steps",
            "plain": f"plain\n3 steps\n{errors['plain']['pooled']:.3f}",
            "mteo": f"MTEO\n3 steps\n{errors['mteo']['pooled']:.3f}",
        }
        path = options.out / "sheet.png"
        sheet({label: vae.decode(latents[name][:SHOWN]) for name, label in labels.items()}, captions=unseen[:SHOWN]).save(path)
    print(CAPTION.format(count=MEASURED, cfg=max(RECIPE.guidance), plain=errors["plain"]["pooled"], mteo=errors["mteo"]["pooled"]))
    print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except MTEOError as error:  # such as: the folder is of an earlier version
        sys.exit(f"mteo: {error}")
