"""Peers of the quality bench start as the solvers that ComfyUI has, and can be told another time."""
import pytest
import torch


@pytest.fixture(scope="module")
def session_of(comfyui_root):
    from bench.parts import parts

    return parts(1, 2, False).session


@pytest.mark.parametrize("base", ["dpmpp_2m", "ipndm"])
def test_with_nothing_learned_a_peer_is_its_solver(session_of, base):
    from bench.parts import named_grids, solver_tableau
    from bench.peers.coefficients import Freedom, parameters_of, table_of

    def work(session):
        sigmas = named_grids(session.sampling, 4)["sgm_uniform"]
        for rows in ("solver", "added", "weights") if base == "ipndm" else ("solver", "added"):
            freedom = Freedom(base, rows=rows, told=True)
            grid, made, told = table_of(freedom, parameters_of(freedom, sigmas.tolist()), sigmas.tolist())
            assert torch.stack(made).allclose(solver_tableau(base, sigmas, session.sampling).matrix, rtol=1e-4, atol=1e-4)
            assert all([float(one) for one in levels] == pytest.approx(sigmas[:-1].tolist()) for levels in (grid, told))

    session_of(work)


def test_a_told_time_is_the_networks_and_has_a_gradient(session_of):
    from bench.peers.lab import Lab, telling, time_of
    from mteo.teacher import Trajectories

    def work(session):
        sampling, lab = session.sampling, Lab(session)
        for sigma in sampling.sigmas[[0, 300, 999]]:
            assert float(time_of(sampling, sigma)) == pytest.approx(float(sampling.timestep(sigma)), abs=1e-2)
        start = session.start(session.noise(2, 1), torch.tensor(3.0))
        pairs = Trajectories(start, start[:, :0], start, torch.tensor([0, 1]), torch.ones(2, dtype=torch.float64))
        told = torch.tensor(2.0, requires_grad=True)
        answer = lab.denoise(start, 3.0, pairs, told)
        assert torch.autograd.grad(answer.square().sum(), told)[0].abs() > 0
        assert not torch.allclose(answer, lab.denoise(start, 3.0, pairs)) and lab.spent == 8
        with telling(sampling, torch.tensor([3.0, 2.0])):  # each row its own, for both branches of a pair
            assert sampling.timestep(torch.ones(4)).tolist() == [float(time_of(sampling, torch.tensor(one))) for one in (3.0, 2.0, 3.0, 2.0)]
        assert float(sampling.timestep(torch.tensor(3.0))) == pytest.approx(float(time_of(sampling, torch.tensor(3.0))), abs=1)

    session_of(work)
