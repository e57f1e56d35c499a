"""A deterministic ODE sampler as a table: it is linear in x_T and in the denoised outputs, so running it once on unit
vectors reads its coefficients: x_j = a_j·x_T + Σ_{i<j} B_ji·D_i."""
from dataclasses import dataclass, replace

import torch

from .errors import MTEOError
from .schedule import SAME_SIGMA

MAX_CALLS = 64
ACCURACY = 1e-5  # relative; float32 rounding of uni_pc reaches 4e-6 (traps 5)


@dataclass(frozen=True)
class Tableau:
    """sigmas [N]: σ at each network call, in call order. row_sigmas [R]: the distinct ones, in order of first use. rows: call -> row.
    matrix [N+1, N+1] float64 on the processor (Apple's graphics cards have no float64): row j < N gives the x of call j, row N the result;
        column 0 = x_T, column 1+i = D_i.
    mean [C]: of the latents by channel, where the first call is below the σ of x_T (`started_at`); None = 0."""

    sigmas: torch.Tensor
    row_sigmas: torch.Tensor
    rows: tuple[int, ...]
    matrix: torch.Tensor
    mean: torch.Tensor | None = None

    def begun(self, x: torch.Tensor) -> torch.Tensor:
        """x_T [B, C, …] moved so that row 0 times it is the step from x_T to the first call with D = mean: r·x_T + (1 − r)·mean, r = σ_0 ÷ σ of x_T."""
        if self.mean is None:
            return x
        share = self.matrix[0, 0]  # r, which moves where the σ are learned
        share = share.to(x) if share.requires_grad else float(share)
        return x + (1 / share - 1) * self.mean.to(x).view(-1, *[1] * (x.dim() - 2))

    @property
    def schedule(self) -> torch.Tensor:
        """[N + 1] σ of x_T, of each later call, and 0: where the calls are one a step, the grid that they step along."""
        return torch.cat([self.start_sigma.view(1), self.sigmas[1:], self.sigmas.new_zeros(1)])

    @property
    def start_sigma(self) -> torch.Tensor:
        """σ of x_T: that of the first call, or above it (`started_at`)."""
        return self.sigmas[0] / self.matrix[0, 0]


class _TooManyCalls(Exception):
    pass


class _Recorder:
    """A model that answers call j with answers[j] and keeps what it was asked."""

    def __init__(self, answers: torch.Tensor):
        self.answers, self.seen, self.sigmas = answers, [], []

    def __call__(self, x, sigma, **kwargs):
        call = len(self.seen)
        if call >= len(self.answers):
            raise _TooManyCalls
        self.seen.append(x.detach().clone())
        self.sigmas.append(float(torch.as_tensor(sigma).flatten()[0]))
        return self.answers[call].view(x.shape).clone()


def probe(run, sigmas: torch.Tensor, name: str, max_calls: int = MAX_CALLS) -> Tableau:
    """Read a sampler; `run(model, x, sigmas)` returns its result, model(x, sigma) -> denoised.

    In float32 on a clone of `sigmas` [K+1] (traps 5); the caller's random state is left alone. First run: x_T is the unit
    vector of channel 0, D_j that of channel 1+j, so what the sampler computes are the coefficients. Second run: random numbers
    under another seed. MTEOError by `name` where it raises, calls the network more than `max_calls` times or at other σ the
    second time, adds noise, or answers otherwise than the table by more than 1e-5 relative.
    """
    refuse = lambda why: MTEOError(f"The sampler {name} {why}, so it is not an ODE solver that a table can be trained for: choose euler, dpmpp_2m or ipndm.")
    if sigmas.dim() != 1 or len(sigmas) < 2 or not torch.isfinite(sigmas).all():
        raise MTEOError(f"The schedule for the sampler {name} needs at least two finite sigmas.")
    size = max_calls + 2  # x_T, the calls, and one channel that nothing may reach
    units = torch.eye(size).view(size, size, 1, 1)
    first, whole = _run(run, _Recorder(units[1 : max_calls + 1]), units[:1], sigmas, 0, refuse)
    calls = len(first.seen)
    if calls == 0:
        raise refuse("never calls the network")
    matrix = whole[:, : calls + 1]
    if whole[:, calls + 1 :].any() or not torch.isfinite(matrix).all():
        raise refuse("adds noise or is not linear")
    values = torch.randn(size, 16, 1, 1, generator=torch.Generator().manual_seed(1))
    second, seen = _run(run, _Recorder(values[1 : max_calls + 1]), values[:1], sigmas, 1, refuse)
    if second.sigmas != first.sigmas:
        raise refuse("chooses its steps by what the network answers")
    flat = values[: calls + 1, :, 0, 0].double()
    error = (matrix @ flat - seen).abs().amax(1)
    if not (error <= ACCURACY * (matrix.abs() @ flat.abs()).amax(1)).all():  # so that NaN is refused as well
        raise refuse("adds noise or is not linear")
    return make_tableau(first.sigmas, matrix)


def _run(run, recorder, start, sigmas, seed, refuse):
    """(recorder, [calls + 1, channels] float64: the x of every call and the result)."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            end = run(recorder, start.clone(), sigmas.detach().clone().float().cpu())
            return recorder, torch.stack([x.flatten() for x in (*recorder.seen, end)]).double()
    except MTEOError:
        raise
    except _TooManyCalls:
        raise refuse(f"calls the network more than {len(recorder.answers)} times") from None
    except Exception as error:
        raise refuse(f"cannot be read ({type(error).__name__})") from error


def make_tableau(sigmas: list[float], matrix: torch.Tensor, mean: torch.Tensor | None = None) -> Tableau:
    """Tableau from σ in call order and its matrix; equal σ share a row (traps 6)."""
    distinct, rows = [], []
    for sigma in sigmas:
        match = next((i for i, own in enumerate(distinct) if abs(own - sigma) <= 1e-6 * own), None)
        if match is None:
            match = len(distinct)
            distinct.append(sigma)
        rows.append(match)
    return Tableau(torch.tensor(sigmas, dtype=torch.float64), torch.tensor(distinct, dtype=torch.float64), tuple(rows), matrix, mean)


def euler_tableau(sigmas: torch.Tensor) -> Tableau:
    """Euler in closed form: x_{k+1} = (σ_{k+1}/σ_k)·x_k + (1 − σ_{k+1}/σ_k)·D_k; sigmas [K+1]."""
    sigma = sigmas.double()
    calls = len(sigma) - 1
    matrix = torch.zeros(calls + 1, calls + 1, dtype=torch.float64)
    matrix[0, 0] = 1.0
    for k in range(calls):
        ratio = sigma[k + 1] / sigma[k]
        matrix[k + 1] = ratio * matrix[k]
        matrix[k + 1, k + 1] += 1 - ratio
    return make_tableau(sigma[:-1].tolist(), matrix)


def started_at(tableau: Tableau, sigma_max: float, mean: torch.Tensor | None = None) -> Tableau:
    """The same calls for an x_T at sigma_max above their first σ, with no evaluation for the step between: the denoised is taken to be `mean` [C] there, that
    of latents by channel (None = 0), as nothing of a picture can be seen (analytic first step: GENIE, Dockhorn et al. 2022; AMED, Zhou et al. 2024)."""
    matrix = tableau.matrix.clone()
    matrix[:, 0] *= tableau.sigmas[0] / sigma_max
    return replace(with_matrix(tableau, matrix), mean=mean)


def execute(tableau: Tableau, denoise, x: torch.Tensor) -> torch.Tensor:
    """Run the table from x = x_T; denoise(x, call, sigma) -> D, sigma a number, or a tensor [] where it is being learned. Differentiable."""
    terms = [tableau.begun(x)]
    for call, sigma in enumerate(tableau.sigmas if tableau.sigmas.requires_grad else tableau.sigmas.tolist()):
        terms.append(denoise(combine(tableau.matrix[call], terms), call, sigma))
    return combine(tableau.matrix[-1], terms)


def combine(row: torch.Tensor, terms: list[torch.Tensor]) -> torch.Tensor:
    """Σ_i row_i · terms_i over the terms that are there (x_T first); a weight of 0 leaves its term unread."""
    if row.requires_grad:  # coefficients that are being learned
        return sum(weight * term for weight, term in zip(row.to(terms[0]), terms, strict=False))
    weights = row.tolist()
    total = None
    for weight, term in zip(weights, terms, strict=False):
        if weight:
            total = weight * term if total is None else total + weight * term
    return torch.zeros_like(terms[0]) if total is None else total


def with_matrix(tableau: Tableau, matrix: torch.Tensor) -> Tableau:
    """The same calls with other coefficients [N+1, N+1]; kept as float64."""
    if matrix.shape != tableau.matrix.shape:
        raise MTEOError(f"The solver's table is {tuple(tableau.matrix.shape)}, the new one {tuple(matrix.shape)}: correct the same solver.")
    return replace(tableau, matrix=matrix.double())


def stopped(tableau: Tableau, calls: int, sigma: float) -> torch.Tensor:
    """The matrix [calls + 1, calls + 1] of the first calls alone, the last row at `sigma`, which need not be the σ that the next call is told: one Euler step
    with the last denoised leads there, for a flow model, too."""
    matrix = tableau.matrix[: calls + 1, : calls + 1].clone()
    if calls < len(tableau.sigmas) and abs((share := sigma / float(tableau.sigmas[calls])) - 1) > SAME_SIGMA:
        matrix[calls] *= share
        matrix[calls, calls] += 1 - share
    return matrix


def between(own: Tableau, others: list[Tableau], shares: torch.Tensor, strength: float) -> Tableau:
    """`own` moved towards the blend of `others` by their shares [len(others)], in σ and in coefficients alike: with the noise in an x, which column 0 gives,
    goes the σ that is told of it. strength 0 = `own`, 1 = the blend. All have the same rows in the same order, and all a mean or none."""

    def moved(name: str) -> torch.Tensor:
        value, values = getattr(own, name), torch.stack([getattr(other, name) for other in others])
        return value + strength * (torch.tensordot(shares.to(value), values, 1) - value)

    return Tableau(moved("sigmas"), moved("row_sigmas"), own.rows, moved("matrix"), None if own.mean is None else moved("mean"))
