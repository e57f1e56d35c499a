"""Say before a training what rows, grid and offsets can give a model, and which layers matter; with --table, where a trained table's error is left."""
from pathlib import Path

from . import config
from .comfyui import empty_latent, encode, find_root, load, open_comfyui
from .config import read_run
from .report import Bars


def add_flags(parser) -> None:
    config.add_flags(parser)
    parser.add_argument(
        "--trajectories",
        type=int,
        default=128,
        help="of the teacher, to measure on; with more of them the share of the offsets gets nearer to what a training reaches",
    )
    parser.add_argument("--table", help="a trained table for the recipe's steps")


def run(options) -> None:
    told = read_run(options)
    open_comfyui(find_root(options.comfyui))
    import torch

    from mteo.comfyui.diagnosis import diagnose_model
    from mteo.embeddings import load_embeddings

    embeddings = load_embeddings(Path(options.table)) if options.table else None
    with torch.inference_mode():
        model, clip, _ = load(told.model)
        bars = Bars()
        try:
            found = diagnose_model(
                model,
                [encode(clip, text) for text in told.prompts],
                encode(clip, told.negative),
                empty_latent(model, told.width, told.height),
                told.recipe,
                options.trajectories,
                embeddings,
                bars,
            )
        finally:
            bars.close()
    for diagnosis in found:
        print("\n".join(lines_of(diagnosis)))


def lines_of(diagnosis) -> list[str]:
    """Lines of text."""
    lines = [
        f"cfg {diagnosis.cfg:g}: error of {len(diagnosis.errors)} ways "
        f"(0 = the teacher's picture; the teacher against twice its steps: {diagnosis.teacher:.4f})"
    ]
    lines += [f"  {error:.4f}  {name}" for name, error in diagnosis.errors.items()]
    lines.append(
        f"  offsets, and coefficients where they are learned, remove at least {diagnosis.offsets:.0%} of the squared error that the plain ways leave; "
        "of that, by layer:"
    )
    lines += [f"  {share:6.1%}  {site}" for site, share in sorted(diagnosis.sites.items(), key=lambda entry: -entry[1])]
    if diagnosis.table is not None:
        lines.append(f"  the table: error {diagnosis.table:.4f}, it removed {diagnosis.achieved:.0%}")
        lines.append("  error of its states: " + ", ".join(f"{error:.4f} at sigma {sigma:.3g}" for sigma, error in diagnosis.states.items()))
        lines.append("  error by frequency ÷ the teacher's energy, low to high: " + ", ".join(f"{share:.3f}" for share in diagnosis.bands))
    return lines
