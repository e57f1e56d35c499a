"""ComfyUI-MTEO: few-step sampling by per-step, per-layer time embeddings."""
WEB_DIRECTORY = "./web"

if __package__:  # a bare import (pytest collecting the root) registers nothing
    try:
        import comfy.samplers  # noqa: F401
    except ImportError:
        pass
    else:
        from .nodes import comfy_entrypoint

        __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
