"""How far a student's end points are from the teacher's."""
import torch


def per_picture(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """RMSE of each picture [N] ÷ standard deviation of all the teacher's values (float64); inputs [N, ...]."""
    error = (student.double() - teacher.double()).flatten(1).pow(2).mean(1).sqrt()
    return error / teacher.double().std()


def nrmse(student: torch.Tensor, teacher: torch.Tensor) -> dict[str, float]:
    """Pooled, mean and median of the per-picture errors; 0 = equal, 1 = as far as the teacher's own spread."""
    errors = per_picture(student, teacher)
    return {"pooled": float(errors.pow(2).mean().sqrt()), "mean": float(errors.mean()), "median": float(errors.median())}


def paired_bootstrap_ratio(errors_a: torch.Tensor, errors_b: torch.Tensor, seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """(ratio, low, high): pooled RMSE of a ÷ of b over the same items, with a 95 % interval from resampling items [N]."""
    a, b = errors_a.double().pow(2), errors_b.double().pow(2)
    index = torch.randint(len(a), (draws, len(a)), generator=torch.Generator().manual_seed(seed))
    ratios = (a[index].mean(1) / b[index].mean(1)).sqrt()
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float((a.mean() / b.mean()).sqrt()), low, high
