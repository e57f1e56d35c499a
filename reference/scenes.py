"""Scenes of 64 px, made on the fly: one or two drawings at random place, scale, flip, tilt and hue on a background.

Drawings are the bitmaps of Noto Color Emoji (fonts OFL 1.1, pictures Apache-2.0), read from the installed font file.
"""
import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .vocabulary import DRAWINGS

DATA = "Noto Color Emoji, OFL-1.1/Apache-2.0"  # said in the header of what is trained on scenes
SIZE = 64  # side of a scene in pixels, unless told
SPRITE = 64  # side of a stored drawing in pixels
FONT_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
)
# Top and bottom colours (RGB, 0..1) of the dozen backgrounds: plain, sky-like gradients, ground below a horizon.
BACKGROUNDS = torch.tensor([
    [[0.96, 0.96, 0.94], [0.96, 0.96, 0.94]], [[0.80, 0.88, 0.97], [0.80, 0.88, 0.97]], [[0.98, 0.88, 0.82], [0.98, 0.88, 0.82]],
    [[0.84, 0.95, 0.84], [0.84, 0.95, 0.84]], [[0.30, 0.33, 0.45], [0.30, 0.33, 0.45]], [[0.45, 0.70, 0.95], [0.88, 0.95, 1.00]],
    [[0.98, 0.70, 0.45], [0.99, 0.90, 0.70]], [[0.10, 0.12, 0.30], [0.35, 0.30, 0.55]], [[0.70, 0.88, 1.00], [0.45, 0.70, 0.35]],
    [[0.65, 0.85, 0.98], [0.92, 0.83, 0.60]], [[0.85, 0.78, 0.92], [0.60, 0.55, 0.75]], [[0.93, 0.90, 0.80], [0.62, 0.45, 0.32]],
])
HORIZON_FROM = 8  # backgrounds from this index on change colour at a horizon, the ones before it gradually


def find_font() -> Path:
    """The font file, or FileNotFoundError with the name of the package that brings it."""
    for place in map(Path, FONT_PLACES):
        if place.is_file():
            return place
    raise FileNotFoundError("NotoColorEmoji.ttf with bitmaps was not found: install the package fonts-noto-color-emoji")


def load_sprites() -> torch.Tensor:
    """[words, 4, SPRITE, SPRITE] float32 in 0..1, alpha premultiplied, in the order of the vocabulary."""
    from fontTools.ttLib import TTFont
    from PIL import Image

    font = TTFont(find_font())
    names, bitmaps, sprites = font.getBestCmap(), font["CBDT"].strikeData[0], []
    for code in DRAWINGS.values():
        drawing = Image.open(io.BytesIO(bitmaps[names[code]].imageData)).convert("RGBA")
        square = Image.new("RGBA", (136, 136))
        square.paste(drawing, ((136 - drawing.width) // 2, (136 - drawing.height) // 2))
        pixels = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1)
        pixels = torch.cat([pixels[:3] * pixels[3:], pixels[3:]])
        sprites.append(F.interpolate(pixels[None], (SPRITE, SPRITE), mode="area")[0])
    return torch.stack(sprites)


def held_out(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """True for the fifth of the (unordered) pairs of drawings that training never sees together."""
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    return (low * 7919 + high * 104729) % 5 == 0


def draw_names(count: int, generator: torch.Generator, unseen_pairs: bool = False) -> torch.Tensor:
    """[count, 2] indices of drawings; the second is -1 where the scene holds one (two of five scenes)."""
    words = len(DRAWINGS)
    names = torch.randint(words, (count, 2), generator=generator)
    single = torch.rand(count, generator=generator) < 0.4
    for _ in range(64):
        wrong = (names[:, 0] == names[:, 1]) | (held_out(names[:, 0], names[:, 1]) != unseen_pairs)
        wrong &= ~single
        if not wrong.any():
            break
        names[wrong, 1] = torch.randint(words, (int(wrong.sum()),), generator=generator)
    names[single, 1] = -1
    return names


def prompts(names: torch.Tensor) -> list[str]:
    """The text of each scene: "cat" or "cat and apple"."""
    words = list(DRAWINGS)
    return [words[a] if b < 0 else f"{words[a]} and {words[b]}" for a, b in names.tolist()]


def _background(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    kind = torch.randint(len(BACKGROUNDS), (count,), generator=generator)
    horizon = 0.45 + 0.35 * torch.rand(count, generator=generator)
    height = (torch.arange(size) + 0.5) / size
    below = torch.where((kind >= HORIZON_FROM)[:, None], ((height - horizon[:, None]) * 32).clamp(0, 1), height.expand(count, -1))
    top, bottom = BACKGROUNDS[kind, 0], BACKGROUNDS[kind, 1]
    rows = top[:, :, None] + (bottom - top)[:, :, None] * below[:, None]
    rows = rows + 0.04 * (torch.rand(count, 3, 1, generator=generator) - 0.5)
    return rows.clamp(0, 1)[..., None].expand(-1, -1, -1, size).contiguous()


def _turn_hue(rgb: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotate colours about the grey axis (Rodrigues' formula); rgb [B, 3, H, W] premultiplied, angle [B] radians."""
    cos, sin = angle.cos(), angle.sin() / math.sqrt(3)
    third = (1 - cos) / 3
    same, forth, back = third + cos, third - sin, third + sin
    matrix = torch.stack([torch.stack([same, forth, back], 1), torch.stack([back, same, forth], 1), torch.stack([forth, back, same], 1)], 1)
    return torch.einsum("bij,bjhw->bihw", matrix, rgb)


def _paste(scene: torch.Tensor, sprite: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    count = len(scene)
    tilt = (torch.rand(count, generator=generator) - 0.5) * 0.4
    flip = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    cos, sin = tilt.cos() / scale, tilt.sin() / scale
    # affine_grid maps scene coordinates (-1..1) to drawing coordinates: rotate, scale, flip about the centre.
    theta = torch.stack([torch.stack([flip * cos, flip * sin], 1), torch.stack([-sin, cos], 1)], 1)
    theta = torch.cat([theta, -(theta @ centre[:, :, None])], 2)
    placed = F.grid_sample(sprite, F.affine_grid(theta, (count, 4, *scene.shape[2:]), align_corners=False), align_corners=False)
    rgb = _turn_hue(placed[:, :3], (torch.rand(count, generator=generator) - 0.5) * 0.5)
    alpha = placed[:, 3:]
    return scene * (1 - alpha) + torch.minimum(rgb.clamp_min(0), alpha)


def compose(names: torch.Tensor, sprites: torch.Tensor, generator: torch.Generator, size: int = SIZE) -> torch.Tensor:
    """Scenes [B, 3, size, size] in -1..1 of the drawings `names` [B, 2]; all randomness is the generator's."""
    count = len(names)
    uniform = lambda low, high: low + (high - low) * torch.rand(count, generator=generator)
    single = names[:, 1] < 0
    scene = _background(count, size, generator)
    scale = torch.where(single, uniform(0.62, 0.92), uniform(0.44, 0.56))
    side = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    room = (1 - scale).clamp_min(0)
    first = torch.stack([torch.where(single, uniform(-1, 1) * room, side * uniform(0.40, 0.54)), uniform(-1, 1) * room], 1)
    second = torch.stack([-side * uniform(0.40, 0.54), uniform(-0.44, 0.44)], 1)
    scene = _paste(scene, sprites[names[:, 0]], scale, first, generator)
    other = _paste(scene, sprites[names[:, 1].clamp_min(0)], uniform(0.44, 0.56), second, generator)
    return torch.where(single[:, None, None, None], scene, other).clamp(0, 1) * 2 - 1


def ink(pictures: torch.Tensor) -> torch.Tensor:
    """The same scenes [B, 3, H, W] in -1..1 in another style, for fine-tunes: dark lines where brightness changes, a light wash, on paper."""
    grey = (pictures * torch.tensor([0.3, 0.59, 0.11]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    across, down = F.pad(grey.diff(dim=3), (0, 1)), F.pad(grey.diff(dim=2), (0, 0, 0, 1))
    dark = 0.2 * (1 - grey) + 1.5 * (across.square() + down.square()).sqrt()
    paper, stroke = torch.tensor([0.95, 0.9, 0.8]).view(1, 3, 1, 1), torch.tensor([-0.9, -0.85, -0.6]).view(1, 3, 1, 1)
    return paper + (stroke - paper) * dark.clamp(0, 1)


STYLES = {"colour": lambda pictures: pictures, "ink": ink}
