"""Pictures of one's own model, in folders: a student's against the teacher's of the same prompts and noise (equal file names), and as a set against the
teacher's of other noise.

Error, spectrum and sliced Wasserstein distance are those of `quality`. FID and KID by torch-fidelity and LPIPS by torchmetrics, where their weights are in
torch's hub folder (TORCH_HOME), the CLIP score with a model's folder: nothing is fetched.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mteo.metrics import nrmse

from .distances import sliced_wasserstein, spectrum_gap

KINDS, PART = (".png", ".jpg", ".jpeg", ".webp"), 16
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's release v0.2.0
BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}  # torchvision's


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench pictures", description=__doc__)
    parser.add_argument("student", type=Path, help="folder of pictures, all of one size")
    parser.add_argument("--teacher", type=Path, help="the teacher's of the same prompts and noise, with the same file names: error, LPIPS")
    parser.add_argument(
        "--other", type=Path, help="the teacher's of other noise: spectrum, swd, FID, KID; sets of the same noise would be compared by their errors"
    )
    parser.add_argument("--prompts", type=Path, help="JSON {file name: prompt}: the CLIP score, with --clip")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP model as transformers saves one")
    parser.add_argument("--lpips", choices=list(BACKBONES), default="alex")
    told = parser.parse_args(arguments)
    if told.prompts and not told.clip:
        raise SystemExit("--prompts is for the CLIP score: give a CLIP model's folder with --clip.")
    student, weights, found = pictures_of(told.student), Path(torch.hub.get_dir()) / "checkpoints", {}
    made = stacked(student) if told.teacher or told.other else None
    if told.teacher:
        teacher = pictures_of(told.teacher)
        if missing := sorted(set(student) ^ set(teacher)):
            raise SystemExit(f"{told.student} and {told.teacher} must have pictures of the same names: {missing[0]} is in one of them only.")
        wanted = stacked(teacher)
        found |= {f"error {name}": value for name, value in nrmse(made, wanted).items()}
        if present(weights / BACKBONES[told.lpips], "LPIPS"):
            found["lpips"] = perceptual_distance(made, wanted, told.lpips)
    if told.other:
        other = stacked(pictures_of(told.other))
        count = min(len(made), len(other))
        found |= dict(spectrum=spectrum_gap(made, other), swd=float(np.mean(sliced_wasserstein(made[:count], other[:count]))))
        if present(weights / INCEPTION, "FID and KID"):
            found |= inception_distances(told.student, told.other, weights / INCEPTION, count)
    if told.prompts and present(told.clip, "the CLIP score"):
        prompts = json.loads(told.prompts.read_text())
        if missing := sorted(set(student) - set(prompts)):
            raise SystemExit(f"{told.prompts} has no prompt for {missing[0]}.")
        found["clip"] = clip_score(student, prompts, told.clip)
    return {name: round(value, 4) for name, value in found.items()} | {"pictures": len(student)}


def pictures_of(folder: Path) -> dict[str, torch.Tensor]:
    """File name -> picture [3, H, W] in -1..1, in the names' order."""
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in KINDS)
    if len(files) < 2:
        raise SystemExit(f"{folder} needs two or more pictures ({', '.join(KINDS)}).")
    return {file.name: torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1 for file in files}


def stacked(pictures: dict[str, torch.Tensor]) -> torch.Tensor:
    """[N, 3, H, W]"""
    first, *rest = pictures.items()
    for name, picture in rest:
        if picture.shape != first[1].shape:
            raise SystemExit(f"{name} has another size than {first[0]}: all pictures of a folder must have one.")
    return torch.stack(list(pictures.values()))


def present(weights: Path, measure: str) -> bool:
    """Whether they are there; says what is left out otherwise."""
    if not weights.exists():
        print(f"[bench] without {measure}: there is no {weights.name} in {weights.parent}", flush=True)
    return weights.exists()


def perceptual_distance(made: torch.Tensor, wanted: torch.Tensor, backbone: str) -> float:
    """LPIPS (Zhang et al. 2018), 0 = equal, mean over pictures [N, 3, H, W] in -1..1."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    measure = LearnedPerceptualImagePatchSimilarity(net_type=backbone)
    for one, two in zip(made.split(PART), wanted.split(PART), strict=True):
        measure.update(one, two)
    return float(measure.compute())


def inception_distances(student: Path, other: Path, weights: Path, count: int) -> dict[str, float]:
    """FID and KID (mean) of the files in two folders."""
    from torch_fidelity import calculate_metrics

    kept = calculate_metrics(
        input1=str(student),
        input2=str(other),
        fid=True,
        kid=True,
        kid_subset_size=min(1000, count),
        cuda=torch.cuda.is_available(),
        cache=False,
        verbose=False,
        feature_extractor_weights_path=str(weights),
        samples_find_ext=",".join(kind[1:] for kind in KINDS),
    )
    return dict(fid=float(kept["frechet_inception_distance"]), kid=float(kept["kernel_inception_distance_mean"]))


@torch.no_grad()
def clip_score(pictures: dict[str, torch.Tensor], prompts: dict[str, str], folder: Path) -> float:
    """100 · cosine of picture and prompt in CLIP, at least 0, mean over pictures (Hessel et al. 2021; torchmetrics 1.9 does not know what transformers 5
    answers)."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor, scores = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder), []
    for name, picture in pictures.items():
        inputs = processor(text=prompts[name], images=((picture + 1) * 127.5).round().byte(), return_tensors="pt", truncation=True)
        scores.append(float(model(**inputs).logits_per_image / model.logit_scale.exp()))
    return 100 * float(np.mean(np.maximum(scores, 0)))
