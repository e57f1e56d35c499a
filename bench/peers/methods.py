"""Every peer by its name: how it samples with three evaluations, what it learns, and its training within a budget of evaluations.

SFD and LCM-LoRA are no peers but bounds, as they change the weights; they have their own training and more evaluations.
"""
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from mteo.recipe import Recipe
from mteo.tableau import execute
from mteo.teacher import Trajectories

from ..heldout import STEPS
from ..parts import TEACHER_STEPS, named_grids, solver_tableau
from . import amed, coefficients, gits, lcm, parallel, pas, sfd, v3
from .lab import Lab, branches
from .training import fit, in_batches

V3 = "DPM-Solver-v3"
ANALYTIC = ", analytic"  # the first slope costs nothing (`Lab.first_slope`)
VIEW = " by the network's view"  # no paper's: where there is guidance, trained in its second half for what a table is
NAMES = (*coefficients.PEERS, "PAS", "EPD", "AMED", *(name + ANALYTIC for name in (*coefficients.PEERS, "EPD", "AMED")), "GITS", V3)
BASES = {"PAS": "euler", "GITS": "ipndm"} | {name: freedom.base for name, freedom in coefficients.PEERS.items()}  # the solver that a peer starts from
SEEING = "GS" + VIEW + ANALYTIC
SURE = ("GITS", V3)  # nothing in their training is drawn
LOST = 0.95  # error of a start that is little nearer than the mean picture, which has about 1
RATES = (0.01, 0.03, 0.1)  # of Adam, the same for all; the best is chosen with a quarter of the budget


@dataclass
class Method:
    """sample(learned, batch, start) -> end points; zero: what is learned, at its start; training: what `fit` is told beside."""

    sample: object
    zero: dict[str, torch.Tensor]
    training: dict = field(default_factory=dict)


def method(lab: Lab, name: str, sigmas: list[float], shift: float = 0.0) -> Method:
    """The peer before its training, with as many evaluations as `sigmas`, from `start_grids`, are made for; on them where it has a grid. shift: one of EPD's
    SHIFTS."""
    analytic = name.endswith(ANALYTIC)
    steps = len(sigmas) - 1 - analytic
    if (base := base_of(name)) in coefficients.PEERS:
        freedom = replace(coefficients.PEERS[base], analytic=analytic)
        training = freedom.training | (dict(view=Recipe().perception) if VIEW in name else {})
        return Method(partial(coefficients.sample, lab, freedom, sigmas), coefficients.parameters_of(freedom, sigmas), training)
    if name == "PAS":
        return Method(partial(pas.sample, lab, sigmas), pas.parameters_of(steps), dict(loss="absolute"))
    if name.startswith("EPD"):
        return Method(partial(parallel.sample, lab, steps, analytic), parallel.parameters_of(steps, analytic, shift))
    if name.startswith("AMED") and steps == amed.EVALUATIONS:
        return Method(partial(amed.sample, lab, analytic), amed.parameters_of(lab, analytic))
    if name == V3:
        return Method(partial(v3.sample, lab, sigmas), {})
    if name == "GITS":
        tableau = solver_tableau(BASES[name], torch.tensor(sigmas), lab.session.sampling)
        return Method(lambda learned, batch, start: execute(tableau, lambda x, call, sigma: lab.denoise(x, sigma, batch), start), {})
    raise ValueError(f"No peer is called {name} with {steps} evaluations: there are {', '.join(NAMES)}, AMED with {amed.EVALUATIONS} only.")


def base_of(name: str) -> str:
    """Without what is said behind it."""
    return name.removesuffix(ANALYTIC).removesuffix(VIEW)


def start_grids(sampling, name: str, plain: dict[int, dict[str, dict[str, float]]], steps: int = STEPS) -> list[list[float]]:
    """The named grid of `steps` on which the peer's own solver does best, by `plain` {steps: {solver: {grid: error}}} of validation pairs; one with an analytic
    step has a step more. Where that is hardly nearer than the mean picture, as one long step to it is, also Euler's best and the model's own time."""
    base = base_of(name)
    steps += name.endswith(ANALYTIC)
    nearest = lambda solver: min(plain[steps][solver], key=plain[steps][solver].get)
    own = BASES.get(base, "euler")
    names = [nearest(own)]
    if base in BASES and plain[steps][own][names[0]] >= LOST:
        names += [nearest("euler"), "sgm_uniform"]
    return [named_grids(sampling, steps)[grid].tolist() for grid in dict.fromkeys(names)]


def teacher_cost(pairs: Trajectories) -> int:
    """Evaluations that the pairs' end points took."""
    return len(pairs) * TEACHER_STEPS * branches(pairs)


def train(own, name: str, pairs: Trajectories, held_out: Trajectories, plain, budget: int, seed: int, first: dict | None = None, steps: int = STEPS) -> dict:
    """{"sigmas", "shift" (EPD's), "learned", "error" (held out), "rate", "spent"} of a peer whose training takes `budget` evaluations, those of the teacher
    for `pairs` included. first: an earlier training, whose start and rate are taken; None = the best of `start_grids` or SHIFTS, and from it of RATES."""
    teacher = teacher_cost(pairs)

    def work(session):
        lab = Lab(session)
        if name == "GITS":
            sigmas = gits.find_grid(lab, pairs.part(slice(0, 256)), steps)
            return dict(sigmas=sigmas, learned={}, error=None, rate=None, spent=lab.spent)
        if name == V3:
            few = pairs.part(slice(0, budget // (2 * v3.LEVELS * branches(pairs))))
            sigmas, learned, error = v3.train(lab, few, held_out, [grid.tolist() for grid in named_grids(session.sampling, steps).values()])
            return dict(sigmas=sigmas, learned=learned, error=error, rate=None, spent=lab.spent)

        def run(start: dict, rate: float, evaluations: int) -> tuple[dict, float]:
            peer = method(lab, name, **start)
            return fit(lab, peer.sample, peer.zero, pairs, held_out, evaluations, seed, rate, **peer.training)

        if first:
            start, rate = {key: first[key] for key in ("sigmas", "shift") if key in first}, first["rate"]
        else:
            starts, few = [dict(sigmas=grid) for grid in start_grids(session.sampling, name, plain, steps)], (budget - teacher) // 4
            if name.startswith("EPD"):
                starts = [starts[0] | dict(shift=shift) for shift in parallel.SHIFTS]
            start = starts[0] if len(starts) == 1 else min(starts, key=lambda one: run(one, RATES[1], few)[1])
            rate = min(RATES, key=lambda one: run(start, one, few)[1])
        before = lab.spent
        learned, error = run(start, rate, budget - teacher)
        return start | dict(learned=learned, error=error, rate=rate, spent=lab.spent - before + teacher)

    return own.session(work)


def ends_of(own, name: str, trained: dict, pairs: Trajectories) -> torch.Tensor:
    """End points of the pairs' starts."""

    def work(session):
        peer = method(Lab(session), name, trained["sigmas"])
        return in_batches(pairs, lambda part: peer.sample(trained["learned"], part, part.start))

    return own.session(work)


def fine_tune(own, sigmas: list[float], pairs: Trajectories, held_out: Trajectories, budget: int, seed: int, analytic: bool) -> dict:
    """SFD on `sigmas`, through whose inner σ the pairs go: {"sigmas", "analytic", "weights" (of the least held-out error), "last", "error", "spent"}, as
    `train`."""

    def work(session):
        lab = Lab(session)
        weights, error, last = sfd.train(lab, sigmas, pairs, held_out, budget - teacher_cost(pairs), seed, analytic)
        return dict(sigmas=sigmas, analytic=analytic, weights=weights, last=last, error=error, spent=lab.spent + teacher_cost(pairs))

    return own.session(work)


def fine_tuned_ends(own, trained: dict, which: str, pairs: Trajectories) -> torch.Tensor:
    """End points of the pairs' starts with SFD's "weights" or "last" ones, on a private copy."""

    def work(session):
        session.network.load_state_dict(trained[which], strict=False)
        return in_batches(pairs, lambda part: sfd.sample(Lab(session), trained["sigmas"], trained["analytic"], part, part.start))

    return own.session(work)


def low_rank(own, pairs: Trajectories, budget: int, seed: int) -> dict:
    """LCM-LoRA: {"updates", "spent"}, as `train`."""

    def work(session):
        lab = Lab(session)
        return dict(updates=lcm.train(lab, pairs, budget - teacher_cost(pairs), seed), spent=lab.spent + teacher_cost(pairs))

    return own.session(work)


def low_rank_ends(own, trained: dict, pairs: Trajectories) -> torch.Tensor:
    """End points of the pairs' starts by as many evaluations as three steps of the others take: six steps where guidance takes a pair."""

    def work(session):
        sigmas, generator = named_grids(session.sampling, STEPS * branches(pairs))["sgm_uniform"].tolist(), torch.Generator().manual_seed(0)
        return in_batches(pairs, lambda part: lcm.sample(Lab(session), sigmas, trained["updates"], part, part.start, generator))

    return own.session(work)
