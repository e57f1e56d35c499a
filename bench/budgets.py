"""Quality over the number of evaluations: the best named plain sampler, GS, EPD, tables and SFD, each made anew for every number (cfg 1) or number of pairs, judged as `quality` judges.

GS, EPD and tables have their first step for nothing and 60,000 evaluations to be trained with, SFD has more. What `quality` made of the same weights, cfg and numbers is taken from there.
"""
from reference.objects import weights_file

from .ground import grounds, parser_of
from .parts import RESULTS, TEACHER_STEPS, name_of, write_result
from .peers.methods import ANALYTIC
from .ways import EQUAL, SFD, Ways, matched

PEERS = ("GS" + ANALYTIC, "EPD" + ANALYTIC)
PLAIN, MTEO = "plain, best named", EQUAL + ANALYTIC
COLOURS = {PLAIN: "0.5", PEERS[0]: "tab:blue", PEERS[1]: "tab:green", MTEO: "tab:red", SFD: "black"}
MEASURES = {"fd": "Fréchet distance above the teacher's own", "error pooled": "error to the teacher (nRMSE)"}


def run(arguments: list[str]) -> dict:
    parser = parser_of("budgets", __doc__, (1.0, 4.0, 7.0))
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8, 10], help="evaluations (cfg 1), or pairs of them")
    told = parser.parse_args(arguments)
    rows = {}
    for ground in grounds(told, planned(told)):
        rows[f"cfg {ground.cfg:g}"] = made = {}
        for steps in sorted(told.steps):
            made[steps] = rows_of(Ways(ground, steps))
            print(f"cfg {ground.cfg:g}, {steps}: " + "  ".join(f"{name} {row['fd']:.4f}/{row['error pooled']:.4f}" for name, row in made[steps].items()), flush=True)
    summary, name = keys_of(rows), f"budgets-{told.model}"
    write_result(name, dict(weights=name_of(weights_file(told.model)), count=told.count, **summary, rows=rows))
    plot(rows, RESULTS / f"{name}.png")
    return summary


def planned(told) -> int:
    """Network evaluations of a run from nothing, at most; a search remembers calls that this counts anew."""
    once = (2 * told.count + told.validation) * TEACHER_STEPS + (told.pairs + 128) * TEACHER_STEPS
    each = sum(54 * told.validation * (2 * steps + 1) + (len(COLOURS) + 0.75) * steps * told.count for steps in told.steps)
    trained = len(told.steps) * ((1 + 1.75 * len(PEERS)) * told.peers + told.bound)
    return round(sum((once + each) * (1 if cfg == 1 else 2) + trained for cfg in told.cfg))


def rows_of(ways: Ways) -> dict[str, dict[str, float]]:
    """Measures by way."""
    [plain] = ways.plain_set(ways.steps).values()
    made = {"teacher": ways.teacher_set(), PLAIN: plain, MTEO: ways.table_set(ANALYTIC, 0)} | {name: ways.peer_set(name, 0) for name in PEERS}
    return {name: judged.row for name, judged in (made | ({SFD: ways.bound_set()} if ways.told.bound else {})).items()}


def keys_of(rows: dict) -> dict:
    """The largest ratios of a table's Fréchet distance and error to those of GS, EPD and the plain sampler at any number and cfg; and for each cfg and number the plain evaluations that a table,
    with all fewer ones, is not behind in Fréchet distance."""
    largest = {f"worst_{measure.split()[0]}": round(max(row[MTEO][measure] / row[name][measure] for made in rows.values() for row in made.values() for name in (PLAIN, *PEERS)), 4) for measure in MEASURES}
    plain = {cfg: {steps: row[PLAIN]["fd"] for steps, row in made.items()} for cfg, made in rows.items()}
    return largest | {"plain_steps_matched": {cfg: {steps: matched(row[MTEO]["fd"], plain[cfg]) for steps, row in made.items()} for cfg, made in rows.items()}}


def plot(rows: dict, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), len(MEASURES), figsize=(11, 3.4 * len(rows)), layout="constrained", squeeze=False)
    for line, (cfg, made) in zip(axes, rows.items(), strict=True):
        for axis, (measure, label) in zip(line, MEASURES.items(), strict=True):
            for name in (name for name in COLOURS if name in next(iter(made.values()))):
                values = [max(row[name][measure] - (row["teacher"][measure] if measure == "fd" else 0), 1e-4) for row in made.values()]
                axis.plot(list(made), values, "o-", color=COLOURS[name], label=name.removesuffix(ANALYTIC))
            axis.set(yscale="log", ylabel=label, xlabel="evaluations" if cfg == "cfg 1" else "pairs of evaluations", title=cfg, xticks=list(made))
            axis.grid(alpha=0.3, which="both")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)
