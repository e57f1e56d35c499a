"""The method's parts on small real networks and closed forms."""
import itertools
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mteo.embeddings import Embeddings, Table, as_stored, load_embeddings, save_embeddings
from mteo.errors import MTEOError
from mteo.injection import Offsets, attach, detach, find_modules
from mteo.metrics import held_out_errors, nrmse, paired_bootstrap_ratio
from mteo.sites import find_sites
from mteo.tableau import euler_tableau, execute, probe, started_at

from .closed_form import Mixture

SIGMAS = torch.tensor([14.6, 3.2, 0.6, 0.0])


def euler(model, x, sigmas):
    for k in range(len(sigmas) - 1):
        d = (x - model(x, sigmas[k] * x.new_ones(len(x)))) / sigmas[k]
        x = x + d * (sigmas[k + 1] - sigmas[k])
    return x


def heun(model, x, sigmas):
    for k in range(len(sigmas) - 1):
        d = (x - model(x, sigmas[k])) / sigmas[k]
        step = sigmas[k + 1] - sigmas[k]
        if sigmas[k + 1] == 0:
            return x + d * step
        ahead = x + d * step
        x = x + step * (d + (ahead - model(ahead, sigmas[k + 1])) / sigmas[k + 1]) / 2
    return x


def test_probe_reads_euler_as_its_closed_form():
    assert torch.allclose(probe(euler, SIGMAS, "euler").matrix, euler_tableau(SIGMAS).matrix, atol=1e-6)


@pytest.mark.parametrize("mean", [None, torch.tensor([0.5, 0.0, -2.0])])
def test_a_first_step_for_nothing_is_one_whose_answer_is_the_mean(mean):
    """The calls of Euler from below σ_max are those of one with a step more, whose first call is answered with the mean; its own grid, from σ_max on, can be
    read."""
    grid = torch.tensor([14.6, 8.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    tableau, x = started_at(euler_tableau(grid[1:]), 14.6, mean), torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    answer = lambda y, sigma: (y / (1 + sigma**2)).sin()
    short = execute(tableau, lambda y, call, sigma: answer(y, sigma), x)
    long = execute(euler_tableau(grid), lambda y, call, sigma: 0 * y + (0.0 if mean is None else mean) if call == 0 else answer(y, sigma), x)
    assert torch.allclose(short, long) and torch.allclose(tableau.schedule, torch.tensor([14.6, 3.0, 1.0, 0.0], dtype=torch.float64))
    assert torch.equal(started_at(euler_tableau(grid), 14.6).matrix, euler_tableau(grid).matrix)


def test_rows_are_distinct_sigmas_not_calls():
    tableau = probe(heun, SIGMAS, "heun")
    assert tableau.rows == (0, 1, 1, 2, 2) and len(tableau.row_sigmas) == 3


def test_executing_the_table_is_the_sampler():
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) / 4
    network = lambda x, sigma: torch.tanh(x @ weight) / (1 + float(torch.as_tensor(sigma).flatten()[0]))
    x = torch.randn(3, 8) * 14.6
    for sampler in (euler, heun):
        told = execute(probe(sampler, SIGMAS, "it"), lambda x, call, sigma: network(x, sigma), x)
        assert torch.allclose(told, sampler(network, x, SIGMAS), rtol=1e-5, atol=1e-5)


def noisy(model, x, sigmas):
    return euler(model, x, sigmas) + 0.1 * torch.randn_like(x)


def bent(model, x, sigmas):
    return euler(lambda x, s: model(x, s) ** 2, x, sigmas)


def broken(model, x, sigmas):
    raise IndexError("steps")


@pytest.mark.parametrize("sampler", [noisy, bent, broken])
def test_what_is_no_ode_solver_is_refused_by_name(sampler):
    with pytest.raises(MTEOError, match="sampler odd_one"):
        probe(sampler, SIGMAS, "odd_one")


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb_layers = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(6, 4))


class Network(torch.nn.Module):
    """Layers named as in ComfyUI's UNet."""

    def __init__(self):
        super().__init__()
        self.input_blocks = torch.nn.ModuleList([torch.nn.ModuleList([Layer()]) for _ in range(2)])

    def forward(self, emb):
        return sum(block[0].emb_layers(emb) for block in self.input_blocks)


@pytest.mark.parametrize("space", ["embedding", "modulation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_offsets_change_no_bit_and_others_do(space, dtype):
    network, emb = Network().to(dtype), torch.randn(4, 6).to(dtype)
    plain = network(emb)
    table = {site.path: torch.zeros(3, site.width) for site in find_sites(network, space)}
    offsets = Offsets(table)
    handles = attach(find_modules(network, table, space), offsets, space)
    offsets.select(torch.tensor([1]))
    assert torch.equal(network(emb), plain)
    for rows in table.values():
        rows[1] = 0.5
    offsets.replace(table)
    offsets.select(torch.tensor([1, 3] * 2))
    moved = network(emb)
    assert moved.dtype == dtype and not torch.equal(moved[0], plain[0])
    assert torch.equal(moved[1], plain[1]) and torch.equal(moved[3], plain[3])
    detach(handles)
    assert torch.equal(network(emb), plain)


def test_a_compiled_network_keeps_no_tensor_of_its_graph():
    """A CUDA graph's next run would write over it."""
    network, emb = Network().bfloat16(), torch.randn(2, 6).bfloat16()
    table = {site.path: torch.full((1, site.width), 0.5) for site in find_sites(network, "embedding")}
    offsets = Offsets(table)
    attach(find_modules(network, table, "embedding"), offsets, "embedding")
    made, kept = [], []
    with torch.no_grad():
        for run in (torch.compile(network, backend="eager"), network):
            offsets.select(0)
            made.append(run(emb))
            kept.append({rows.dtype for rows in offsets.current.values()})
    assert torch.equal(*made) and kept == [{torch.float32}, {torch.bfloat16}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gain_scales_what_a_normalisation_puts_out_with_and_without_a_gradient(dtype):
    from mteo.injection import GAIN_UNIT

    path = "middle_block.1.transformer_blocks.0.norm2"
    network = torch.nn.Module()
    for name in path.split(".")[:-1]:  # modules as ComfyUI's UNet has them
        network.get_submodule(".".join(path.split(".")[: path.split(".").index(name)])).add_module(name, torch.nn.Module())
    network.get_submodule(path.rpartition(".")[0]).norm2 = norm = torch.nn.LayerNorm(8).to(dtype)
    rows, x = torch.zeros(2, 8), torch.randn(3, 5, 8).to(dtype)
    rows[1] = torch.linspace(-1, 1, 8)
    offsets = Offsets({path: rows.requires_grad_(True)})
    attach(find_modules(network, offsets.table, "gains"), offsets, "gains")
    plain = norm(x)
    offsets.select(torch.tensor([1, 2, 0]))
    told = norm(x)
    assert torch.equal(told[1:], plain[1:]) and torch.allclose(
        told[0].float(), plain[0].float() * (1 + GAIN_UNIT * rows[1]), atol=2e-2 if dtype == torch.bfloat16 else 1e-6
    )
    told[0].float().sum().backward()
    assert rows.grad[1].abs().min() > 0 and rows.grad[0].abs().max() == 0
    with torch.no_grad():
        assert torch.equal(norm(x), told)


def test_learned_sigmas_get_the_gradient_of_the_step_from_the_mean():
    """The first call's σ also says how far the step for nothing goes; against differences."""
    from mteo.coefficients import SIGMAS, corrected
    from mteo.gridsearch import student_start
    from mteo.tableau import execute

    model, start = Mixture(), student_start(14.6, [6.0, 2.5, 1.2, 0.5], torch.tensor([1.0]))
    x = model.start(64, 14.6).double()[:, None]
    loss = lambda moves: execute(corrected(start, {SIGMAS: moves}), lambda y, call, sigma: model.denoise(y[:, 0], sigma)[:, None], x).square().mean()
    moves = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    [slope] = torch.autograd.grad(loss(moves), moves)
    far = 1e-5 * torch.eye(4, dtype=torch.float64)
    differences = torch.stack([(loss(one) - loss(-one)) / 2e-5 for one in far])
    assert torch.allclose(slope, differences, rtol=1e-3, atol=1e-6)


def test_grids_of_a_flow_model_compare_by_noise_to_signal():
    from mteo.gridsearch import levels
    from mteo.schedule import HIGHEST, karras, ratio_of, refined

    flow, plain = karras(24, 0.003, 1.0, flow=True), karras(24, float(ratio_of(torch.tensor(0.003, dtype=torch.float64), True)), HIGHEST)
    assert flow[0] == 1 and flow[-1] == 0 and torch.allclose(ratio_of(flow[1:], True), plain[1:], rtol=1e-3)
    through = refined(torch.tensor([1.0, 0.8, 0.5, 0.0]), flow, flow=True)
    assert through[0] == 1 and (through.diff() < 0).all() and {0.8, 0.5} <= {round(value, 6) for value in through.tolist()}
    for sigma_max, top, of_flow in ((14.6, 14.6, False), (1.0, 1.0, True)):
        for steps in (2, 3, 5):
            made = levels(steps, sigma_max, of_flow)
            assert len(made) == steps - 1 and all(0 < value < top for inner in made for value in inner)
            assert all(a[6] > b[6] for a, b in zip(made, made[1:], strict=False))  # their middles fall


@pytest.mark.parametrize("analytic", [True, False])
def test_the_search_finds_nearly_the_best_of_all_grids(analytic):
    """On a mixture of Gaussians, where all of them can be tried."""
    from mteo.gridsearch import Plain, levels, search_grid, student_start
    from mteo.teacher import Trajectories

    model, top = Mixture(), 14.6
    x = model.start(256, top)
    pairs = Trajectories(x, x[:, None][:, :0], model.flow(x, top, 0.0), torch.zeros(256, dtype=torch.long), torch.ones(256))
    plain = Plain(lambda y, call, sigma, batch: model.denoise(y, sigma), pairs)
    error = lambda told: float(plain.solved(student_start(top, told, plain.mean))[0].mean())
    [found] = search_grid([plain], 3, top, analytic=analytic)
    choices = [[*levels(4, top)[0], top], *levels(4, top)[1:]] if analytic else [[top], *levels(3, top)]
    best = min(error(told) for told in itertools.product(*choices) if told[0] > told[1] > told[2])
    assert float(found.start_sigma) == pytest.approx(top) and (found.sigmas[0] < top) == analytic
    assert best <= error(found.sigmas.tolist()) < 1.03 * best


def test_one_grid_for_two_cfg_values_suits_both():
    """Whichever comes first."""
    from mteo.gridsearch import Plain, search_grid
    from mteo.teacher import Trajectories

    def plain(model: Mixture) -> Plain:
        x = model.start(64, 14.6)
        pairs = Trajectories(x, x[:, None][:, :0], model.flow(x, 14.6, 0.0), torch.zeros(64, dtype=torch.long), torch.ones(64))
        return Plain(lambda y, call, sigma, batch: model.denoise(y, sigma), pairs)

    wide, narrow = plain(Mixture(modes=2, spread=1.0)), plain(Mixture(modes=12, spread=0.02, seed=1))
    told = lambda plains: [tableau.sigmas.tolist() for tableau in search_grid(plains, 3, 14.6)]
    one, other = told([wide, narrow]), told([narrow, wide])
    assert one[0] == one[1] == other[0] == other[1] and told([wide]) != told([narrow])


def test_stage_a_brings_each_call_to_the_teachers_next_state():
    """Of the step that is trained the call alone learns; the last one's target is the end."""
    from mteo.distill import picture_loss, step_loss
    from mteo.tableau import combine
    from mteo.teacher import Trajectories

    model, student = Mixture(), euler_tableau(SIGMAS.double())
    x = model.start(16, 14.6)
    states = torch.stack([model.flow(x, 14.6, sigma) for sigma in SIGMAS[1:3].tolist()], 1)
    batch = Trajectories(x, states, model.flow(x, 14.6, 0.0), torch.zeros(16, dtype=torch.long), torch.ones(16))
    for step, target in enumerate((states[:, 0], states[:, 1], batch.end)):
        moved = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
        loss = step_loss(step, student, lambda y, call, sigma, part, moved=moved: model.denoise(y, sigma) + moved[call], batch)
        terms = [x]
        for call in range(step + 1):
            terms.append(model.denoise(combine(student.matrix[call], terms), SIGMAS[call]) + 0.1)
        assert loss.item() == pytest.approx(float(picture_loss(combine(student.matrix[step + 1], terms), target)), rel=1e-6)
        [slope] = torch.autograd.grad(loss, moved)
        assert [bool(value) for value in slope] == [call == step for call in range(3)]


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("start", [0.05, 0.1, 0.3, 0.8])
def test_any_number_of_steps_is_searched_from_any_start(flow, start):
    """Image to image with a low denoise leaves little room for many calls."""
    from mteo.gridsearch import Plain, search_grid
    from mteo.teacher import Trajectories

    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    plain = Plain(lambda y, call, sigma, batch: y / (1 + sigma), Trajectories(x, x[:, None][:, :0], 0.9 * x, torch.zeros(4, dtype=torch.long), torch.ones(4)))
    for steps in (2, 3, 9, 16):
        [found] = search_grid([plain], steps, start, flow, analytic=False, rough=True)
        assert float(found.sigmas[0]) == start and len(found.sigmas) == steps and (found.schedule.diff() < 0).all() and found.matrix.isfinite().all()


@pytest.mark.parametrize("flow", [False, True])
def test_moved_sigmas_bring_the_rows_of_the_solver_on_them(flow):
    """None to where x_T is, none past the one before; a first call at x_T's own σ stays."""
    from mteo.coefficients import SIGMA_UNIT, SIGMAS, corrected
    from mteo.gridsearch import student_start
    from mteo.schedule import ratio_of, sigma_of

    top, told = (1.0, [0.9, 0.7, 0.5, 0.2]) if flow else (14.6, [9.0, 4.0, 2.0, 0.5])
    start, far = student_start(top, told), torch.tensor([-0.3, 0.2, 0.1, -0.4], dtype=torch.float64)
    same = corrected(start, {SIGMAS: torch.zeros(4)}, flow)
    assert torch.allclose(same.matrix, start.matrix, rtol=0, atol=1e-15) and torch.allclose(same.sigmas, start.sigmas, rtol=1e-15)
    moves = (far * 4 / SIGMA_UNIT).requires_grad_(True)
    own = corrected(start, {SIGMAS: moves}, flow)
    wanted = [float(sigma_of(ratio_of(torch.tensor(sigma, dtype=torch.float64), flow) * move.exp(), flow)) for sigma, move in zip(told, far, strict=True)]
    assert own.sigmas.tolist() == pytest.approx(wanted) and own.row_sigmas.tolist() == own.sigmas.tolist()
    assert torch.allclose(own.matrix, student_start(top, wanted).matrix, atol=1e-12) and float(own.start_sigma.detach()) == pytest.approx(top)
    assert (torch.autograd.grad(own.matrix[-1].square().sum() + own.sigmas.sum(), moves)[0] != 0).all()
    pushed = corrected(start, {SIGMAS: torch.tensor([9.0, 9.0, 9.0, -1.0])}, flow).sigmas.tolist()
    assert pushed == sorted(pushed, reverse=True) and top > pushed[0] > pushed[1] > pushed[2] > pushed[3] > 0
    assert corrected(student_start(top, [top, *told[1:]]), {SIGMAS: torch.full((4,), 0.01)}, flow).sigmas[0] == top


def test_offsets_get_a_gradient_and_weights_none():
    network = Network().requires_grad_(False)
    table = {site.path: torch.zeros(3, site.width, requires_grad=True) for site in find_sites(network, "embedding")}
    offsets = Offsets(table)
    attach(find_modules(network, table, "embedding"), offsets, "embedding")
    offsets.select(torch.tensor([2]))
    network(torch.randn(4, 6)).pow(2).sum().backward()
    assert all(rows.grad[2].abs().sum() > 0 and rows.grad[:2].abs().sum() == 0 for rows in table.values())


@pytest.fixture
def embeddings():
    tableau = euler_tableau(SIGMAS)
    offsets = {"input_blocks.0.0.emb_layers.1": torch.randn(2, 3, 6)}
    return Embeddings({3: Table(3, SIGMAS.tolist(), [999.0, 700.0, 300.0], "euler", tableau, [1.0, 4.0], offsets)}, "embedding", {"family": "unet"})


def test_file_round_trip_and_same_bytes(embeddings, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_embeddings(embeddings, one)
    again = load_embeddings(one)
    save_embeddings(again, two)
    assert one.read_bytes() == two.read_bytes()
    site = "input_blocks.0.0.emb_layers.1"
    assert torch.equal(again.tables[3].offsets[site], as_stored(embeddings.tables[3].offsets[site]))
    assert torch.allclose(again.tables[3].offsets[site], embeddings.tables[3].offsets[site], rtol=5e-4, atol=1e-7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_a_table_in_use_does_not_hold_its_file(embeddings, tmp_path):
    """It may be replaced, or its folder deleted, which Windows refuses of a mapped file."""
    path = tmp_path / "held.safetensors"
    save_embeddings(embeddings, path)
    held, maps = load_embeddings(path), Path("/proc/self/maps")
    before = held.tables[3].tableau.matrix.clone()
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(held.tables[3].tableau.matrix, before)
    assert held.tables and not (maps.is_file() and "held.safetensors" in maps.read_text())


def test_broken_files_get_one_sentence(embeddings, tmp_path):
    path = tmp_path / "table.safetensors"
    save_embeddings(embeddings, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(MTEOError, match="table.safetensors cannot be read"):
        load_embeddings(path)
    data = bytearray(whole)
    data[-2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(MTEOError, match="hash differs|not finite"):
        load_embeddings(path)
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    at = whole.index(struct.pack("<4e", *embeddings.tables[3].offsets["input_blocks.0.0.emb_layers.1"][0, 0, :4].tolist()), start)
    path.write_bytes(whole[:at] + struct.pack("<e", float("nan")) + whole[at + 2 :])
    with pytest.raises(MTEOError, match="not finite"):
        load_embeddings(path)
    save_embeddings(replace(embeddings, tables={3: replace(embeddings.tables[3], guided=(9,))}), path)
    with pytest.raises(MTEOError, match="table.safetensors is not complete .*The guided steps are"):
        load_embeddings(path)
    save_embeddings(replace(embeddings, tables={3: replace(embeddings.tables[3], guidance=[1.0])}), path)
    with pytest.raises(MTEOError, match="has the shape .2, 3, 6., not 1 cfg values of 3 rows"):
        load_embeddings(path)
    with pytest.raises(MTEOError, match="models/mteo"):
        load_embeddings(tmp_path / "none.safetensors")


def test_a_log_of_several_cfg_values_is_one_line():
    log = [
        dict(cfg=cfg, iteration=iteration, held_out=error)
        for cfg, errors in ((1.0, (0.4, 0.2)), (4.0, (0.6, 0.3)))
        for iteration, error in zip((0, 10), errors, strict=True)
    ]
    assert held_out_errors(log) == pytest.approx([0.5, 0.25])


def test_metrics_on_known_errors():
    teacher = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    student = teacher + 0.1 * teacher.std()
    assert nrmse(student, teacher)["pooled"] == pytest.approx(0.1, rel=1e-3)
    errors = torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.5
    ratio, low, high = paired_bootstrap_ratio(0.5 * errors, errors)
    assert ratio == pytest.approx(0.5) and low == pytest.approx(0.5) and high == pytest.approx(0.5)
    other = torch.rand(256, generator=torch.Generator().manual_seed(2)) + 0.5  # squares: mean 1.0833, deviation .5821
    ratio, low, high = paired_bootstrap_ratio(other, errors)
    deviation = 0.5821 / 1.0833 / 256**0.5 * 2**0.5 / 2
    assert ratio == pytest.approx(1, abs=3 * deviation) and low < ratio < high and high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
