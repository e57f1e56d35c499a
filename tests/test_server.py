"""The pack in ComfyUI's real server: templates give pictures, previews arrive, errors are sentences, a cancel loses nothing."""
import copy
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mteo.embeddings import Embeddings, Table, save_embeddings
from mteo.tableau import euler_tableau
from tests.server import Server
from tests.templates import SCHEMA, SEEDS, WORKFLOWS, fields_of, schema, workflow

PACK = Path(__file__).resolve().parent.parent
SIGMAS = [14.614640, 3.0, 0.6, 0.0]
SITE = "output_blocks.0.0.emb_layers.1"


@pytest.fixture(scope="module")
def server(comfyui_root, tmp_path_factory):
    base = tmp_path_factory.mktemp("server")
    running = Server(comfyui_root, base, PACK)
    models = base / "models" / "mteo"
    save_embeddings(embeddings(SITE), models / "zero.safetensors")
    save_embeddings(embeddings(SITE, {"fingerprint": {SITE: [1.0] * 64}}), models / "model.safetensors")
    whole = (models / "zero.safetensors").read_bytes()
    (models / "cut.safetensors").write_bytes(whole[:-100])
    broken = embeddings(SITE)
    broken.tables[3].offsets[SITE][0, 1, 5] = float("nan")
    save_embeddings(broken, models / "nan.safetensors")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def objects(server):
    return json.loads(server.get("/object_info"))


def embeddings(site, model=None):
    from comfy.model_sampling import EPS, ModelSamplingDiscrete

    kind = type("Sampling", (ModelSamplingDiscrete, EPS), {})
    times = [float(kind().timestep(torch.tensor(sigma))) for sigma in SIGMAS[:-1]]
    return Embeddings(
        {3: Table(3, SIGMAS, times, "euler", euler_tableau(torch.tensor(SIGMAS)), [1.0], {site: torch.zeros(1, 3, 512)})},
        "embedding",
        {"family": "unet", **(model or {})},
    )


def api(name: str) -> dict:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())


def graph(template: str = "mteo_sample_3_steps", **changes) -> dict:
    """A sampling template, with some of its inputs changed: node__input=value."""
    changed = api(template)
    for name, value in changes.items():
        number, field = name.removeprefix("n").split("__")
        changed[number]["inputs"][field] = value
    return changed


def with_custom_sampler(**changes) -> dict:
    """The same through Apply MTEO and SamplerCustom."""
    changed = graph()
    changed["10"] = {"class_type": "MTEOApply", "inputs": {"model": ["1", 0], "embeddings": ["5", 0], "steps": 0, "strength": 1.0, "off_grid": "error"}}
    changed["6"] = {
        "class_type": "SamplerCustom",
        "inputs": dict(
            model=["10", 0],
            add_noise=True,
            noise_seed=7,
            cfg=4.0,
            positive=["2", 0],
            negative=["3", 0],
            sampler=["10", 1],
            sigmas=["10", 2],
            latent_image=["4", 0],
        )
        | changes,
    }
    changed["11"] = {"class_type": "BasicScheduler", "inputs": {"model": ["1", 0], "scheduler": "karras", "steps": 3, "denoise": 1.0}}
    changed["12"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "heun"}}
    return changed


def message_of(entry) -> str:
    if "refused" in entry:
        return json.dumps(entry["refused"])
    return next((detail["exception_message"] for kind, detail in entry["status"]["messages"] if kind == "execution_error"), "no error")


def pictures(server, entry, number: str) -> list:
    assert entry.get("status", {}).get("status_str") == "success", message_of(entry)
    return [Image.open(io.BytesIO(server.get(f"/view?filename={one['filename']}&subfolder={one['subfolder']}&type={one['type']}"))).convert("RGB")
            for one in entry["outputs"][number]["images"]]


def test_saved_graphs_keep_working(objects):
    """Inputs are only appended, outputs stay; tests/schema.json is what the last release had."""
    now = schema(objects)
    for name, before in json.loads(SCHEMA.read_text()).items():
        assert now[name]["inputs"][: len(before["inputs"])] == before["inputs"], name
        assert now[name]["outputs"] == before["outputs"], name


def test_every_input_has_a_tooltip(objects):
    for name, about in objects.items():
        if name.startswith("MTEO"):
            for field, _, options in fields_of(about):
                assert options.get("tooltip"), f"{name}.{field}"


def test_every_seed_says_whether_the_page_may_change_it(objects):
    """Left unsaid, the page adds its control to inputs of these names: saved values then shift by one, and each Run trains anew [18]."""
    told = {
        name: options.get("control_after_generate")
        for name, about in objects.items()
        if name.startswith("MTEO")
        for field, _, options in fields_of(about)
        if field in SEEDS
    }
    assert told == {"MTEOKSampler": True, "MTEODistill": False}


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_a_template_is_its_api_copy_and_has_a_picture(objects, path):
    assert json.loads(path.read_text()) == workflow(api(path.stem), objects)
    assert Image.open(path.with_suffix(".jpg")).width >= 256


@pytest.mark.parametrize("template", ["mteo_sample_3_steps", "mteo_sample_3_steps_mmdit", "mteo_sample_4_steps_two_guided"])
def test_a_sampling_template_gives_pictures_and_previews(server, template):
    entry, messages = server.watch(graph(template))
    made = pictures(server, entry, "9")
    assert len(made) == 4 and all(one.size == (256, 256) and len(one.getcolors(1 << 20)) > 1000 for one in made)
    previews = [message for message in messages if isinstance(message, bytes)]
    steps = [message["data"] for message in messages if isinstance(message, dict) and message["type"] == "progress"]
    total = int(template.split("_")[2])
    assert len(previews) == total and [step["value"] for step in steps] == list(range(1, total + 1))


def test_no_table_is_written_over_another(server):
    """Whatever the prefix: of one that ends in a slash ComfyUI counts no files."""
    load = lambda name: {"class_type": "MTEOLoadEmbeddings", "inputs": {"embeddings_name": name}}
    save = lambda prefix: {"class_type": "MTEOSaveEmbeddings", "inputs": {"embeddings": ["1", 0], "filename_prefix": prefix}}
    shipped = sorted(path.name for path in (PACK / "reference" / "tables").glob("reference-*.safetensors"))[:2]
    for prefix in ("mine/", "mine/own"):
        made = [server.queue({"1": load(name), "2": save(prefix)})["outputs"]["2"]["text"] for name in shipped]
        assert made[0] != made[1] and all((server.base / "models" / "mteo" / name).is_file() for name, in made)
    assert "filename_prefix is empty: give the file a name" in message_of(server.queue({"1": load(shipped[0]), "2": save("")}))


def test_the_ksampler_is_apply_with_a_custom_sampler(server):
    one = pictures(server, server.queue(graph(n6__seed=8)), "9")
    two = pictures(server, server.queue(with_custom_sampler(noise_seed=8)), "9")
    assert [a.tobytes() for a in one] == [b.tobytes() for b in two]


def test_distilling_in_a_graph_cancel_resume_and_compare(server):
    """Cancelled in training, then asked for again: the run folder goes on and the comparison comes out nearer to the teacher."""
    compare, stopped = api("mteo_distill_and_compare"), []

    def cancel_in_training(message):
        if isinstance(message, dict) and message["type"] == "progress" and message["data"]["value"] > 700 and not stopped:
            stopped.append(server.post("/interrupt", {}))

    entry, messages = server.watch(compare, cancel_in_training)
    assert stopped and any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert sum(isinstance(message, bytes) for message in messages) >= 2, "the student's picture is shown while it trains"
    folders = list((server.base / "output" / "mteo").iterdir())
    assert len(folders) == 1 and (folders[0] / "state-0.pt").is_file() and not (folders[0] / "table.safetensors").exists()
    assert list((folders[0] / "teacher").iterdir())

    sheet = pictures(server, server.queue(compare), "16")[0]
    assert list((server.base / "output" / "mteo").iterdir()) == folders and not (folders[0] / "teacher").exists(), "it is of no more use"
    assert (folders[0] / "table.safetensors").stat().st_size <= 200_000
    assert sorted((server.base / "models" / "mteo").glob("my_table*"))[0].read_bytes() == (folders[0] / "table.safetensors").read_bytes()
    teacher, plain, mteo = (torch.frombuffer(bytearray(sheet.crop((x, 0, x + 256, 256)).tobytes()), dtype=torch.uint8).float() for x in (0, 264, 528))
    assert sheet.size == (784, 256) and (mteo - teacher).square().mean() < (plain - teacher).square().mean()


ERRORS = {
    "another model": (dict(n5__embeddings_name="model.safetensors"), "distilled for another model"),
    "another architecture": (
        dict(n5__embeddings_name="reference-mmdit-3steps.safetensors"),
        "another architecture: the model has no layer final_layer.adaLN_modulation.1",
    ),
    "a truncated file": (dict(n5__embeddings_name="cut.safetensors"), "cut.safetensors cannot be read, it is cut off"),
    "a NaN": (dict(n5__embeddings_name="nan.safetensors"), f"nan.safetensors has values in 3.{SITE} that are not finite"),
    "steps that the file lacks": (dict(n6__steps=5), "no table for 5 steps: they hold 3"),
    "an untrained start": (dict(n6__start_step=1), "not trained for a start at step 1"),
    "a start after the end": (dict(n6__start_step=4), "start_step is 4: give a step from 0 to 2"),
    "cfg without a negative": (dict(n6__negative=None), "cfg is 4 but no negative is connected"),
    "a file that is not there": (dict(n5__embeddings_name="gone.safetensors"), "gone.safetensors"),
}


@pytest.mark.parametrize("changes, sentence", ERRORS.values(), ids=ERRORS)
def test_bad_input_gets_one_sentence_and_the_next_prompt_works(server, changes, sentence):
    wrong = graph(**changes)
    for node in wrong.values():
        node["inputs"] = {name: value for name, value in node["inputs"].items() if value is not None}
    assert sentence in message_of(server.queue(wrong))
    assert len(pictures(server, server.queue(graph(n6__seed=len(sentence))), "9")) == 4


def test_another_schedule_or_sampler_is_refused_before_sampling(server):
    assert "connect the SIGMAS output of Apply MTEO" in message_of(server.queue(with_custom_sampler(sigmas=["11", 0])))
    assert "The sampler heun is not the one this table was trained for, euler: connect the SAMPLER output" in message_of(
        server.queue(with_custom_sampler(sampler=["12", 0]))
    )
    assert len(pictures(server, server.queue(with_custom_sampler(noise_seed=8)), "9")) == 4


def test_off_grid_policies_sample_on_another_schedule(server):
    seen = set()
    for policy in ("interpolate", "nearest", "off"):
        changed = copy.deepcopy(with_custom_sampler(sigmas=["11", 0], sampler=["12", 0]))
        changed["10"]["inputs"]["off_grid"] = policy
        changed["11"]["inputs"]["scheduler"] = "sgm_uniform"  # has a sigma between two of the table's
        seen.add(pictures(server, server.queue(changed), "9")[0].tobytes())
    assert len(seen) == 3
