"""Every statement of docs/theory.md, on a mixture of Gaussians with a closed-form denoiser and on a spectrum of Gaussians."""
import itertools

import pytest
import torch
from scipy.optimize import minimize

from mteo.gridsearch import multistep_tableau
from mteo.schedule import karras
from mteo.tableau import combine, euler_tableau, execute, started_at

from .closed_form import Mixture, exact_answers

GRID = [10.0, 3.0, 0.8, 0.0]


def teacher_states(model: Mixture, x: torch.Tensor) -> list[torch.Tensor]:
    states = [x]
    for high, low in itertools.pairwise(GRID):
        states.append(model.flow(states[-1], high, low))
    return states


def test_the_target_of_an_euler_step_is_an_average_over_the_interval():
    """§1: D* = ∫ D(x_s; s) w(s) ds with w = σσ'/(σ − σ')·s⁻², and that is what lands on the teacher."""
    model = Mixture()
    x = model.start(64, 3.0)
    exact = (3.0 * model.flow(x, 3.0, 0.8) - 0.8 * x) / (3.0 - 0.8)
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)
    levels = (3.0 * (0.8 / 3.0) ** grid).tolist()
    path = [x]
    for high, low in itertools.pairwise(levels):
        path.append(model.flow(path[-1], high, low, steps=2))
    weight = torch.tensor(levels, dtype=torch.float64).reciprocal().square() * 3.0 * 0.8 / (3.0 - 0.8)
    answers = torch.stack([model.denoise(y, sigma) for y, sigma in zip(path, levels, strict=True)])
    average = -torch.trapezoid(weight[:, None, None] * answers, torch.tensor(levels, dtype=torch.float64), dim=0)
    assert float(torch.trapezoid(weight, torch.tensor(levels, dtype=torch.float64)).abs()) == pytest.approx(1, abs=1e-3)
    assert (average - exact).abs().max() < 2e-4
    assert (model.denoise(x, 3.0) - exact).abs().max() > 0.1  # what the network is asked for when it is told σ


@pytest.mark.parametrize("make", [euler_tableau, multistep_tableau])
def test_exact_answers_bring_any_solver_to_the_teacher(make):
    """§1, for multistep rows too: D*_k = (Ψ_{k+1} − a·x_T − Σ_{i<k} B_i D*_i) ÷ B_k."""
    model, tableau = Mixture(), make(torch.tensor(GRID, dtype=torch.float64))
    states = teacher_states(model, model.start(64, GRID[0]))
    answers = exact_answers(tableau, states)
    for row, state in zip(tableau.matrix, states, strict=True):
        assert (combine(row, [states[0], *answers]) - state).abs().max() < 1e-9
    plain = execute(tableau, lambda x, call, sigma: model.denoise(x, sigma), states[0])
    assert (plain - states[-1]).square().mean().sqrt() > 0.1


def test_the_end_error_is_the_sum_of_what_each_step_adds_carried_along_the_flow():
    """§2: x̂_K − x_K = Σ_k [Ψ(Φ_k(x̂_k)) − Ψ(x̂_k)], each difference carried to the end by the teacher's flow: exact, no bound needed."""
    model, tableau = Mixture(), euler_tableau(torch.tensor(GRID, dtype=torch.float64))
    states = teacher_states(model, model.start(256, GRID[0]))
    seen = []
    execute(tableau, lambda x, call, sigma: seen.append(x) or model.denoise(x, sigma), states[0])
    student = [*seen, combine(tableau.matrix[-1], [states[0], *(model.denoise(x, sigma) for x, sigma in zip(seen, GRID, strict=False))])]
    to_end = lambda x, k: x if k == len(GRID) - 1 else model.flow(x, GRID[k], 0.0)
    added = [to_end(student[k + 1], k + 1) - to_end(student[k], k) for k in range(len(GRID) - 1)]
    assert (sum(added) - (student[-1] - states[-1])).abs().max() < 1e-5


def test_the_gain_that_an_error_meets_is_not_the_largest_possible():
    """§2: between modes the flow tears neighbours apart, almost everywhere it draws them together: mean gain < 1 < Lipschitz constant; the root of its
    mean square is ruled by the few."""
    model = Mixture()
    x = model.start(4096, 3.0)
    small = 1e-4 * torch.nn.functional.normalize(torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64), dim=1)
    gain = (model.flow(x + small, 3.0, 0.0) - model.flow(x, 3.0, 0.0)).norm(dim=1) / 1e-4
    assert gain.max() > 10 and gain.median() < 0.2 and gain.mean() < 0.5 and gain.square().mean().sqrt() > 4 * gain.median()


def spectrum(size: int = 32) -> torch.Tensor:
    """[modes] variances of a 1/f² picture, .25 on average; sorted from coarse to fine."""
    f = torch.fft.fftfreq(size, dtype=torch.float64) * size
    radius = (f[:, None].square() + f.square()).sqrt().flatten()
    power = 1 / radius.clamp_min(0.5).square()
    return (0.25 * power / power.mean()).sort(descending=True).values


def multipliers(variances: torch.Tensor, grid: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """[K, modes]: what an Euler step multiplies each mode by when the denoiser is told σ = told [K, modes]."""
    answer = variances / (variances + told.square())
    return grid[1:, None] / grid[:-1, None] + (1 - grid[1:, None] / grid[:-1, None]) * answer


def flow_multipliers(variances: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """[K, modes]: the teacher's, √((s² + σ'²)/(s² + σ²))."""
    total = variances + grid.square()[:, None]
    return (total[1:] / total[:-1]).sqrt()


def end_error(variances, grid, told) -> torch.Tensor:
    """E|x̂_K − x_K|² ÷ E|x_K|²."""
    energy, exact = variances + grid[0] ** 2, flow_multipliers(variances, grid).prod(0)
    return ((multipliers(variances, grid, told).prod(0) - exact).square() * energy).sum() / (exact.square() * energy).sum()


def step_error(variances, grid, told, k: int, before: torch.Tensor) -> torch.Tensor:
    """The same after step k, of a student whose modes were multiplied by `before`."""
    exact = flow_multipliers(variances, grid)
    energy = variances + grid[0] ** 2
    return ((before * multipliers(variances, grid, told)[k] - exact[: k + 1].prod(0)).square() * energy).sum()


def fit(error, start: torch.Tensor) -> torch.Tensor:
    """The values that make `error` least, from `start`."""

    def ask(values):
        own = torch.tensor(values, dtype=torch.float64).view_as(start).requires_grad_(True)
        loss = error(own).log()
        return float(loss.detach()), torch.autograd.grad(loss, own)[0].flatten().numpy()

    best = minimize(
        ask, start.flatten().numpy(), jac=True, method="L-BFGS-B", bounds=[(-12.0, 6.0)] * start.numel(), options=dict(maxiter=2000, ftol=1e-14, gtol=1e-10)
    )
    return torch.tensor(best.x, dtype=torch.float64).view_as(start)


def bands_of(variances: torch.Tensor, bands: int) -> torch.Tensor:
    """[modes]: the band of each mode, of equal width in ln(variance)."""
    place = variances.log()
    return ((place - place.min()) / (place.max() - place.min() + 1e-12) * bands).floor().clamp_max(bands - 1).long()


def full_grid(steps: int) -> torch.Tensor:
    """[steps + 1] σ of Karras et al. from 80 to .002, which is as good as 0 here."""
    return karras(steps + 1, 0.002, 80.0)[:-1].double()


def trained(steps: int, bands: int, greedy: bool) -> float:
    """The end error where each step and band has its own σ̃, learned step by step on the student's own states, or end to end."""
    variances, grid = spectrum(), full_grid(steps)
    band = bands_of(variances, bands)
    logs = (0.5 * grid[:-1]).log()[:, None].expand(steps, bands).clone()
    before = torch.ones_like(variances)
    for k in range(steps):
        def of_step(own, k=k, before=before, logs=logs):
            return step_error(variances, grid, torch.cat([logs[:k], own, logs[k + 1 :]]).exp()[:, band], k, before)

        logs[k : k + 1] = fit(of_step, logs[k : k + 1])
        before = before * multipliers(variances, grid, logs.exp()[:, band])[k]
    if not greedy:
        logs = fit(lambda own: end_error(variances, grid, own.exp()[:, band]), logs)
    return float(end_error(variances, grid, logs.exp()[:, band]))


def test_the_right_conditioning_depends_on_the_scale_so_each_layer_needs_its_own():
    """§4: the σ̃ that makes a step exact for a mode of deviation s differs by s, and a table with more bands leaves less error."""
    grid = full_grid(3)
    high, low = float(grid[1]), float(grid[2])
    told = []
    for s in (0.02, 0.3, 1.0, 10.0):
        psi = ((s * s + low * low) / (s * s + high * high)) ** 0.5
        told.append(s * (1 / ((high * psi - low) / (high - low)) - 1) ** 0.5 / high)
    assert told == pytest.approx([0.304, 0.316, 0.381, 0.668], abs=1e-3)
    assert max(told) > 1.8 * min(told)
    errors = [trained(3, bands, greedy=True) for bands in (1, 2, 4, 8)]
    assert errors == pytest.approx([0.0174, 0.0125, 0.0049, 0.0010], abs=6e-5)
    variances = spectrum()
    plain = float(end_error(variances, grid, grid[:-1, None].expand(3, len(variances))))
    assert errors[0] < 0.15 * plain and all(b < a for a, b in itertools.pairwise(errors)) and errors[3] < 0.2 * errors[0]


def test_end_to_end_leaves_less_than_step_by_step():
    """§5: step by step no step gives up its own target for the end's sake."""
    known = {(3, 1): (0.0174, 0.0070), (3, 4): (0.0049, 0.0010), (4, 1): (0.0082, 0.0030), (4, 4): (0.0023, 0.0004)}
    for (steps, bands), figures in known.items():
        greedy, whole = trained(steps, bands, greedy=True), trained(steps, bands, greedy=False)
        assert whole < 0.6 * greedy and (greedy, whole) == pytest.approx(figures, abs=6e-5)


def test_with_many_steps_nothing_is_left_to_learn():
    """§6: D* − D falls with the length of the step, so the table of a fine grid is near zero."""
    model = Mixture()
    x, wrong = model.start(256, 3.0), []
    for ratio in (0.2, 0.1, 0.05):
        low = 3.0 * (1 - ratio)
        exact = (3.0 * model.flow(x, 3.0, low) - low * x) / (3.0 - low)
        wrong.append(float((exact - model.denoise(x, 3.0)).square().mean().sqrt()))
    assert all(0.4 < b / a < 0.6 for a, b in itertools.pairwise(wrong))


def test_few_trajectories_rule_a_squared_loss():
    """§7: where the flow parts neighbours, error and gradient are both large; a loss of each picture's RMSE is linear in one of them."""
    model, tableau = Mixture(spread=0.05), euler_tableau(torch.tensor(GRID, dtype=torch.float64))
    x = model.start(2048, GRID[0])
    end = model.flow(x, GRID[0], 0.0)
    told = torch.tensor(GRID[:-1], dtype=torch.float64).log().expand(len(x), 3).clone().requires_grad_(True)  # one σ̃ for each step and trajectory
    answer = execute(tableau, lambda y, call, sigma: model.denoise(y, told[:, call : call + 1].exp()), x)
    squared = (answer - end).square().mean(1)
    norms = {}
    for name, loss in (("squared", squared.sum()), ("per picture", (squared + 1e-12).sqrt().sum())):
        norms[name] = torch.autograd.grad(loss, told, retain_graph=True)[0].square().sum(1)
    share = {name: float(value.topk(len(x) // 10).values.sum() / value.sum()) for name, value in norms.items()}
    assert share["squared"] > 0.45 and share["squared"] > 1.2 * share["per picture"] > 2 * 0.1


def test_what_is_nearest_on_average_lacks_the_energy_of_its_error():
    """§8: least squares leaves an error that nothing the student has explains, so E|x̂|² = E|x|² − E|x̂ − x|²: it is duller by exactly its error, and seeds lie
    nearer together."""
    model, tableau = Mixture(), euler_tableau(torch.tensor(GRID, dtype=torch.float64))
    x = model.start(4096, GRID[0])
    end = model.flow(x, GRID[0], 0.0)
    terms = [x]
    for call, sigma in enumerate(GRID[:-1]):
        terms.append(model.denoise(combine(tableau.matrix[call], terms), sigma))
    columns = torch.stack([term.flatten() for term in terms], 1)
    nearest = columns @ torch.linalg.lstsq(columns, end.flatten()[:, None]).solution
    energy, error = nearest.square().mean(), (nearest.flatten() - end.flatten()).square().mean()
    assert float(energy + error) == pytest.approx(float(end.square().mean()), rel=1e-6) and error > 0.02 * energy
    assert nearest.view_as(end).var(0).sum() < end.var(0).sum()


def test_guidance_is_at_work_only_while_the_class_is_open():
    """§9: what the pair adds, D_cond − D_uncond, on the guided path of each picture: all of it at noise that hides the class, none where the class can be
    seen."""
    whole = Mixture()
    alone = Mixture()
    alone.means = whole.means[:3]  # the prompt: one of these modes
    x, levels, added = alone.start(512, GRID[0]), (GRID[0] * (0.05 / GRID[0]) ** torch.linspace(0, 1, 201, dtype=torch.float64)).tolist(), {}
    for high, low in itertools.pairwise(levels):
        cond, plain = alone.denoise(x, high), whole.denoise(x, high)
        added[high] = float((cond - plain).square().sum(1).mean().sqrt())
        x = low / high * x + (1 - low / high) * (plain + 4 * (cond - plain))
    figures = [added[min(added, key=lambda own, sigma=sigma: abs(own - sigma))] for sigma in (10, 3, 1, 0.3, 0.1)]
    assert figures == pytest.approx([0.34, 0.44, 0.25, 0.001, 0.0], abs=6e-3)


def test_the_first_call_tells_little_at_the_largest_sigma():
    """§10: three calls, the first told a σ to which a step that costs nothing leads, come near to four."""
    model = Mixture()
    model.means = model.means - model.means.mean(0)
    data = float(model.means.square().sum(1).mean()) + 2 * model.spread**2
    energies = [float(model.denoise(model.start(4096, sigma), sigma).square().sum(1).mean()) / data for sigma in (10.0, 5.0, 2.0)]
    assert energies == pytest.approx([0.011, 0.043, 0.22], rel=0.03)
    x = model.start(2048, GRID[0])
    end = model.flow(x, GRID[0], 0.0)
    levels = [GRID[0] * 0.01 ** (i / 16) for i in range(17)]

    def least(told) -> float:
        """Of Euler's calls at `told`, from x_T at σ_max."""
        tableaux = (started_at(euler_tableau(torch.tensor([*own, 0.0], dtype=torch.float64)), GRID[0]) for own in told)
        return min(
            float((execute(tableau, lambda y, call, sigma: model.denoise(y, sigma), x) - end).square().mean().sqrt() / end.std()) for tableau in tableaux
        )

    best = min(itertools.combinations(levels, 3), key=lambda own: least([own]))
    pinned, free, four = (
        least(told)
        for told in (
            ((GRID[0], *own) for own in itertools.combinations(levels[1:], 2)),
            [best],
            ((GRID[0], *own) for own in itertools.combinations(levels[1:], 3)),
        )
    )
    assert [pinned, free, four] == pytest.approx([0.366, 0.320, 0.294], abs=2e-3)
    moved, errors = Mixture(), []
    moved.means = model.means + end.std()  # as far from 0 as the data are spread
    for mean in (None, torch.full((2,), float(end.std()))):
        tableau = started_at(euler_tableau(torch.tensor([*best, 0.0], dtype=torch.float64)), GRID[0], mean)
        errors.append(
            float((execute(tableau, lambda y, call, sigma: moved.denoise(y, sigma), x + end.std()) - end.std() - end).square().mean().sqrt() / end.std())
        )
    assert errors == pytest.approx([0.428, free], abs=2e-3)
