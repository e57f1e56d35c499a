"""The pack's nodes: thin V3 schemas over `mteo.comfyui`."""
from comfy_api.latest import ComfyExtension

from .embeddings import ApplyEmbeddings, LoadEmbeddings, SaveEmbeddings
from .reference import LoadReferenceModel


class MTEOExtension(ComfyExtension):
    async def get_node_list(self):
        return [LoadEmbeddings, SaveEmbeddings, ApplyEmbeddings, LoadReferenceModel]


async def comfy_entrypoint():
    return MTEOExtension()
