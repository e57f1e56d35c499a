"""Distil a table in a run folder; stop it and the same command goes on.

Writes run.json (all settings as resolved), teacher/ (trajectories, until the table is done), state-N.pt and log-N.jsonl for each cfg value, previews/,
loss.png, sheet.png, table.safetensors.
"""
from .comfyui import empty_latent, encode, find_root, load, open_comfyui
from .config import Run, read_run
from .report import Bars, plot_loss


def run(options) -> None:
    told = read_run(options)
    open_comfyui(find_root(options.comfyui))
    distill_run(told)


def distill_run(told: Run):
    """Distil as told; the result with its sheet's pictures {label: IMAGE}."""
    import torch

    from mteo.comfyui.previews import previewer, rough
    from mteo.comfyui.training import distill_model
    from mteo.sheet import sheet

    with torch.inference_mode():
        model, clip, vae = load(told.model)
        positives, negative = [encode(clip, text) for text in told.prompts], encode(clip, told.negative)

        def show(number, iteration, picture):
            (told.folder / "previews").mkdir(exist_ok=True)
            rough(previewer(model), picture).resize((told.width, told.height)).save(told.folder / "previews" / f"{number}-{iteration:06}.png")

        bars = Bars(show)
        try:
            made = distill_model(model, positives, negative, empty_latent(model, told.width, told.height), told.recipe, told.folder, progress=bars)
        finally:
            bars.close()
        steps = told.recipe.steps
        labels = {"teacher": "teacher", "plain": f"plain {steps} steps", "mteo": f"MTEO {steps} steps"}
        sheet({label: vae.decode(made.previews[name]) for name, label in labels.items()}, captions=told.prompts).save(told.folder / "sheet.png")
        try:
            plot_loss(made.log, told.folder / "loss.png")
        except ModuleNotFoundError as error:
            print(f"no loss.png, as {error.name} is not installed: pip install {error.name}")
    for cfg in told.recipe.guidance:
        own = [line for line in made.log if line["cfg"] == cfg]
        print(f"cfg {cfg:g}: held-out error {own[0]['held_out']:.4f} -> {own[-1]['best']:.4f} ({own[-1]['best'] / own[0]['held_out']:.2f} of where it started)")
    print(f"table: {told.folder / 'table.safetensors'}")
    return made
