"""Reads trainval_merged.json, PASCAL-Context in the format of PASCAL in Detail (github.com/ccvl/detail-api).

Its lists: `images` (image_id 2008000002, file_name, height, width, phase), `annos_segmentation` (image_id, category_id,
segmentation: a compressed RLE; about 20 for an image) and others that are not looked at. A label map is 0 with each
segment's category painted on it, in the order of the file, crowds included: what `Detail.getMask(image)` gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from seglight.data.cocojson.stream import entries, text_of
from seglight.data.findings import DataError, listing
from seglight.data.packed import Packed, Strings, pack_bytes
from seglight.data.rle import run_lengths

_USED = ("images", "annos_segmentation")
LISTS = (*_USED, "categories", "parts", "annos_occlusion", "annos_boundary", "annos_joints")
_FORMAT = "Download trainval_merged.json again, or read the .mat files (data.labels: mat)."


class ContextFile:
    """The images and segments of the file, in flat arrays that loader processes share.

    Measured: 37 MB/s on one core, at most twice the size of the file in memory; the text is not kept.

    Args:
        path: of the file.

    Raises:
        DataError: not such a file, or entries that cannot be used: all of them are in the message.
        FileNotFoundError: no such file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        images: dict[int, tuple[str, int, int, str]] = {}
        segments: list[tuple[int, int, bytes]] = []
        seen: set[str] = set()
        wrong: list[str] = []
        for name, number, one in entries(self.path, text_of(self.path), LISTS):
            seen.add(name)
            if number is None or name not in _USED:
                continue
            try:
                if name == "images":
                    known = (str(one["file_name"]), int(one["height"]), int(one["width"]), str(one["phase"]))
                    images[int(one["image_id"])] = known
                else:
                    segments.append((int(one["image_id"]), int(one["category_id"]), _counts(one["segmentation"])))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                wrong.append(f"{name}[{number}] ({type(error).__name__}: {error})")
        if missing := [name for name in _USED if name not in seen]:
            raise DataError(f"{self.path} has no {' and no '.join(missing)}, so it is not PASCAL in Detail. {_FORMAT}")
        if not wrong:
            unknown = sorted({image for image, _, _ in segments} - images.keys())
            wrong = [f"segments of the unknown image {image}" for image in unknown]
        if wrong:
            raise DataError(f"{self.path}: {len(wrong)} entries cannot be used: {listing(wrong, 5)}. {_FORMAT}")
        self._pack(images, segments)

    def _pack(self, images: dict[int, tuple[str, int, int, str]], segments: list[tuple[int, int, bytes]]) -> None:
        place = {image: index for index, image in enumerate(images)}
        of_image = np.array([place[image] for image, _, _ in segments], np.int64)
        order = np.argsort(of_image, kind="stable")
        names, name_starts = pack_bytes(Path(name).stem.encode() for name, *_ in images.values())
        phases, phase_starts = pack_bytes(phase.encode() for *_, phase in images.values())
        rles, rle_starts = pack_bytes(segments[i][2] for i in order)
        self.data = Packed(
            names=names,
            name_starts=name_starts,
            phases=phases,
            phase_starts=phase_starts,
            sizes=np.array([(height, width) for _, height, width, _ in images.values()], np.int32).reshape(-1, 2),
            first=np.concatenate([[0], np.cumsum(np.bincount(of_image, minlength=len(images)))]),
            numbers=np.array([segments[i][1] for i in order], np.int32),
            rles=rles,
            rle_starts=rle_starts,
        )

    def ids(self, phase: str | None = None) -> list[str]:
        """Names ("2008_000002") of the images of a phase ("train", "val"), or of all, in the order of the file."""
        phases = Strings(self.data.phases, self.data.phase_starts)
        names = Strings(self.data.names, self.data.name_starts)
        return [names[i] for i in range(len(names)) if phase is None or phases[i] == phase]

    def places(self) -> dict[str, int]:
        """Place of each image by name."""
        return {name: place for place, name in enumerate(self.ids())}

    def size(self, place: int) -> tuple[int, int]:
        """Height and width of an image."""
        height, width = self.data.sizes[place]
        return int(height), int(width)

    def label_map(self, place: int) -> np.ndarray:
        """uint16 (H, W): category of each pixel, 0 where there is none.

        Raises:
            DataError: a segment of another size, or one that is no RLE.
        """
        from pycocotools import mask as coco

        data, size = self.data, self.size(place)
        labels = np.zeros(size, np.uint16)
        for i in range(data.first[place], data.first[place + 1]):
            counts = data.rles[data.rle_starts[i] : data.rle_starts[i + 1]].tobytes()
            runs = run_lengths(counts)  # what is unsound would make COCO's code write outside of the mask
            if runs is None or runs.min(initial=0) < 0 or runs.sum() != size[0] * size[1]:
                name = Strings(data.names, data.name_starts)[place]
                raise DataError(
                    f"{self.path}: segment {i - data.first[place]} of {name} is no RLE of {size[0]} x {size[1]} "
                    f"pixels. {_FORMAT}"
                )
            inside = coco.decode({"size": size, "counts": counts})
            np.copyto(labels, np.uint16(data.numbers[i]), where=inside.view(bool))
        return labels

    def fingerprint(self) -> dict[str, Any]:
        """Images, segments and bytes of the file."""
        return {"images": len(self.data.sizes), "segments": len(self.data.numbers), "bytes": self.path.stat().st_size}


def _counts(segmentation: dict[str, Any]) -> bytes:
    """Compressed run lengths."""
    counts = segmentation["counts"]
    if isinstance(counts, list):
        from pycocotools import mask as coco

        return coco.frPyObjects({"size": segmentation["size"], "counts": counts}, *segmentation["size"])["counts"]
    return counts.encode()
