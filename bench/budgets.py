"""Quality over the number of evaluations: the best named plain sampler, GS, EPD, tables and SFD, each made anew for every number (cfg 1) or number of pairs,
judged as `quality` judges.

GS, EPD and tables have their first step for nothing and 60,000 evaluations to be trained with, SFD has more. What `quality` made of the same weights, cfg and
numbers is taken from there. The result file keeps what earlier runs found with the same weights, judge and numbers, so that it may be filled in parts.
"""
from reference.objects import weights_file

from .ground import BOUND, grounds, parser_of, teacher_planned
from .intervals import matched
from .judge import Judged
from .parts import RESULTS, name_of, rows_before, write_result
from .peers.methods import ANALYTIC
from .ways import EQUAL, SFD, Ways

WAYS = {"plain": "plain, best named", "GS": "GS" + ANALYTIC, "EPD": "EPD" + ANALYTIC, "table": EQUAL + ANALYTIC, "SFD": SFD}
PLAIN, TABLE, RIVALS = WAYS["plain"], WAYS["table"], [WAYS[way] for way in ("plain", "GS", "EPD")]
COLOURS = dict(zip(WAYS.values(), ("0.5", "tab:blue", "tab:green", "tab:red", "black"), strict=True))
MEASURES = {"fd": "Fréchet distance above the teacher's own", "error pooled": "error to the teacher (nRMSE)"}


def run(arguments: list[str]) -> dict:
    parser = parser_of("budgets", __doc__, (1.0, 4.0, 7.0))
    parser.add_argument("--bound", **BOUND)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8, 10], help="evaluations (cfg 1), or pairs of them")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of sampling; the file keeps the others of the same weights and numbers")
    told = parser.parse_args(arguments)
    name, numbers = f"budgets-{told.model}", ("count", "validation", "peers", "bound", "pairs")
    about = dict(weights=name_of(weights_file(told.model))) | {key: getattr(told, key) for key in numbers}
    names = ["teacher", *(WAYS[way] for way in told.ways if told.bound or way != SFD)]
    rows = {}
    for ground in grounds(told, planned(told)):
        about["judge"] = ground.judge.name
        for steps in sorted(told.steps):
            ways = Ways(ground, steps)
            for way in names:
                made = {measure: round(value, 4) for measure, value in set_of(ways, way).row.items()}
                rows = rows_before(name, about)  # anew: another process may have written
                row = rows.setdefault(f"cfg {ground.cfg:g}", {}).setdefault(str(steps), {})
                row[way] = made
                write_result(name, about | keys_of(rows) | dict(rows=rows))
            shown = "  ".join(f"{way} {own['fd']:.4f}/{own['error pooled']:.4f}" for way, own in row.items())
            print(f"cfg {ground.cfg:g}, {steps}: {shown}", flush=True)
    plot(rows, RESULTS / f"{name}.png")
    return keys_of(rows)


def planned(told) -> int:
    """Network evaluations of a run from nothing, at most; a search remembers calls that this counts anew."""
    trained = {"table": told.peers, "GS": 1.75 * told.peers, "EPD": 1.75 * told.peers, "SFD": told.bound}  # the peers' rates are found with three quarters more
    each = sum(54 * told.validation * (2 * steps + 1) + len(told.ways) * steps * told.count for steps in told.steps)
    training = len(told.steps) * sum(trained.get(way, 0) for way in told.ways)
    return round(sum((teacher_planned(told) + each) * (1 if cfg == 1 else 2) + training for cfg in told.cfg))


def set_of(ways: Ways, way: str) -> Judged:
    """What it draws, the teacher's own set among them."""
    if way == "teacher":
        return ways.teacher_set()
    if way == PLAIN:
        [plain] = ways.plain_set(ways.steps).values()
        return plain
    if way == TABLE:
        return ways.table_set(ANALYTIC, 0)
    return ways.bound_set() if way == SFD else ways.peer_set(way, 0)


def keys_of(rows: dict) -> dict:
    """The largest ratios of a table's Fréchet distance and error to those of GS, EPD and the plain sampler at any number and cfg; for each cfg and number the
    plain evaluations that a table, with all fewer ones, is not behind in Fréchet distance. Of what is there: a key whose rows are not is left out."""
    together = [(row[TABLE], row[rival]) for of_cfg in rows.values() for row in of_cfg.values() for rival in RIVALS if TABLE in row and rival in row]
    keys = {f"worst_{measure.split()[0]}": round(max(table[measure] / rival[measure] for table, rival in together), 4) for measure in MEASURES if together}
    matches = {}
    for cfg, of_cfg in rows.items():
        plain = {int(steps): row[PLAIN]["fd"] for steps, row in of_cfg.items() if PLAIN in row}
        matches[cfg] = {steps: matched(row[TABLE]["fd"], plain) for steps, row in of_cfg.items() if TABLE in row}
    return keys | {"plain_steps_matched": matches}


def plot(rows: dict, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), len(MEASURES), figsize=(11, 3.4 * len(rows)), layout="constrained", squeeze=False)
    for line, (cfg, of_cfg) in zip(axes, rows.items(), strict=True):
        for axis, (measure, label) in zip(line, MEASURES.items(), strict=True):
            for way, colour in COLOURS.items():
                made = {int(steps): row[way][measure] - (row["teacher"][measure] if measure == "fd" else 0) for steps, row in of_cfg.items() if way in row}
                if made:
                    axis.plot(sorted(made), [max(made[steps], 1e-4) for steps in sorted(made)], "o-", color=colour, label=way.removesuffix(ANALYTIC))
            axis.set(yscale="log", ylabel=label, xlabel="evaluations" if cfg == "cfg 1" else "pairs of evaluations", title=cfg, xticks=sorted(map(int, of_cfg)))
            axis.grid(alpha=0.3, which="both")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)
