"""The headless trainer as a command: what it writes, that it is the node's distillation, and what it says of bad input."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
model = "reference"
prompts = ["cat and apple", "car"]
width = 64
height = 64

[recipe]
guidance = [1.0, 4.0]
pictures = 16
held_out = 16
teacher_steps = 6
iterations = 4
batch = 8
validate_every = 2
"""


def trainer(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "trainer", "--comfyui", os.environ["COMFYUI_PATH"], *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def done(comfyui_root, tmp_path_factory):
    place = tmp_path_factory.mktemp("trainer")
    (place / "run.toml").write_text(CONFIG)
    told = trainer("distill", place / "run.toml", "--folder", place / "run")
    assert told.returncode == 0, told.stderr[-3000:]
    return place, told


def test_a_run_leaves_its_settings_log_plot_and_sheets(done):
    run, told = done[0] / "run", done[1]
    assert "held-out error" in told.stdout and "training" in told.stderr
    assert json.loads((run / "run.json").read_text())["recipe"]["pictures"] == 16
    for number in (0, 1):
        assert [json.loads(line)["iteration"] for line in (run / f"log-{number}.jsonl").read_text().splitlines()] == [0, 2, 4]
    assert Image.open(run / "loss.png").width > 300 and Image.open(run / "sheet.png").height > 300
    assert len(list((run / "previews").glob("*.png"))) == 6


def test_it_is_the_table_that_the_graph_makes(done, comfyui_root):
    """Same recipe, prompts and model in this process, as the node calls it."""
    with torch.inference_mode():
        import nodes
        from mteo.comfyui.training import distill_model
        from mteo.recipe import Recipe
        from reference.objects import make_clip, make_model

        clip = make_clip()
        encode = lambda text: nodes.CLIPTextEncode().encode(clip, text)[0]
        recipe = Recipe(guidance=(1.0, 4.0), pictures=16, held_out=16, teacher_steps=6, iterations=4, batch=8, validate_every=2)
        folder = done[0] / "graph"
        distill_model(make_model(), [encode("cat and apple"), encode("car")], encode(""), torch.zeros(1, 32, 8, 8), recipe, folder)
    assert (folder / "table.safetensors").read_bytes() == (done[0] / "run" / "table.safetensors").read_bytes()


def test_sample_and_inspect(done):
    table, picture = done[0] / "run" / "table.safetensors", done[0] / "cat.png"
    told = trainer("sample", table, "cat", "--width", 64, "--height", 64, "--cfg", 4, "--count", 2, "--out", picture)
    assert told.returncode == 0 and Image.open(picture).width > 200, told.stderr[-2000:]
    seen = trainer("inspect", table).stdout
    assert "3 steps of euler, rows learned" in seen and "middle_block.0.emb_layers.1" in seen
    small = done[0] / "small.png"
    Image.open(picture).crop((4, 40, 68, 104)).save(small)
    redraw = ROOT / "reference" / "tables" / "reference-3steps-denoise-0.6.safetensors"
    told = trainer("sample", redraw, "dog", "--image", small, "--count", 2, "--out", done[0] / "dog.png")
    assert told.returncode == 0 and Image.open(done[0] / "dog.png").width > 100, told.stderr[-2000:]
    assert "image to image at denoise 0.6" in trainer("inspect", redraw).stdout
    assert "cfg 1: calls told 7." in trainer("inspect", ROOT / "reference" / "tables" / "reference-3steps.safetensors").stdout


def test_comfyuis_nodes_are_imported_not_the_packs(comfyui_root):
    """From the project's root the pack's own `nodes` would come first [20]."""
    code = "import sys; sys.path.insert(0, ''); import trainer.comfyui as t; t.open_comfyui(t.find_root(sys.argv[1])); import nodes; assert nodes.KSampler"
    told = subprocess.run([sys.executable, "-c", code, str(comfyui_root)], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-1500:]


def test_it_runs_where_python_does_not_look_into_the_current_folder(done):
    """As ComfyUI's portable for Windows: `python -m trainer` is not found there."""
    told = subprocess.run([sys.executable, "-I", "trainer", "inspect", done[0] / "run" / "table.safetensors"], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0 and "3 steps" in told.stdout, told.stderr[-1500:]


def test_a_folder_of_a_refused_command_is_free_for_the_next_one(done, tmp_path):
    config = done[0] / "run.toml"
    assert "The grid sgm is not known" in trainer("distill", config, "--folder", tmp_path / "run", "--grid", "sgm").stderr
    told = trainer("distill", config, "--folder", tmp_path / "run", "--grid", "karras")
    assert told.returncode == 0 and json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["grid"] == "karras", told.stderr[-1500:]


def test_bad_input_gets_one_sentence(done, tmp_path):
    table = done[0] / "run" / "table.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(table.read_bytes()[:-50])
    (tmp_path / "wrong.toml").write_text(CONFIG.replace("pictures", "pictured"), encoding="utf-8-sig")  # as Windows' Notepad does
    (tmp_path / "ansi.txt").write_bytes("Bär".encode("cp1252"))
    (tmp_path / "words.txt").write_text("cat")
    (tmp_path / "kinds.toml").write_text("prompts = [1]")
    (tmp_path / "section.toml").write_text('recipe = 1\nprompts = ["cat"]')
    cases = [
        (("inspect", cut), "cut.safetensors cannot be read"),
        (("sample", table, "cat", "--steps", 5, "--width", 64, "--height", 64), "no table for 5 steps: they hold 3"),
        (("sample", table, "cat", "--model", tmp_path / "none.safetensors"), "none.safetensors is not there"),
        (("distill", tmp_path / "wrong.toml"), "no setting 'pictured'"),
        (("distill", tmp_path / "missing.toml"), "missing.toml cannot be read"),
        (("distill", "--prompts", tmp_path / "ansi.txt"), "ansi.txt is not UTF-8 text"),
        (("sample", table, "cat", "--image", cut, "--width", 64, "--height", 64), "cut.safetensors cannot be read"),
        (("distill", done[0] / "run.toml", "--folder", done[0] / "run", "--seed", 5), "belongs to a run with another recipe"),
        (("sample", table, "cat", "--out", tmp_path / "cat"), "cat is no name of a picture file"),
        (("distill", "--prompts", tmp_path / "words.txt", "--width", 0), "width is '0': give a whole number of pixels, 64 or more"),
        (("sample", table, "cat", "--width", 0), "width is 0: give a whole number of pixels, 64 or more"),
        (("sample", table, "cat", "--count", 0), "count is 0: give the number of pictures"),
        (("sample", table, "cat", "--out", cut / "cat.png"), "cut.safetensors"),
        (("distill", tmp_path / "kinds.toml"), "prompts: give a list of texts"),
        (("distill", tmp_path / "section.toml"), "make it a section, [recipe]"),
        (("diagnose", done[0] / "run.toml", "--denoise", 0.6, "--table", table), "The table starts at sigma 14.61, the recipe at"),
        (("distill", "--prompts", tmp_path / "words.txt", "--model", table), "table.safetensors is no checkpoint with a network and a VAE"),
    ]
    for arguments, sentence in cases:
        told = trainer(*arguments)
        assert told.returncode == 1 and told.stderr.strip().splitlines()[-1].startswith("mteo: ") and sentence in told.stderr, told.stderr[-1500:]
        assert "Traceback" not in told.stderr


def test_diagnose_says_what_can_be_gained_and_what_a_table_gained(done):
    place, _ = done
    told = trainer("diagnose", place / "run.toml", "--trajectories", 8, "--table", place / "run" / "table.safetensors")
    assert told.returncode == 0, told.stderr[-3000:]
    for said in ("cfg 1:", "cfg 4:", "plain euler, sgm_uniform", "remove at least", "middle_block.0.emb_layers.1", "the table: error", "at sigma 0"):
        assert said in told.stdout
    assert "nan" not in told.stdout
