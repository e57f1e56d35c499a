"""How a table acts on a network: hooks that add the row of the current step to what each site reads."""
import torch
from torch.nn.functional import embedding

from .errors import MTEOError
from .sites import SPACES, is_gain, width_of

CPU = torch.device("cpu")
GAIN_UNIT = 0.3  # a row of 1 scales by 1.3: gains are learned in the same steps as offsets, and need smaller ones


class Offsets:
    """The table that hooks read, and the offsets in force.

    table: site path -> [R, D], all of one R, in the units of the site's tensor; rows of a normalisation are gains in GAIN_UNIT.
    scale multiplies all of it: 0 adds nothing, 1 a row as it is, bit for bit.
    order [N]: the row (R = none) behind each number that `select` takes; without it the rows themselves.
    What `select` was told last is in force.
    """

    def __init__(self, table: dict[str, torch.Tensor], order: torch.Tensor | None = None):
        self.table, self.scale, self.order = table, 1.0, order
        self.widths = [rows.shape[1] for rows in table.values()]
        self.units = torch.cat([torch.full((rows.shape[1],), GAIN_UNIT if is_gain(path) else 1.0) for path, rows in table.items()])
        self.current: dict[str, torch.Tensor] | None = None
        self.folded = False  # the normalisations' own weights hold the gains in force (mteo/folding.py)
        self._joined: tuple | None = None  # (device, scale) and the rows made for them
        self._alone: dict[int, dict[str, torch.Tensor]] = {}  # what each of these is at every site, as far as it was asked for

    def replace(self, table: dict[str, torch.Tensor]) -> None:
        """Another table of the same sites and shapes."""
        self.table, self._joined, self._alone = table, None, {}

    @property
    def trained(self) -> bool:
        return next(iter(self.table.values())).requires_grad

    def select(self, row: torch.Tensor | int | None, other: torch.Tensor | None = None, share: torch.Tensor | None = None, device: torch.device = CPU) -> None:
        """row [B], or a number for the whole batch on `device`: the row of the table that each batch row gets, R = none; other [B], share [B] in 0..1:
        so much of it is of another row. None = the plain network."""
        if row is None or self.scale == 0:
            self.current = None
            return
        if isinstance(row, int):
            joined = self.joined(device)
            self.current = self._alone.get(row) or self._by_site(joined[row : row + 1])
            if not self.trained:
                self._alone[row] = self.current
            return
        joined = self.joined(row.device)
        mixed = embedding(row, joined)  # as joined[row], but its gradient is summed in one order: training repeats bit for bit
        if other is not None:
            mixed = (1 - share)[:, None] * mixed + share[:, None] * embedding(other, joined)
        self.current = self._by_site(mixed)

    def _by_site(self, mixed: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of [B, ΣD] by path."""
        return dict(zip(self.table, mixed.split_with_sizes(self.widths, 1), strict=True))

    def joined(self, device) -> torch.Tensor:
        """All sites side by side and a row of zeros below, [R + 1, ΣD], in the order asked for; a trained table is joined anew, so that gradients reach its
        tensors."""
        key = (device, self.scale)
        if self.trained or self._joined is None or self._joined[0] != key:
            rows = torch.cat([rows.float().to(device) for rows in self.table.values()], 1)
            self.units = self.units.to(device)
            joined = self.scale * self.units * torch.cat([rows, torch.zeros_like(rows[:1])])
            joined = joined if self.order is None else embedding(self.order.to(device), joined)
            if self.trained:
                return joined
            self._joined, self._alone = (key, joined), {}
        return self._joined[1]

    def add(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """tensor [B, D] or [B, T, D] plus the offset, cast to the tensor's own dtype at the site (traps 12)."""
        offset = self._as(path, tensor)
        return tensor + (offset if tensor.dim() == 2 else offset[:, None])  # v = e_l(t_k) + Δ[k, l]

    def _as(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is in force at the site in the tensor's dtype; made once for a row that is not being learned, but in a compiled network, of whose graph no
        tensor may be kept (CUDA graphs write over it)."""
        values = self.current[path]
        if values.dtype != tensor.dtype:
            values = values.to(tensor.dtype)
            if not values.requires_grad and not torch.compiler.is_compiling():
                self.current[path] = values
        return values

    def gains(self, device) -> torch.Tensor:
        """[R + 1, ΣC] of the sites that are normalisations, side by side, as `joined`."""
        by_site = self._by_site(self.joined(device))
        return torch.cat([by_site[path] for path in gain_paths(self.table)], 1)

    def scaled(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """tensor [B, C, H, W] or [B, T, D] times 1 + the gain of each channel, rounded once to the tensor's dtype; without a gradient in place, as a
        normalisation's output is nobody else's."""
        gain = self._as(path, tensor)
        gain = gain[:, :, None, None] if tensor.dim() == 4 else gain[:, None]
        return torch.addcmul(tensor, tensor, gain) if torch.is_grad_enabled() else tensor.addcmul_(tensor, gain)


def gain_paths(table: dict[str, torch.Tensor]) -> list[str]:
    """The sites of a table that are normalisations."""
    return [path for path in table if is_gain(path)]


def find_modules(network: torch.nn.Module, table: dict[str, torch.Tensor], space: str) -> dict[str, torch.nn.Module]:
    """The module of each site of the table; MTEOError where a path is not in the network or has another width."""
    if space not in SPACES:
        raise MTEOError(f'The space "{space}" is not known: choose one of {", ".join(SPACES)}.')
    modules = {}
    for path, rows in table.items():
        try:
            modules[path] = network.get_submodule(path)
            width = width_of(path, modules[path], space)
        except AttributeError:
            raise MTEOError(
                f"This table is for another architecture: the model has no layer {path}. Load the table that was distilled for this model."
            ) from None
        if rows.shape[1:] != (width,):
            raise MTEOError(
                f"This table is for another model: layer {path} takes {width} numbers, the table has {rows.shape[-1]}. "
                "Load the table that was distilled for this model."
            )
    return modules


def attach(modules: dict[str, torch.nn.Module], offsets: Offsets, space: str) -> list:
    """Put a hook on each site's module; returns handles for `detach`. With nothing selected a hook returns None: PyTorch then
    keeps what was there."""

    def before(path):
        return lambda module, arguments: None if offsets.current is None else (offsets.add(path, arguments[0]), *arguments[1:])

    def after(path):
        return lambda module, arguments, output: None if offsets.current is None else offsets.add(path, output)

    def gain(path):
        return lambda module, arguments, output: None if offsets.current is None or offsets.folded else offsets.scaled(path, output)

    def hooked(path, module):
        if is_gain(path):
            return module.register_forward_hook(gain(path))
        return module.register_forward_hook(after(path)) if space == "modulation" else module.register_forward_pre_hook(before(path))

    return [hooked(path, module) for path, module in modules.items()]


def detach(handles: list) -> None:
    """Take the hooks off; handles may be removed twice."""
    for handle in handles:
        handle.remove()
