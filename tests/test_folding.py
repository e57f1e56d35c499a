"""Gains that are in the normalisations' own weights do what hooks do, and leave the weights as they were."""
import pytest
import torch

from mteo.folding import Folded, foldable


def normalisations():
    torch.manual_seed(0)
    modules = [torch.nn.GroupNorm(4, 8), torch.nn.LayerNorm(6), torch.nn.LayerNorm(5, bias=False)]
    for module in modules:
        for value in module.parameters():
            torch.nn.init.normal_(value)
    return modules


def test_a_folded_gain_is_the_output_times_1_plus_the_gain():
    modules, gains = normalisations(), 0.3 * torch.randn(3, 8 + 6 + 5)
    inputs = [torch.randn(2, 8, 3, 3), torch.randn(2, 6), torch.randn(2, 5)]
    plain, own = [module(x) for module, x in zip(modules, inputs, strict=True)], [dict(module._parameters) for module in modules]
    folded = Folded(modules, gains)
    for row in range(3):
        with folded.row(row):
            for module, x, before, gain in zip(modules, inputs, plain, gains[row].split([8, 6, 5]), strict=True):
                assert module(x).allclose(before * (1 + (gain.view(-1, 1, 1) if x.dim() == 4 else gain)), atol=1e-5)
    with pytest.raises(KeyboardInterrupt), folded.row(1):
        raise KeyboardInterrupt
    assert all(module._parameters[name] is value for module, values in zip(modules, own, strict=True) for name, value in values.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.half(),
        lambda module: setattr(module, "_v", 1),
        lambda module: setattr(module, "weight_function", [abs]),
        lambda module: module.to(torch.float8_e4m3fn),
    ],
)
def test_weights_that_are_streamed_or_patched_on_their_way_are_not_folded(change):
    modules = normalisations()
    assert foldable(modules)
    change(modules[1])
    assert not foldable(modules)
