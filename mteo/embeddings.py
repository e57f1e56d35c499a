"""The table and its file: safetensors that anyone can read, several numbers of steps in one file."""
import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .errors import MTEOError
from .guided import ALL, Guided, alone_of, read_guided
from .schedule import SAME_SIGMA
from .sites import SPACES
from .tableau import Tableau, between, make_tableau

FORMAT = 5
STORED = torch.float16  # of the rows in a file: eleven binary digits of each number


@dataclass
class Table:
    """What was learned for one number of steps, at G cfg values; between them it is interpolated, beyond them the end one holds.

    sigmas: the schedule, K+1 values from the model's sigma_max, or of image to image one below it, to 0. timesteps: the model's timestep(σ) of each row [R].
    solver: a ComfyUI sampler's name with its options; tableau: its own coefficients, the first call at sigmas[0] or below it (`started_at`).
    guidance: the G cfg values, rising. offsets: site path -> [G, R, D].
    learned: the solver as sampled at each cfg value, with σ and coefficients of its own, None = `tableau` at all; then sigmas and tableau,
        whose σ and mean are the means of those that the search found, only say where in the schedule a call is, and what strength 0 is.
    record: how it was trained (JSON).
    guided: which rows, from 1, evaluate the cfg pair; at the others the prompt is evaluated alone, whatever the cfg.
    """

    steps: int
    sigmas: list[float]
    timesteps: list[float]
    solver: str
    tableau: Tableau
    guidance: list[float]
    offsets: dict[str, torch.Tensor]
    learned: list[Tableau] | None = None
    solver_options: dict = field(default_factory=dict)
    record: dict = field(default_factory=dict)
    guided: Guided = ALL

    @property
    def alone(self) -> list[int]:
        """The calls of the solver that evaluate the prompt alone."""
        return alone_of(self.guided, self.tableau.rows)

    @property
    def denoise(self) -> float:
        """1 = samplings start from noise; below it from a picture with noise on it."""
        return self.record.get("recipe", {}).get("denoise", 1.0)

    def shares(self, cfg: float) -> torch.Tensor:
        """[G], sum 1: how much of each trained cfg value is in force at `cfg`, linear between neighbours in cfg ÷ (1 + cfg); 1 at a trained value. Linear in
        cfg is up to a fifth worse (docs/ablations.md)."""
        place = lambda value: np.divide(value, np.add(value, 1))
        return torch.tensor([np.interp(place(cfg), place(self.guidance), one) for one in np.eye(len(self.guidance))], dtype=torch.float32)

    def offsets_at(self, cfg: float) -> dict[str, torch.Tensor]:
        """Site path -> [R, D] in force at `cfg`."""
        shares = self.shares(cfg).view(-1, 1, 1)
        return {site: (shares.to(rows) * rows).sum(0) for site, rows in self.offsets.items()}

    def tableau_at(self, cfg: float, strength: float = 1.0) -> Tableau:
        """The solver in force at `cfg`, with `strength` of what was learned of it: 0 = the named solver, 1 and more = as trained, as beyond it σ would not fall
        any more."""
        if self.learned is None:
            return self.tableau
        return between(self.tableau, self.learned, self.shares(cfg), min(strength, 1.0))


@dataclass
class Embeddings:
    """Tables by number of steps; space: one of sites.SPACES; model: family, prediction and sampling of the base model;
    metadata: more strings for the file's header."""

    tables: dict[int, Table]
    space: str
    model: dict = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def as_stored(rows: torch.Tensor) -> torch.Tensor:
    """What a file keeps of rows, as float32 on the processor: a trained table is the same before and after it was written."""
    return rows.detach().cpu().to(STORED).float()


def save_embeddings(embeddings: Embeddings, path: Path) -> None:
    """Write the file under a temporary name, then rename. The same embeddings give the same bytes."""
    path, tensors, about = Path(path), {}, {}
    for steps, table in sorted(embeddings.tables.items()):
        for site, rows in table.offsets.items():
            tensors[f"{steps}.{site}"] = rows.detach().cpu().to(STORED).contiguous()
        tensors[f"{steps}.solver.matrix"] = table.tableau.matrix.cpu().double().contiguous()
        if table.learned is not None:
            tensors[f"{steps}.solver.learned"] = torch.stack([own.matrix.cpu().double() for own in table.learned])
            if table.tableau.mean is not None:
                tensors[f"{steps}.solver.mean"] = torch.stack([own.mean.cpu().float() for own in table.learned])
            tensors[f"{steps}.solver.told"] = torch.stack([own.sigmas.cpu().double() for own in table.learned])
        tensors[f"{steps}.solver.sigmas"] = table.tableau.sigmas.cpu().double().contiguous()
        about[str(steps)] = dict(
            sigmas=table.sigmas,
            row_sigmas=table.tableau.row_sigmas.tolist(),
            timesteps=table.timesteps,
            solver=table.solver,
            guidance=table.guidance,
            guided=table.guided,
            solver_options=table.solver_options,
            record=table.record,
        )
    header = {
        **embeddings.metadata,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{embeddings.model.get('family', 'unknown')}/mteo",
        "modelspec.implementation": "ComfyUI-MTEO",
        "modelspec.hash_sha256": tensor_hash(tensors),
        "mteo.format": str(FORMAT),
        "mteo.space": embeddings.space,
        "mteo.model": json.dumps(embeddings.model, sort_keys=True),
        "mteo.tables": json.dumps(about, sort_keys=True),
    }
    header.setdefault("modelspec.title", "MTEO embeddings")
    new = path.with_name(path.name + ".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    with new.open("wb") as file:
        file.write(_sorted_header(save(dict(sorted(tensors.items())), header)))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _sorted_header(data: bytes) -> bytes:
    """safetensors writes its header in a random order; sort it (and pad it to 8 bytes again), so that equal files are equal."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def load_embeddings(path: Path) -> Embeddings:
    """Read and check a file; MTEOError names the file and what is wrong with it before anything else is touched."""
    path = Path(path)
    wrong = lambda why: MTEOError(f"{path.name} {why}.")
    if not path.is_file():
        raise wrong("is not there: put .safetensors files of MTEO into models/mteo")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            names = file.keys() if header.get("mteo.format") == str(FORMAT) else ()  # a checkpoint that lies here is not read
            tensors = {name: file.get_tensor(name).clone() for name in names}  # not the file's own memory: it may be replaced while they are in use
    except (SafetensorError, OSError) as error:
        raise wrong(f"cannot be read, it is cut off or no safetensors file ({error}): download it again") from error
    if "mteo.format" not in header:
        raise wrong("holds no MTEO embeddings: choose a file that Save MTEO Embeddings or the trainer wrote")
    if header["mteo.format"] != str(FORMAT):
        raise wrong(f"has format {header['mteo.format']}, this version reads {FORMAT}: update the pack, or distil the table again")
    if header.get("mteo.space") not in SPACES:
        raise wrong(f"names the unknown space {header.get('mteo.space')}: update the pack")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise wrong(f"has whole numbers in {name}: distil the table again")
        if not torch.isfinite(tensor).all():
            raise wrong(f"has values in {name} that are not finite: distil the table again")
    if header.get("modelspec.hash_sha256") != tensor_hash(tensors):
        raise wrong("was changed after it was written (its hash differs): download it again")
    try:
        about = json.loads(header["mteo.tables"])
        tables = {int(steps): _table(int(steps), facts, tensors) for steps, facts in about.items()}
        model = json.loads(header["mteo.model"])
        if not tables or not all(len(numbers) for numbers in model.get("fingerprint", {}).values()):
            raise ValueError("it holds no table, or no numbers of its model")
    except (AttributeError, KeyError, TypeError, ValueError, MTEOError) as error:
        raise wrong(f"is not complete ({error}): distil the table again") from error
    return Embeddings(tables, header["mteo.space"], model, {k: v for k, v in header.items() if not k.startswith("mteo.") and k != "modelspec.hash_sha256"})


def _table(steps: int, facts: dict, tensors: dict[str, torch.Tensor]) -> Table:
    prefix = f"{steps}."
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    tableau = make_tableau(own.pop("solver.sigmas").tolist(), own.pop("solver.matrix"))
    guidance, learned = [float(value) for value in facts["guidance"]], None
    sigmas, timesteps = ([float(value) for value in facts[name]] for name in ("sigmas", "timesteps"))
    rows, size = len(tableau.row_sigmas), len(tableau.sigmas) + 1
    if len(sigmas) != steps + 1 or len(timesteps) != rows or tableau.matrix.shape != (size, size):
        raise ValueError(f"the table for {steps} steps has a schedule of another length")
    if sigmas[-1] != 0 or not all(a > b for a, b in pairwise(sigmas)) or abs(float(tableau.start_sigma) / sigmas[0] - 1) > SAME_SIGMA:
        raise ValueError(f"the table for {steps} steps has a schedule that is not its solver's")
    if not guidance or sorted(set(guidance)) != guidance:
        raise ValueError(f"the table for {steps} steps has cfg values that do not fit")
    if "solver.learned" in own:
        matrices, told, mean = own.pop("solver.learned"), own.pop("solver.told"), own.pop("solver.mean", None)
        if (
            matrices.shape != (len(guidance), size, size)
            or told.shape != (len(guidance), size - 1)
            or (mean is not None and (mean.dim() != 2 or len(mean) != len(guidance)))
        ):
            raise ValueError(f"the table for {steps} steps has a solver that does not fit its cfg values")
        learned = [
            make_tableau(sigmas, matrix, mean if mean is None else mean[number])
            for number, (sigmas, matrix) in enumerate(zip(told.tolist(), matrices, strict=True))
        ]
        tableau = replace(tableau, mean=mean if mean is None else mean.mean(0))
        if any(one.rows != tableau.rows for one in learned):
            raise ValueError(f"the table for {steps} steps has calls at other σ than its rows")
    for site, value in own.items():
        if value.dim() != 3 or value.shape[:2] != (len(guidance), rows):
            raise ValueError(f"layer {site} has the shape {tuple(value.shape)}, not {len(guidance)} cfg values of {rows} rows")
    return Table(
        steps,
        sigmas,
        timesteps,
        str(facts["solver"]),
        tableau,
        guidance,
        {site: value.float() for site, value in own.items()},
        learned,
        dict(facts["solver_options"]),
        dict(facts["record"]),
        read_guided(facts["guided"], rows),
    )


def tensor_hash(tensors: dict[str, torch.Tensor]) -> str:
    """ModelSpec's hash: "0x" + sha256 over the bytes of all tensors in the order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return "0x" + digest.hexdigest()
