"""How a table acts on a network: hooks that add the row of the current step to what each site reads."""
import torch

from .errors import MTEOError
from .sites import SPACES


class Offsets:
    """The table that hooks read and the row in force.

    table: site path -> [R, D]. row: None = no offset, an int = that row for the whole batch, LongTensor [B] = a row for each
    batch row with −1 for none. scale multiplies the offset (1 = as trained, 0 = none). Units: those of the site's tensor.
    """

    def __init__(self, table: dict[str, torch.Tensor]):
        self.table, self.row, self.scale = table, None, 1.0

    def add(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """tensor [B, D] or [B, T, D] plus the offset in the tensor's own dtype; differentiable in the table."""
        rows = self.table[path]
        if rows.device != tensor.device:
            rows = rows.to(tensor.device)
            if not rows.requires_grad:  # a copy of a trained table would go stale: the optimiser changes the original
                self.table[path] = rows
        if isinstance(self.row, int):
            offset = rows[self.row]
        else:
            per_row = self.row.to(tensor.device)
            offset = torch.where((per_row >= 0)[:, None], rows[per_row.clamp_min(0)], 0)
            offset = offset.view(len(offset), *[1] * (tensor.dim() - 2), -1)
        return tensor + (offset * self.scale).to(tensor.dtype)  # v = e_l(t_k) + Δ[k, l], cast at the site (traps 12)


def attach(network: torch.nn.Module, offsets: Offsets, space: str) -> list:
    """Put a hook on every site of the table; returns handles for `detach`. MTEOError, before any hook is set, where a path is
    not in the network or has another width. With `offsets.row` None a hook returns None: PyTorch then keeps what was there."""
    if space not in SPACES:
        raise MTEOError(f'The space "{space}" is not known: choose one of {", ".join(SPACES)}.')
    modules = dict(network.named_modules())
    for path, rows in offsets.table.items():
        if path not in modules:
            raise MTEOError(f"The model has no layer {path}: the table is for another architecture.")
        width = getattr(modules[path], "in_features" if space == "embedding" else "out_features", None)
        if rows.dim() != 2 or width not in (None, rows.shape[1]):
            raise MTEOError(f"Layer {path} takes offsets of {width} numbers, the table has the shape {tuple(rows.shape)}: it is for another model.")

    def before(path):
        return lambda module, arguments: None if offsets.row is None else (offsets.add(path, arguments[0]), *arguments[1:])

    def after(path):
        return lambda module, arguments, output: None if offsets.row is None else offsets.add(path, output)

    if space == "embedding":
        return [modules[path].register_forward_pre_hook(before(path)) for path in offsets.table]
    return [modules[path].register_forward_hook(after(path)) for path in offsets.table]


def detach(handles: list) -> None:
    """Take the hooks off; handles may be removed twice."""
    for handle in handles:
        handle.remove()
