"""Pictures inside the page: plots as SVG in the page's own colours and fonts, images as PNG of single pixels."""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .. import drawing
from .markup import Markup, escape

ROLES = {
    drawing.INK: "--ink",
    drawing.AXIS: "--axis",
    drawing.GRID: "--grid",
    drawing.PAPER: "--paper",
    **{colour: f"--network-{place}" for place, colour in enumerate(drawing.NETWORKS)},
}
ENLARGED = 96  # pixels of the longer side that are not exceeded
REFERENCE = re.compile(r"#([A-Za-z_][\w.-]*)")


def inline_svg(figure: Any, prefix: str, description: str) -> Markup:
    """A matplotlib Figure as an <svg> element that belongs to the page.

    Colours of `drawing` become CSS variables, so that the plot follows light and dark; letters stay letters, in the
    page's font; ids get `prefix`, for there are several plots in a page. The same figure gives the same text.

    Args:
        figure: drawn with the colours of `drawing`.
        prefix: another one for each plot of the page; letters, digits and hyphens.
        description: what a screen reader says.
    """
    buffer = io.BytesIO()
    with _svg_settings(prefix):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = ids & {name for value in values for name in REFERENCE.findall(value)}  # the rest are colours
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {
            _local(key): _adapted(value, used, prefix) if _local(key) != "id" else f"{prefix}-{value}"
            for key, value in element.attrib.items()
            if _local(key) != "id" or value in used
        }
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": description, "class": "plot"}
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in ("metadata", "style")]:  # a style would be the page's
            parent.remove(child)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def thumbnails(pixels: str, shape: Sequence[int]) -> list[str]:
    """A data URL with a PNG for each image; small ones are enlarged, for on paper they would be smoothed.

    Args:
        pixels: base64 of uint8, (n, channels, height, width) in row-major order.
        shape: (n, channels, height, width); with other than 1 or 3 channels, their mean is shown.
    """
    count, channels, height, width = shape
    data = base64.b64decode(pixels)
    size, times = channels * height * width, max(1, ENLARGED // max(height, width))
    urls = []
    for place in range(count):
        image = data[place * size : (place + 1) * size]
        planes = [image[channel * height * width : (channel + 1) * height * width] for channel in range(channels)]
        if channels not in (1, 3):
            planes = [bytes(sum(values) // channels for values in zip(*planes, strict=True))]
        urls.append("data:image/png;base64," + base64.b64encode(_png(planes, height, width, times)).decode())
    return urls


def track(values: Sequence[tuple[str, Mapping[str, Any]]]) -> Markup:
    """Shares and their intervals as dots on lines from 0 to 100 %, one below the other.

    Args:
        values: CSS class and value of each network; what is not a number leaves its line empty.
    """
    step = 9
    height = step * len(values) + 3
    parts = [f'<line class="scale" x1="{end}" x2="{end}" y1="0" y2="{height}"/>' for end in ("0.5", "50%", "99.5%")]
    for row, (network, value) in enumerate(values):
        y = step * row + step // 2 + 2
        ends = [value.get("low"), value["value"], value.get("high")]
        if any(end is None or not 0 <= end <= 1 for end in ends):
            continue
        low, middle, high = (f"{100 * end:.2f}%" for end in ends)
        parts.append(f'<line class="{escape(network)}" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="{escape(network)}" cx="{middle}" cy="{y}" r="3"/>')
    return Markup(f'<svg class="track" height="{height}" aria-hidden="true">{"".join(parts)}</svg>')


@contextlib.contextmanager
def _svg_settings(salt: str) -> Iterator[None]:
    """matplotlib reads these two from its global settings alone; they are put back."""
    matplotlib = importlib.import_module("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        yield


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _adapted(value: str, used: set[str], prefix: str) -> str:
    value = REFERENCE.sub(lambda match: f"#{prefix}-{match[1]}" if match[1] in used else match[0], value)
    for colour, role in ROLES.items():
        value = value.replace(colour, f"var({role})")
    # the page's own font; sizes stay
    value = re.sub(r"font-family: [^;]*", "font-family: inherit", value)
    return re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1; font-family: inherit", value)


def _png(planes: Sequence[bytes], height: int, width: int, times: int) -> bytes:
    """Eight bits, grey (1 plane) or RGB (3); every pixel becomes a square of `times` x `times`."""
    pixels = [bytes(pixel) * times for pixel in zip(*planes, strict=True)]
    lines = [b"\0" + b"".join(pixels[row * width : (row + 1) * width]) for row in range(height)]
    rows = b"".join(line * times for line in lines)
    header = struct.pack(">IIBBBBB", times * width, times * height, 8, 0 if len(planes) == 1 else 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
