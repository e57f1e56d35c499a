"""Every way of sampling that `bench quality` and `bench budgets` compare, for one model and cfg: trained once, its set of pictures judged once. Of a set its
measures are kept, not its pictures."""
from functools import cached_property, partial

from mteo.comfyui.patch import choose_table
from mteo.embeddings import Embeddings, load_embeddings
from mteo.gridsearch import SEARCHED
from mteo.recipe import Recipe
from mteo.tableau import Tableau
from mteo.teacher import Trajectories

from .cost import TEACHER_SHARE, affordable, searched
from .ground import Ground
from .heldout import STEPS, best_named, free_rival, named
from .judge import Judged
from .parts import TEACHER_STEPS, ends_of, guided_table_file, name_of, named_grids, solver_tableau, teacher_pairs, train_embeddings
from .peers import methods

FREE, MTEO, EQUAL = f"plain with free grid and rows, {STEPS}", f"MTEO, {STEPS}", "MTEO at a peer's cost"
GUIDED, SFD, LCM = "MTEO, 4 guided in 1 and 3", "SFD", "LCM-LoRA"


def seeded(name: str, steps: int, seed: int = 0) -> str:
    """What a row is called."""
    return of_seed(f"{name}, {steps}", seed)


def of_seed(name: str, seed: int) -> str:
    """The first training has the name alone."""
    return name + (f", seed {seed}" if seed else "")


class Ways:
    """Stages of one cfg; steps: evaluations, or pairs of them, of all that is trained."""

    def __init__(self, ground: Ground, steps: int = STEPS):
        self.ground, self.told, self.cfg, self.steps = ground, ground.told, ground.cfg, steps
        self.own, self.seen, self.stage, self.judged = ground.own, ground.seen, ground.stage, ground.judged
        self.tag = "" if steps == STEPS else f"-{steps}-steps"  # of the stages that are of these steps alone

    def sigmas(self, analytic: str) -> list[float]:
        """The grid of SFD."""
        return methods.start_grids(self.seen.model.get_model_object("model_sampling"), SFD + analytic, self.plain, self.steps)[0]

    def through(self, analytic: str = "") -> Trajectories:
        """The bounds' training pairs, with the teacher's states at SFD's inner σ: as large a share of its evaluations as a table's."""
        branches, through = 1 if self.cfg == 1 else 2, tuple(self.sigmas(analytic))
        count = max(round(TEACHER_SHARE * self.told.bound / TEACHER_STEPS / branches), 3 * self.told.pairs)
        return self.stage(f"bound-train{analytic}-{self.cfg:g}-{count}{self.tag}", teacher_pairs, self.seen, count, self.cfg, 2006, TEACHER_STEPS, through)

    @cached_property
    def plain(self) -> dict[int, dict]:
        """{steps: {solver: {grid: errors}}} that peers start by."""
        return {steps: self.named(steps) for steps in (self.steps, self.steps + 1)}

    def named(self, steps: int) -> dict:
        return self.stage(f"named-{steps}-{self.cfg:g}", named, self.ground.choosing, self.ground.validation, steps)

    def sets(self) -> dict[str, Judged]:
        """By row."""
        made = {"teacher": self.teacher_set()} | self.plain_sets()
        if self.told.peers:
            made |= self.bound_sets() | self.table_sets() | self.peer_sets()
        return made | self.pack_sets()

    def teacher_set(self) -> Judged:
        """The teacher's own."""
        return self.judged(f"teacher-{self.cfg:g}", lambda: self.ground.pairs.end)

    def plain_set(self, steps: int) -> dict[str, Judged]:
        """The best named sampler."""
        solver, grid = best_named(self.named(steps))
        sampling = self.own.model.get_model_object("model_sampling")
        tableau = solver_tableau(solver, named_grids(sampling, steps)[grid], sampling)
        return {f"plain {steps}, {solver}/{grid}": self.judged(f"plain-{steps}-{self.cfg:g}", partial(ends_of, self.own, self.ground.pairs, tableau))}

    def euler_set(self, steps: int) -> dict[str, Judged]:
        """Euler on its best named grid: what is nearest in error need not be the nearest as a set."""
        errors, sampling = self.named(steps)["euler"], self.own.model.get_model_object("model_sampling")
        grid = min(errors, key=errors.get)
        tableau = solver_tableau("euler", named_grids(sampling, steps)[grid], sampling)
        return {f"Euler {steps}, {grid}": self.judged(f"euler-{steps}-{self.cfg:g}", partial(ends_of, self.own, self.ground.pairs, tableau))}

    def plain_sets(self) -> dict[str, Judged]:
        """The best named sampler and Euler at each budget, and σ and all coefficients searched at three."""
        made = {}
        for steps in self.told.budgets:
            made |= self.plain_set(steps) | self.euler_set(steps)
        free = self.stage(f"free-{self.cfg:g}", free_rival, self.ground.choosing, self.ground.validation, min(64, self.told.validation))["grid, all rows"]
        return made | {FREE: self.judged(f"plain-free-{self.cfg:g}", partial(ends_of, self.own, self.ground.pairs, free))}

    def pack_sets(self) -> dict[str, Judged]:
        """The table that comes with the pack, and with guidance the one that guides in some steps only."""
        made = {MTEO: self._table(f"mteo-{self.cfg:g}-{name_of(self.told.table)}", lambda: load_embeddings(self.told.table))}
        if self.cfg != 1:
            file = guided_table_file(self.told.model)
            made[GUIDED] = self._table(f"guided-{self.cfg:g}-{name_of(file)}", lambda: load_embeddings(file))
        return made

    def bound_sets(self) -> dict[str, Judged]:
        """SFD and LCM-LoRA, which change the weights; SFD with its last weights, too: those with the least error need not be the nearest as a set."""
        name, made = lambda of: f"{of}-{self.cfg:g}-{self.told.lcm}-{self.told.pairs}-0", {}
        for analytic in ("", methods.ANALYTIC) if self.told.bound else ():
            for which, last in (("weights", ""), ("last", ", last")):
                made[seeded(SFD + analytic + last, self.steps)] = self.bound_set(analytic, which)
        if self.told.lcm:
            updates = lambda: self.stage(name("lcm"), methods.low_rank, self.seen, self.through().part(slice(0, 3 * self.told.pairs)), self.told.lcm, 0)
            made[seeded(LCM, self.steps)] = self.judged(name("lcm-ends"), lambda: methods.low_rank_ends(self.own, updates(), self.ground.pairs))
        return made

    def bound_set(self, analytic: str = "", which: str = "weights") -> Judged:
        """SFD."""
        name = f"{analytic}-{self.cfg:g}-{self.told.bound}-0{self.tag}"

        def trained():
            asked = self.sigmas(analytic), self.through(analytic), self.ground.held_out, self.told.bound, 0, bool(analytic)
            return self.stage(f"sfd{name}", methods.fine_tune, self.seen, *asked)

        return self.judged(f"sfd-{which}{name}", lambda: methods.fine_tuned_ends(self.own, trained(), which, self.ground.pairs))

    def table_sets(self) -> dict[str, Judged]:
        """Tables that took as many evaluations to make as a peer."""
        return {
            seeded(EQUAL + analytic, self.steps, seed): self.table_set(analytic, seed) for analytic in ("", methods.ANALYTIC) for seed in range(self.trainings)
        }

    def table_set(self, analytic: str, seed: int) -> Judged:
        return self._table(f"equal-ends{analytic}-{self.cfg:g}-{self.told.peers}-{seed}{self.tag}", lambda: self.equal(analytic, seed))

    def equal(self, analytic: str, seed: int) -> Embeddings:
        """A table that takes as many evaluations to make as a peer, its search included."""

        def make():
            start, recipe = self.equal_start(analytic, seed)
            pairs = self.stage(f"peers-table-{self.cfg:g}-{recipe.pictures}", teacher_pairs, self.seen, recipe.pictures, self.cfg, 2007)
            return train_embeddings(self.seen, recipe, start, pairs, self.ground.held_out)

        return self.ground.trained.table(f"equal{analytic}-{self.cfg:g}-{self.told.peers}-{seed}{self.tag}", make)

    def equal_start(self, analytic: str, seed: int) -> tuple[Tableau, Recipe]:
        few = self.ground.held_out.part(slice(0, SEARCHED))
        start, spent = self.stage(f"peers-start{analytic}-{self.cfg:g}{self.tag}", searched, self.seen, few, bool(analytic), self.steps)
        return start, affordable(self.told.peers - spent, self.cfg, seed, steps=self.steps)

    def peer_sets(self) -> dict[str, Judged]:
        best, names = self.best_peers(), (*methods.NAMES, *[methods.SEEING] * (self.cfg != 1))
        return {seeded(name, self.steps, seed): self.peer_set(name, seed) for name in names for seed in range(self.trainings_of(name, best))}

    def peer_set(self, name: str, seed: int) -> Judged:
        return self.judged(f"peer-ends-{self.of(name, seed)}", lambda: methods.ends_of(self.own, name, self.peer(name, seed), self.ground.pairs))

    def peer(self, name: str, seed: int) -> dict:
        """A trained peer; a seed above 0 takes the grid and rate that seed 0 found."""

        def make():
            first = self.peer(name, 0) if seed else None
            return methods.train(self.seen, name, self.ground.train, self.ground.held_out, self.plain, self.told.peers, seed, first, self.steps)

        keep = self.stage if name in methods.SURE else self.ground.trained.peer
        return keep(f"peer-{self.of(name, seed)}", make)

    def of(self, peer: str, seed: int) -> str:
        """What a peer's stages are called after."""
        return f"{peer}-{self.cfg:g}-{self.told.peers}-{self.told.pairs}-{seed}{self.tag}"

    @property
    def trainings(self) -> int:
        """Seeds of the tables and of the best peers."""
        return max(self.told.seeds, self.told.best)

    def best_peers(self) -> list[str]:
        """The three with the least error on held-out pairs."""
        drawn = [name for name in methods.NAMES if name not in methods.SURE]
        return sorted(drawn, key=lambda name: self.peer(name, 0)["error"])[:3]

    def trainings_of(self, name: str, best: list[str]) -> int:
        return 1 if name in methods.SURE else self.trainings if name in best else self.told.seeds

    def _table(self, name: str, load) -> Judged:
        """Of the least number of steps that the embeddings load() have."""

        def ends():
            table = load()
            return ends_of(self.own, self.ground.pairs, choose_table(table, 0).tableau_at(self.cfg), table)

        return self.judged(name, ends)
