"""Are few-step pictures as good *as a set* as the teacher's? Every way of sampling at its number of evaluations, on unseen prompts.

The sets that are compared have other noise than the teacher's (but for the error, which is of the same noise), and the teacher's own
distance to itself is the floor: only what is above it counts (traps 35). Pictures of one prompt by several seeds show diversity.
"""
import argparse
import statistics
from pathlib import Path

import torch

from mteo.comfyui.patch import choose_table
from mteo.embeddings import Embeddings, load_embeddings
from mteo.gridsearch import LEVELS, ROUNDS, SEARCHED
from mteo.metrics import per_picture
from reference.objects import weights_file

from .cost import affordable, searched
from .heldout import CFGS, SOLVERS, STEPS, TRIALS, best_named, free_rival, named
from .intervals import Made, largest_ratios
from .judge import SEEDS, Judge
from .parts import (
    RESULTS,
    ROOT,
    TEACHER_STEPS,
    ends_of,
    guided_table_file,
    name_of,
    name_of_tensor,
    named_grids,
    parts,
    solver_tableau,
    stage,
    table_file,
    teacher_pairs,
    train_embeddings,
    write_result,
)
from .peers import methods

FREE, MTEO, EQUAL, GUIDED, SFD, LCM = "plain with free grid and rows, 3", "MTEO, 3", "MTEO at a peer's cost", "MTEO, 5 guided in the first", "SFD", "LCM-LoRA"


def run(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench quality", description=__doc__)
    parser.add_argument("--count", type=int, default=2048, help="pictures of a set")
    parser.add_argument("--validation", type=int, default=128, help="pairs on which plain solvers and grids are chosen")
    parser.add_argument("--budgets", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8, 10], help="evaluations (cfg 1) or pairs of them (cfg 4) of the best plain sampler")
    parser.add_argument("--peers", type=int, default=60_000, help="evaluations that a peer's training takes, those of its teacher included; 0: no peers and no bound")
    parser.add_argument("--bound", type=int, default=300_000, help="evaluations of SFD, which changes the weights")
    parser.add_argument("--lcm", type=int, default=300_000, help="those of LCM-LoRA, which changes them too; 0: without it")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each peer; a bound has one")
    parser.add_argument("--best", type=int, default=1, help="trainings of the table at a peer's cost and of the three peers with the least error on held-out pairs, where that is more")
    parser.add_argument("--pairs", type=int, default=512, help="training pairs of the peers; the bounds take three times as many")
    parser.add_argument("--cfg", type=float, help="this one alone, with a report of its own; also for a second process beside")
    parser.add_argument("--model", choices=("unet", "mmdit"), default="unet")
    parser.add_argument("--table", type=Path, help="default: the model's own")
    told = parser.parse_args(arguments)
    told.table = told.table or table_file(told.model)
    told.budgets = sorted({STEPS, *told.budgets})
    folder = ROOT / "runs" / "bench" / f"quality-{name_of(weights_file(told.model))}-{told.count}-{told.validation}"
    own, choosing, seen = parts(5, told.count // SEEDS, True, told.model), parts(6, told.validation, True, told.model), parts(1, 1024, False, told.model)
    cfgs = CFGS if told.cfg is None else (told.cfg,)
    print(f"[bench] at most {planned(told, cfgs):,} network evaluations, less what {folder.relative_to(ROOT)} has", flush=True)
    judge, embeddings, result, intervals = Judge(told.model, told.count // SEEDS), load_embeddings(told.table), {}, {}
    for cfg in cfgs:
        sets = made_by(folder, own, choosing, seen, told, embeddings, cfg)
        judge.against(sets["teacher"], sets.pop("teacher, other noise"))
        result[f"cfg {cfg:g}"] = {name: stage(folder, f"judged-{cfg:g}-{name_of_tensor(ends)}", judge, ends) for name, ends in sets.items()}
        intervals[f"cfg {cfg:g}"] = intervals_of(judge, sets) if told.peers else {}
    show(result)
    summary, name = keys_of(result, intervals, told.budgets), f"quality-{told.model}" + ("" if told.cfg is None else f"-cfg{told.cfg:g}")
    write_result(name, dict(weights=name_of(weights_file(told.model)), count=told.count, **summary, rows=result))
    plot(result, RESULTS / f"{name}.png")
    return summary


def planned(told, cfgs) -> int:
    """Network evaluations of a run from nothing, at most: the judging takes none, a search remembers calls that this counts anew."""
    sets = 2 * told.count * TEACHER_STEPS + told.validation * TEACHER_STEPS + told.count * (sum(told.budgets) + 2 * STEPS)
    search = sum(len(SOLVERS) * 10 * told.validation * steps for steps in told.budgets) + STEPS * min(64, told.validation) * (ROUNDS * STEPS * LEVELS + TRIALS)
    one = round(sets + search)
    trained = ((len(methods.NAMES) * told.seeds + 5 * max(told.best, told.seeds)) * (told.peers + STEPS * told.count) + len(methods.NAMES) * 0.75 * told.peers + told.bound + told.lcm + 2 * STEPS * told.count) if told.peers else 0
    return round(sum(one * (1 if cfg == 1 else 2) + trained for cfg in cfgs))


def made_by(folder: Path, own, choosing, seen, told, embeddings, cfg: float) -> dict[str, torch.Tensor]:
    """Name -> end points [count, ...]; all but "teacher, other noise" from the same noise."""
    pairs = stage(folder, f"teacher-{cfg:g}", teacher_pairs, own, told.count, cfg, 2001)
    other = stage(folder, f"teacher-other-{cfg:g}", teacher_pairs, own, told.count, cfg, 2002)
    validation = stage(folder, f"validation-{cfg:g}", teacher_pairs, choosing, told.validation, cfg, 2003)
    sets, sampling = {"teacher": pairs.end, "teacher, other noise": other.end}, own.model.get_model_object("model_sampling")
    for steps in told.budgets:
        solver, grid = best_named(stage(folder, f"named-{steps}-{cfg:g}", named, choosing, validation, steps))
        tableau = solver_tableau(solver, named_grids(sampling, steps)[grid], sampling)
        sets[f"plain {steps}, {solver}/{grid}"] = stage(folder, f"plain-{steps}-{cfg:g}", ends_of, own, pairs, tableau)
    free = stage(folder, f"free-{cfg:g}", free_rival, choosing, validation, min(64, told.validation))["grid, all rows"]
    sets[FREE] = stage(folder, f"plain-free-{cfg:g}", ends_of, own, pairs, free)
    if told.peers:
        plain = {steps: stage(folder, f"named-{steps}-{cfg:g}", named, choosing, validation, steps) for steps in (STEPS, STEPS + 1)}
        sets |= bound_of(folder, own, seen, told, plain, pairs, cfg)
        sets |= peers_of(folder, own, seen, told, plain, pairs, cfg)
    sets[MTEO] = stage(folder, f"mteo-{cfg:g}-{name_of(told.table)}", ends_of, own, pairs, embeddings.tables[STEPS].tableau_at(cfg), embeddings)
    if cfg != 1 and (file := guided_table_file(told.model)):
        guided = load_embeddings(file)
        sets[GUIDED] = stage(folder, f"guided-{cfg:g}-{name_of(file)}", ends_of, own, pairs, choose_table(guided, 0).tableau_at(cfg), guided)
    return sets


def bound_of(folder: Path, own, seen, told, plain, pairs, cfg: float) -> dict[str, torch.Tensor]:
    """Name -> end points of SFD and LCM-LoRA with three evaluations or pairs; `plain`: errors of the named grids on validation pairs, by steps."""
    held_out = held_out_of(folder, seen, cfg)
    sigmas = methods.start_grid(seen.model.get_model_object("model_sampling"), SFD, plain)
    through = stage(folder, f"bound-train-{cfg:g}-{told.pairs}", teacher_pairs, seen, 3 * told.pairs, cfg, 2006, TEACHER_STEPS, tuple(sigmas))
    bound = stage(folder, f"bound-{cfg:g}-{told.bound}-{told.pairs}-0", methods.fine_tune, seen, sigmas, through, held_out, told.bound, 0)
    sets = {}
    if told.lcm:
        updates = stage(folder, f"lcm-{cfg:g}-{told.lcm}-{told.pairs}-0", methods.low_rank, seen, through, told.lcm, 0)
        sets[f"{LCM}, 3"] = stage(folder, f"lcm-ends-{cfg:g}-{told.lcm}-{told.pairs}-0", methods.low_rank_ends, own, updates, pairs)
    return sets | {f"{SFD}, 3": stage(folder, f"bound-ends-{cfg:g}-{told.bound}-{told.pairs}-0", methods.fine_tuned_ends, own, bound, pairs)}


def peers_of(folder: Path, own, seen, told, plain, pairs, cfg: float) -> dict[str, torch.Tensor]:
    """Name -> end points with three evaluations of tables that took as many evaluations to make as each peer, and of every peer; a seed above 0 is in the name."""
    sets, more = {}, max(told.seeds, told.best)
    end = lambda seed: f", {STEPS}" + (f", seed {seed}" if seed else "")
    for analytic in ("", methods.ANALYTIC):
        for seed in range(more):
            table = equal_of(folder, seen, told, cfg, analytic, seed)
            sets[f"{EQUAL}{analytic}{end(seed)}"] = stage(folder, f"equal-ends{analytic}-{cfg:g}-{told.peers}-{seed}", ends_of, own, pairs, table.tables[STEPS].tableau_at(cfg), table)
    drawn = [name for name in methods.NAMES if name not in methods.SURE]
    best = sorted(drawn, key=lambda name: peer_of(folder, seen, told, plain, cfg, name, 0)["error"])[:3]
    for name in methods.NAMES:
        for seed in range((more if name in best else told.seeds) if name in drawn else 1):
            peer = peer_of(folder, seen, told, plain, cfg, name, seed)
            sets[f"{name}{end(seed)}"] = stage(folder, f"peer-ends-{name}-{cfg:g}-{told.peers}-{told.pairs}-{seed}", methods.ends_of, own, name, peer, pairs)
    return sets


def equal_of(folder: Path, seen, told, cfg: float, analytic: str, seed: int) -> Embeddings:
    """A table that takes as many evaluations to make as a peer, its search included."""
    held_out = held_out_of(folder, seen, cfg)
    start, spent = stage(folder, f"peers-start{analytic}-{cfg:g}", searched, seen, held_out.part(slice(0, SEARCHED)), bool(analytic))
    recipe = affordable(told.peers - spent, cfg, seed)
    pairs = stage(folder, f"peers-table-{cfg:g}-{recipe.pictures}", teacher_pairs, seen, recipe.pictures, cfg, 2007)
    return stage(folder, f"equal{analytic}-{cfg:g}-{told.peers}-{seed}", train_embeddings, seen, recipe, start, pairs, held_out)


def peer_of(folder: Path, seen, told, plain, cfg: float, name: str, seed: int) -> dict:
    """A trained peer; a seed above 0 takes the rate that seed 0 found."""
    train = stage(folder, f"peers-train-{cfg:g}-{told.pairs}", teacher_pairs, seen, told.pairs, cfg, 2004)
    rate = peer_of(folder, seen, told, plain, cfg, name, 0)["rate"] if seed else None
    return stage(folder, f"peer-{name}-{cfg:g}-{told.peers}-{told.pairs}-{seed}", methods.train, seen, name, train, held_out_of(folder, seen, cfg), plain, told.peers, seed, rate)


def held_out_of(folder: Path, seen, cfg: float):
    """The pairs that trainings are stopped by."""
    return stage(folder, f"peers-held-out-{cfg:g}-128", teacher_pairs, seen, 128, cfg, 2005)


def intervals_of(judge: Judge, sets: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Key of `keys_of` -> 95 % interval of the largest ratio of a table at a peer's cost to a peer."""
    made = lambda name: [Made(judge.features(sets[one]), per_picture(sets[one], judge.same).square()) for one in seeds_of(sets, name)]
    found = {}
    for analytic in ("", methods.ANALYTIC):
        largest = largest_ratios(made(EQUAL + analytic), [made(name) for name in rivals(analytic)], judge.other["features"])
        found |= {f"vs_peers_{measure}{analytic.replace(', ', '_')}": interval for measure, interval in largest.items()}
    return found


def rivals(analytic: str) -> list[str]:
    """The peers of the table where nobody, or everybody, has the first step for nothing."""
    return [name for name in methods.NAMES if name.endswith(methods.ANALYTIC) == bool(analytic)] + [FREE.removesuffix(f", {STEPS}")] * bool(analytic)


def seeds_of(rows: dict, name: str) -> list[str]:
    """The names of its rows, one for each training seed."""
    return [row for row in rows if row == f"{name}, {STEPS}" or row.startswith(f"{name}, {STEPS}, seed ")]


def over_seeds(rows: dict, name: str, measure: str) -> float:
    """Mean of its training seeds."""
    return statistics.fmean(rows[row][measure] for row in seeds_of(rows, name))


def keys_of(result: dict, intervals: dict, budgets: list[int]) -> dict:
    """The worse cfg of each: recall ÷ the teacher's, spectrum and diversity of MTEO, the largest number of plain evaluations that it, with all fewer ones, is not behind in
    Fréchet distance (0: of none); with peers the largest ratio of a table at their cost to one of them (means over seeds), none of which has its first step for nothing, the same where all have, each
    with its interval, and the share of the way from the plain sampler to SFD."""
    def of_set(row: dict, teacher: dict, plain: dict[int, dict]) -> dict:
        matched = max((steps for steps in plain if all(other["fd"] >= row["fd"] for fewer, other in plain.items() if fewer <= steps)), default=0)
        return dict(plain_steps_matched=matched, diversity=row["diversity"] / teacher["diversity"], recall=row["recall"] / teacher["recall"], spectrum=row["spectrum"], fd=row["fd"])

    keys = {}
    for cfg, rows in result.items():
        mteo, teacher, free = rows[MTEO], rows["teacher"], rows[FREE]
        plain = {steps: next(row for name, row in rows.items() if name.startswith(f"plain {steps}, ")) for steps in budgets}
        keys[cfg] = own = of_set(mteo, teacher, plain) | dict(fd_floor=teacher["fd"], fd_free_3=free["fd"])
        if guided := rows.get(GUIDED):
            own |= {f"guided_{key}": value for key, value in of_set(guided, teacher, plain).items()}
        if bound := rows.get(f"{SFD}, 3"):
            for key, measure in (("fd", "fd"), ("error", "error pooled")):
                for analytic in ("", methods.ANALYTIC):
                    own[f"vs_peers_{key}{analytic.replace(', ', '_')}"] = max(over_seeds(rows, EQUAL + analytic, measure) / over_seeds(rows, name, measure) for name in rivals(analytic))
                start, end = plain[STEPS][measure], mteo[measure]
                own[f"gap_closed_{key}"] = (start - end) / (start - bound[measure])
    lowest = ("plain_steps_matched", "diversity", "recall", "gap_closed_fd", "gap_closed_error")
    for cfg, own in keys.items():
        own |= {f"{name}_{end}": bound for name, interval in intervals[cfg].items() for end, bound in zip(("low", "high"), interval, strict=True)}
    names = [name for name in next(iter(keys.values())) if name in (*lowest, "spectrum") or name.startswith("vs_peers")]
    worst = {name: (min if name in lowest else max)(own[name] for own in keys.values()) for name in names}
    return {name: round(value, 4) for name, value in worst.items()} | {"by_cfg": {cfg: {name: round(value, 4) for name, value in own.items()} for cfg, own in keys.items()}}


def show(result: dict) -> None:
    for cfg, rows in result.items():
        print(f"\n{cfg}" + " " * 36 + " ".join(f"{name:>13}" for name in rows["teacher"]))
        for name, row in rows.items():
            print(f"  {name:40} " + " ".join(f"{value:13.4f}" for value in row.values()))


def plot(result: dict, path: Path) -> None:
    """Fréchet distance above the teacher's own and error of all that takes three evaluations (cfg 1) or pairs of them, the best plain samplers of more as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {cfg: {name.removesuffix(f", {STEPS}"): row for name, row in rows.items() if name.endswith(f", {STEPS}") or name.startswith(f"plain {STEPS}, ") or name == GUIDED} for cfg, rows in result.items()}
    heights = [1 + 0.24 * len(rows) for rows in shown.values()]
    figure, axes = plt.subplots(len(result), 2, figsize=(12, sum(heights)), layout="constrained", squeeze=False, height_ratios=heights)
    for line, (cfg, rows) in zip(axes, shown.items(), strict=True):
        for axis, (measure, floor, label) in zip(line, (("fd", result[cfg]["teacher"]["fd"], "Fréchet distance above the teacher's own"), ("error pooled", 0.0, "error to the teacher (nRMSE)")), strict=True):
            values = {name: max(row[measure] - floor, 1e-4) for name, row in sorted(rows.items(), key=lambda entry: -entry[1][measure])}
            colours = ["tab:red" if name.startswith("MTEO") else "black" if name in (SFD, LCM) else "tab:blue" for name in values]
            axis.scatter(list(values.values()), list(values), c=colours, zorder=2)
            more = [name for name in result[cfg] if name.startswith("plain ") and name != FREE and not name.startswith(f"plain {STEPS}, ")]
            for number, name in enumerate(more):
                at = max(result[cfg][name][measure] - floor, 1e-4)
                axis.axvline(at, color="0.7", linestyle="--", linewidth=1, zorder=1)
                axis.text(at, 1 + 0.025 * (number % 3), name.split(",")[0].removeprefix("plain "), transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=8, color="0.4")
            axis.set(xlabel=label, xscale="log" if measure == "fd" else "linear")
            axis.tick_params(axis="y", labelsize=8)
            axis.grid(alpha=0.3, axis="y")
        line[0].set_title(f"{cfg}, {STEPS} {'evaluations' if cfg == 'cfg 1' else 'pairs'} (dashed: plain with more; black: other weights)", loc="left", pad=30, fontsize=10)
    figure.savefig(path, dpi=90)
    plt.close(figure)
