"""The pack's nodes: thin V3 schemas over `mteo.comfyui`."""
from comfy_api.latest import ComfyExtension

from .apply import ApplyEmbeddings
from .distill import DistillEmbeddings
from .embeddings import LoadEmbeddings, SaveEmbeddings
from .reference import LoadReferenceModel
from .sampler import KSampler


class MTEOExtension(ComfyExtension):
    async def get_node_list(self):
        return [LoadEmbeddings, ApplyEmbeddings, KSampler, DistillEmbeddings, SaveEmbeddings, LoadReferenceModel]


async def comfy_entrypoint():
    return MTEOExtension()
