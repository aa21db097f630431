"""The findings as one HTML page with thumbnails: a file to open, mail or keep, without anything beside it."""

from __future__ import annotations

import base64
import html
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageFile

from seglight.data.decode import contents, read_image, read_mask
from seglight.data.findings import DataError
from seglight.data.palette import palette
from seglight.doctor.crew import muted
from seglight.doctor.findings import ORDER, Finding, Place, Report

_HEIGHT = 132
_PICTURES = 8  # per finding
_NAMES = 400  # per finding; the json has all

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2330;--dim:#667085;--paper:#fff;--card:#f6f7f9;--line:#dfe3e8;
--error:#c6262e;--warning:#b25e00;--note:#2767b0}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8ec;--dim:#98a2b3;--paper:#14171c;--card:#1c2027;--line:#2d333d;
--error:#ff6b6b;--warning:#ffb454;--note:#7ab7ff}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0 auto;padding:28px 20px;
max-width:1080px}
h1{font-size:22px;margin:0 0 2px;overflow-wrap:anywhere}.dim{color:var(--dim)}
.counts{display:flex;gap:10px;margin:18px 0 22px;flex-wrap:wrap}
.counts b{display:block;font-size:24px;line-height:1.2}
.counts div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 16px}
section{background:var(--card);border:1px solid var(--line);border-left:5px solid var(--tone);border-radius:8px;
padding:12px 16px;margin:0 0 14px}
.error{--tone:var(--error)}.warning{--tone:var(--warning)}.note{--tone:var(--note)}
h2{font-size:16px;margin:0 0 4px;overflow-wrap:anywhere}
h2 small{color:var(--tone);font-weight:600;text-transform:uppercase;font-size:11px;letter-spacing:.05em;
margin-right:8px}
.fix{margin:0 0 8px}.fix:before{content:"\\2192\\00a0";color:#2a9d5c;font-weight:700}
pre{background:var(--paper);border:1px solid var(--line);border-radius:6px;padding:8px 12px;overflow:auto;
margin:6px 0 10px;font-size:13px}
.row{display:flex;gap:12px;flex-wrap:wrap;margin:8px 0}
figure{margin:0;max-width:100%}
figure div{display:flex;flex-wrap:wrap;gap:3px}
img{height:132px;max-width:100%;border-radius:4px;background:#8883;display:block;object-fit:contain}
figcaption{font-size:12px;color:var(--dim);overflow-wrap:anywhere}
details{font-size:13px}summary{cursor:pointer;color:var(--dim)}
details ul{columns:3 260px;padding-left:18px;margin:6px 0;overflow-wrap:anywhere}
"""


def write(report: Report, file: Path) -> None:
    """Write the page; folders above it are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with muted():
        text = page(report)
    file.write_text(text, encoding="utf-8")


def page(report: Report) -> str:
    """The whole page."""
    samples = ", ".join(f"{count:,} in {split}" for split, count in report.samples.items()) or "nothing"
    counts = "".join(
        f"<div class={severity}><b style='color:var(--{severity})'>{report.count(severity)}</b>"
        f"{severity}{'' if report.count(severity) == 1 else 's'}</div>"
        for severity in ORDER
    )
    classes = f", {len(report.classes)} classes" if report.classes else ""
    findings = "".join(_section(one) for one in report.findings) or "<p>Nothing wrong was found.</p>"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{_text(report.source)}: data check</title><style>{_STYLE}</style>"
        f"<h1>{_text(report.source)}</h1><div class=dim>{_text(report.name)}{classes}; examined: {samples}; "
        f"files below {_text(report.root)}</div><div class=counts>{counts}</div>{findings}</html>\n"
    )


def _section(one: Finding) -> str:
    figures = "".join(_figure(place) for place in one.places[:_PICTURES])
    block = f"<pre>{_text(one.block)}</pre>" if one.block else ""
    names = "".join(f"<li>{_text(place)}" for place in one.places[:_NAMES])
    rest = len(one.places) - _NAMES
    names += f"<li>and {rest:,} more (--json lists all)" if rest > 0 else ""
    shown = sum(bool(place.image) for place in one.places[:_PICTURES])
    several = len(one.places) > shown
    listing = (
        f"<details{'' if shown else ' open'}><summary>{len(one.places):,} places</summary><ul>{names}</ul></details>"
    )
    return (
        f"<section class={one.severity}><h2><small>{one.severity}</small>{_text(one.head[:1].upper() + one.head[1:])}"
        f"</h2>{f'<p class=fix>{_text(one.fix)}</p>' if one.fix else ''}{block}"
        f"{f'<div class=row>{figures}</div>' if figures else ''}{listing if several else ''}</section>"
    )


def _figure(place: Place) -> str:
    if place.image is None:
        return ""
    pictures = [_picture(place)]
    if place.box is not None:
        pictures.append(_around(place))
    if place.mask is not None:
        pictures.append(_mask(place.mask))
    shown = "".join(f"<img alt='' src='data:image/{'png' if png else 'jpeg'};base64,{data}'>" if data else
                    "<img alt='cannot be shown' style='width:120px'>" for data, png in pictures)  # fmt: skip
    return f"<figure><div>{shown}</div><figcaption>{_text(place)}</figcaption></figure>"


def _picture(place: Place) -> tuple[str, bool]:
    image = _decode(place.image)
    if image is None:
        return "", False
    small, scale = _small(image, cv2.INTER_AREA)
    if place.box is not None:
        x1, y1, x2, y2 = (int(np.clip(round(v * scale), -9, 9999)) for v in place.box)
        cv2.rectangle(small, (x1, y1), (max(x2, x1 + 2), max(y2, y1 + 2)), (255, 0, 90), 2)
    return _encoded(small, ".jpg")


def _around(place: Place) -> tuple[str, bool]:
    """The box and as much again on every side, magnified."""
    image = _decode(place.image)
    if image is None or place.box is None:
        return "", False
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (int(np.clip(value, -1e6, 1e6)) for value in place.box)
    margin = max(16, x2 - x1, y2 - y1)
    left, top = int(np.clip(x1 - margin, 0, width - 1)), int(np.clip(y1 - margin, 0, height - 1))
    part = image[top : max(top + 1, y2 + margin), left : max(left + 1, x2 + margin)]
    small, scale = _small(part, cv2.INTER_AREA)
    box = [round((v - o) * scale) for v, o in zip((x1, y1, x2, y2), (left, top, left, top), strict=True)]
    cv2.rectangle(small, tuple(box[:2]), tuple(box[2:]), (255, 0, 90), 1)
    return _encoded(small, ".jpg")


def _mask(path: Any) -> tuple[str, bool]:
    """A mask in the colours of VOC, or what it shows; a second picture as it is."""
    try:
        labels = read_mask(path)
    except (DataError, OSError):
        image = _decode(path)
        return ("", True) if image is None else _encoded(_small(image, cv2.INTER_AREA)[0], ".jpg")
    colours = np.array(palette(256), np.uint8)
    colours[255] = (224, 224, 192)
    return _encoded(colours[_small(labels, cv2.INTER_NEAREST)[0]], ".png")


def _decode(path: Any) -> np.ndarray | None:
    """RGB of whatever can still be decoded of a file."""
    try:
        return read_image(path, exif=True)
    except OSError:
        return None
    except DataError:  # what can be seen of it
        pass
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        with Image.open(io.BytesIO(contents(path))) as picture:
            values = np.array(picture if picture.mode.startswith("I;16") else picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError):
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    if values.ndim == 2:
        values = np.repeat(cv2.normalize(values, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)[..., None], 3, 2)
    return np.ascontiguousarray(values)


def _small(image: np.ndarray, how: int) -> tuple[np.ndarray, float]:
    scale = min(_HEIGHT / image.shape[0], 420 / image.shape[1])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_NEAREST if scale > 1 else how), scale


def _encoded(image: np.ndarray, kind: str) -> tuple[str, bool]:
    options = [cv2.IMWRITE_JPEG_QUALITY, 82] if kind == ".jpg" else []
    data = cv2.imencode(kind, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1]
    return base64.b64encode(data).decode(), kind == ".png"


def _text(value: Any) -> str:
    return html.escape(str(value))
