"""Archives and datasets in miniature, for the tests of `seglight data prepare`."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

from seglight.prepare.folder import OWN
from seglight.prepare.recipe import Archive, Count, Recipe

FILES = {
    "kit/img/a.jpg": b"a" * 900,
    "kit/img/b.jpg": b"b" * 1000,
    "kit/deep/er/c.png": bytes(range(256)),
    "kit/list.txt": b"a\nb\n",
}
COUNTS = (Count("images", "img/*.jpg", 2), Count("lines", "list.txt", 2, lines=True))


def tar(path, files, entries=(), mode="w"):
    """A tar; `entries` are pairs of a TarInfo and its content."""
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info, data in entries:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def packed(path, files):
    """A tar of these files, as bytes."""
    return tar(path, files).read_bytes()


def make_kit(tmp_path):
    """An archive as bytes, and its recipe without a server."""
    data = packed(tmp_path / "kit.source", FILES)
    (tmp_path / "kit.source").unlink()
    digest = "md5:" + hashlib.md5(data).hexdigest()
    archive = Archive(
        "kit.tar", COUNTS, ("http://127.0.0.1:9/kit.tar",), "http://page", len(data), 0, digest, ("kit", "")
    )
    return data, Recipe("kit", "Kit", "kit", "VOC", (archive,))


def own(root):
    """What is there beside the dataset."""
    return sorted(path.name for path in (root / OWN).iterdir())


def there(root):
    """The dataset, without archives and what is ours."""
    return {
        name: data for name, data in content(root).items() if not name.startswith(OWN) and not name.endswith(".tar")
    }


def voc_archive(path):
    """A miniature of VOC's archive; its members by name."""
    from seglight.data import formats
    from seglight.data.scenes import scene

    splits = {"train": [scene(0, i, (60, 80)) for i in range(3)], "val": [scene(0, i, (60, 80)) for i in (100, 101)]}
    root = formats.write_voc(path.parent / "voc miniature", splits)
    with tarfile.open(path, "w") as archive:
        archive.add(root / "VOCdevkit", "VOCdevkit")
    return content(root)
