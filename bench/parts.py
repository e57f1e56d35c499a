"""What the benches share: the reference model with prompts, teacher pairs, and samplers run as tables with their calls remembered."""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import comfy.model_sampling
import comfy.samplers
import torch

from mteo.coefficients import moves_sigmas
from mteo.comfyui.session import is_flow, private_copy, run_session, training_mode
from mteo.comfyui.solver import read_tableau
from mteo.comfyui.training import denoise_of, refined_of, start_sigma, starts, teacher_sigmas, teacher_tableau, trained, untrained_table, with_table
from mteo.embeddings import Embeddings
from mteo.gridsearch import SEARCHED, Plain, search_grid
from mteo.recipe import Recipe
from mteo.tableau import Tableau, execute
from mteo.teacher import Trajectories, follow
from reference.objects import make_clip, make_model
from reference.scenes import SIZE, draw_names, prompts
from trainer.comfyui import empty_latent, encode

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BATCH = 512 if torch.cuda.is_available() else 64  # pictures that are evaluated together where nothing is learned
TEACHER_STEPS = 24
SHIFTS = (1.0, 1.7, 6.0)  # SD3's own is 3


@dataclass
class Parts:
    """The model and its conditions; `positives` hold one prompt each."""

    model: object
    positives: list
    negative: object
    latent: torch.Tensor

    def session(self, work, embeddings: Embeddings | None = None):
        """work(session), with a table on the model where one is given; gradients are on. Pictures are on the processor, whatever the network computes on."""

        def on_processor(session):
            session.keep_on(torch.device("cpu"))
            return work(session)

        with training_mode():
            private = private_copy(self.model)
            if embeddings is not None:
                private, _ = with_table(private, embeddings)
            return run_session(private, self.positives, self.negative, self.latent, on_processor)


def parts(prompt_seed: int, count: int, unseen_pairs: bool, kind: str = "unet") -> Parts:
    """The reference model of that kind with `count` prompts; unseen_pairs: of drawings that its training never saw together."""
    with torch.inference_mode():
        return parts_of(make_model(kind), make_clip(kind), prompts(draw_names(count, torch.Generator().manual_seed(prompt_seed), unseen_pairs)))


def parts_of(model, clip, texts: list[str], size: int = SIZE) -> Parts:
    """A model with these prompts, for pictures of size × size pixels."""
    with torch.inference_mode():
        return Parts(model, [encode(clip, text) for text in texts], encode(clip, ""), empty_latent(model, size, size))


def table_file(kind: str) -> Path:
    """The table of the reference model that comes with the pack."""
    return ROOT / "reference" / "tables" / {"unet": "reference-3steps.safetensors", "mmdit": "reference-mmdit-3steps.safetensors"}[kind]


def guided_table_file(kind: str) -> Path:
    """The one that guides in some steps only."""
    return ROOT / "reference" / "tables" / {"unet": "reference-4steps-guided-1-3.safetensors", "mmdit": "reference-mmdit-4steps-guided-1-3.safetensors"}[kind]


def name_of(file: Path) -> str:
    """A short name of a file's content: what was made from another one has another name."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def write_result(name: str, value: dict) -> None:
    """bench/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")


def rows_before(name: str, about: dict) -> dict:
    """The rows of bench/results/NAME.json, if they are of the same weights and numbers."""
    file = RESULTS / f"{name}.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    return before["rows"] if all(before.get(key) == value for key, value in about.items()) else {}


def error_line(name: str, errors: dict[str, float]) -> str:
    """A row of errors for the terminal."""
    return f"{name:44}" + "  ".join(f"{key} {value:.4f}" for key, value in errors.items())


def rounded(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Rows of errors as a result file has them."""
    return {name: {key: round(value, 4) for key, value in row.items()} for name, row in rows.items()}


def stage(folder: Path, name: str, make, *arguments):
    """make(*arguments), or what an earlier run of the same stage wrote."""
    path = folder / f"{name}.pt"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        value = make(*arguments)
        torch.save(value, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        print(f"[bench] {name}", flush=True)
    return torch.load(path, weights_only=False)


def batched(session, pairs: Trajectories, alone=()):
    """denoise(x, call, sigma) over all pairs in batches, without gradient; the calls `alone` ask for the prompt alone."""
    one = denoise_of(session, alone)

    def denoise(x, call, sigma):
        with torch.no_grad():
            return torch.cat([one(x[i : i + BATCH], call, sigma, pairs.part(slice(i, i + BATCH))) for i in range(0, len(x), BATCH)])

    return denoise


def teacher_pairs(
    own: Parts, count: int, cfg: float, seed: int, steps: int = TEACHER_STEPS, through: tuple[float, ...] = (), denoise: float = 1.0
) -> Trajectories:
    """Starts, the teacher's states at the inner σ of a grid `through` (none: no states) and its end points: prompts in turn, noise by `seed`."""

    def work(session):
        place, guidance = torch.arange(count), torch.full((count,), cfg, dtype=torch.float64)
        item = place % len(own.positives)
        recipe = Recipe(denoise=denoise)
        sigma = start_sigma(session.sampling, recipe)
        start = starts(session, recipe, torch.tensor(sigma), place, item, guidance, len(own.positives), seed)
        sigmas = refined_of(session, through, steps) if through else teacher_sigmas(session, steps, sigma)
        states, end = follow(teacher_tableau(session, sigmas), batched(session, Trajectories(start, start[:, :0], start, item, guidance)), start, through)
        return Trajectories(start, states, end, item, guidance)

    return own.session(work)


def untrained(seen: Parts, recipe: Recipe, tableau: Tableau) -> Embeddings:
    """Zero offsets for a solver's table; the recipe says of how many steps and where they act."""
    table = untrained_table(
        seen.model.model.diffusion_model,
        seen.model.get_model_object("model_sampling"),
        recipe.space,
        tableau.schedule.float(),
        recipe.solver,
        tableau,
        recipe.guided,
    )
    return Embeddings({recipe.steps: table}, recipe.space)


def train_embeddings(seen: Parts, recipe: Recipe, tableau: Tableau, train: Trajectories, held_out: Trajectories, tell=lambda state, line: None) -> Embeddings:
    """A table trained from zero offsets on pairs of the recipe's one cfg."""
    zero = untrained(seen, recipe, tableau)
    table = seen.session(lambda session: trained(session, session.patch, recipe, recipe.guidance[0], train, held_out, None, tell), zero)
    return Embeddings({recipe.steps: table}, recipe.space)


def searched_start(seen: Parts, recipe: Recipe, held_out: Trajectories) -> Tableau:
    """σ and last row by a search on the plain model."""

    def work(session):
        plain = calls_of(session, held_out.part(slice(0, SEARCHED)), recipe.alone)
        return search_grid([plain], recipe.steps, float(session.sampling.sigma_max), session.flow, rough=moves_sigmas(recipe, recipe.steps))[0]

    return seen.session(work)


def searched_and_trained(seen: Parts, recipe: Recipe, train: Trajectories, held_out: Trajectories) -> Embeddings:
    """As `distill_model` goes about it: the search, then the offsets."""
    return train_embeddings(seen, recipe, searched_start(seen, recipe, held_out), train, held_out)


def ends_of(own: Parts, pairs: Trajectories, tableau: Tableau, embeddings: Embeddings | None = None) -> torch.Tensor:
    """End points of the pairs' starts by a solver's table, with a table of embeddings on the model where one is given."""

    def work(session):
        if session.patch:
            session.patch.at(float(pairs.guidance[0]))
        return execute(tableau, batched(session, pairs, session.patch.table.alone if session.patch else ()), pairs.start)

    return own.session(work, embeddings)


def calls_of(session, pairs: Trajectories, alone=()) -> Plain:
    """Samplers run on these pairs as tables, their calls remembered."""
    return Plain(lambda x, call, sigma, part: batched(session, part, alone)(x, call, sigma), pairs)


def named_grids(sampling, steps: int) -> dict[str, torch.Tensor]:
    """[steps + 1] σ by name: ComfyUI's schedulers, Align Your Steps and GITS, or for a flow model even steps with a shift of less and of more than its own; all
    start at the model's sigma_max. A grid that drops a step is left out."""
    grids = {
        name: comfy.samplers.calculate_sigmas(sampling, name, steps)
        for name in ("normal", "simple", "karras", "exponential", "sgm_uniform", "beta", "kl_optimal")
    }
    if is_flow(sampling):
        even = torch.linspace(1, 0, steps + 1)
        grids |= {f"shift {shift:g}": comfy.model_sampling.time_snr_shift(shift, even) for shift in SHIFTS}
    else:
        from comfy_extras.nodes_align_your_steps import AlignYourStepsScheduler
        from comfy_extras.nodes_gits import GITSScheduler

        grids["AYS"] = AlignYourStepsScheduler.execute("SD1", steps, 1.0).result[0]
        grids["GITS"] = GITSScheduler.execute(1.20, steps, 1.0).result[0]
    for sigmas in grids.values():
        sigmas[0] = sampling.sigma_max
    return {name: sigmas.float() for name, sigmas in grids.items() if len(sigmas) == steps + 1}


def solver_tableau(name: str, sigmas: torch.Tensor, sampling) -> Tableau:
    return read_tableau(comfy.samplers.sampler_object(name), sigmas, sampling, name)
