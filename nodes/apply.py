"""Apply MTEO: MODEL, SAMPLER and SIGMAS that belong together."""
import inspect

from comfy_api.latest import io

from ..mteo.comfyui.sampling import applied
from .embeddings import MTEOEmbeddings

# Older ComfyUI (0.3.75) has no advanced inputs: there they are shown with the others.
ADVANCED = {"advanced": True} if "advanced" in inspect.signature(io.Int.Input.__init__).parameters else {}
POLICY_HELP = (
    "What to do on other sigmas than the trained ones. error = stop before sampling with a sentence; interpolate = blend the two rows around; "
    "nearest = take the nearest row; off = no check, rows act only on their own sigmas. The table's own SAMPLER runs on its own sigmas whatever is set here."
)


def shared_inputs() -> list:
    """Inputs that Apply and the KSampler have in common."""
    return [
        io.Model.Input("model", tooltip="The model that the table was distilled for, with any LoRA."),
        MTEOEmbeddings.Input("embeddings", tooltip="From Load MTEO Embeddings or Distill MTEO."),
    ]


def steps_input():
    return io.Int.Input("steps", default=0, min=0, max=64, tooltip="Number of steps, one that the file holds; 0 = the smallest that it holds.")


def strength_input():
    return io.Float.Input(
        "strength",
        default=1.0,
        min=0.0,
        max=2.0,
        step=0.01,
        tooltip="Of the offsets and the solver's corrections. 1 = as trained, more = stronger offsets, "
        "0 = the plain model; where the table learned its solver, on the sigmas that its search found, for all cfg values the same.",
    )


def off_grid_input():
    return io.Combo.Input("off_grid", options=["error", "interpolate", "nearest", "off"], default="error", tooltip=POLICY_HELP, **ADVANCED)


class ApplyEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MTEOApply",
            display_name="Apply MTEO",
            category="MTEO",
            description="Give the model its few-step time embeddings, with the sampler and the sigmas that they were trained for. "
            "Connect all three to SamplerCustom or SamplerCustomAdvanced.",
            inputs=[*shared_inputs(), steps_input(), strength_input(), off_grid_input()],
            outputs=[io.Model.Output(), io.Sampler.Output(), io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model, embeddings, steps, strength, off_grid):
        return io.NodeOutput(*applied(model, embeddings, steps, strength, off_grid))
