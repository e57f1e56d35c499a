"""A labelled sheet of pictures: one row for each way of sampling, one column for each noise and prompt."""
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

GAP, INK, PAPER = 6, (20, 20, 20), (255, 255, 255)


SIDES = 128, 512  # of a picture on a sheet: its own width, if that is between these


def sheet(rows: dict[str, torch.Tensor], side: int | None = None, captions: list[str] | None = None) -> Image.Image:
    """rows: label -> pictures [N, H, W, 3] in 0..1, all of one size; `side` = width of a picture on the sheet in pixels, None = its own, within SIDES.
    captions: N short texts under the columns. Returns an RGB image with a label column on the left."""
    side = side or min(max(max(pictures.shape[2] for pictures in rows.values()), SIDES[0]), SIDES[1])
    font, tall = letters(15), {label: pictures.shape[1] * side // pictures.shape[2] for label, pictures in rows.items()}
    count = max(len(pictures) for pictures in rows.values())
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max(int(probe.multiline_textbbox((0, 0), label, font=font)[2]) for label in rows) + 3 * GAP
    foot = 24 if captions else 0
    canvas = Image.new("RGB", (left + count * (side + GAP), sum(tall.values()) + GAP * (len(rows) + 1) + foot), PAPER)
    draw, top = ImageDraw.Draw(canvas), GAP
    for label, pictures in rows.items():
        box = draw.multiline_textbbox((0, 0), label, font=font)
        draw.multiline_text((GAP, top + (tall[label] - box[3]) / 2), label, INK, font)
        for column, picture in enumerate(pictures):
            pixels = (picture.detach().float().cpu().clamp(0, 1).numpy() * 255).round().astype(np.uint8)
            canvas.paste(Image.fromarray(pixels).resize((side, tall[label]), Image.Resampling.BICUBIC), (left + column * (side + GAP), top))
        top += tall[label] + GAP
    small = letters(11)
    for column, caption in enumerate(captions or []):
        while caption and draw.textlength(caption, small) > side:
            caption = caption[:-1]
        draw.text((left + column * (side + GAP), top), caption, INK, small)
    return canvas


def letters(size: int):
    """PIL's own font; Pillow before 10.1 has it in one size."""
    try:
        return ImageFont.load_default(size=size)
    except TypeError:
        return ImageFont.load_default()


def as_image(picture: Image.Image) -> torch.Tensor:
    """ComfyUI's IMAGE [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
