"""How a table acts on a network: hooks that add the row of the current step to what each site reads."""
import torch

from .errors import MTEOError
from .sites import SPACES


class Offsets:
    """The table that hooks read, and the offsets in force.

    table: site path -> [R, D], all of one R. `select` sets what is added until the next `select`; units are those of the site's
    tensor. A weight of 1 picks a row bit for bit, 0 adds nothing.
    """

    def __init__(self, table: dict[str, torch.Tensor]):
        self.table, self.scale = table, 1.0
        self.current: dict[str, torch.Tensor] | None = None
        self._joined: torch.Tensor | None = None

    def replace(self, table: dict[str, torch.Tensor]) -> None:
        """Another table of the same sites and shapes."""
        self.table, self._joined = table, None

    def select(self, weights: torch.Tensor | None) -> None:
        """weights [B, R] (or [1, R] for the whole batch): how much of each row each batch row gets; None = the plain network."""
        if weights is None or self.scale == 0:
            self.current = None
            return
        mixed = ((weights * self.scale)[:, :, None] * self._join(weights.device)[None]).sum(1)
        self.current = dict(zip(self.table, mixed.split([rows.shape[1] for rows in self.table.values()], dim=1), strict=True))

    def _join(self, device) -> torch.Tensor:
        """All sites side by side [R, ΣD] on the device; a trained table is joined anew, so that gradients reach its tensors."""
        if any(rows.requires_grad for rows in self.table.values()):
            return torch.cat([rows.to(device) for rows in self.table.values()], 1)
        if self._joined is None or self._joined.device != device:
            self._joined = torch.cat([rows.float().to(device) for rows in self.table.values()], 1)
        return self._joined

    def add(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """tensor [B, D] or [B, T, D] plus the offset, cast to the tensor's own dtype at the site (traps 12)."""
        offset = self.current[path].to(tensor.dtype)
        return tensor + (offset if tensor.dim() == 2 else offset[:, None])  # v = e_l(t_k) + Δ[k, l]


def attach(network: torch.nn.Module, offsets: Offsets, space: str) -> list:
    """Put a hook on every site of the table; returns handles for `detach`. MTEOError, before any hook is set, where a path is
    not in the network or has another width. With nothing selected a hook returns None: PyTorch then keeps what was there."""
    if space not in SPACES:
        raise MTEOError(f'The space "{space}" is not known: choose one of {", ".join(SPACES)}.')
    modules = {}
    for path, rows in offsets.table.items():
        try:
            modules[path] = network.get_submodule(path)  # a walk over all modules would cost each sampling milliseconds
        except AttributeError:
            raise MTEOError(f"The model has no layer {path}: the table is for another architecture.") from None
        width = getattr(modules[path], "in_features" if space == "embedding" else "out_features", None)
        if rows.dim() != 2 or width not in (None, rows.shape[1]):
            raise MTEOError(f"Layer {path} takes offsets of {width} numbers, the table has the shape {tuple(rows.shape)}: it is for another model.")

    def before(path):
        return lambda module, arguments: None if offsets.current is None else (offsets.add(path, arguments[0]), *arguments[1:])

    def after(path):
        return lambda module, arguments, output: None if offsets.current is None else offsets.add(path, output)

    if space == "embedding":
        return [modules[path].register_forward_pre_hook(before(path)) for path in offsets.table]
    return [modules[path].register_forward_hook(after(path)) for path in offsets.table]


def detach(handles: list) -> None:
    """Take the hooks off; handles may be removed twice."""
    for handle in handles:
        handle.remove()
