"""Is a table ahead of the nearest peers whatever its training drew? A table at a peer's cost and peers, each trained several times, each training with another
seed; judged as `quality` judges, whose stages it shares."""
import statistics

import torch

from reference.objects import weights_file

from .ground import NUMBERS, grounds, parser_of, teacher_planned
from .heldout import CFGS, STEPS
from .intervals import largest_ratios
from .judge import Judged
from .parts import name_of, rounded, rows_before, write_result
from .peers import methods
from .ways import EQUAL, Ways, of_seed

DRAWN = [name for name in methods.NAMES if name not in methods.SURE]
NEAREST = [name + methods.ANALYTIC for name in ("GS", "S4S-Alt", "DyWeight")]
MEASURES = {"fd": "fd", "error": "error pooled"}


def run(arguments: list[str]) -> dict:
    parser = parser_of("seeds", __doc__, CFGS)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each")
    parser.add_argument("--rivals", nargs="+", choices=DRAWN, default=NEAREST, help="peers; default: the nearest to the UNet's tables in `quality`")
    told = parser.parse_args(arguments)
    if len(kinds := {rival.endswith(methods.ANALYTIC) for rival in told.rivals}) > 1:
        parser.error("--rivals has peers with their first step for nothing and others: name those of one kind.")
    analytic = methods.ANALYTIC if kinds.pop() else ""
    name = f"seeds-{told.model}" + ("" if told.peers == NUMBERS["peers"] else f"-{told.peers}")
    about = dict(weights=name_of(weights_file(told.model))) | {key: getattr(told, key) for key in ("count", "peers", "pairs")}
    by_cfg = {}
    for ground in grounds(told, planned(told)):
        about["judge"], ways, seeds = ground.judge.name, Ways(ground), range(told.seeds)
        tables, peers = [ways.table_set(analytic, seed) for seed in seeds], {rival: [ways.peer_set(rival, seed) for seed in seeds] for rival in told.rivals}
        keys = keys_of(tables, peers, ground.judge.other["features"].cpu())
        rows = {of_seed(way, seed): one.row for way, made in ({EQUAL + analytic: tables} | peers).items() for seed, one in enumerate(made)}
        by_cfg = rows_before(name, about) | {f"cfg {ground.cfg:g}": keys | dict(trainings=rounded(rows))}
        write_result(name, about | dict(rows=by_cfg))
        for row, measures in rows.items():
            print(f"cfg {ground.cfg:g}  {row:40}" + "  ".join(f"{key} {measures[key]:.4f}" for key in MEASURES.values()), flush=True)
    return {cfg: {key: value for key, value in of_cfg.items() if key != "trainings"} for cfg, of_cfg in by_cfg.items()}


def planned(told) -> int:
    """Network evaluations of a run from nothing, at most; a peer's rates are found with three quarters more."""
    trainings = told.seeds * (1 + len(told.rivals))
    pictures = teacher_planned(told) + trainings * STEPS * told.count
    return round(sum((trainings + 0.75 * len(told.rivals)) * told.peers + pictures * (1 if cfg == 1 else 2) for cfg in told.cfg))


def keys_of(tables: list[Judged], peers: dict[str, list[Judged]], other: torch.Tensor) -> dict:
    """A list has one for each training seed; other: features of the teacher's pictures of other noise. `vs_peers`: the largest ratio to a peer, of means over
    seeds, its 95 % interval from drawing pictures and seeds anew, and to which; `worst_to_best`: the largest of the worst table to the best training of a
    peer."""
    keys, made = {}, lambda sets: [one.made for one in sets]
    intervals = largest_ratios(made(tables), [made(sets) for sets in peers.values()], other)
    for key, measure in MEASURES.items():
        own, theirs = [one.row[measure] for one in tables], {name: [one.row[measure] for one in sets] for name, sets in peers.items()}
        ratios = {statistics.fmean(own) / statistics.fmean(values): name for name, values in theirs.items()}
        worst = max(max(own) / min(values) for values in theirs.values())
        low, high = intervals[key]
        numbers = {f"vs_peers_{key}": max(ratios), f"vs_peers_{key}_low": low, f"vs_peers_{key}_high": high, f"worst_to_best_{key}": worst}
        keys |= {name: round(value, 4) for name, value in numbers.items()} | {f"nearest_{key}": ratios[max(ratios)]}
    return keys
