"""Sample pictures with a table, through the same function as MTEO KSampler."""
from pathlib import Path

from PIL import Image

from mteo.errors import MTEOError

from .comfyui import empty_latent, encode, encode_image, find_root, load, open_comfyui
from .config import whole


def add_flags(parser) -> None:
    parser.add_argument("table", help="a .safetensors file of MTEO")
    parser.add_argument("prompt")
    parser.add_argument("--model", default="reference", help='"reference", "reference-mmdit" or a checkpoint file')
    parser.add_argument("--negative", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg", type=float, default=1.0, help="1 = no guidance")
    parser.add_argument("--steps", type=int, default=0, help="0 = the smallest number that the file holds")
    parser.add_argument("--strength", type=float, default=1.0, help="1 = as trained, 0 = the plain model")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--image", type=Path, help="the picture that a table for image to image starts from; it gives the size")
    parser.add_argument("--out", type=Path, default=Path("sample.png"))


def run(options) -> None:
    if options.out.suffix.lower() not in Image.registered_extensions():
        raise MTEOError(f"{options.out} is no name of a picture file: let it end on .png or .jpg.")
    width, height = whole("width", options.width), whole("height", options.height)
    if options.count < 1:
        raise MTEOError(f"count is {options.count}: give the number of pictures, 1 or more.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    open_comfyui(find_root(options.comfyui))
    import torch

    from mteo.comfyui.sampling import sample_latent
    from mteo.embeddings import load_embeddings
    from mteo.sheet import SIDES, sheet

    embeddings = load_embeddings(Path(options.table))
    with torch.inference_mode():
        model, clip, vae = load(options.model)
        latent = {"samples": empty_latent(model, width, height, options.count)}
        if options.image:
            latent["samples"] = encode_image(vae, options.image).expand(options.count, -1, -1, -1)
        made = sample_latent(
            model, embeddings, latent, options.seed, encode(clip, options.prompt), encode(clip, options.negative), options.steps, options.cfg, options.strength
        )
        sheet({"": vae.decode(made["samples"])}, max(SIDES[0], width), [options.prompt]).save(options.out)
    print(f"wrote {options.out}")
