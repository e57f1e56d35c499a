"""Distill MTEO: learn a table for the connected model, in a run folder, with progress, previews and cancel."""
import hashlib
import json
from pathlib import Path

import comfy.model_management
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ..mteo.comfyui.previews import previewer, rough
from ..mteo.comfyui.sampling import samples_for
from ..mteo.comfyui.training import distill_model, facts_of
from ..mteo.guided import ALL
from ..mteo.metrics import held_out_errors
from ..mteo.recipe import FREE, Recipe
from ..mteo.sheet import as_image, sheet
from .embeddings import MTEOEmbeddings

SOLVERS = ["euler", "dpmpp_2m", "ipndm", "deis", "res_multistep", "uni_pc", "heun"]
BUDGETS = {  # trajectories, held-out ones, optimiser steps
    "try": dict(pictures=64, held_out=32, iterations=24, batch=24, validate_every=6),
    "quick": dict(pictures=256, held_out=64, iterations=80, batch=32, validate_every=10),
    "standard": dict(pictures=1024, held_out=128, iterations=200, batch=48, validate_every=20),
    "thorough": dict(pictures=4096, held_out=256, iterations=800, batch=48, validate_every=50),
}
BAR, SEARCH = 1000, 0.05  # parts of the progress bar; share of it for the search of a grid
SEARCHES = {"teacher, for the grid": (0.0, 0.3), "grid": (0.3, 1.0)}  # of that share
STAGES = {"teacher": (0.0, 0.38), "teacher, held out": (0.38, 0.42), "training": (0.42, 1.0)}  # of each cfg value's share of the rest


class DistillEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MTEODistill",
            display_name="Distill MTEO",
            category="MTEO",
            description="Learn few-step time embeddings for this model from its own many-step pictures. Weights are not changed. "
            "Works in a run folder in output/mteo: after a cancel the same inputs go on where they stopped (a search for the grid starts anew), "
            "and give the same table.",
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to distil, with any LoRA that the table should be made with."),
                io.Conditioning.Input("positive", tooltip="One prompt, or a list of them: each item is one prompt. Many and varied ones are better."),
                io.Conditioning.Input("negative", tooltip="The negative prompt to train with; not used where cfg is 1."),
                io.Latent.Input("latent_image", tooltip="Gives the size; its content is not used."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**62,
                    control_after_generate=False,
                    tooltip="Seed of the training noise. The same seed and inputs give the same table.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The guidance to train for; 1 = none. "
                    "A list of numbers: each is trained by itself, one table holds all of them and blends between.",
                ),
                io.Int.Input("steps", default=3, min=2, max=16, tooltip="Number of sampling steps of the table."),
                io.Combo.Input(
                    "solver",
                    options=SOLVERS,
                    default="euler",
                    tooltip="The ODE solver that the steps start from; its coefficients are learned beside the embeddings. With grid = free and one "
                    "evaluation a step (all but heun) they start from what the search finds, and this is only the solver that strength 0 stands for.",
                ),
                io.Combo.Input(
                    "grid",
                    options=[FREE, *comfy.samplers.SCHEDULER_NAMES],
                    default=FREE,
                    tooltip="The schedule of sigmas; free = search the best one first, with four to seven steps learn it with the rest.",
                ),
                io.Combo.Input(
                    "budget",
                    options=list(BUDGETS),
                    default="quick",
                    tooltip="How long to train, for each cfg value: try = "
                    + "; ".join(f"{name} = {b['pictures']} pictures and {b['iterations']} steps" for name, b in BUDGETS.items())[6:],
                ),
                io.Vae.Input("vae", optional=True, tooltip="For the picture sheet; without it the sheet shows rough previews."),
                io.Sampler.Input("sampler", optional=True, tooltip="A SAMPLER in place of solver."),
                io.String.Input(
                    "guided_steps",
                    optional=True,
                    default=ALL,
                    tooltip="The steps that evaluate the negative prompt and cfg, two evaluations each; the others evaluate the prompt alone, "
                    'one evaluation, and the table stands in for the guidance. "all", "none", or numbers of steps from 1: of four steps "1 3" costs '
                    "as much as three that are all guided, and is nearer to the many-step picture.",
                ),
                io.Float.Input(
                    "denoise",
                    optional=True,
                    default=1.0,
                    min=0.05,
                    max=1.0,
                    step=0.01,
                    tooltip="1 = a table for pictures from noise. Below it, one for image to image, which starts from a picture with noise on it, "
                    "as KSampler's denoise: 0.05 changes next to nothing. A table works at its own denoise only.",
                ),
            ],
            outputs=[
                MTEOEmbeddings.Output(display_name="embeddings"),
                io.Image.Output(display_name="sheet"),
                io.Custom("LOSS_MAP").Output(display_name="loss"),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, cfg, steps, solver, grid, budget, vae=None, sampler=None, guided_steps=(ALL,), denoise=(1.0,)
    ):
        model = model[0]
        size = samples_for(model, latent_image[0])
        asked_for = dict(steps=steps[0], solver=solver[0], grid=grid[0], guidance=tuple(cfg), guided=guided_steps[0], seed=seed[0], denoise=denoise[0])
        recipe = Recipe(**asked_for, **BUDGETS[budget[0]])
        prompts = list(positive)
        asked = model, prompts, negative[0], torch.zeros_like(size[:1]), recipe
        sampler = sampler[0] if sampler else None
        folder = run_folder(recipe.steps, facts_of(*asked, sampler))
        made = distill_model(*asked, folder, sampler, Progress(model))
        rows = {"teacher": made.previews["teacher"], f"plain {recipe.steps}": made.previews["plain"], f"MTEO {recipe.steps}": made.previews["mteo"]}
        pictures = {label: pictures_of(model, value, vae[0] if vae else None) for label, value in rows.items()}
        return io.NodeOutput(made.embeddings, as_image(sheet(pictures)), {"loss": held_out_errors(made.log)}, ui={"text": [folder.name]})


def run_folder(steps: int, facts: dict) -> Path:
    """output/mteo/<name of what is asked for>: the same inputs find it again [18]."""
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return Path(folder_paths.get_output_directory()) / "mteo" / f"{steps}steps-{name}"


def pictures_of(model, latents, vae):
    """IMAGE [N, H, W, 3] of LATENT values: by the VAE, or the rough preview."""
    if vae is not None:
        return vae.decode(latents)
    inner, own = model.model.process_latent_in(latents), previewer(model)
    return torch.cat([as_image(rough(own, one)) for one in inner.split(1)])


class Progress:
    """Told at every chunk and step: moves the bar, shows what the student makes, lets a cancel through."""

    def __init__(self, model):
        self.bar, self.previewer = comfy.utils.ProgressBar(BAR), previewer(model)

    def __call__(self, stage: str, done: int, total: int, part=(0, 1), picture=None, **facts):
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None if picture is None else ("JPEG", rough(self.previewer, picture), 512)
        share = done / max(total, 1)
        if stage in STAGES:
            low, high = STAGES[stage]
            share = SEARCH + (1 - SEARCH) * (part[0] + low + (high - low) * share) / part[1]
        else:
            low, high = SEARCHES[stage]
            share = SEARCH * (low + (high - low) * (part[0] + share) / part[1])
        self.bar.update_absolute(int(BAR * share), BAR, preview)
