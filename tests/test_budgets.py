"""The summary of `bench budgets` on rows whose answer is known, with parts of them missing, and what its file and the benches' trainings keep."""
from functools import partial

import pytest
import torch


@pytest.fixture
def budgets(comfyui_root):
    from bench import budgets

    return budgets


def of(fd: float, error: float) -> dict[str, float]:
    return {"fd": fd, "error pooled": error}


def test_ratios_are_of_what_stands_side_by_side_and_matches_of_all_fewer_evaluations(budgets):
    plain = {"2": of(0.1, 0.8), "3": of(0.02, 0.6), "4": of(0.04, 0.5), "5": of(0.01, 0.4)}
    rows = {"cfg 1": {steps: {budgets.PLAIN: row} for steps, row in plain.items()}, "cfg 4": {"2": {budgets.PLAIN: of(1.0, 1.0)}}}
    assert budgets.keys_of(rows) == {"plain_steps_matched": {"cfg 1": {}, "cfg 4": {}}}
    rows["cfg 1"]["2"] |= {budgets.TABLE: of(0.03, 0.4), budgets.WAYS["GS"]: of(0.04, 0.5)}
    rows["cfg 1"]["3"] |= {budgets.TABLE: of(0.01, 0.3), budgets.WAYS["SFD"]: of(0.001, 0.1)}  # a bound, and no rival
    keys = budgets.keys_of(rows)
    assert keys["worst_fd"] == 0.75 and keys["worst_error"] == 0.8
    assert keys["plain_steps_matched"] == {"cfg 1": {"2": 2, "3": 5}, "cfg 4": {}}  # 4 is behind .03, but 3 is not


def test_rows_of_other_weights_or_numbers_are_not_kept(comfyui_root, tmp_path, monkeypatch):
    from bench import parts

    monkeypatch.setattr(parts, "RESULTS", tmp_path)
    assert parts.rows_before("one", dict(weights="a", count=8)) == {}
    parts.write_result("one", dict(weights="a", count=8, rows={"cfg 1": {"2": {}}}))
    assert parts.rows_before("one", dict(weights="a", count=8)) == {"cfg 1": {"2": {}}}
    assert parts.rows_before("one", dict(weights="b", count=8)) == parts.rows_before("one", dict(weights="a", count=9)) == {}


def test_a_training_is_made_once_and_read_as_it_was(comfyui_root, tmp_path):
    from bench.parts import table_file
    from bench.trained import Trained
    from mteo.embeddings import load_embeddings

    made = dict(sigmas=[14.6, 1.0, 0.0], learned={"rows": torch.randn(2, 3), "inner": torch.tensor(0.1)}, error=0.3, rate=0.03, spent=60_000)
    runs = []
    make = lambda seed: runs.append(seed) or made
    for seed in (0, 1, 0, 1):
        kept = Trained(tmp_path).peer(f"GS-{seed}", partial(make, seed))
        assert {name: torch.equal(value, made["learned"][name]) for name, value in kept["learned"].items()} == {"rows": True, "inner": True}
        assert {name: kept[name] for name in ("sigmas", "error", "rate", "spent")} == {name: made[name] for name in ("sigmas", "error", "rate", "spent")}
    assert runs == [0, 1]
    table = [Trained(tmp_path).table("equal", partial(load_embeddings, table_file("unet"))) for _ in range(2)][1].tables[3]
    own = load_embeddings(table_file("unet")).tables[3]
    assert all(torch.equal(rows, own.offsets[site]) for site, rows in table.offsets.items()) and table.offsets.keys() == own.offsets.keys()
