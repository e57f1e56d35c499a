"""The templates that open in ComfyUI are made from their API copies: COMFYUI_PATH=… python -m tests.templates

An API copy says what is connected; the layout comes from how far a node is from the loaders, the widgets from the server's
/object_info, the pictures from running them. Writes workflows/*.json, workflows/*.jpg and tests/schema.json.
"""
import io
import json
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS, SCHEMA = ROOT / "workflows", Path(__file__).with_name("schema.json")
COLUMN, GAP, LINE, TALL = 340, 40, 24, 1000  # pixels of the canvas; a column takes nodes of the next depth up to TALL
GROWS = {"CLIPTextEncode": 60}  # texts, and below them pictures
GROWS |= dict.fromkeys(("SaveImage", "PreviewImage"), 260) | dict.fromkeys(("MTEODistill", "MTEOKSampler", "KSampler", "SamplerCustom"), 200)
SEEDS = ("seed", "noise_seed")


def is_link(value) -> bool:
    return isinstance(value, list)


def fields_of(about: dict):
    """(name, type or list of choices, options) of a node's inputs in the order of its widgets."""
    for section in ("required", "optional"):
        for name in about["input_order"].get(section, []):
            kind, *options = about["input"][section][name]
            yield name, kind, options[0] if options else {}


def depths(graph: dict) -> dict[str, int]:
    found: dict[str, int] = {}
    while len(found) < len(graph):
        for number, node in graph.items():
            before = [value[0] for value in node["inputs"].values() if is_link(value)]
            if all(other in found for other in before):
                found[number] = 1 + max((found[other] for other in before), default=-1)
    return found


def workflow(graph: dict, objects: dict) -> dict:
    """ComfyUI's saved form (version 0.4) of an API graph."""
    links, nodes, at, outputs = [], [], {}, {}
    depth, column, top, deepest = depths(graph), 0, 0, 0
    for order, (number, node) in enumerate(sorted(graph.items(), key=lambda entry: (depth[entry[0]], int(entry[0])))):
        about, inputs, widgets = objects[node["class_type"]], [], []
        for name, kind, options in fields_of(about):
            value = node["inputs"].get(name)
            is_widget = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
            shown = "COMBO" if isinstance(kind, list) else kind
            if is_widget:
                widgets.append(value if value is not None else options.get("default"))
                if kind == "INT" and options.get("control_after_generate", name in SEEDS):  # the page's own rule
                    widgets.append("fixed")
                inputs.append({"name": name, "type": shown, "widget": {"name": name}, "link": None})
            else:
                inputs.append({"name": name, "type": shown, "link": None})
            if is_link(value):
                source, slot = value
                links.append([len(links) + 1, int(source), slot, int(number), len(inputs) - 1, objects[graph[source]["class_type"]]["output"][slot]])
                inputs[-1]["link"] = len(links)
                outputs.setdefault((source, slot), []).append(len(links))
        height = 40 + LINE * (max(len([i for i in inputs if "widget" not in i]), len(about["output"])) + len(widgets)) + 16
        height += GROWS.get(node["class_type"], 0)
        if depth[number] > deepest and top + height > TALL:
            column, top = column + 1, 0
        deepest = depth[number]
        at[number] = len(nodes)
        nodes.append(
            {
                "id": int(number),
                "type": node["class_type"],
                "pos": [column * (COLUMN + GAP), top],
                "size": [COLUMN, height],
                "flags": {},
                "order": order,
                "mode": 0,
                "inputs": inputs,
                "outputs": [],
                "properties": {"Node name for S&R": node["class_type"]},
                "widgets_values": widgets,
                **({"title": node["_meta"]["title"]} if "_meta" in node else {}),
            }
        )
        top += height + 2 * GAP
    for number, node in graph.items():
        about = objects[node["class_type"]]
        nodes[at[number]]["outputs"] = [{"name": name, "type": kind, "slot_index": slot, "links": outputs.get((number, slot), [])}
                                        for slot, (name, kind) in enumerate(zip(about["output_name"], about["output"], strict=True))]
    return {
        "last_node_id": max(map(int, graph)),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def schema(objects: dict) -> dict:
    """What saved graphs rely on: names and order of inputs and outputs of the pack's nodes."""
    own = {name: about for name, about in sorted(objects.items()) if name.startswith("MTEO")}
    kind = lambda value: "COMBO" if isinstance(value, list) else value
    return {
        name: {
            "inputs": [[field, kind(value)] for field, value, _ in fields_of(about)],
            "outputs": [[a, b] for a, b in zip(about["output_name"], about["output"], strict=True)],
        }
        for name, about in own.items()
    }


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def picture(server, entry: dict) -> Image.Image:
    """What a template's SaveImage nodes made: four in a square, else side by side."""
    saved = [one for output in entry["outputs"].values() for one in output.get("images", []) if one["type"] == "output"]
    images = [Image.open(io.BytesIO(server.get(f"/view?filename={one['filename']}&subfolder={one['subfolder']}&type=output"))).convert("RGB") for one in saved]
    across = 2 if len(images) == 4 else len(images)
    wide, tall = max(image.width for image in images), max(image.height for image in images)
    strip = Image.new("RGB", (wide * across, tall * -(-len(images) // across)))
    for place, image in enumerate(images):
        strip.paste(image, (wide * (place % across), tall * (place // across)))
    return strip


def main() -> int:
    from tests.server import Server

    with tempfile.TemporaryDirectory() as base:
        server = Server(Path(os.environ["COMFYUI_PATH"]), Path(base) / "server", ROOT)
        try:
            objects = json.loads(server.get("/object_info"))
            write_json(SCHEMA, schema(objects))
            for copy in sorted((WORKFLOWS / "api").glob("*.json")):
                graph = json.loads(copy.read_text())
                write_json(WORKFLOWS / copy.name, workflow(graph, objects))
                picture(server, server.queue(graph)).save(WORKFLOWS / f"{copy.stem}.jpg", quality=90)
        finally:
            server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
