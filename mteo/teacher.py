"""The many-step model's own trajectories: computed once, kept on disk, read in batches."""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import MTEOError
from .schedule import SAME_SIGMA
from .tableau import Tableau, combine


@dataclass
class Trajectories:
    """What the student is taught from: N starts, the teacher's states at the student's inner σ, and its end points.

    start [N, ...] noised start x_T; states [N, K-1, ...] at σ_1 … σ_{K-1}; end [N, ...]; item [N] which prompt; guidance [N] cfg.
    device: where pictures of a part go, None = where they are; a whole set need not fit on a graphics card.
    """

    start: torch.Tensor
    states: torch.Tensor
    end: torch.Tensor
    item: torch.Tensor
    guidance: torch.Tensor
    device: torch.device | None = None

    def __len__(self) -> int:
        return len(self.start)

    def part(self, index) -> "Trajectories":
        """Its pictures on the device; which prompt and cfg stay where the host reads them."""
        pictures = (getattr(self, name)[index] for name in FIELDS[:3])
        return Trajectories(*(one.to(self.device or one.device) for one in pictures), self.item[index], self.guidance[index], self.device)

    def for_device(self, device: torch.device) -> "Trajectories":
        return replace(self, device=device)


FIELDS = ("start", "states", "end", "item", "guidance")


@torch.no_grad()
def follow(tableau: Tableau, denoise, start: torch.Tensor, student_sigmas) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the teacher's table from `start` [B, ...]: (states [B, K-1, ...] at the student's inner σ, end [B, ...]).

    denoise(x, call, sigma) -> D. MTEOError where the teacher's grid misses one of the student's σ.
    """
    matrix, sigmas = tableau.matrix, tableau.sigmas.tolist()
    wanted = [float(s) for s in student_sigmas if 0 < s < student_sigmas[0]]
    terms, states = [tableau.begun(start)], {}
    for call, sigma in enumerate(sigmas):
        x = combine(matrix[call], terms)
        states |= {i: x for i, target in enumerate(wanted) if abs(sigma / target - 1) < SAME_SIGMA}
        terms.append(denoise(x, call, sigma))
    missing = [target for i, target in enumerate(wanted) if i not in states]
    if missing:
        raise MTEOError(f"The teacher's grid does not hold the student's sigma {missing[0]:.4g}: make it with schedule.refined.")
    inner = torch.stack([states[i] for i in range(len(wanted))], 1) if wanted else start.new_zeros(len(start), 0, *start.shape[1:])
    return inner, combine(matrix[-1], terms)


def save_trajectories(trajectories: Trajectories, path: Path, note: str) -> None:
    """Write the store under a temporary name, then rename; `note` says what it was made from and is compared on reading."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    save_file({name: getattr(trajectories, name).contiguous() for name in FIELDS}, new, {"mteo.store": note})
    new.replace(path)


def load_trajectories(path: Path, note: str) -> Trajectories | None:
    """The store at `path`, or None where there is none, it cannot be read or was made from something else."""
    if not Path(path).is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("mteo.store") != note:
                return None
            return Trajectories(*(file.get_tensor(name).clone() for name in FIELDS))  # not the file's own memory: Windows would not let it be deleted
    except (SafetensorError, OSError):
        return None


def join(parts: list[Trajectories]) -> Trajectories:
    """One after the other."""
    return Trajectories(*(torch.cat([getattr(part, name) for part in parts]) for name in FIELDS))
