"""Which model a table was made for, by numbers: a hash would refuse the fp8 or GGUF copy of the same checkpoint [15]."""
import torch

SITES, ROWS, COLUMNS = 4, 4, 16  # a fixed sample of weights: small in the file, read in a moment
SAME, SIBLING = 0.05, 0.6  # relative difference: other number format / fine-tune of the same model; above: another model


def fingerprint(paths: list[str], weight_of, sites: int = SITES) -> dict[str, list[float]]:
    """{site path: numbers} from ROWS × COLUMNS evenly spaced weights of as many evenly spaced sites, four digits each.

    weight_of(path) -> the unpatched weight [out, in, …] of the site's layer, in any float format.
    """
    chosen = [paths[i * (len(paths) - 1) // max(1, sites - 1)] for i in range(min(sites, len(paths)))]
    numbers = {}
    for path in dict.fromkeys(chosen):
        weight = weight_of(path)
        rows = torch.linspace(0, weight.shape[0] - 1, ROWS).long()
        columns = torch.linspace(0, weight.shape[1] - 1, COLUMNS).long()
        sample = weight.detach()[rows.to(weight.device)][:, columns.to(weight.device)].float().cpu().flatten()
        numbers[path] = [float(f"{value:.4g}") for value in sample.tolist()]
    return numbers


def difference(own: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """Relative difference of two fingerprints: 0 = equal, about 1.4 = unrelated; infinite where they are of other layers."""
    if {path: len(numbers) for path, numbers in own.items()} != {path: len(numbers) for path, numbers in other.items()}:
        return float("inf")
    a, b = (torch.tensor([value for path in sorted(own) for value in print_[path]], dtype=torch.float64) for print_ in (own, other))
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def verdict(relative: float) -> str:
    """ "same", "sibling" (a fine-tune: most of the gain is kept, for a far style with guidance it may be none) or "other"."""
    return "same" if relative <= SAME else "sibling" if relative <= SIBLING else "other"
