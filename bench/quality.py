"""Are few-step pictures as good *as a set* as the teacher's? Every way of sampling at its number of evaluations, on unseen prompts.

The sets that are compared have other noise than the teacher's (but for the error, which is of the same noise), and the teacher's own
distance to itself is the floor: only what is above it counts. Pictures of one prompt by several seeds show diversity.
"""
import statistics
from pathlib import Path

import torch

from mteo.gridsearch import LEVELS, ROUNDS
from reference.objects import weights_file

from .ground import BOUND, grounds, parser_of
from .heldout import CFGS, SOLVERS, STEPS, TRIALS
from .intervals import largest_ratios, matched, matched_interval
from .judge import Judged
from .parts import RESULTS, TEACHER_STEPS, name_of, table_file, write_result
from .peers import methods
from .ways import EQUAL, FREE, GUIDED, LCM, MTEO, SFD, Ways


def run(arguments: list[str]) -> dict:
    parser = parser_of("quality", __doc__, CFGS)
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[3, 4, 5, 6, 8, 10], help="evaluations (cfg 1) or pairs of them (cfg 4) of the best plain sampler"
    )
    parser.add_argument("--bound", **BOUND)
    parser.add_argument("--lcm", type=int, default=150_000, help="evaluations of LCM-LoRA, which changes the weights too; 0: without it")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each peer; a bound has one")
    parser.add_argument(
        "--best",
        type=int,
        default=1,
        help="trainings of the table at a peer's cost and of the three peers with the least error on held-out pairs, where that is more",
    )
    parser.add_argument("--table", type=Path, help="default: the model's own")
    told = parser.parse_args(arguments)
    told.table = told.table or table_file(told.model)
    told.budgets = sorted({STEPS, *told.budgets})
    result, intervals = {}, {}
    for ground in grounds(told, planned(told)):
        sets, cfg = Ways(ground).sets(), f"cfg {ground.cfg:g}"
        result[cfg] = {name: judged.row for name, judged in sets.items()}
        intervals[cfg] = intervals_of(sets, ground.judge.other["features"].cpu(), bool(told.peers))
    show(result)
    summary, name = keys_of(result, intervals), "-".join([f"quality-{told.model}", *(f"cfg{cfg:g}" for cfg in told.cfg if tuple(told.cfg) != CFGS)])
    write_result(name, dict(weights=name_of(weights_file(told.model)), judge=ground.judge.name, count=told.count, **summary, rows=result))
    plot(result, RESULTS / f"{name}.png")
    return summary


def planned(told) -> int:
    """Network evaluations of a run from nothing, at most: the judging takes none, a search remembers calls that this counts anew."""
    sets = 2 * told.count * TEACHER_STEPS + told.validation * TEACHER_STEPS + told.count * (sum(told.budgets) + 2 * STEPS)
    search = sum(len(SOLVERS) * 10 * told.validation * steps for steps in told.budgets) + STEPS * min(64, told.validation) * (ROUNDS * STEPS * LEVELS + TRIALS)
    one = round(sets + search)
    peers = len(methods.NAMES) + 1
    trainings = peers * told.seeds + 5 * max(told.best, told.seeds)
    trained = trainings * (told.peers + STEPS * told.count) + peers * 0.75 * told.peers + 2 * told.bound + told.lcm + 2 * STEPS * told.count
    return round(sum(one * (1 if cfg == 1 else 2) + (trained if told.peers else 0) for cfg in told.cfg))


def intervals_of(sets: dict[str, Judged], other: torch.Tensor, peers: bool) -> dict[str, tuple[float, float]]:
    """Key of `keys_of` -> 95 % interval: of the plain evaluations that the pack's tables match, and with peers of the largest ratio of a table at their cost to
    one of them; other: the teacher's features."""
    made = lambda name: [sets[one].made for one in seeds_of(sets, name)]
    plain = {steps: judged.made for steps, judged in nearest_of(sets, lambda judged: judged.row["fd"]).items()}
    packs = {"": MTEO, "guided_": GUIDED}
    found = {f"{name}plain_steps_matched": matched_interval(sets[row].made, plain, other) for name, row in packs.items() if row in sets}
    for analytic in ("", methods.ANALYTIC) if peers else ():
        largest = largest_ratios(made(EQUAL + analytic), [made(name) for name in rivals(sets, analytic)], other)
        found |= {f"vs_peers_{measure}{analytic.replace(', ', '_')}": interval for measure, interval in largest.items()}
    return found


def rivals(rows: dict, analytic: str) -> list[str]:
    """The peers of the table where nobody, or everybody, has the first step for nothing."""
    names = [name for name in (*methods.NAMES, methods.SEEING) if name.endswith(methods.ANALYTIC) == bool(analytic) and seeds_of(rows, name)]
    return names + [FREE.removesuffix(f", {STEPS}")] * bool(analytic)


def seeds_of(rows: dict, name: str) -> list[str]:
    """The names of its rows, one for each training seed."""
    return [row for row in rows if row == f"{name}, {STEPS}" or row.startswith(f"{name}, {STEPS}, seed ")]


def over_seeds(rows: dict, name: str, measure: str) -> float:
    """Mean of its training seeds."""
    return statistics.fmean(rows[row][measure] for row in seeds_of(rows, name))


def plain_of(rows: dict, called: str = "plain ") -> dict:
    """Rows, or sets, of the best named plain samplers by their number of evaluations."""
    return {int(name.split()[1].rstrip(",")): row for name, row in rows.items() if name.startswith(called) and name != FREE}


def nearest_of(rows: dict, fd=lambda row: row["fd"]) -> dict:
    """As `plain_of`, of the sampler with the least error and Euler the one that is nearer as a set."""
    euler = plain_of(rows, "Euler ")
    return {steps: min((row, euler.get(steps, row)), key=fd) for steps, row in plain_of(rows).items()}


def keys_of(result: dict, intervals: dict) -> dict:
    """The worse cfg of each: recall ÷ the teacher's, spectrum and diversity of MTEO, the largest number of plain evaluations that it, with all fewer ones, is
    not behind in Fréchet distance (0: of none), with interval; with peers the largest ratio of a table at their cost to one of them (means over seeds), none
    of which has its first step for nothing, the same where all have, each with its interval, and the share of the way from the plain sampler to
    the nearest of SFD's."""
    def of_set(row: dict, teacher: dict, nearest: dict[int, dict]) -> dict:
        return dict(
            plain_steps_matched=matched(row["fd"], {steps: other["fd"] for steps, other in nearest.items()}),
            diversity=row["diversity"] / teacher["diversity"],
            recall=row["recall"] / teacher["recall"],
            spectrum=row["spectrum"],
            fd=row["fd"],
        )

    keys = {}
    for cfg, rows in result.items():
        mteo, teacher, free = rows[MTEO], rows["teacher"], rows[FREE]
        plain, nearest = plain_of(rows), nearest_of(rows)
        keys[cfg] = own = of_set(mteo, teacher, nearest) | dict(fd_floor=teacher["fd"], fd_free_3=free["fd"])
        if guided := rows.get(GUIDED):
            own |= {f"guided_{key}": value for key, value in of_set(guided, teacher, nearest).items()}
        if bounds := [row for name, row in rows.items() if name.startswith(SFD)]:
            for key, measure in (("fd", "fd"), ("error", "error pooled")):
                for analytic in ("", methods.ANALYTIC):
                    own[f"vs_peers_{key}{analytic.replace(', ', '_')}"] = max(
                        over_seeds(rows, EQUAL + analytic, measure) / over_seeds(rows, name, measure) for name in rivals(rows, analytic)
                    )
                start, bound = plain[STEPS][measure], min(row[measure] for row in bounds)
                own |= {f"{name}gap_closed_{key}": (start - row[measure]) / (start - bound) for name, row in (("", mteo), ("guided_", guided)) if row}
    lowest = ("plain_steps_matched", "plain_steps_matched_low", "plain_steps_matched_high", "diversity", "recall", "gap_closed_fd", "gap_closed_error")
    for cfg, own in keys.items():
        own |= {f"{name}_{end}": bound for name, interval in intervals[cfg].items() for end, bound in zip(("low", "high"), interval, strict=True)}
    names = [name for name in next(iter(keys.values())) if name in (*lowest, "spectrum") or name.startswith("vs_peers")]
    worst = {name: (min if name in lowest else max)(own[name] for own in keys.values()) for name in names}
    return {name: round(value, 4) for name, value in worst.items()} | {
        "by_cfg": {cfg: {name: round(value, 4) for name, value in own.items()} for cfg, own in keys.items()}
    }


def show(result: dict) -> None:
    for cfg, rows in result.items():
        print(f"\n{cfg}" + " " * 36 + " ".join(f"{name:>13}" for name in rows["teacher"]))
        for name, row in rows.items():
            print(f"  {name:40} " + " ".join(f"{value:13.4f}" for value in row.values()))


def plot(result: dict, path: Path) -> None:
    """Fréchet distance above the teacher's own and error of all that takes three evaluations (cfg 1) or pairs of them, the best plain samplers of more as
    lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    shown = {
        cfg: {
            name.removesuffix(f", {STEPS}"): row
            for name, row in rows.items()
            if name.endswith(f", {STEPS}") or name.startswith(f"plain {STEPS}, ") or name == GUIDED
        }
        for cfg, rows in result.items()
    }
    heights = [1 + 0.24 * len(rows) for rows in shown.values()]
    figure, axes = plt.subplots(len(result), 2, figsize=(12, sum(heights)), layout="constrained", squeeze=False, height_ratios=heights)
    for line, (cfg, rows) in zip(axes, shown.items(), strict=True):
        for axis, (measure, floor, label) in zip(
            line,
            (("fd", result[cfg]["teacher"]["fd"], "Fréchet distance above the teacher's own"), ("error pooled", 0.0, "error to the teacher (nRMSE)")),
            strict=True,
        ):
            values = {name: max(row[measure] - floor, 1e-4) for name, row in sorted(rows.items(), key=lambda entry: -entry[1][measure])}
            colours = ["tab:red" if name.startswith("MTEO") else "black" if name.startswith((SFD, LCM)) else "tab:blue" for name in values]
            axis.scatter(list(values.values()), list(values), c=colours, zorder=2)
            more = {steps: row for steps, row in plain_of(result[cfg]).items() if steps != STEPS}
            for number, (steps, row) in enumerate(more.items()):
                at = max(row[measure] - floor, 1e-4)
                axis.axvline(at, color="0.7", linestyle="--", linewidth=1, zorder=1)
                axis.text(at, 1 + 0.025 * (number % 3), str(steps), transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=8, color="0.4")
            axis.set(xlabel=label, xscale="log")
            axis.xaxis.set(
                major_locator=ticker.LogLocator(subs=(1,) if measure == "fd" else (1, 2, 5)),
                major_formatter=ticker.StrMethodFormatter("{x:g}"),
                minor_formatter=ticker.NullFormatter(),
            )
            axis.tick_params(axis="y", labelsize=8)
            axis.grid(alpha=0.3, axis="y")
        line[0].set_title(
            f"{cfg}, {STEPS} {'evaluations' if cfg == 'cfg 1' else 'pairs'} (dashed: plain with more; black: other weights)", loc="left", pad=30, fontsize=10
        )
    figure.savefig(path, dpi=90)
    plt.close(figure)
