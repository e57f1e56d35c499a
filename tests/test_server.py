"""The pack in ComfyUI's real server: its nodes are listed, a graph gives a picture, errors are sentences."""
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mteo.embeddings import Embeddings, Table, save_embeddings
from mteo.tableau import euler_tableau
from tests.server import Server

PACK = Path(__file__).resolve().parent.parent
SIGMAS = [14.614640, 3.0, 0.6, 0.0]


@pytest.fixture(scope="module")
def server(comfyui_root, tmp_path_factory):
    base = tmp_path_factory.mktemp("server")
    running = Server(comfyui_root, base, PACK)
    save_embeddings(embeddings("output_blocks.0.0.emb_layers.1"), base / "models" / "mteo" / "zero.safetensors")
    save_embeddings(embeddings("joint_blocks.0.x_block.adaLN_modulation.1"), base / "models" / "mteo" / "other.safetensors")
    yield running
    running.stop()


def embeddings(site):
    table = Table(3, SIGMAS, [999.0, 700.0, 300.0], "euler", euler_tableau(torch.tensor(SIGMAS)), {site: torch.zeros(3, 512)})
    return Embeddings({3: table}, "embedding", {"family": "unet"})


def graph(file):
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}
    return {
        "1": node("MTEOLoadReferenceModel"),
        "2": node("CLIPTextEncode", clip=["1", 1], text="cat and apple"),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "5": node("MTEOLoadEmbeddings", embeddings_name=file),
        "6": node("MTEOApply", model=["1", 0], embeddings=["5", 0], steps=0, strength=1.0),
        "7": node("SamplerCustom", model=["6", 0], add_noise=True, noise_seed=1, cfg=4.0, positive=["2", 0], negative=["3", 0], sampler=["6", 1], sigmas=["6", 2], latent_image=["4", 0]),
        "8": node("VAEDecode", samples=["7", 0], vae=["1", 2]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="test"),
    }


def message_of(entry):
    return next(detail["exception_message"] for kind, detail in entry["status"]["messages"] if kind == "execution_error")


def test_nodes_are_listed_with_their_tooltips(server):
    nodes = {name: about for name, about in json.loads(server.get("/object_info")).items() if name.startswith("MTEO")}
    assert set(nodes) >= {"MTEOLoadEmbeddings", "MTEOSaveEmbeddings", "MTEOApply", "MTEOLoadReferenceModel"}
    assert nodes["MTEOApply"]["output"] == ["MODEL", "SAMPLER", "SIGMAS"]
    assert "0 = the plain model" in nodes["MTEOApply"]["input"]["required"]["strength"][1]["tooltip"]


def test_a_graph_gives_a_picture_and_a_wrong_table_one_sentence(server):
    wrong = server.queue(graph("other.safetensors"))
    assert "another architecture" in message_of(wrong)
    entry = server.queue(graph("zero.safetensors"))
    assert entry["status"]["status_str"] == "success", message_of(entry)
    name = entry["outputs"]["9"]["images"][0]["filename"]
    picture = Image.open(io.BytesIO(server.get(f"/view?filename={name}")))
    assert picture.size == (64, 64) and len(picture.convert("RGB").getcolors(4096)) > 100


def test_another_schedule_is_refused_before_sampling_and_the_next_prompt_works(server):
    changed = graph("zero.safetensors")
    changed["10"] = {"class_type": "BasicScheduler", "inputs": {"model": ["1", 0], "scheduler": "karras", "steps": 3, "denoise": 1.0}}
    changed["7"]["inputs"]["sigmas"] = ["10", 0]
    assert "connect the SIGMAS output of Apply MTEO" in message_of(server.queue(changed))
    again = graph("zero.safetensors")
    again["7"]["inputs"]["noise_seed"] = 2
    assert server.queue(again)["status"]["status_str"] == "success"
