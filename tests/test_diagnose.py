"""The numbers that `trainer diagnose` prints, where they are known in closed form (docs/theory.md §3)."""
import pytest
import torch

from mteo.diagnose import halves, offsets_share, row_error
from mteo.gridsearch import multistep_tableau
from mteo.metrics import by_frequency

PICTURES, NUMBERS = 40, 12


def linear(seed: int = 0, common: float = 1.0):
    """(ends, offsets, target): end points that are linear in 5 offsets, of which "dead" does nothing; `common` of the missing part is the same answer for every
    picture."""
    generator = torch.Generator().manual_seed(seed)
    plain, jacobian = torch.randn(PICTURES, NUMBERS, generator=generator), torch.randn(PICTURES, NUMBERS, 3, generator=generator)
    wanted = torch.tensor([1.0, -0.5, 0.25])
    own = torch.randn(PICTURES, 3, 1, generator=generator)
    target = plain + common * jacobian @ wanted + (1 - common) * (jacobian @ own)[..., 0] + 0.3 * torch.randn(PICTURES, NUMBERS, generator=generator)
    ends = lambda part, offsets: plain[part] + jacobian[part] @ torch.cat([offsets["a"][0], offsets["b"][0]]) + 0 * offsets["dead"].sum()
    return ends, {"a": torch.zeros(1, 2), "b": torch.zeros(1, 1), "dead": torch.zeros(1, 2)}, plain, jacobian, target


def test_the_share_of_the_offsets_is_that_of_weighted_least_squares():
    ends, offsets, plain, jacobian, target = linear()
    missing, before, after = (target - plain).double(), 0.0, 0.0
    for fit, test in halves(PICTURES):
        weight = 1 / missing[fit].norm(dim=1, keepdim=True)
        best = torch.linalg.lstsq((jacobian[fit] * weight[..., None]).flatten(0, 1).double(), (missing[fit] * weight).flatten()[:, None]).solution[:, 0]
        before, after = before + missing[test].square().sum(), after + (missing[test] - jacobian[test].double() @ best).square().sum()
    share = offsets_share(ends, offsets, target, iterations=3)
    assert share.best == pytest.approx(float(1 - after / before), abs=2e-3) and share.best > 0.8
    assert share.sites["dead"] == 0 and sum(share.sites.values()) == pytest.approx(1) and share.sites["a"] > share.sites["b"] > 0


def test_offsets_that_lie_beyond_a_straight_line_are_found_and_counted_as_they_are():
    ends, offsets, plain, jacobian, target = linear()
    bent = lambda part, own: plain[part] + torch.sinh(2 * (ends(part, own) - plain[part])) / 2
    target = bent(torch.arange(PICTURES), {"a": torch.tensor([[1.0, -0.5]]), "b": torch.tensor([[0.25]]), "dead": torch.zeros(1, 2)})
    straight, found = (offsets_share(bent, offsets, target, rounds=rounds, iterations=3) for rounds in (1, 12))
    assert found.share == sorted(found.share) and len(straight.share) == 1
    assert straight.best < 0.9 and found.best > 0.999


def test_what_differs_from_picture_to_picture_is_not_promised():
    ends, offsets, *_, target = linear(common=0.0)
    assert offsets_share(ends, offsets, target, iterations=3).best < 0.05


def test_a_solved_row_is_counted_on_the_pictures_that_it_was_not_solved_on():
    tableau = multistep_tableau(torch.tensor([4.0, 2.0, 1.0, 0.0]))
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(16, 3, 4, 4, generator=generator) for _ in range(4)]
    row = torch.tensor([0.1, -0.2, 0.4, 0.8])
    target = sum(weight * term for weight, term in zip(row, terms, strict=True))
    assert row_error(terms, target, tableau).max() < 1e-6
    target = target + torch.randn(16, 3, 4, 4, generator=generator)
    columns, goal = torch.stack([term.flatten() for term in terms], 1).double(), target.flatten()[:, None].double()
    on_all = (columns @ torch.linalg.lstsq(columns, goal).solution - goal).square().mean()
    assert on_all < row_error(terms, target, tableau).mean() < 1.1 * on_all


def test_the_error_by_frequency_is_of_its_own_band():
    x, wave = torch.randn(4, 2, 16, 16, generator=torch.Generator().manual_seed(0)), torch.cos(torch.pi * torch.arange(16.0))
    assert by_frequency(x, x) == [0.0] * 4
    assert by_frequency(torch.zeros_like(x), x) == pytest.approx([1.0] * 4)
    finest = by_frequency(x + wave * wave[:, None], x)
    assert finest[3] > 0.1 and max(finest[:3]) < 1e-6


@pytest.mark.parametrize(("model", "told"), [("unet", (8.0, 3.8, 1.9, 0.7)), ("mmdit", (0.95, 0.87, 0.72, 0.5))])
def test_the_gradient_of_what_is_diagnosed_is_that_of_small_moves(comfyui_root, monkeypatch, model, told):
    """Of the learned σ, too, whose time is a number of a step (UNet) or a function of them (flow model)."""
    from bench.parts import parts, teacher_pairs, untrained
    from mteo.coefficients import ROWS, SIGMAS
    from mteo.comfyui import diagnosis
    from mteo.gridsearch import student_start
    from mteo.recipe import Recipe

    own, recipe, seen = parts(1, 4, False, model), Recipe(steps=4), []
    sampling = own.model.get_model_object("model_sampling")
    tableau, pairs = student_start(float(sampling.sigma_max), told), teacher_pairs(own, 4, 1.0, 7, 8)

    def compare(ends, zero, target, progress=None):
        part, generator = torch.arange(len(pairs)), torch.Generator().manual_seed(0)
        leaves, weight = {name: value.detach().clone().requires_grad_(True) for name, value in zero.items()}, torch.randn(target.shape, generator=generator)
        gradients = dict(zip(leaves, torch.autograd.grad((ends(part, leaves) * weight).sum(), list(leaves.values()), allow_unused=True), strict=True))
        for name in (SIGMAS, ROWS):
            for place in range(len(told)):
                move = torch.zeros_like(zero[name])
                move[place] = 2e-4
                with torch.no_grad():
                    up, down = (ends(part, zero | {name: zero[name] + sign * move}) for sign in (1, -1))
                seen.append((float((gradients[name] * move).sum()), float(((up - down).double() / 2 * weight).sum())))

    monkeypatch.setattr(diagnosis, "offsets_share", compare)
    own.session(lambda session: diagnosis.of_offsets(session, session.patch, recipe, tableau, pairs, None), untrained(own, recipe, tableau))
    largest = max(abs(slope) for _, slope in seen)
    assert len(seen) == 8 and [gradient for gradient, _ in seen] == pytest.approx([slope for _, slope in seen], rel=0.05, abs=0.02 * largest)
