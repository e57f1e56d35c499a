"""The summary of `bench seeds` on sets whose distances are known."""
import pytest
import torch


def test_ratios_are_of_means_over_trainings_and_the_worst_is_held_against_the_best(comfyui_root):
    from bench.intervals import Made
    from bench.judge import Judged
    from bench.seeds import keys_of

    noise = lambda seed: torch.randn(400, 3, generator=torch.Generator().manual_seed(seed))

    def trained(fd: float, error: float) -> Judged:
        return Judged({"fd": fd, "error pooled": error}, Made(noise(2) + fd**0.5, torch.full((400,), error**2)))

    tables = [trained(0.8, 0.2), trained(1.2, 0.3)]
    peers = {"near in error": [trained(4.0, 0.4), trained(4.0, 0.6)], "near as a set": [trained(1.0, 1.0), trained(3.0, 1.0)]}
    keys = keys_of(tables, peers, noise(1))
    assert (keys["vs_peers_fd"], keys["nearest_fd"], keys["worst_to_best_fd"]) == (0.5, "near as a set", 1.2)
    assert (keys["vs_peers_error"], keys["nearest_error"], keys["worst_to_best_error"]) == (0.5, "near in error", 0.75)
    assert keys["vs_peers_error_low"] == pytest.approx(0.2 / 0.6, abs=1e-3) and keys["vs_peers_error_high"] == pytest.approx(0.3 / 0.4, abs=1e-3)
    assert keys["vs_peers_fd_low"] < 0.5 < keys["vs_peers_fd_high"]
