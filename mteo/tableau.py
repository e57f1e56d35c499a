"""A deterministic ODE sampler as a table: it is linear in x_T and in the denoised outputs, so running it once on unit
vectors reads its coefficients: x_j = a_j·x_T + Σ_{i<j} B_ji·D_i."""
from dataclasses import dataclass, replace

import torch

from .errors import MTEOError

MAX_CALLS = 64


@dataclass(frozen=True)
class Tableau:
    """sigmas [N]: σ at each network call, in call order. row_sigmas [R]: the distinct ones, in order of first use. rows: call
    -> row. matrix [N+1, N+1] float64: row j < N gives the x of call j, row N the result; column 0 = x_T, column 1+i = D_i."""

    sigmas: torch.Tensor
    row_sigmas: torch.Tensor
    rows: tuple[int, ...]
    matrix: torch.Tensor


class _Recorder:
    """Answers call j with channel 1+j set to one; channel 0 is x_T."""

    def __init__(self, answers: torch.Tensor):
        self.answers, self.seen, self.sigmas = answers, [], []

    def __call__(self, x, sigma, **kwargs):
        call = len(self.seen)
        if call >= len(self.answers):
            raise OverflowError
        self.seen.append(x.detach().clone())
        self.sigmas.append(float(torch.as_tensor(sigma).flatten()[0]))
        return self.answers[call].view(x.shape).clone()


def probe(run, sigmas: torch.Tensor, name: str) -> Tableau:
    """Read a sampler; `run(model, x, sigmas)` returns its result, model(x, sigma) -> denoised.

    In float32 on a clone of `sigmas` [K+1]. MTEOError by `name` where it raises, calls the network more than 64 times, adds
    noise, or does not answer linearly (a second run on random numbers differs from the table by more than 1e-4 relative).
    """
    refuse = lambda why: MTEOError(f"The sampler {name} {why}, so it is not an ODE solver that a table can be trained for: choose euler, dpmpp_2m or ipndm.")
    size = MAX_CALLS + 1
    start = torch.zeros(1, size, 1, 1)
    start[0, 0] = 1.0
    answers = torch.eye(size)[1:]
    first, end = _run(run, _Recorder(answers), start, sigmas, refuse)
    calls = len(first.seen)
    if calls == 0:
        raise refuse("never calls the network")
    matrix = torch.stack([x.flatten() for x in (*first.seen, end)])[:, : calls + 1].double()
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(size, 16, 1, 1, generator=generator)
    second, other = _run(run, _Recorder(values[1:]), values[:1], sigmas, refuse)
    if second.sigmas != first.sigmas:
        raise refuse("chooses its steps by what the network answers")
    flat = values[: calls + 1, :, 0, 0].double()
    told, seen = matrix @ flat, torch.stack([x.flatten() for x in (*second.seen, other)]).double()
    if not torch.isfinite(seen).all() or (told - seen).abs().max() > 1e-4 * matrix.abs().sum(1).max() * flat.abs().max():
        raise refuse("adds noise or is not linear")
    return make_tableau(first.sigmas, matrix)


def _run(run, recorder, start, sigmas, refuse):
    try:
        return recorder, run(recorder, start, sigmas.detach().clone().float())
    except MTEOError:
        raise
    except OverflowError:
        raise refuse(f"calls the network more than {MAX_CALLS} times") from None
    except Exception as error:
        raise refuse(f"cannot be read ({type(error).__name__})") from error


def make_tableau(sigmas: list[float], matrix: torch.Tensor) -> Tableau:
    """Tableau from σ in call order and its matrix; equal σ share a row."""
    distinct, rows = [], []
    for sigma in sigmas:
        match = next((i for i, own in enumerate(distinct) if abs(own - sigma) <= 1e-6 * own), None)
        if match is None:
            match = len(distinct)
            distinct.append(sigma)
        rows.append(match)
    return Tableau(torch.tensor(sigmas, dtype=torch.float64), torch.tensor(distinct, dtype=torch.float64), tuple(rows), matrix)


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


def execute(tableau: Tableau, denoise, x: torch.Tensor) -> torch.Tensor:
    """Run the table from x = x_T; denoise(x, call, sigma) -> D. Differentiable."""
    terms, matrix = [x], tableau.matrix.to(x.device)
    for call, sigma in enumerate(tableau.sigmas.tolist()):
        terms.append(denoise(combine(matrix[call], terms), call, sigma))
    return combine(matrix[-1], terms)


def combine(row: torch.Tensor, terms: list[torch.Tensor]) -> torch.Tensor:
    """Σ_i row_i · terms_i over the terms that are there (x_T first); a weight of 0 leaves its term unread."""
    weights = row.tolist()
    total = None
    for weight, term in zip(weights, terms, strict=False):
        if weight:
            total = weight * term if total is None else total + weight * term
    return total


def with_matrix(tableau: Tableau, matrix: torch.Tensor) -> Tableau:
    """The same calls with other coefficients."""
    return replace(tableau, matrix=matrix)
