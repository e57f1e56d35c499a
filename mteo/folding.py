"""Gains in a normalisation's own weight and bias: (w·n + b)·(1 + g) = w(1 + g)·n + b(1 + g), so that in a sampling a gain takes no time."""
from contextlib import contextmanager

import torch


class Folded:
    """Weights and biases of these normalisations for each row of gains [R, ΣC], the modules' channels side by side; made in a few calls for all of them, as a
    card takes as long for a small call as for a large one."""

    def __init__(self, modules: list[torch.nn.Module], gains: torch.Tensor):
        self.modules, self.rows = modules, [[] for _ in gains]
        for name in ("weight", "bias"):
            having = [module for module in modules if module._parameters.get(name) is not None]
            if having:
                own = [module._parameters[name] for module in having]
                both = self._columns(gains, having) + 1
                scaled = (both * torch.cat([value.detach().float() for value in own])).to(own[0].dtype)
                for row, values in zip(self.rows, scaled, strict=True):
                    row += zip([module._parameters for module in having], [name] * len(having), values.split([len(value) for value in own]), own, strict=True)

    def _columns(self, gains: torch.Tensor, having: list[torch.nn.Module]) -> torch.Tensor:
        if len(having) == len(self.modules):
            return gains
        widths = [module.weight.shape[0] for module in self.modules]
        return torch.cat([part for module, part in zip(self.modules, gains.split(widths, 1), strict=True) if module in having], 1)

    @property
    def current(self) -> bool:
        """Whether the modules still hold the weights that this was made of, and read them."""
        return all(parameters[name] is own for parameters, name, _, own in self.rows[0]) and not any(map(changed_on_its_way, self.modules))

    @contextmanager
    def row(self, row: int):
        """Inside, the modules have that row's weights and biases; afterwards their own."""
        for parameters, name, value, _ in self.rows[row]:
            parameters[name] = value
        try:
            yield
        finally:
            for parameters, name, _, own in self.rows[row]:
                parameters[name] = own


def foldable(modules: list[torch.nn.Module]) -> bool:
    """Whether a forward of these modules reads the weight that they hold, as it is, and all are of one kind."""
    kinds = set()
    for module in modules:
        weight = module._parameters.get("weight")
        if weight is None or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16) or changed_on_its_way(module):
            return False
        kinds |= {(value.dtype, value.device) for value in module._parameters.values() if value is not None}
    return len(kinds) == 1


def changed_on_its_way(module: torch.nn.Module) -> bool:
    """Whether ComfyUI streams the module's weight to the card, or puts a LoRA on it when it is read."""
    own = module.__dict__
    return "_v" in own or bool(own.get("weight_function") or own.get("bias_function"))
