"""MTEO KSampler: the stock KSampler's inputs, the table's steps."""
from comfy_api.latest import io

from ..mteo.comfyui.sampling import sample_latent
from .apply import ADVANCED, off_grid_input, shared_inputs, steps_input, strength_input


class KSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MTEOKSampler",
            display_name="MTEO KSampler",
            category="MTEO",
            description="Sample in a few steps with MTEO embeddings: sampler and sigmas are the table's own.",
            inputs=[
                *shared_inputs(),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip="The random seed of the noise, as in KSampler."
                ),
                steps_input(),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance; 1 = none (twice as fast). Best within the range that the table was trained for.",
                ),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent, or with a table for image to image the latent of a picture: how much of it stays is the table's own.",
                ),
                strength_input(),
                io.Int.Input(
                    "start_step",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="0 = the table's first step. A later one needs another off_grid, and a table that learned nothing of its sampler; "
                    "for image to image use a table that was distilled with denoise below 1.",
                ),
                io.Int.Input(
                    "end_step", default=10000, min=1, max=10000, tooltip="Stop after this step; beyond the last step = sample to the end.", **ADVANCED
                ),
                io.Boolean.Input(
                    "add_noise",
                    default=True,
                    tooltip="Off: the latent is taken as it is, already noisy (a flow model's first step starts at pure noise and does not see it).",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "return_with_leftover_noise",
                    default=False,
                    tooltip="With an early end_step: on = the noisy latent, off = the model's estimate of the picture.",
                    **ADVANCED,
                ),
                off_grid_input(),
                io.Conditioning.Input("negative", optional=True, tooltip="What it should not show; needed where cfg is not 1."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, latent_image, **inputs):
        return io.NodeOutput(sample_latent(latent=latent_image, **inputs))
