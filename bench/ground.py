"""What all ways of sampling that are compared at one cfg have in common: the teacher's pictures, pairs to choose, train and stop by, a judge, and a folder
where each stage is kept."""
import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mteo.teacher import Trajectories
from reference.objects import weights_file

from .judge import SEEDS, Judge, Judged
from .parts import RESULTS, ROOT, TEACHER_STEPS, Parts, name_of, parts, stage, teacher_pairs
from .trained import Trained

TRAINED = RESULTS / "trained"
BOUND = dict(type=int, default=300_000, help="evaluations of SFD, which changes the weights; 0: without it")  # a flag where there is such a bound
HELD_OUT = 128  # pairs that a training is stopped by
NUMBERS = dict(validation=64, peers=60_000, pairs=512)  # of the trainings that are kept there,
BUDGETS = (NUMBERS["peers"], 300_000)  # those of five times as many evaluations, too


def parser_of(name: str, description: str, cfgs: Sequence[float]) -> argparse.ArgumentParser:
    """The flags of a bench that compares ways of sampling."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=description)
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--cfg", type=float, nargs="+", default=list(cfgs), help="one of these alone may also run in a second process beside")
    parser.add_argument("--count", type=int, default=2048, help="pictures of a set")
    parser.add_argument("--validation", type=int, default=NUMBERS["validation"], help="pairs on which plain solvers and grids are chosen")
    parser.add_argument(
        "--peers",
        type=int,
        default=NUMBERS["peers"],
        help="evaluations that a training takes, those of its teacher included; 0: `quality` without peers and bounds",
    )
    parser.add_argument("--pairs", type=int, default=NUMBERS["pairs"], help="training pairs of the peers; LCM-LoRA takes three times as many")
    return parser


@dataclass
class Ground:
    """Of one cfg; folder: where stages are kept; trained: where trainings are; told: the bench's arguments."""

    folder: Path
    told: argparse.Namespace
    cfg: float
    own: Parts
    choosing: Parts
    seen: Parts
    trained: Trained

    pairs = cached_property(lambda self: self._pairs("teacher", self.own, self.told.count, 2001))
    other = cached_property(lambda self: self._pairs("teacher-other", self.own, self.told.count, 2002))
    judge = cached_property(lambda self: Judge(self.told.model, self.pairs.end, self.other.end))
    validation = cached_property(lambda self: self._pairs("validation", self.choosing, self.told.validation, 2003))
    train = cached_property(lambda self: self.stage(f"peers-train-{self.cfg:g}-{self.told.pairs}", teacher_pairs, self.seen, self.told.pairs, self.cfg, 2004))
    held_out = cached_property(lambda self: self.stage(f"peers-held-out-{self.cfg:g}-{HELD_OUT}", teacher_pairs, self.seen, HELD_OUT, self.cfg, 2005))

    def _pairs(self, name: str, of: Parts, count: int, seed: int) -> Trajectories:
        return self.stage(f"{name}-{self.cfg:g}", teacher_pairs, of, count, self.cfg, seed)

    def stage(self, name: str, make, *arguments):
        """make(*arguments), or what an earlier run kept."""
        return stage(self.folder, name, make, *arguments)

    def judged(self, name: str, make) -> Judged:
        """Measures of the end points make()."""
        return self.stage(f"set-{name}-{self.judge.name}", lambda: self.judge.judged(make()))


def teacher_planned(told) -> int:
    """Network evaluations, without guidance, of all that a cfg's teacher draws for a ground."""
    return (2 * told.count + told.validation + told.pairs + HELD_OUT) * TEACHER_STEPS


def grounds(told, planned: int) -> Iterator[Ground]:
    """One for each cfg in turn; planned: network evaluations of a run from nothing, at most."""
    folder = ROOT / "runs" / "bench" / f"quality-{name_of(weights_file(told.model))}-{told.count}-{told.validation}"
    print(f"[bench] at most {planned:,} network evaluations, less what {folder.relative_to(ROOT)} has", flush=True)
    prompts = told.count // SEEDS
    own, choosing, seen = parts(5, prompts, True, told.model), parts(6, told.validation, True, told.model), parts(1, 1024, False, told.model)
    trained = Trained(training_folder(told, folder))
    for cfg in told.cfg:
        yield Ground(folder, told, cfg, own, choosing, seen, trained)


def training_folder(told, otherwise: Path) -> Path:
    """Where trainings with these numbers are kept."""
    usual = told.peers in BUDGETS and all(getattr(told, name) == NUMBERS[name] for name in ("validation", "pairs"))
    return TRAINED / f"{told.model}-{name_of(weights_file(told.model))}" if usual else otherwise

