"""What the shipped table is worth away from what it was made for: fine-tunes of the model, a LoRA, other cfg, other prompts. Three steps.

The fine-tunes are trained here from the shipped weights; the LoRA is what ComfyUI's own extraction makes of one of them. Each has its own teacher, and the
error is to that. Beside the table stand the best named plain sampler, chosen for that very model, and a table that was trained on it.
"""
import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import comfy.sd
import torch
from comfy_extras.nodes_lora_extract import LORAType, calc_lora_model
from safetensors import safe_open

from mteo.comfyui.identity import model_fingerprint
from mteo.embeddings import Embeddings, load_embeddings
from mteo.fingerprint import difference, verdict
from mteo.metrics import paired_bootstrap_ratio, per_picture
from mteo.recipe import Recipe
from reference.objects import make_clip, make_model, weights_file
from reference.scenes import SIZE, draw_names, prompts
from reference.vocabulary import DRAWINGS

from .heldout import CFGS, STEPS, best_named, named, summary
from .parts import (
    ROOT,
    Parts,
    ends_of,
    name_of,
    named_grids,
    parts_of,
    searched_and_trained,
    solver_tableau,
    stage,
    table_file,
    teacher_pairs,
    write_result,
)

FINE_TUNES = {"ink": ("--style", "ink"), "96 pixels": ("--size", "96")}
SIZES = {"96 pixels": 96}
RANK = 16  # of the LoRA
GUIDANCE = 1.9  # inside the fine-tunes' answers, as in the base's last images
OTHER_CFGS = (2.5, 7.0)  # between and beyond those of the table
PLAIN, BASE, OWN = "plain, best named", "the base's table", "its own table"


@dataclass
class Relative:
    """A model, what it is asked for, and where it is looked at; learns: a table of its own is trained for comparison, at the cfg values of the base's."""

    name: str
    model: object
    clip: object
    cfgs: tuple[float, ...] = CFGS
    learns: bool = True
    third: bool = False  # prompts of three drawings, which no training has

    def parts(self, prompt_seed: int, count: int, unseen_pairs: bool) -> Parts:
        generator = torch.Generator().manual_seed(prompt_seed)
        texts, words = prompts(draw_names(count, generator, unseen_pairs)), list(DRAWINGS)
        if self.third:
            texts = [
                f"{text if ' and ' in text else f'{text} and {words[i]}'} and {words[j]}"
                for text, (i, j) in zip(texts, torch.randint(len(words), (count, 2), generator=generator).tolist(), strict=True)
            ]
        return parts_of(self.model, self.clip, texts, SIZES.get(self.name, SIZE))

    @cached_property
    def seen(self) -> Parts:
        return self.parts(1, 1024, False)


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench generality", description=__doc__)
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--test", type=int, default=256, help="test pairs")
    parser.add_argument("--validation", type=int, default=64, help="pairs on which the plain sampler is chosen")
    parser.add_argument("--pictures", type=int, default=256, help="training pairs of a model's own table, at each cfg")
    parser.add_argument("--iterations", type=int, default=40, help="optimiser steps of it")
    parser.add_argument("--images", type=int, default=16_000, help="scenes that a fine-tune sees")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="cfg inside the fine-tunes' answers")
    parser.add_argument("--compile", action="store_true", help="fine-tune in half the time, where a C++ compiler is at hand")
    told = parser.parse_args(arguments)
    table = table_file(told.model)
    embeddings = load_embeddings(table)
    numbers = "-".join(str(number) for number in (told.images, told.test, told.validation, *[told.guidance] * (told.guidance != GUIDANCE)))
    folder = ROOT / "runs" / "bench" / f"generality-{name_of(weights_file(told.model))}-{numbers}"
    rows, prints = {}, {}
    for relative in relatives(told, folder):
        prints[relative.name] = difference(model_fingerprint(relative.model, list(embeddings.model["fingerprint"])), embeddings.model["fingerprint"])
        for cfg in relative.cfgs:
            errors = errors_at(relative, cfg, folder, told, embeddings, name_of(table))
            rows[f"{relative.name}, cfg {cfg:g}"] = row_of(errors)
    show(rows, prints)
    result = dict(
        model=told.model, worst_ratio=max(row["ratio"][0] for row in rows.values()), least_kept=min(row["kept"] for row in rows.values() if "kept" in row)
    )
    write_result(
        f"generality-{told.model}",
        result
        | dict(
            weights=name_of(weights_file(told.model)),
            table=name_of(table),
            told={name: getattr(told, name) for name in ("test", "validation", "pictures", "iterations", "images", "guidance")},
            weights_differ={name: round(value, 4) for name, value in prints.items()},
            rows=rows,
        ),
    )
    return result


def relatives(told, folder: Path):
    """The base first; each is made when its turn comes."""
    model, clip = make_model(told.model), make_clip(told.model)
    yield Relative("base", model, clip, cfgs=(*CFGS, *OTHER_CFGS))
    yield Relative("three drawings", model, clip, learns=False, third=True)
    tuned = {}
    for name, flags in FINE_TUNES.items():
        tuned[name] = weights = fine_tuned(told, folder, name, flags)
        yield Relative(name, make_model(told.model, weights=weights), make_clip(told.model, weights=weights))
    lora = stage(folder, f"lora-{RANK}", extracted, told.model, tuned["ink"])
    for strength in (1.0, 0.5):
        yield Relative(f"ink as a LoRA, strength {strength:g}", *comfy.sd.load_lora_for_models(model, clip, lora, strength, strength), learns=False)


def fine_tuned(told, folder: Path, name: str, flags: tuple[str, ...]) -> Path:
    """Weights that were trained on from the shipped ones; goes on where it was stopped."""
    run, weights, start = folder / name, folder / name / "weights.safetensors", weights_file(told.model)
    run.mkdir(parents=True, exist_ok=True)
    if not weights.is_file():
        shutil.copy(start, weights)
    goal = images_of(start) + told.images
    if images_of(weights) < goal:
        command = [sys.executable, "-m", "reference.train", "--comfyui", Path(comfy.sd.__file__).parents[1], "--model", told.model, "--run", run]
        command += ["--weights", weights, "--images", goal, "--ship-every", 2_000, "--guidance", told.guidance, "--tune", "--warm", 2_000, *flags]
        subprocess.run([str(word) for word in command + ["--compile"] * told.compile], check=True, cwd=ROOT)
    return weights


def images_of(weights: Path) -> int:
    with safe_open(weights, "pt") as file:
        return int(file.get_tensor("images"))


def extracted(kind: str, weights: Path) -> dict[str, torch.Tensor]:
    """The difference of a fine-tune to its base as a LoRA, as ComfyUI's nodes ModelSubtract, CLIPSubtract and LoraSave make it."""
    lora = {}
    with torch.inference_mode():
        for one, base, own, key in ((make_model(kind, weights=weights), make_model(kind), "diffusion_model.", "diffusion_model."),
                                    (make_clip(kind, weights).patcher, make_clip(kind).patcher, "", "text_encoders.")):
            one.add_patches(base.get_key_patches(own or None), -1.0, 1.0)
            lora = calc_lora_model(one, RANK, own, key, lora, LORAType.STANDARD, bias_diff=True)
    return lora


def errors_at(relative: Relative, cfg: float, folder: Path, told, embeddings: Embeddings, table: str) -> dict[str, torch.Tensor]:
    """nRMSE of each test picture by what made it."""
    kept = lambda name, make, *own: stage(folder, f"{relative.name}-{cfg:g}-{name}", make, *own)
    fresh = relative.parts(3, told.test, True)
    choosing = relative.parts(2, told.validation, True)
    test = kept("test", teacher_pairs, fresh, told.test, cfg, 3001)
    sampling = relative.model.get_model_object("model_sampling")
    solver, grid = best_named(kept("named", lambda: named(choosing, teacher_pairs(choosing, told.validation, cfg, 3002))))
    made = {PLAIN: kept("plain", ends_of, fresh, test, solver_tableau(solver, named_grids(sampling, STEPS)[grid], sampling)),
            BASE: kept(f"base-{table}", ends_of, fresh, test, embeddings.tables[STEPS].tableau_at(cfg), embeddings)}
    if relative.learns and cfg in CFGS:
        own = kept(f"own-{told.pictures}-{told.iterations}", own_table, relative.seen, cfg, told.pictures, told.iterations)
        made[OWN] = kept(f"ends-own-{told.pictures}-{told.iterations}", ends_of, fresh, test, own.tables[STEPS].tableau_at(cfg), own)
    return {name: per_picture(ends, test.end) for name, ends in made.items()}


def own_table(seen: Parts, cfg: float, pictures: int, iterations: int) -> Embeddings:
    """A table of the model itself, its σ searched for."""
    recipe = Recipe(steps=STEPS, rows="all", guidance=(cfg,), pictures=pictures, iterations=iterations)
    return searched_and_trained(seen, recipe, teacher_pairs(seen, pictures, cfg, 3003), teacher_pairs(seen, 128, cfg, 3004))


def row_of(errors: dict[str, torch.Tensor]) -> dict:
    """ratio: the base's table ÷ plain, with its interval; kept: the share of the own table's gain over plain that the base's has."""
    pooled = {name: summary(own)["pooled"] for name, own in errors.items()}
    row = dict(errors=pooled, ratio=[round(value, 4) for value in paired_bootstrap_ratio(errors[BASE], errors[PLAIN])])
    if OWN in errors:
        row["kept"] = round((pooled[PLAIN] - pooled[BASE]) / (pooled[PLAIN] - pooled[OWN]), 4)
    return row


def show(rows: dict[str, dict], prints: dict[str, float]) -> None:
    for name, value in prints.items():
        print(f"weights of {name} differ by {100 * value:.1f} %: {verdict(value)}")
    print(f"\n{'':40}" + " ".join(f"{name:>18}" for name in (PLAIN, BASE, OWN, "ratio", "kept")))
    for name, row in rows.items():
        numbers = [*(row["errors"].get(key) for key in (PLAIN, BASE, OWN)), row["ratio"][0], row.get("kept")]
        print(f"{name:40}" + " ".join(" " * 18 if value is None else f"{value:18.4f}" for value in numbers))
