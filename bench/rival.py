"""The honest rival of a table: the plain model with everything about its solver free."""
import itertools

from scipy.optimize import minimize

from mteo.gridsearch import Plain, student_start
from mteo.schedule import ratio_of, sigma_of
from mteo.tableau import Tableau, with_matrix

LOWEST = 0.03  # no σ below this


def refine(plain: Plain, start: Tableau, trials: int, flow: bool = False) -> Tableau:
    """σ of the calls (sigma_max stays) and all inner coefficients by Nelder–Mead from `start`, the last row solved at each of `trials` trials."""
    calls, sigma_max = len(start.sigmas), float(start.start_sigma)
    moved = [call for call in range(calls) if start.sigmas[call] < sigma_max]
    places = [(row, column) for row in range(1, calls) for column in range(row + 1)]

    def tableau_of(change) -> Tableau:
        told = start.sigmas.tolist()
        for call, step in zip(moved, change, strict=False):
            told[call] = float(sigma_of(ratio_of(told[call], flow) * 2.0**step, flow))
        tableau = student_start(sigma_max, told, start.mean)
        matrix = tableau.matrix.clone()
        for (row, column), value in zip(places, change[len(moved) :], strict=True):
            matrix[row, column] += value / (sigma_max if column == 0 else 1.0)
        matrix[-1] = start.matrix[-1]
        return with_matrix(tableau, matrix)

    def error(change) -> float:
        tableau = tableau_of(change)
        falling = [*tableau.sigmas.tolist(), LOWEST]
        if falling[0] > sigma_max or not all(a > b for a, b in itertools.pairwise(falling)):
            return 1e3
        return float(plain.solved(tableau)[0].square().mean().sqrt())

    size = len(moved) + len(places)
    simplex = [[0.0] * size] + [[0.2 * (i == j) for j in range(size)] for i in range(size)]
    found = minimize(error, simplex[0], method="Nelder-Mead", options=dict(maxfev=trials, initial_simplex=simplex, xatol=1e-3, fatol=1e-5))
    return plain.solved(tableau_of(found.x))[1]
