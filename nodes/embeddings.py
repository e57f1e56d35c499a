"""Load, save and apply MTEO embeddings."""
from pathlib import Path

import comfy.samplers
import folder_paths
import torch
from comfy_api.latest import io

from ..mteo.comfyui.patch import apply_embeddings
from ..mteo.comfyui.solver import tableau_sampler
from ..mteo.embeddings import load_embeddings, save_embeddings

FOLDER = "mteo"
MTEOEmbeddings = io.Custom("MTEO_EMBEDDINGS")

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")
Path(folder_paths.models_dir, FOLDER).mkdir(parents=True, exist_ok=True)


class LoadEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = folder_paths.get_filename_list(FOLDER)
        return io.Schema(
            node_id="MTEOLoadEmbeddings",
            display_name="Load MTEO Embeddings",
            category="MTEO",
            description="Read a table of time embeddings from models/mteo.",
            inputs=[io.Combo.Input("embeddings_name", options=files, tooltip="A .safetensors file in models/mteo. Where the list is empty, put a table there or distil one.")],
            outputs=[MTEOEmbeddings.Output(display_name="embeddings")],
        )

    @classmethod
    def fingerprint_inputs(cls, embeddings_name):
        facts = Path(folder_paths.get_full_path_or_raise(FOLDER, embeddings_name)).stat()
        return f"{facts.st_mtime_ns}-{facts.st_size}"

    @classmethod
    def execute(cls, embeddings_name):
        return io.NodeOutput(load_embeddings(folder_paths.get_full_path_or_raise(FOLDER, embeddings_name)))


class SaveEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MTEOSaveEmbeddings",
            display_name="Save MTEO Embeddings",
            category="MTEO",
            description="Write a table of time embeddings to models/mteo, where Load MTEO Embeddings finds it.",
            inputs=[
                MTEOEmbeddings.Input("embeddings"),
                io.String.Input("filename_prefix", default="mteo", tooltip="Name of the file; a number follows, nothing is overwritten."),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, embeddings, filename_prefix):
        folder = folder_paths.get_folder_paths(FOLDER)[0]
        target, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, folder)
        save_embeddings(embeddings, Path(target) / f"{name}_{counter:05}_.safetensors")
        return io.NodeOutput()


class ApplyEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MTEOApply",
            display_name="Apply MTEO",
            category="MTEO",
            description="Give the model its few-step time embeddings, with the sampler and the sigmas that they were trained for. "
            "Connect all three to SamplerCustom or SamplerCustomAdvanced.",
            inputs=[
                io.Model.Input("model"),
                MTEOEmbeddings.Input("embeddings"),
                io.Int.Input("steps", default=0, min=0, max=64, tooltip="Number of steps; 0 = the smallest that the file holds."),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.01, tooltip="1 = as trained, 0 = the plain model with the plain sampler on the same sigmas."),
            ],
            outputs=[io.Model.Output(), io.Sampler.Output(), io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model, embeddings, steps, strength):
        patched, table = apply_embeddings(model, embeddings, steps, strength)
        corrected = table.corrected and strength > 0
        sampler = tableau_sampler(table.tableau) if corrected else comfy.samplers.sampler_object(table.solver)
        return io.NodeOutput(patched, sampler, torch.tensor(table.sigmas))
