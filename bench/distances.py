"""How far two sets of pictures are apart as sets: no picture is compared with its own teacher, the two sets have other noise.

features [N, F], pictures [N, C, H, W]; float64 inside; 0 = the sets cannot be told apart, but for `precision_recall`.
"""
import math

import torch
import torch.nn.functional as F

from mteo.metrics import energy_by_frequency


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of the Gaussians with the features' means and covariances: |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2(Σ_aΣ_b)^½) (Heusel et al. 2017, eq. 6)."""
    a, b = a.double(), b.double()
    one, two = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(one @ two).real.clamp_min(0).sqrt().sum()  # trace of the root = roots of the eigenvalues, which are ≥ 0
    return float((a.mean(0) - b.mean(0)).square().sum() + one.trace() + two.trace() - 2 * roots)


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Unbiased squared MMD with the kernel (x·y/F + 1)³ (KID, Bińkowski et al. 2018, eq. 4); may be a little below 0."""
    a, b = a.double(), b.double()
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    within = lambda k: (k.sum() - k.trace()) / (len(k) * (len(k) - 1))
    return float(within(kernel(a, a)) + within(kernel(b, b)) - 2 * kernel(a, b).mean())


def precision_recall(a: torch.Tensor, b: torch.Tensor, neighbours: int = 3) -> tuple[float, float]:
    """(share of `a` that lies among `b`, share of `b` that lies among `a`); among = within the distance of the k-th neighbour of one of
    the other set (Kynkäänniemi et al. 2019, eq. 1-2). 1 = all."""
    a, b = a.double(), b.double()
    reach = lambda x: torch.cdist(x, x).kthvalue(neighbours + 1, 1).values  # the nearest of all is the picture itself
    apart = torch.cdist(a, b)
    return float((apart <= reach(b)).any(1).double().mean()), float((apart <= reach(a)[:, None]).any(0).double().mean())


def pyramid(pictures: torch.Tensor, smallest: int = 16) -> list[torch.Tensor]:
    """Laplacian pyramid (Burt & Adelson 1983): details of each size, the smallest picture last."""
    tap = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=pictures.dtype) / 16
    kernel = (tap[:, None] * tap).expand(pictures.shape[1], 1, 5, 5).to(pictures.device)
    blur = lambda x, weight: F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), weight, groups=x.shape[1])
    levels = []
    while pictures.shape[-1] > smallest:
        small = blur(pictures, kernel)[..., ::2, ::2]
        large = torch.zeros_like(pictures)
        large[..., ::2, ::2] = small
        levels.append(pictures - blur(large, 4 * kernel))
        pictures = small
    return [*levels, pictures]


def random_patches(pictures: torch.Tensor, count: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """[N · count, side, side, C], `count` of each picture [N, C, H, W]."""
    row, column = (torch.randint(size - side + 1, (len(pictures), count, 1, 1), generator=generator).to(pictures.device) for size in pictures.shape[2:])
    step = torch.arange(side, device=pictures.device)
    return pictures[torch.arange(len(pictures), device=pictures.device).view(-1, 1, 1, 1), :, row + step[:, None], column + step].flatten(0, 1)


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, seed: int = 0, patches: int = 16, side: int = 7, directions: int = 256) -> list[float]:
    """Of each pyramid level, fine to coarse: mean distance of sorted projections of random 7 × 7 patches, every channel scaled to
    mean 0 and deviation 1 of `b` (Karras et al. 2018, §5). The same number of pictures in both."""
    generator, distances = torch.Generator().manual_seed(seed), []
    for one, two in zip(pyramid(a.double()), pyramid(b.double()), strict=True):
        x, y = random_patches(one, patches, side, generator), random_patches(two, patches, side, generator)
        mean, spread = y.mean((0, 1, 2)), y.std((0, 1, 2))
        x, y = ((x - mean) / spread).flatten(1), ((y - mean) / spread).flatten(1)
        way = F.normalize(torch.randn(x.shape[1], directions, generator=generator, dtype=torch.float64), dim=0).to(x)
        distances.append(float(((x @ way).sort(0).values - (y @ way).sort(0).values).abs().mean()))
    return distances


def diversity(pictures: torch.Tensor, seeds: int) -> float:
    """RMSE of two pictures of one prompt, over all pairs of its `seeds`; pictures [prompts · seeds, …], a prompt's seeds together."""
    sets = pictures.double().flatten(1).view(-1, seeds, pictures[0].numel())
    return math.sqrt(2 * float(sets.var(1).mean()))  # E|x − y|² of independent draws = 2 · variance


def spectrum_gap(a: torch.Tensor, b: torch.Tensor, bands: int = 8) -> float:
    """max over bands of |ln(energy of a ÷ energy of b)|: both too smooth and too rough count (traps 35)."""
    return float((energy_by_frequency(a, bands) / energy_by_frequency(b, bands)).log().abs().max())
