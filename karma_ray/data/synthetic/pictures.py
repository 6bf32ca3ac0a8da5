"""Pictures of the toy shop's items, which show the same attributes as the texts.

The category gives the shape, the colour the fill, the style the pattern, the material the
background, the brand a badge and the price a frame. The geometry uses integers, so that pixels are
the same on every machine; Pillow only encodes them.

Legend: S pixels of a side; masks are bool [S, S].
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from karma_ray.data.synthetic.items import ShopItems

_COLOURS = np.array(
    [
        (208, 32, 44),  # red
        (36, 72, 200),  # blue
        (40, 150, 70),  # green
        (236, 200, 40),  # yellow
        (28, 28, 32),  # black
        (250, 250, 250),  # white
        (244, 140, 180),  # pink
        (120, 48, 160),  # purple
    ],
    dtype=np.uint8,
)
_GROUNDS = np.array(
    [
        (222, 214, 200),  # cotton
        (170, 130, 96),  # leather
        (196, 200, 212),  # wool
        (214, 222, 190),  # linen
        (150, 190, 196),  # nylon
        (200, 186, 130),  # bamboo
    ],
    dtype=np.uint8,
)


def _shapes(size: int) -> list[np.ndarray]:
    """Return a silhouette per category on a grid scaled to -24..24 (y grows downwards)."""
    y, x = np.mgrid[0:size, 0:size]
    x, y = (2 * x + 1 - size) * 24 // size, (2 * y + 1 - size) * 24 // size
    ax, ay, square = abs(x), abs(y), x * x + y * y
    box = (ax < 17) & (ay < 17)
    return [
        (3 * ax < y + 24) & (ay < 20),  # dress: a narrow triangle
        ((ax < 12) & (ay < 17)) | ((ax < 20) & (y > -17) & (y < -5)),  # jacket: a T, long
        ((ax < 9) & (ay < 12)) | ((ax < 18) & (y > -12) & (y < -6)),  # shirt: a T, short
        ((ax < 16) & (y > -4) & (y < 17)) | ((square < 196) & (square > 90) & (y < 0)),  # bag
        ((2 * ax < y + 22) & (y < -2)) | ((ax < 3) & (ay < 20)),  # lamp: a shade on a pole
        (ax < 20) & (ay < 9),  # rug: a wide bar
        ((x > -14) & (x < -8) & (ay < 19)) | ((ax < 14) & (y > 0) & (y < 19)),  # chair: an L
        (ax * 3 < 18 + abs(y - 4)) & (ay < 18),  # vase: an hourglass
        (ax < (y + 18) * 2 // 3) & (y < 17),  # tent: a wide triangle
        (square < 330) & (ax < 13),  # backpack: a tall rounded box
        ((ax < 7) & (y > -10) & (y < 20)) | ((ax < 3) & (y > -20) & (y < 0)),  # bottle
        box & ~((ax < 8) & (ay < 8)),  # blanket: a square ring
    ]


def _patterns(size: int) -> list[np.ndarray]:
    """Return a pattern per style: the mask of the shaded part of the fill."""
    y, x = np.mgrid[0:size, 0:size]
    return [
        np.zeros((size, size), dtype=bool),  # modern: plain
        y % 8 < 3,  # vintage: horizontal stripes
        (x + y) % 8 < 3,  # boho: diagonal stripes
        (x % 8 < 2) & (y % 8 < 2),  # minimal: dots
        (x % 12 < 6) ^ (y % 12 < 6),  # classic: chequers
        x % 8 < 3,  # sporty: vertical stripes
    ]


def draw_items(items: ShopItems, size: int) -> np.ndarray:
    """Draw every item, uint8 [I, S, S, 3]."""
    shapes, patterns = np.stack(_shapes(size)), np.stack(_patterns(size))
    colour, material, style, brand, price = items.values.T
    fill = _COLOURS[colour].astype(np.int64)  # [I, 3]
    # Dark fills get a lighter pattern and light ones a darker one, to be visible on black.
    dark = fill.sum(axis=1, keepdims=True) < 300
    shade = np.where(dark, (fill + 255) // 2, fill // 2).astype(np.uint8)
    pixels = np.repeat(_GROUNDS[material][:, None, None], size, axis=1).repeat(size, axis=2)
    shape = shapes[items.category]  # [I, S, S]
    shaded = shape & patterns[style]
    pixels = np.where(shape[..., None], _COLOURS[colour][:, None, None], pixels)
    pixels = np.where(shaded[..., None], shade[:, None, None], pixels)
    for item in range(len(pixels)):
        width = int(price[item])
        for edge in range(width):
            pixels[item, [edge, -1 - edge], :] = 0
            pixels[item, :, [edge, -1 - edge]] = 0
        column = 3 + int(brand[item]) * (size - 8) // 8
        pixels[item, size - 6 : size - 3, column : column + 3] = (255, 90, 0)
    return pixels


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode a picture [S, S, 3] as PNG."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="PNG")
    return sink.getvalue()
