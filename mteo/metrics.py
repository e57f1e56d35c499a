"""How far a student's end points are from the teacher's."""
import torch

from .errors import MTEOError


def per_picture(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """RMSE of each picture [N] ÷ standard deviation of all the teacher's values (float64); inputs [N, ...].
    MTEOError where the shapes differ or the teacher has no spread."""
    if student.shape != teacher.shape or student.dim() < 2:
        raise MTEOError(f"Pictures cannot be compared: the student's are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}.")
    student, teacher = student.cpu().double(), teacher.cpu().double()
    if teacher.numel() < 2 or float(teacher.std()) == 0:
        raise MTEOError("Pictures cannot be compared: the teacher's have no spread.")
    return (student - teacher).flatten(1).pow(2).mean(1).sqrt() / teacher.std()


def nrmse(student: torch.Tensor, teacher: torch.Tensor) -> dict[str, float]:
    """Pooled, mean and median of the per-picture errors; 0 = equal, 1 = as far as the teacher's own spread."""
    errors = per_picture(student, teacher)
    return {"pooled": float(errors.pow(2).mean().sqrt()), "mean": float(errors.mean()), "median": float(errors.quantile(0.5))}


def paired_bootstrap_ratio(errors_a: torch.Tensor, errors_b: torch.Tensor, seed: int = 0, n: int = 2000) -> tuple[float, float, float]:
    """(ratio, low, high): pooled RMSE of a ÷ of b over the same items, with a 95 % interval from resampling items [N]
    `n` times, the same items for both (traps 34)."""
    if errors_a.shape != errors_b.shape or errors_a.dim() != 1 or len(errors_a) == 0:
        raise MTEOError("The two lists of errors must be of the same pictures.")
    a, b = errors_a.cpu().double().pow(2), errors_b.cpu().double().pow(2)
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(a), (len(a),), generator=generator) for _ in range(n))
    ratios = torch.stack([a[index].mean() / b[index].mean() for index in draws]).sqrt()
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float((a.mean() / b.mean()).sqrt()), low, high


def held_out_errors(log: list[dict]) -> list[float]:
    """The held-out error at every validation of a training, the mean over its cfg values (which have the same iterations)."""
    at: dict[int, list[float]] = {}
    for line in log:
        at.setdefault(line["iteration"], []).append(line["held_out"])
    return [sum(errors) / len(errors) for _, errors in sorted(at.items())]


def energy_by_frequency(x: torch.Tensor, bands: int) -> torch.Tensor:
    """[bands] mean energy of x [N, C, H, W] in each band of frequency, low to high, float64; the mean of a picture is left out."""
    energy = torch.fft.fft2(x.cpu().double(), norm="ortho").abs().square().mean((0, 1))
    each = [torch.fft.fftfreq(n, dtype=torch.float64) for n in energy.shape]
    band = ((each[0][:, None].square() + each[1].square()).sqrt() / 0.5 * bands).ceil().clamp_max(bands)  # 0: the mean
    return torch.stack([energy[band == i].mean() for i in range(1, bands + 1)])


def by_frequency(student: torch.Tensor, teacher: torch.Tensor, bands: int = 4) -> list[float]:
    """Energy of the error ÷ the teacher's energy in each band; 0 = equal, 1 = as if the student gave nothing there."""
    return (energy_by_frequency(student - teacher, bands) / energy_by_frequency(teacher, bands)).tolist()
