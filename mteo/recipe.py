"""All that decides what a distillation makes, apart from the model and its conditions: one frozen record, from TOML or a node."""
import math
from dataclasses import asdict, dataclass, fields

from .errors import MTEOError
from .guided import ALL, Guided, alone_of, read_guided
from .sites import SPACES

ROWS = ("solver", "last", "all")
FREE = "free"


@dataclass(frozen=True)
class Recipe:
    """steps: K, 2..16. solver: a ComfyUI sampler's name.
    denoise: 1 = samplings start from noise; below it, to 0.05, from a picture with noise on it, as KSampler's (image to image): the table is for that alone.
    grid: a ComfyUI scheduler's name, or "free" = the σ of each call are searched for, with four to seven steps learned where all rows are.
    rows: what of the solver's coefficients is learned: "solver" = nothing, "last" = the row of the end point, "all" = the inner ones as well.
    perception: weight of how unlike the teacher's picture the network itself finds the student's, in the second half of stage B and at any
        cfg but 1, beside the error of the latents (÷ their spread); 0 = none.
    space: where offsets act. guidance: the cfg values that it is trained at, each by itself; between them it is interpolated.
    guided: "all", "none", or the numbers of the steps, from 1, that evaluate the pair that cfg needs; the others evaluate the prompt alone,
        and the table stands in for the guidance.
    pictures / held_out: teacher trajectories of each cfg value to train on / to choose the best table by.
    teacher_steps: of DPM++ 2M on Karras' grid, for a flow model on that of its own time.
    sequential / iterations: optimiser steps of stage A / B for each cfg value, of `batch` pictures.
    rate: Adam's first step at most, a smaller one where that is all that the network bears (`first_rates`); falls to 0 along a cosine.
    clip: largest gradient norm. average: memory of the averaged offsets, 0..1."""

    steps: int = 3
    solver: str = "euler"
    grid: str = FREE
    rows: str = "all"
    space: str = "gains"
    guidance: tuple[float, ...] = (1.0,)
    guided: Guided = ALL
    pictures: int = 256
    held_out: int = 64
    teacher_steps: int = 24
    sequential: int = 0
    iterations: int = 160
    batch: int = 48
    rate: float = 0.01
    clip: float = 1.0
    perception: float = 50.0
    average: float = 0.95
    validate_every: int = 20
    seed: int = 0
    denoise: float = 1.0

    def __post_init__(self):
        try:
            object.__setattr__(self, "guidance", tuple(float(value) for value in self.guidance))
        except (TypeError, ValueError):
            raise MTEOError(f"guidance is {self.guidance!r}: give one or more numbers.") from None
        limits = dict(steps=(2, 16), pictures=(1, 10**7), held_out=(2, 10**6), teacher_steps=(self.steps, 1000), sequential=(0, 10**7), iterations=(0, 10**7),
                      batch=(1, 4096), rate=(0, 10), clip=(1e-9, 1e9), perception=(0, 10**6), average=(0, 1), validate_every=(1, 10**7), seed=(0, 2**63 - 1),
                      denoise=(0.05, 1))
        for name, (low, high) in limits.items():
            value, whole = getattr(self, name), Recipe.__dataclass_fields__[name].type is int
            if not isinstance(value, (int, float)) or not low <= value <= high or (whole and value != int(value)):
                raise MTEOError(f"{name} is {value!r}: give a {'whole ' * whole}number from {low} to {high}.")
            object.__setattr__(self, name, int(value) if whole else value)
        object.__setattr__(self, "guided", read_guided(self.guided, self.steps))
        for name, allowed in (("rows", ROWS), ("space", SPACES)):
            if getattr(self, name) not in allowed:
                raise MTEOError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}.")
        if not self.guidance or not all(0 <= value < math.inf for value in self.guidance) or len(set(self.guidance)) < len(self.guidance):
            raise MTEOError(f"guidance is {list(self.guidance)}: give one or more different cfg values of 0 or more.")

    @classmethod
    def of(cls, values: dict) -> "Recipe":
        """From a dict as TOML or JSON gives it; an unknown name is an error that lists the known ones."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise MTEOError(f"The recipe has no setting {name!r}: it knows {', '.join(sorted(known))}.")
        return cls(**values)

    def perceives(self, cfg: float) -> bool:
        """Whether a training at this cfg asks the network how unlike the pictures look; without guidance it does harm (docs/ablations.md)."""
        return self.perception > 0 and cfg != 1

    @property
    def analytic(self) -> bool:
        """Whether the first call may be told a σ below that of x_T, for nothing: not where the solver stays the named one, nor from a picture under noise, of
        which more can be seen than its mean."""
        return self.rows != "solver" and self.denoise == 1

    @property
    def alone(self) -> list[int]:
        """The steps, from 0, that evaluate the prompt alone."""
        return alone_of(self.guided, range(self.steps))

    def evaluations(self, cfg: float) -> int:
        """Network evaluations of one picture, of a solver with one in each step; a cfg pair is 2."""
        return self.steps + (0 if cfg == 1 else self.steps - len(self.alone))

    def facts(self) -> dict:
        """As JSON."""
        return {**asdict(self), "guidance": list(self.guidance), "guided": self.guided if self.guided == ALL else list(self.guided)}
