"""Are few-step pictures as good *as a set* as the teacher's? Every way of sampling at its number of evaluations, on unseen prompts.

The sets that are compared have other noise than the teacher's (but for the error, which is of the same noise), and the teacher's own
distance to itself is the floor: only what is above it counts (traps 35). Pictures of one prompt by several seeds show diversity.
"""
import argparse
import json
from pathlib import Path

import torch

from mteo.embeddings import load_embeddings
from mteo.metrics import nrmse
from mteo.tableau import euler_tableau, with_matrix
from reference import gate, latents, scenes
from reference.objects import vae_numbers, weights_file

from .distances import diversity, frechet, kernel_distance, precision_recall, sliced_wasserstein, spectrum_gap
from .heldout import CFGS, best_named, free_rival, named
from .parts import ends_of, name_of, named_grids, parts, solver_tableau, stage, teacher_pairs

ROOT = Path(__file__).resolve().parent.parent
FREE = "plain with free grid and rows, 3"
SEEDS, FEATURES = 8, 64  # pictures of a prompt; principal components of the classifier's features


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench quality", description=__doc__)
    parser.add_argument("--count", type=int, default=2048, help="pictures of a set")
    parser.add_argument("--validation", type=int, default=128, help="pairs on which plain solvers and grids are chosen")
    parser.add_argument("--budgets", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8, 10], help="evaluations (cfg 1) or pairs of them (cfg 4) of the best plain sampler")
    parser.add_argument("--table", type=Path, default=ROOT / "reference" / "tables" / "reference-3steps.safetensors")
    told = parser.parse_args(arguments)
    folder = ROOT / "runs" / "bench" / f"quality-{name_of(weights_file('unet'))}-{told.count}-{told.validation}"
    own, choosing = parts(5, told.count // SEEDS, True), parts(6, told.validation, True)
    judge, embeddings, result = Judge(told.count // SEEDS), load_embeddings(told.table), {}
    for cfg in CFGS:
        sets = made_by(folder, own, choosing, told, embeddings, cfg)
        judge.against(sets["teacher"], sets.pop("teacher, other noise"))
        result[f"cfg {cfg:g}"] = {name: stage(folder, f"judged-{name.replace('/', ' ')}-{cfg:g}-{name_of(told.table)}", judge, ends) for name, ends in sets.items()}
    show(result)
    summary = keys_of(result, told.budgets)
    out = Path(__file__).parent / "results" / "quality-unet.json"
    out.write_text(json.dumps(dict(weights=name_of(weights_file("unet")), count=told.count, **summary, rows=result), indent=1) + "\n")
    return summary


def made_by(folder: Path, own, choosing, told, embeddings, cfg: float) -> dict[str, torch.Tensor]:
    """Name -> end points [count, ...]; all but "teacher, other noise" from the same noise."""
    pairs = stage(folder, f"teacher-{cfg:g}", teacher_pairs, own, told.count, cfg, 2001)
    other = stage(folder, f"teacher-other-{cfg:g}", teacher_pairs, own, told.count, cfg, 2002)
    validation = stage(folder, f"validation-{cfg:g}", teacher_pairs, choosing, told.validation, cfg, 2003)
    sets, sampling = {"teacher": pairs.end, "teacher, other noise": other.end}, own.model.get_model_object("model_sampling")
    for steps in told.budgets:
        solver, grid = best_named(stage(folder, f"named-{steps}-{cfg:g}", named, choosing, validation, steps))
        tableau = solver_tableau(solver, named_grids(sampling, steps)[grid], sampling)
        sets[f"plain {steps}, {solver}/{grid}"] = stage(folder, f"plain-{steps}-{cfg:g}", ends_of, own, pairs, tableau)
    sigmas, matrix = stage(folder, f"free-{cfg:g}", free_rival, choosing, validation, min(64, told.validation))["grid, all rows"]
    sets[FREE] = stage(folder, f"plain-free-{cfg:g}", ends_of, own, pairs, with_matrix(euler_tableau(torch.tensor([*sigmas, 0.0])), matrix))
    sets["MTEO 3"] = stage(folder, f"mteo-{cfg:g}-{name_of(told.table)}", ends_of, own, pairs, embeddings.tables[3].tableau_at(cfg), embeddings)
    return sets


class Judge:
    """All measures of a set of end points [prompts · SEEDS, ...], prompts in turn, as `against` says. fd is of real scenes' variance."""

    def __init__(self, prompts: int):
        numbers = vae_numbers("unet")
        self.vae, self.numbers = latents.LinearVAE(numbers["basis"]), numbers
        sprites, generator = scenes.load_sprites(), torch.Generator().manual_seed(12)
        self.classifier = gate.train_classifier(200_000, sprites, self.vae, numbers, gate.CLASSIFIER)
        self.names = scenes.draw_names(prompts, torch.Generator().manual_seed(5), True).repeat(SEEDS, 1)
        real = torch.cat([self.pooled(gate.real(500, sprites, self.vae, numbers, generator)[1]) for _ in range(20)])
        self.middle = real.mean(0)
        variances, axes = torch.linalg.eigh(torch.cov(real.T))
        self.axes = axes[:, -FEATURES:] / variances[-FEATURES:].mean().sqrt()

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """What the classifier's last layer reads [N, width], float64."""
        kept = []
        handle = self.classifier.last.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0].double()))
        with torch.no_grad():
            for part in x.split(256):
                self.classifier(part)
        handle.remove()
        return torch.cat(kept)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[N, FEATURES] float64; over real scenes of mean 0 and mean variance 1."""
        return (self.pooled(x) - self.middle) @ self.axes

    def pictures(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] in -1..1."""
        return self.vae.decode(latents.unscaled(x, self.numbers))

    def by_prompt(self, x: torch.Tensor) -> float:
        """Diversity of a prompt's seeds."""
        return diversity(x.view(SEEDS, -1, *x.shape[1:]).transpose(0, 1).flatten(0, 1), SEEDS)

    def against(self, same: torch.Tensor, other: torch.Tensor) -> None:
        """From now on sets are compared with these of the teacher: of the same noise, and of other noise."""
        self.same, self.other = same, dict(features=self.features(other), pictures=self.pictures(other), diversity=self.by_prompt(other))

    def __call__(self, made: torch.Tensor) -> dict[str, float]:
        features, pictures, other = self.features(made), self.pictures(made), self.other
        precision, recall = precision_recall(features, other["features"])
        wasserstein = sliced_wasserstein(pictures, other["pictures"])
        return {f"error {name}": value for name, value in nrmse(made, self.same).items()} | dict(
            fd=frechet(features, other["features"]) / FEATURES, kid=kernel_distance(features, other["features"]), swd=sum(wasserstein) / len(wasserstein),
            precision=precision, recall=recall, diversity=self.by_prompt(made) / other["diversity"], spectrum=spectrum_gap(pictures, other["pictures"]),
            accuracy=gate.recognised(self.classifier, made, self.names)["recall"])


def keys_of(result: dict, budgets: list[int]) -> dict:
    """The worse cfg of each: recall ÷ the teacher's, spectrum and diversity of MTEO, and the largest number of plain evaluations that it is not behind in Fréchet distance (0: of none)."""
    keys = {}
    for cfg, rows in result.items():
        mteo, teacher = rows["MTEO 3"], rows["teacher"]
        plain = {steps: next(row["fd"] for name, row in rows.items() if name.startswith(f"plain {steps}, ")) for steps in budgets}
        keys[cfg] = dict(plain_steps_matched=max((steps for steps, fd in plain.items() if fd >= mteo["fd"]), default=0), diversity=mteo["diversity"] / teacher["diversity"],
                         recall=mteo["recall"] / teacher["recall"], spectrum=mteo["spectrum"], fd=mteo["fd"], fd_floor=teacher["fd"], fd_plain_3=plain.get(3), fd_free_3=rows[FREE]["fd"])
    worst = {name: (max if name == "spectrum" else min)(own[name] for own in keys.values()) for name in ("plain_steps_matched", "diversity", "recall", "spectrum")}
    return {name: round(value, 4) for name, value in worst.items()} | {"by_cfg": {cfg: {name: value if value is None else round(value, 4) for name, value in own.items()} for cfg, own in keys.items()}}


def show(result: dict) -> None:
    for cfg, rows in result.items():
        print(f"\n{cfg}" + " " * 36 + " ".join(f"{name:>13}" for name in rows["teacher"]))
        for name, row in rows.items():
            print(f"  {name:40} " + " ".join(f"{value:13.4f}" for value in row.values()))
