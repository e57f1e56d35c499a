"""The distances of `bench quality` on sets whose distance is known."""
import pytest
import torch

from bench.distances import diversity, frechet, kernel_distance, precision_recall, pyramid, sliced_wasserstein, spectrum_gap
from bench.intervals import Made, largest_ratios, matched_interval, ratio_above
from mteo.metrics import energy_by_frequency


def gaussian(count: int, seed: int, width: int = 8) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_of_shifted_and_scaled_gaussians():
    """|shift|² + Σ (s_a − s_b)²; another draw of the same set is near 0."""
    a, b = gaussian(20_000, 1), gaussian(20_000, 2)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9) and frechet(a, b) < 0.01
    assert frechet(3 * a + 1, b) == pytest.approx(8 * 1 + 8 * 4, rel=0.03)


def test_kernel_distance_is_unbiased_and_grows():
    apart = [kernel_distance(gaussian(200, 2 * seed), gaussian(200, 2 * seed + 1)) for seed in range(40)]
    assert abs(sum(apart) / 40) < 0.05  # a biased estimate would be above 0 by Σ k(x, x) ÷ n² ≈ .08
    assert kernel_distance(gaussian(500, 1) + 1, gaussian(500, 2)) > 1


def test_precision_and_recall_tell_what_is_missing():
    real = torch.cat([gaussian(500, 1), gaussian(500, 2) + 20])
    one_of_two = gaussian(1000, 3)
    whole = precision_recall(one_of_two, real[:500])  # what two draws of one Gaussian reach
    precision, recall = precision_recall(one_of_two, real)
    assert 0.8 < whole[0] == precision and whole[1] / 2 == recall > 0.4
    assert precision_recall(gaussian(300, 4) + 100, real) == (0.0, 0.0)


def test_a_pyramid_loses_nothing():
    pictures = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = pyramid(pictures)
    assert [level.shape[-1] for level in levels] == [64, 32, 16]
    whole, tap = levels[-1], torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=torch.float64) / 8
    kernel = (tap[:, None] * tap).expand(3, 1, 5, 5)
    for detail in reversed(levels[:-1]):
        large = torch.zeros_like(detail)
        large[..., ::2, ::2] = whole
        whole = detail + torch.nn.functional.conv2d(torch.nn.functional.pad(large, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    assert whole.allclose(pictures, atol=1e-12)
    flat = pyramid(torch.full((1, 3, 64, 64), 0.3, dtype=torch.float64))
    assert flat[-1].allclose(torch.tensor(0.3, dtype=torch.float64)) and flat[0][..., 4:-4, 4:-4].abs().max() < 1e-9


def test_sliced_wasserstein_finds_the_level_that_differs():
    one, two = (torch.randn(128, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    same, rougher = sliced_wasserstein(one, two, directions=64), sliced_wasserstein(1.3 * one, two, directions=64)
    assert max(same) < 0.05 and min(rougher) == pytest.approx(0.3 * (2 / torch.pi) ** 0.5, rel=0.25)  # E|1.3 z − z|
    assert sliced_wasserstein(one, two, directions=64) == same
    row = torch.arange(64)
    checked = one + 0.5 * ((row[:, None] + row) % 2 * 2 - 1)  # the finest pattern there is
    finest, *coarser = sliced_wasserstein(checked, two, directions=64)
    assert finest > 3 * same[0] and coarser == pytest.approx(same[1:], rel=0.02)


def test_diversity_is_the_distance_of_two_seeds():
    pictures = torch.randn(4000, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    assert diversity(pictures, 4) == pytest.approx(2**0.5, rel=0.02)
    assert diversity(pictures[::4].repeat_interleave(4, 0), 4) == 0


def test_spectrum_is_two_sided():
    noise = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert energy_by_frequency(noise, 8).allclose(torch.ones(8, dtype=torch.float64), rtol=0.05)
    assert spectrum_gap(noise * 1.2, noise) == pytest.approx(spectrum_gap(noise / 1.2, noise)) == pytest.approx(2 * torch.tensor(1.2).log().item(), rel=1e-3)


def test_interval_of_the_largest_ratio():
    """Around the known ratio to the nearest peer; a way of sampling is as good as itself, without doubt; seeds that differ widen it."""
    other, own = gaussian(600, 1), Made(gaussian(600, 2) + 1, gaussian(600, 3)[:, 0].square())
    near, far = (Made(own.features + far, (1 + far) ** 2 * own.squared) for far in (1, 3))
    assert largest_ratios([own], [[own]], other, 20) == {"fd": pytest.approx((1, 1)), "error": pytest.approx((1, 1))}
    found = largest_ratios([own], [[far], [near]], other, 100)
    assert found["fd"][0] < frechet(own.features, other) / frechet(near.features, other) < found["fd"][1] < found["fd"][0] + 0.1
    assert found["error"] == pytest.approx((0.5, 0.5))
    assert largest_ratios([own], [[near, far]], other, 100)["error"] == pytest.approx((1 / 4, 1 / 2))


def test_interval_of_a_ratio_above_the_floor():
    """Around the known ratio; without doubt 1 of a way of sampling to itself."""
    other, squared = gaussian(600, 1), torch.zeros(600)
    floor, own, peer = (Made(gaussian(600, seed) + shift, squared) for seed, shift in ((2, 0), (3, 1), (4, 2)))
    assert ratio_above([own], [own], floor, other, 20) == pytest.approx((1, 1))
    low, high = ratio_above([own], [peer], floor, other, 100)
    distance = [frechet(made.features, other) for made in (own, peer, floor)]
    assert low < (distance[0] - distance[2]) / (distance[1] - distance[2]) < high < low + 0.1
    assert ratio_above([own, peer], [peer], floor, other, 100)[1] == pytest.approx(1), "seeds that differ widen it"


def test_the_evaluations_that_are_matched_have_an_interval_over_pictures():
    """Without doubt where all others are far; both sides of one that is as good."""
    other, squared = gaussian(600, 1), torch.zeros(600)
    of = lambda shift, seed: Made(gaussian(600, seed) + shift, squared)
    plain = {3: of(2, 2), 5: of(1, 3), 6: of(0.5, 4), 8: of(0, 5)}
    assert matched_interval(of(0.7, 6), plain, other, 50) == (5, 5) and matched_interval(of(3, 6), plain, other, 50) == (0, 0)
    assert matched_interval(of(0.5, 6), plain, other, 100) == (5, 6)


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_the_classifier_that_ships_finds_what_a_prompt_names(comfyui_root, kind):
    """In the model's own guided pictures of pairs that nothing was trained on; drawings guessed at random would be found in 1 of 100 cases. Its features of
    them vary as much as those of scenes, 1 in the mean."""
    from bench.parts import parts, teacher_pairs
    from reference.gate import classifier_of, recognised
    from reference.scenes import draw_names

    pictures = teacher_pairs(parts(21, 16, True, kind), 16, 4.0, 31).end
    names = draw_names(16, torch.Generator().manual_seed(21), True)
    classifier = classifier_of(kind)
    assert recognised(classifier, pictures, names)["recall"] >= 0.7
    with torch.no_grad():
        assert classifier.features(pictures).var(0).mean() == pytest.approx(1, abs=0.5)
