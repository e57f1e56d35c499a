"""Load and save MTEO embeddings."""
import logging
from itertools import count
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..mteo.embeddings import load_embeddings, save_embeddings
from ..mteo.errors import MTEOError

FOLDER = "mteo"
MTEOEmbeddings = io.Custom("MTEO_EMBEDDINGS")

# models/mteo first, where Save writes; then the tables that come with the pack [21].
for place in (Path(folder_paths.models_dir, FOLDER), Path(__file__).resolve().parent.parent / "reference" / "tables"):
    folder_paths.add_model_folder_path(FOLDER, str(place))
folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")
try:
    Path(folder_paths.models_dir, FOLDER).mkdir(parents=True, exist_ok=True)
except OSError as error:
    logging.warning(f"MTEO: models/{FOLDER} cannot be made ({error.strerror}): the tables of the pack work, none can be saved.")


def find_file(name: str) -> Path:
    """The file of a name in the list; MTEOError says what to do where it is not there."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise MTEOError(
            f"{name} is not in models/mteo: put .safetensors files of MTEO there, or distil one with Distill MTEO, and press R to read the list anew."
        )
    return Path(path)


class LoadEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MTEOLoadEmbeddings",
            display_name="Load MTEO Embeddings",
            category="MTEO",
            description="Read a table of time embeddings from models/mteo, or one that comes with the pack.",
            inputs=[
                io.Combo.Input(
                    "embeddings_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A .safetensors file in models/mteo, or a table of the pack for its reference model. "
                    "Put tables for your own models into models/mteo, or distil one.",
                ),
            ],
            outputs=[MTEOEmbeddings.Output(display_name="embeddings")],
        )

    @classmethod
    def fingerprint_inputs(cls, embeddings_name):
        facts = find_file(embeddings_name).stat()
        return f"{facts.st_mtime_ns}-{facts.st_size}"

    @classmethod
    def execute(cls, embeddings_name):
        return io.NodeOutput(load_embeddings(find_file(embeddings_name)))


class SaveEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MTEOSaveEmbeddings",
            display_name="Save MTEO Embeddings",
            category="MTEO",
            description="Write a table of time embeddings to models/mteo, where Load MTEO Embeddings finds it.",
            inputs=[
                MTEOEmbeddings.Input("embeddings", tooltip="From Distill MTEO or Load MTEO Embeddings."),
                io.String.Input("filename_prefix", default="mteo", tooltip="Name of the file; a number follows, nothing is overwritten."),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, embeddings, filename_prefix):
        folder = folder_paths.get_folder_paths(FOLDER)[0]
        target, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, folder)
        if not Path(filename_prefix).name:
            raise MTEOError("filename_prefix is empty: give the file a name.")
        path = next(path for number in count(counter) if not (path := Path(target) / f"{name}_{number:05}_.safetensors").exists())
        save_embeddings(embeddings, path)
        return io.NodeOutput(ui={"text": [path.relative_to(folder).as_posix()]})
