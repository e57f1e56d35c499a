"""MTEO: offsets per step and per layer on what a frozen diffusion network takes in as time.

In the order of the data: `sites` -> `injection` -> `schedule`, `tableau` -> `teacher` -> `distill` -> `embeddings`; `metrics`.
Knows torch, safetensors and numpy; `mteo.comfyui` is the one part that knows ComfyUI.
"""
