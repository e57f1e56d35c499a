"""`bench pictures` on folders of pictures: its own measures, and the libraries' with networks of random weights, read from where the real ones would be."""
import json
import os
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from bench import pictures


def write(folder, count: int, seed: int, shift: float = 0.0):
    """Blurred noise, some of it brighter by `shift`."""
    folder.mkdir()
    made = torch.nn.functional.interpolate(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), size=64, mode="bicubic") * 0.3 + shift
    for i, picture in enumerate(((made.clamp(-1, 1) + 1) * 127.5).byte()):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def hub(tmp_path):
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


def test_without_weights_the_own_measures_are_told(tmp_path, hub, capsys):
    teacher, other = write(tmp_path / "teacher", 8, 1), write(tmp_path / "other", 8, 2)
    same = pictures.run([str(teacher), "--teacher", str(teacher), "--other", str(other)])
    far = pictures.run([str(write(tmp_path / "student", 8, 1, 0.2)), "--teacher", str(teacher), "--other", str(other)])
    assert same["error pooled"] == 0 < far["error pooled"] and 0 < same["swd"] and same["pictures"] == 8
    assert not {"fid", "kid", "lpips"} & set(same) and "without FID and KID" in capsys.readouterr().out


def test_pictures_that_cannot_be_compared_are_named(tmp_path, hub):
    teacher, few = write(tmp_path / "teacher", 3, 1), write(tmp_path / "few", 2, 1)
    with pytest.raises(SystemExit, match="02.png is in one of them only"):
        pictures.run([str(few), "--teacher", str(teacher)])
    Image.new("RGB", (32, 32)).save(few / "01.png")
    with pytest.raises(SystemExit, match="01.png has another size than 00.png"):
        pictures.run([str(few), "--other", str(teacher)])
    with pytest.raises(SystemExit, match="needs two or more pictures"):
        pictures.run([str(tmp_path / "nowhere")])


def test_lpips_and_the_clip_score_are_the_libraries(tmp_path, hub):
    """Equal pictures have no distance; a prompt's score is 100 times the cosine that the model itself gives."""
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), hub / pictures.BACKBONES["squeeze"])
    config = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = CLIPModel(CLIPConfig(text_config=config, vision_config=config | dict(image_size=32, patch_size=16), projection_dim=16)).eval()
    with torch.no_grad():
        model.text_projection.weight.neg_()  # with these random weights both prompts would be below 0
    processor = CLIPProcessor(
        CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)),
        CLIPTokenizer.from_pretrained(Path(os.environ["COMFYUI_PATH"]) / "comfy" / "sd1_tokenizer"),
    )
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    teacher, student = write(tmp_path / "teacher", 2, 1), write(tmp_path / "student", 2, 1, 0.2)
    prompts = {"00.png": "a red cat", "01.png": "a tree"}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    told = ["--lpips", "squeeze", "--prompts", str(tmp_path / "prompts.json"), "--clip", str(tmp_path / "clip")]
    same, far = (pictures.run([str(folder), "--teacher", str(teacher), *told]) for folder in (teacher, student))
    assert same["lpips"] == 0 < far["lpips"]
    with torch.no_grad():
        inputs = processor(text=list(prompts.values()), images=[Image.open(teacher / name) for name in prompts], return_tensors="pt", padding=True)
        seen = model.vision_model(inputs["pixel_values"]).pooler_output, model.text_model(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        cosine = torch.cosine_similarity(model.visual_projection(seen[0]), model.text_projection(seen[1]))
    assert same["clip"] == pytest.approx(100 * float(cosine.clamp_min(0).mean()), abs=0.05) and cosine.max() > 0.01


def test_fid_is_the_distance_of_what_the_network_sees(tmp_path, hub, monkeypatch):
    torch.manual_seed(0)
    torch.save({}, tmp_path / "none.pth")
    with monkeypatch.context() as patched:
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], str(tmp_path / "none.pth"))
    torch.save(network.state_dict(), hub / pictures.INCEPTION)
    student, other = write(tmp_path / "student", 6, 1, 0.2), write(tmp_path / "other", 6, 2)
    found = pictures.run([str(student), "--other", str(other)])
    features = [network(((pictures.stacked(pictures.pictures_of(folder)) + 1) * 127.5).round().byte())[0] for folder in (student, other)]
    means, spreads = zip(*((one.double().mean(0), (one.double() - one.double().mean(0)) / 5**0.5) for one in features), strict=True)
    shared = torch.linalg.matrix_norm(spreads[0] @ spreads[1].T, "nuc")  # trace of (Σ_a Σ_b)^½, of six pictures each
    fid = float((means[0] - means[1]).square().sum() + sum(one.square().sum() for one in spreads) - 2 * shared)
    assert found["fid"] == pytest.approx(fid, rel=0.02, abs=1e-3) and "kid" in found
