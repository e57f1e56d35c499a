"""What a set of pictures of the reference model is measured by: errors to the teacher of the same noise, distances to its pictures of other noise."""
from dataclasses import dataclass

import comfy.model_management
import torch

from mteo.embeddings import tensor_hash
from mteo.metrics import nrmse, per_picture
from reference import gate, latents, scenes
from reference.objects import vae_numbers

from .distances import diversity, frechet, kernel_distance, precision_recall, sliced_wasserstein, spectrum_gap
from .intervals import Made

SEEDS = 8  # pictures of a prompt


@dataclass
class Judged:
    """What is kept of a set: its measures, and what their intervals are drawn from."""

    row: dict[str, float]
    made: Made


class Judge:
    """All measures of a set of end points [prompts · SEEDS, ...], prompts in turn, beside two such of the teacher, of the `same` noise and of `other`. fd is of
    real scenes' variance."""

    def __init__(self, kind: str, same: torch.Tensor, other: torch.Tensor):
        numbers = vae_numbers(kind)
        self.device = comfy.model_management.get_torch_device()
        self.vae, self.numbers = latents.LinearVAE(numbers["basis"]).to(self.device), numbers
        classifier = gate.classifier_of(kind)
        self.names = scenes.draw_names(len(same) // SEEDS, torch.Generator().manual_seed(5), True).repeat(SEEDS, 1)
        self.name = tensor_hash({name: value.detach() for name, value in classifier.named_parameters()})[2:14]  # distances by others are not to be compared
        self.classifier = classifier.to(self.device)
        self.same, other = same.to(self.device), other.to(self.device)
        self.other = dict(features=self.features(other), pictures=self.pictures(other), diversity=self.by_prompt(other))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[N, gate.FEATURES] float64; over real scenes of mean 0 and mean variance 1. On the judge's device, as everything here but what `judged` keeps."""
        with torch.no_grad():
            return torch.cat([self.classifier.features(part) for part in x.split(256)])

    def pictures(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] in -1..1."""
        return self.vae.decode(latents.unscaled(x, self.numbers))

    def by_prompt(self, x: torch.Tensor) -> float:
        """Diversity of a prompt's seeds."""
        return diversity(x.view(SEEDS, -1, *x.shape[1:]).transpose(0, 1).flatten(0, 1), SEEDS)

    def judged(self, ends: torch.Tensor) -> Judged:
        """All of a set on any device; on the processor, the features in float32."""
        features = self.features(ends.to(self.device))
        return Judged(self(ends, features), Made(features.float().cpu(), per_picture(ends, self.same.cpu()).square()))

    def __call__(self, made: torch.Tensor, features: torch.Tensor | None = None) -> dict[str, float]:
        """The measures of a set, whose features may be known."""
        made, other = made.to(self.device), self.other
        features, pictures = self.features(made) if features is None else features, self.pictures(made)
        precision, recall = precision_recall(features, other["features"])
        wasserstein = sliced_wasserstein(pictures, other["pictures"])
        return {f"error {name}": value for name, value in nrmse(made, self.same).items()} | dict(
            fd=frechet(features, other["features"]) / gate.FEATURES, kid=kernel_distance(features, other["features"]), swd=sum(wasserstein) / len(wasserstein),
            precision=precision, recall=recall, diversity=self.by_prompt(made) / other["diversity"], spectrum=spectrum_gap(pictures, other["pictures"]),
            accuracy=gate.recognised(self.classifier, made, self.names.to(self.device))["recall"])
