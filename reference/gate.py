"""Is a reference model good enough to measure few steps on? python -m reference.gate --comfyui PATH --model unet|mmdit

A small classifier, trained on scenes that went through the linear VAE, reads the model's pictures; then diversity, copies and the
best plain 3-step error. Writes gate-MODEL.json and samples-MODEL.jpg beside this file. The classifier ships; where its file is missing this trains it anew.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mteo.precision import multiplies_bfloat16
from trainer.comfyui import find_root, open_comfyui

from . import latents, scenes
from .vocabulary import DRAWINGS

HERE = Path(__file__).parent
BOUNDS = {"recall": 0.80, "two_seeds": 0.5, "copies": 0.05, "plain_3_steps": 0.20}
CFGS = (1.0, 4.0)
PATCH = 8  # pixels on a side of what the classifier sees as one place
FEATURES = 64  # principal components of what its last layer reads


class Block(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = torch.nn.GroupNorm(8, width)
        self.one, self.two = torch.nn.Conv2d(width, width, 3, padding=1), torch.nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.two(F.silu(self.one(F.silu(self.norm(x)))))


class Classifier(torch.nn.Module):
    """Which drawings a latent [B, C, H, W] (equivalent to its decoded picture, of 8 × 8 patches of 8 pixels) holds: scores [B, drawings]; and the features that
    sets of pictures are compared by."""

    def __init__(self, kind: str, width: int = 160):
        super().__init__()
        patch, channels = latents.SHAPES[kind]
        self.fold = PATCH // patch
        self.first = torch.nn.Conv2d(channels * self.fold**2, width, 3, padding=1)
        self.blocks = torch.nn.Sequential(*(Block(width) for _ in range(4)))
        self.last = torch.nn.Linear(2 * width, len(DRAWINGS))
        self.register_buffer("middle", torch.zeros(2 * width))
        self.register_buffer("axes", torch.zeros(2 * width, FEATURES))

    def forward(self, x):
        return self.last(self.pooled(x))

    def pooled(self, x):
        """What the last layer reads [B, 2 · width]."""
        x = F.silu(self.blocks(self.first(F.pixel_unshuffle(x, self.fold))))
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)

    def features(self, x):
        """[B, FEATURES] float64; over the scenes that `measure_by` had, of mean 0 and mean variance 1."""
        return (self.pooled(x).double() - self.middle.double()) @ self.axes.double()

    def measure_by(self, scenes_made: torch.Tensor) -> None:
        """Features are the principal components over these latents [N, C, H, W]."""
        real = torch.cat([self.pooled(part) for part in scenes_made.split(500)]).double()
        variances, axes = torch.linalg.eigh(torch.cov(real.T))
        self.middle.copy_(real.mean(0))
        self.axes.copy_(axes[:, -FEATURES:] / variances[-FEATURES:].mean().sqrt())


def real(count: int, sprites, vae, pca, generator, unseen_pairs: bool = False):
    """(names [count, 2], latents of unit-like scale) of composed scenes."""
    names = scenes.draw_names(count, generator, unseen_pairs)
    raw = vae.encode(scenes.compose(names, sprites, generator))
    return names, latents.scaled(raw, pca)


def targets(names: torch.Tensor) -> torch.Tensor:
    """[B, drawings]: 1/n at each of the n named drawings."""
    hot = F.one_hot(names.clamp_min(0), len(DRAWINGS)).float() * (names >= 0)[..., None]
    return hot.sum(1) / (names >= 0).sum(1, keepdim=True)


def recognised(classifier, x: torch.Tensor, names: torch.Tensor) -> dict[str, float]:
    """Share of the named drawings among the n highest scores (n = how many are named), and of pictures with all of them."""
    with torch.no_grad():
        order = torch.cat([classifier(part) for part in x.split(256)]).argsort(1, descending=True)
    one = (order[:, :1] == names[:, :1]).any(1) | ((names[:, 1] >= 0) & (order[:, 1] == names[:, 0]))
    two = (order[:, :2] == names[:, 1:2]).any(1)
    named = 1 + (names[:, 1] >= 0).int()
    found = one.int() + (two & (names[:, 1] >= 0)).int()
    return {"recall": float(found.sum() / named.sum()), "whole": float((found == named).float().mean())}


def classifier_of(kind: str) -> Classifier:
    """The classifier that ships. FileNotFoundError where it does not."""
    if not (path := file_of(kind)).is_file():
        raise FileNotFoundError(f"{path.name} is missing beside the reference models; python -m reference.gate --model {kind} trains it anew.")
    classifier = Classifier(kind)
    classifier.load_state_dict(load_file(path))
    return classifier.eval()


def file_of(kind: str) -> Path:
    return HERE / "weights" / f"classifier-{kind}.safetensors"


def save_classifier(classifier: Classifier, kind: str, images: int) -> None:
    """Weights in float16, the features' axes in float32."""
    path, halves = file_of(kind), {name: value.detach().half() for name, value in classifier.named_parameters()}
    save_file(halves | dict(classifier.named_buffers()), path.with_suffix(".new"), {"license": "MIT", "images": str(images), "data": scenes.DATA})
    path.with_suffix(".new").replace(path)


def train_classifier(kind: str, images: int, sprites, vae, pca) -> Classifier:
    batch, generator = 128, torch.Generator().manual_seed(11)
    torch.manual_seed(0)
    classifier = Classifier(kind)
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=images // batch)
    for step in range(images // batch):
        names, x = real(batch, sprites, vae, pca, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()):
            scores = classifier(x)
        loss = -(targets(names) * scores.float().log_softmax(1)).sum(1).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 200 == 0:
            print(f"[gate] classifier {step * batch} of {images} images, loss {float(loss.detach()):.3f}", flush=True)
    generator.manual_seed(12)
    with torch.no_grad():
        classifier.half().float().measure_by(torch.cat([real(500, sprites, vae, pca, generator)[1] for _ in range(20)]))
    return classifier


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui")
    parser.add_argument("--model", choices=latents.SHAPES, default="unet")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--classifier-images", type=int, default=200_000)
    told = parser.parse_args(arguments)
    open_comfyui(find_root(told.comfyui))
    from safetensors import safe_open

    from bench.heldout import named
    from bench.parts import parts, teacher_pairs
    from mteo.sheet import sheet

    from .objects import make_vae, vae_numbers, weights_file

    pca = vae_numbers(told.model)
    sprites, vae, generator = scenes.load_sprites(), latents.LinearVAE(pca["basis"]), torch.Generator().manual_seed(12)
    if not file_of(told.model).is_file():
        save_classifier(train_classifier(told.model, told.classifier_images, sprites, vae, pca), told.model, told.classifier_images)
    classifier = classifier_of(told.model)
    names, held_out = real(2048, sprites, vae, pca, generator, unseen_pairs=True)
    with safe_open(weights_file(told.model), "pt") as file:
        images = int(file.get_tensor("images"))
    result = {"images": images, "pictures": told.pictures, "classifier_on_real_scenes": recognised(classifier, held_out, names)}
    _, training = real(20_000, sprites, vae, pca, generator)
    own = parts(21, told.pictures, True, told.model)
    names = scenes.draw_names(told.pictures, torch.Generator().manual_seed(21), True)
    for cfg in CFGS:
        one, two = teacher_pairs(own, told.pictures, cfg, 31), teacher_pairs(own, told.pictures // 4, cfg, 32)
        near = torch.cdist(one.end.flatten(1), training.flatten(1)).topk(2, largest=False).values
        plain = named(own, one.part(slice(0, 128)))
        apart = (one.end[: len(two)] - two.end).square().mean().sqrt() / one.end.std()
        best = min(value for grids in plain.values() for value in grids.values())
        result[f"cfg {cfg:g}"] = recognised(classifier, one.end, names) | dict(
            two_seeds=float(apart), copies=float((near[:, 0] / near[:, 1] < 1 / 3).float().mean()), plain_3_steps=best
        )
        print(f"[gate] cfg {cfg:g}: {result[f'cfg {cfg:g}']}", flush=True)
    judged = [result[f"cfg {cfg:g}"] for cfg in CFGS]
    result["passed"] = {name: all((own[name] <= bound) if name == "copies" else (own[name] >= bound) for own in judged) for name, bound in BOUNDS.items()}
    (HERE / f"gate-{told.model}.json").write_text(json.dumps(result, indent=1) + "\n")
    few = teacher_pairs(parts(22, 8, True, told.model), 32, 4.0, 33).end  # eight prompts, four seeds each
    with torch.inference_mode():
        pictures = make_vae(told.model).decode(latents.unscaled(few, pca))
    texts = scenes.prompts(scenes.draw_names(8, torch.Generator().manual_seed(22), True))
    sheet({f"seed {row}": pictures[8 * row : 8 * row + 8] for row in range(4)}, captions=texts).save(HERE / f"samples-{told.model}.jpg", quality=92)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
