"""Two small diffusion models that were really trained: the embedded default, the benchmark and the demo.

The way of the data: `vocabulary.txt` -> `scenes` (drawings to pictures) -> `latents` (pictures to latents)
-> `network` (ComfyUI's own classes with small numbers) -> `train` -> `weights/` -> `objects` (MODEL, CLIP, VAE).
"""
