"""Peers of the quality bench start as the solvers that ComfyUI has, and can be told another time."""
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

ANALYTIC = ", analytic"
NAMES = ("LD3", "GS", "S4S-Alt", "DyWeight", "PAS", "EPD", "AMED", *(name + ANALYTIC for name in ("LD3", "GS", "S4S-Alt", "DyWeight", "EPD", "AMED")))


@pytest.fixture(scope="module")
def session_of(comfyui_root):
    from bench.parts import parts

    return parts(1, 2, False).session


@pytest.fixture(scope="module")
def pairs(comfyui_root):
    from bench.parts import parts, teacher_pairs

    own = parts(1, 8, False)
    return own, teacher_pairs(own, 16, 1.0, 1, 12), teacher_pairs(own, 16, 1.0, 2, 12)


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_gets_nearer_to_the_teacher_at_three_evaluations(pairs, name):
    from bench.parts import named_grids
    from bench.peers.lab import Lab
    from bench.peers.methods import method
    from bench.peers.training import error_of, fit

    own, train, held_out = pairs

    def work(session):
        lab = Lab(session)
        peer = method(lab, name, named_grids(session.sampling, 3 + name.endswith(ANALYTIC))["sgm_uniform"].tolist())
        with torch.no_grad():
            peer.sample(peer.zero, held_out, held_out.start)
        assert lab.spent == 3 * len(held_out)
        before = error_of(lab, peer.sample, peer.zero, held_out)
        learned, error = fit(lab, peer.sample, peer.zero, train, held_out, 400, 0, 0.03, batch=8, **peer.training)
        assert error < before and set(learned) == set(peer.zero) and 400 <= lab.spent - 3 * len(held_out) < 450

    own.session(work)


@pytest.mark.parametrize("name", ["GS", "GS, analytic", "EPD", "EPD, analytic"])
@pytest.mark.parametrize("steps", [2, 4, 5, 8])
def test_a_peer_takes_as_many_evaluations_as_it_is_told(pairs, name, steps):
    from bench.parts import named_grids
    from bench.peers.lab import Lab
    from bench.peers.methods import method

    own, _, held_out = pairs

    def work(session):
        lab, part = Lab(session), held_out.part(slice(0, 4))
        peer = method(lab, name, named_grids(session.sampling, steps + name.endswith(ANALYTIC))["sgm_uniform"].tolist())
        with torch.no_grad():
            assert peer.sample(peer.zero, part, part.start).isfinite().all()
        assert lab.spent == steps * len(part)

    own.session(work)


def test_a_training_that_betters_nothing_keeps_its_start(pairs):
    from bench.parts import named_grids
    from bench.peers.lab import Lab
    from bench.peers.methods import method
    from bench.peers.training import error_of, fit

    own, train, held_out = pairs

    def work(session):
        lab = Lab(session)
        peer = method(lab, "GS", named_grids(session.sampling, 3)["sgm_uniform"].tolist())
        learned, error = fit(lab, peer.sample, peer.zero, train, held_out, 200, 0, 100.0, batch=8, **peer.training)
        assert error == error_of(lab, peer.sample, peer.zero, held_out) and all(torch.equal(value, peer.zero[name]) for name, value in learned.items())

    own.session(work)


def test_a_peer_that_is_trained_by_the_networks_view_looks_more_alike_to_it(pairs):
    """What is chosen in the second half is by the view; its evaluations count."""
    from bench.parts import named_grids
    from bench.peers.lab import Lab
    from bench.peers.methods import SEEING, method
    from bench.peers.training import fit, score_of

    own, train, held_out = pairs

    def work(session):
        lab = Lab(session)
        peer = method(lab, SEEING, named_grids(session.sampling, 4)["sgm_uniform"].tolist())
        score = lambda learned, view: score_of(lab, peer.sample, learned, held_out, view)
        learned, chosen = fit(lab, peer.sample, peer.zero, train, held_out, 800, 0, 0.03, batch=8, **peer.training)
        assert 800 <= lab.spent < 900 and chosen == pytest.approx(score(learned, peer.training["view"]))
        unlike = lambda learned: score(learned, 1.0) - score(learned, 0.0)
        assert unlike(learned) < 0.9 * unlike(peer.zero)

    own.session(work)


def test_parallel_steps_are_as_wide_as_the_evaluations_allow(comfyui_root):
    from bench.peers.parallel import places_of

    assert [places_of(count, False) for count in (2, 3, 4, 5, 6)] == [[1], [2], [2, 0], [2, 1], [2, 2]]
    assert [places_of(count, True) for count in (2, 3, 4, 5, 6)] == [[2], [2, 0], [2, 1], [2, 2], [2, 2, 0]]


@pytest.mark.parametrize("name", ["GS", "GS, analytic", "EPD", "GITS", "DPM-Solver-v3"])
def test_a_training_takes_no_more_than_its_budget(pairs, name):
    from bench.peers import methods, parallel
    from bench.peers.methods import ends_of, train

    own, known, held_out = pairs
    plain = {steps: {solver: {"sgm_uniform": 1.0, "karras": 2.0} for solver in ("euler", "dpmpp_2m", "ipndm")} for steps in (3, 4)}
    trained = train(own, name, known, held_out, plain, budget := 1200, 0)
    assert set(methods.NAMES) == {*NAMES, "GITS", "DPM-Solver-v3"}
    assert trained["spent"] < budget + 200 and ends_of(own, name, trained, held_out).shape == held_out.end.shape
    if name == "EPD":  # from a long step's far places nothing is learned
        assert trained["shift"] == parallel.SHIFTS[-1] and trained["error"] < 1
        assert train(own, name, known, held_out, plain, budget, 1, trained)["shift"] == trained["shift"]


def test_fine_tuning_changes_a_private_copy_only(pairs):
    from bench.parts import named_grids
    from bench.peers import sfd
    from bench.peers.lab import Lab

    own, train, held_out = pairs
    before = {name: value.clone() for name, value in own.model.model.diffusion_model.state_dict().items()}

    def work(session):
        lab, sigmas = Lab(session), named_grids(session.sampling, 3)["sgm_uniform"].tolist()
        states = train.end[:, None].expand(-1, 2, -1, -1, -1)  # any target will do here
        for analytic in (False, True):
            weights, _, last = sfd.train(lab, sigmas, replace(train, states=states), held_out, 200, 0, analytic, batch=8)
            assert set(weights) == set(last) and sfd.sample(lab, sigmas, analytic, held_out, held_out.start).isfinite().all()
        assert set(weights) <= set(before) and any(not torch.equal(value, before[name]) for name, value in session.network.state_dict().items())

    own.session(work)
    assert all(torch.equal(value, before[name]) for name, value in own.model.model.diffusion_model.state_dict().items())


def test_low_rank_updates_start_as_the_plain_answer_to_the_prompt_alone(pairs):
    """Whatever the pairs' cfg, one evaluation a step; what is trained makes the teacher's next state end where the student ends, and leaves the weights."""
    from bench.peers import lcm
    from bench.peers.lab import Lab

    own, train, held_out = pairs
    guided = replace(held_out, guidance=torch.full_like(held_out.guidance, 4.0))

    def work(session):
        lab, before = Lab(session), {name: value.clone() for name, value in session.network.state_dict().items()}
        zero, sigmas = lcm.parameters_of(session.network), [lab.sigma_max, 3.0, 0.0]
        sample = lambda values, grid=sigmas: lcm.sample(lab, grid, values, guided, guided.start, torch.Generator().manual_seed(0))
        end = sample(zero, [lab.sigma_max, 0.0])
        with torch.no_grad():  # without a gradient attention is another kernel
            assert end.equal(lab.denoise(guided.start, torch.full((16,), lab.sigma_max), held_out))
        lab.spent = 0
        assert sample(zero).isfinite().all() and lab.spent == 2 * len(guided)
        made = lcm.train(lab, replace(train, guidance=guided.guidance[: len(train)]), 800, 0, batch=8)
        assert set(made) == set(zero) and all(made[name].abs().max() > 0 for name in made if name.endswith(".up"))
        assert not sample(made).allclose(sample(zero))
        assert all(torch.equal(value, before[name]) for name, value in session.network.state_dict().items())

    own.session(work)


def test_the_shortest_path_weighs_later_steps_more():
    from bench.peers.gits import shortest_path

    cost = torch.full((4, 4), torch.inf, dtype=torch.float64)
    cost[0, 1], cost[1, 3], cost[0, 2], cost[2, 3] = 1.0, 3.0, 3.0, 1.5  # 4.0 against 4.5 where all weigh the same
    assert shortest_path(cost, [9.0, 3.0, 1.0, 0.0], 2, 1.0) == [9.0, 3.0, 0.0]
    assert shortest_path(cost, [9.0, 3.0, 1.0, 0.0], 2, 2.0) == [9.0, 1.0, 0.0]


def test_a_found_grid_falls_from_start_to_end(pairs):
    from bench.peers.gits import find_grid
    from bench.peers.lab import Lab

    own, train, _ = pairs
    grid = own.session(lambda session: find_grid(Lab(session), train.part(slice(0, 4)), 3))
    assert grid[0] == pytest.approx(14.6146, abs=1e-3) and grid[-1] == 0 and all(a > b for a, b in itertools.pairwise(grid)) and len(grid) == 4


@pytest.mark.parametrize("base", ["dpmpp_2m", "ipndm"])
def test_with_nothing_learned_a_peer_is_its_solver(session_of, base):
    from bench.parts import named_grids, solver_tableau
    from bench.peers.coefficients import Freedom, parameters_of, table_of
    from mteo.tableau import started_at

    def work(session):
        sigmas = named_grids(session.sampling, 4)["sgm_uniform"]
        for rows in ("solver", "added", "weights") if base == "ipndm" else ("solver", "added"):
            freedom = Freedom(base, rows=rows, told=True)
            grid, made, told = table_of(freedom, parameters_of(freedom, sigmas.tolist()), sigmas.tolist())
            assert torch.stack(made).allclose(solver_tableau(base, sigmas, session.sampling).matrix, rtol=1e-4, atol=1e-4)
            assert all([float(one) for one in levels] == pytest.approx(sigmas[:-1].tolist()) for levels in (grid, told))
            freedom = replace(freedom, analytic=True)
            grid, made, told = table_of(freedom, parameters_of(freedom, sigmas.tolist()), sigmas.tolist())
            short = started_at(solver_tableau(base, sigmas[1:], session.sampling), float(sigmas[0]))
            assert torch.stack(made).allclose(short.matrix, rtol=1e-4, atol=1e-4) and [float(one) for one in grid] == pytest.approx(sigmas[1:-1].tolist())

    session_of(work)


def test_a_followed_time_is_the_models_own_and_has_the_slope_between_its_steps(session_of):
    from mteo.comfyui.times import following, time_of

    def work(session):
        sampling = session.sampling
        sigma = torch.tensor([3.0], requires_grad=True)
        with following(sampling, sigma):
            read = sampling.timestep(sigma)
        assert float(read.detach()) == float(sampling.timestep(sigma.detach())) != float(time_of(sampling, sigma).detach())
        assert torch.autograd.grad(read, sigma)[0] == torch.autograd.grad(time_of(sampling, sigma), sigma)[0] > 0
        with following(sampling, 3.0):
            assert "timestep" not in vars(sampling)

    session_of(work)


def test_a_continuous_models_time_is_its_own_function(comfyui_root):
    """EDM's has log_sigmas as well, for compatibility only."""
    from comfy.model_sampling import ModelSamplingContinuousEDM

    from mteo.comfyui.times import following, time_of

    sampling, sigma = ModelSamplingContinuousEDM(), torch.tensor([3.0], requires_grad=True)
    with following(sampling, sigma):
        for time in (sampling.timestep(sigma), time_of(sampling, sigma)):
            assert float(time.detach()) == pytest.approx(0.25 * float(sigma.detach().log()))
            assert float(torch.autograd.grad(time, sigma)[0]) == pytest.approx(0.25 / 3)


def test_a_told_time_is_the_networks_and_has_a_gradient(session_of):
    from bench.peers.lab import Lab
    from mteo.comfyui.times import following, telling, time_of
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
            with following(sampling, told):
                assert sampling.timestep(told.expand(2)).requires_grad
            assert sampling.timestep(torch.ones(2)).tolist() == [float(time_of(sampling, torch.tensor(one))) for one in (3.0, 2.0)], "the outer one again"
        assert float(sampling.timestep(torch.tensor(3.0))) == pytest.approx(float(time_of(sampling, torch.tensor(3.0))), abs=1)

    session_of(work)


def test_v3_solves_a_linear_flow_in_one_step(comfyui_root):
    """D = c·x + m·σ: with l, s and b of that flow, f is a straight exponential and any step is exact."""
    from bench.peers.v3 import sample, step

    levels = torch.linspace(-3.0, 3.0, 400, dtype=torch.float64)
    c, m = torch.tensor([[0.3, -0.2]], dtype=torch.float64), torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    sigma = lambda level: torch.exp(-torch.as_tensor(level, dtype=torch.float64))
    ones = torch.ones(len(levels), 1, 1, dtype=torch.float64)
    numbers = dict(levels=levels, l=ones * (1 - c), s=-ones, b=0 * ones * c)  # f = −m·σ, so df/dλ = −f
    x = torch.tensor([[[1.5, -2.0]]], dtype=torch.float64)
    exact = x.clone()
    for level, after in zip(torch.linspace(-2, 2, 4001, dtype=torch.float64)[:-1], torch.linspace(-2, 2, 4001, dtype=torch.float64)[1:], strict=True):
        middle = exact + (after - level) / 2 * -((1 - c) * exact - m * sigma(level))
        exact = exact + (after - level) * -((1 - c) * middle - m * sigma((level + after) / 2))
    made = step(numbers, x, -2.0, 2.0, [(-2.0, (-m * sigma(-2.0)).expand_as(x))])
    assert torch.allclose(made, exact, rtol=5e-3)
    lab = SimpleNamespace(sigma_min=float(sigma(2.0)), denoise=lambda x, level, batch: c * x + m * level)
    for order, corrected in itertools.product((1, 2), (False, True)):
        told = numbers | {"order": torch.tensor(order), "corrected": torch.tensor(corrected)}
        assert torch.allclose(sample(lab, [float(sigma(level)) for level in (-2.0, -0.7, 0.6)] + [0.0], told, None, x), exact, rtol=5e-3)


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_v3_measures_down_to_where_its_last_step_ends(comfyui_root, kind):
    from bench.parts import parts, teacher_pairs
    from bench.peers.lab import Lab
    from bench.peers.v3 import LEVELS, statistics

    own = parts(1, 2, False, kind)
    pairs = teacher_pairs(own, 2, 1.0, 1, 4)
    numbers, ends = own.session(lambda session: (statistics(lab := Lab(session), pairs), (lab.sigma_max, lab.sigma_min)))
    assert [float(numbers["levels"][i].neg().exp()) for i in (0, -1)] == pytest.approx(ends, rel=1e-3)
    assert all(len(values) == LEVELS and values.isfinite().all() for values in numbers.values())


def test_where_a_solver_is_lost_other_grids_are_tried(session_of):
    """One that is no nearer than the mean picture starts from a step that leads there."""
    from bench.parts import named_grids
    from bench.peers.methods import start_grids

    def work(session):
        grid = lambda name, steps: named_grids(session.sampling, steps)[name].tolist()
        plain = lambda error: {4: {"dpmpp_2m": {"karras": error, "beta": 1.2}, "euler": {"simple": 1.1, "karras": 1.3}}}
        assert start_grids(session.sampling, "GS" + ANALYTIC, plain(0.9)) == [grid("karras", 4)]
        assert start_grids(session.sampling, "GS" + ANALYTIC, plain(0.96)) == [grid(name, 4) for name in ("karras", "simple", "sgm_uniform")]
        assert len(start_grids(session.sampling, "EPD" + ANALYTIC, plain(1.0))) == 1

    session_of(work)
