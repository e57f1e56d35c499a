"""Load MTEO Reference Model: a small model that comes with the pack, for trying things without a download."""
from comfy_api.latest import io


class LoadReferenceModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MTEOLoadReferenceModel",
            display_name="Load MTEO Reference Model",
            category="MTEO",
            description='A small text-to-image model that comes with the pack: 64 px scenes of one or two things ("cat and apple").',
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=["unet", "mmdit"],
                    default="unet",
                    optional=True,
                    tooltip="unet: predicts noise, as SD 1.x does. mmdit: a transformer with flow matching, as SD 3 is.",
                ),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, kind="unet"):
        from ..reference.objects import make_clip, make_model, make_vae

        return io.NodeOutput(make_model(kind), make_clip(kind), make_vae(kind))
