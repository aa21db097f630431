"""Archives for servers: written, looked at, refused; and read by the official code where there is one."""

from __future__ import annotations

import io
import json
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny  # noqa: F401  makes the short name Tiny known
import torch
from PIL import Image
from pycocotools import mask as coco

from seglight import submit
from seglight.cityscapes_ap import IDS
from seglight.cityscapes_scores import CLASSES
from seglight.cli import main
from seglight.data import COCO, VOC, Cityscapes, CityscapesInstances, PascalContext
from seglight.data.findings import DataError
from seglight.data.formats import write_cityscapes, write_coco, write_context, write_voc
from seglight.data.palette import palette
from seglight.data.scenes import split_scenes

SIZE = (48, 60)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A miniature of every benchmark, with a test split without labels where there is one."""
    folder = tmp_path_factory.mktemp("root")
    for name, write in (("voc", write_voc), ("cityscapes", write_cityscapes), ("coco", write_coco)):
        write(folder / name, {split: split_scenes(split, 3, 0, SIZE) for split in ("train", "val")}
              | {"test": split_scenes("val", 4, 1, SIZE)})  # fmt: skip
    write_context(folder / "context", {split: split_scenes(split, 3, 0, SIZE) for split in ("train", "val")})
    return folder


def data_of(name: str, root: Path, split: str, task: str = "semantic"):
    options = {"workers": 0, "check": False}
    if name == "voc":
        return VOC(str(root / name), test_split=split, **options)
    if name == "context":
        return PascalContext(str(root / name), test_split="val", **options)
    if name == "coco":
        return COCO(str(root / name), test_split={"test": "test-dev2017", "val": "val2017"}[split], **options)
    return (Cityscapes if task == "semantic" else CityscapesInstances)(str(root / name), test_split=split, **options)


class Oracle:
    """Says what the labels say; void becomes class 0, and images without labels get stripes or two boxes."""

    device = torch.device("cpu")

    def __init__(self, data):
        self.data, self.classes = data, data.classes
        self.places = {name: index for index, name in enumerate(data.split("test").ids)}

    def predict_step(self, batch, number):
        if self.data.task == "semantic":
            return [torch.from_numpy(self.labels(mask)) for mask in batch["mask"]]
        sizes = [image.shape[-2:] for image in batch["image"]]
        found = [self.objects(*pair) for pair in zip(batch["target"], sizes, strict=True)]
        return {"detections": [one for one, _ in found], "rles": [rles for _, rles in found]}

    def labels(self, mask):
        mask = mask.numpy().copy()
        if (mask == 255).all():
            mask = (np.indices(mask.shape).sum(0) // 5 % len(self.classes)).astype(np.uint8)
        mask[mask == 255] = 0
        return mask

    def objects(self, target, size):
        rles = [rle for rle, crowd in zip(target["rles"], target["iscrowd"], strict=True) if not crowd]
        labels = target["labels"][~target["iscrowd"]]
        if not rles:
            dense = np.zeros((*size, 2), np.uint8, order="F")
            dense[5:20, 5:20, 0] = dense[10:30, 30:50, 1] = 1
            rles, labels = coco.encode(dense), torch.tensor([0, 1])
        return {"labels": labels, "scores": torch.linspace(0.9, 0.5, len(rles))}, rles


KINDS = {
    "voc": ("semantic", "r.tgz"),
    "cityscapes": ("semantic", "r.zip"),
    "objects": ("instance", "r.zip"),
    "coco": ("instance", "detections_{}_mine_results.zip"),
    "context": ("semantic", "r.zip"),
}


def made(kind: str, root: Path, folder: Path, split: str = "val"):
    """An archive of what the labels say: its path, the submission, the datamodule, the verdict."""
    task, name = KINDS[kind]
    benchmark = "cityscapes" if kind == "objects" else kind
    data = data_of(benchmark, root, split, task)
    out = folder / name.format({"test": "test-dev2017", "val": "val2017"}[split])
    submission = getattr(submit, submit.BENCHMARKS[benchmark])(split)
    return out, submission, data, submit.make(submission, Oracle(data), data, out)


def members(path: Path) -> dict[str, bytes]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            return {name: file.read(name) for name in file.namelist()}
    with tarfile.open(path) as file:
        return {one.name: file.extractfile(one).read() for one in file.getmembers()}


def pack(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".tgz":
        with tarfile.open(path, "w:gz") as file:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                file.addfile(entry, io.BytesIO(content))
    else:
        with zipfile.ZipFile(path, "w") as file:
            for name, content in files.items():
                file.writestr(name, content)
    return path


def look(kind: str, root: Path, archive: Path, split: str = "val"):
    task, _ = KINDS[kind]
    benchmark = "cityscapes" if kind == "objects" else kind
    kind_of = getattr(submit, submit.BENCHMARKS[benchmark])
    return submit.check(kind_of(split), archive, data_of(benchmark, root, split, task))


def text(verdict) -> str:
    from seglight.submit.run import findings

    return "\n".join(findings(verdict))


def cells(table) -> str:
    from rich.console import Console

    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return " ".join(console.file.getvalue().split())


# ------------------------------------------------------------------ what is written


def test_voc(root, tmp_path):
    out, _, data, verdict = made("voc", root, tmp_path)
    files, dataset = members(out), data.split("test")
    assert list(files) == [f"results/VOC2012/Segmentation/comp6_val_cls/{name}.png" for name in dataset.ids]
    for index, content in enumerate(files.values()):
        picture = Image.open(io.BytesIO(content))
        mask = dataset.read(index)[1]
        assert picture.mode == "P" and picture.format == "PNG"
        assert np.array_equal(np.array(picture), np.where(mask == 255, 0, mask))
        assert picture.getpalette()[:63] == [part for colour in palette(21) for part in colour]
    assert (
        verdict.files == 3
        and "mean (mIoU, mAcc) │ 100.0" in cells(verdict.score)
        and "VOC devkit" in " ".join(cells(verdict.score).split())
    )


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"context"}))
def test_a_test_split_has_no_score(kind, root, tmp_path):
    out, _, data, verdict = made(kind, root, tmp_path, "test")
    assert verdict.faults == [] and verdict.score is None and len(data.split("test")) == 4
    assert look(kind, root, out, "test").faults == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name]


@pytest.mark.fidelity
def test_cityscapes_pixels_as_the_official_scripts_read_them(root, tmp_path, monkeypatch):
    out, _, data, verdict = made("cityscapes", root, tmp_path)
    files, dataset = members(out), data.split("test")
    assert list(files) == [f"{name}_labelIds.png" for name in dataset.ids]
    values = {value for content in files.values() for value in np.unique(np.array(Image.open(io.BytesIO(content))))}
    assert values <= set(CLASSES.values()) and max(values) > 18, "labelIds, not train ids"
    assert "mean of classes │ 100.0 │ 100.0" in cells(verdict.score)
    script = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    if not hasattr(np, "in1d"):
        monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    with zipfile.ZipFile(out) as file:
        file.extractall(tmp_path / "results")
    script.args.predictionPath, script.args.predictionWalk = str(tmp_path / "results"), None
    script.args.quiet, script.args.JSONOutput = True, False
    truths = sorted(map(str, (root / "cityscapes/gtFine/val").rglob("*_labelIds.png")))
    found = [script.getPrediction(script.args, truth) for truth in truths]
    result = script.evaluateImgLists(found, truths, script.args)
    assert result["averageScoreClasses"] == result["averageScoreInstClasses"] == 1


@pytest.mark.fidelity
def test_cityscapes_objects_as_the_official_scripts_read_them(root, tmp_path, monkeypatch):
    out, _, data, verdict = made("objects", root, tmp_path)
    files, dataset = members(out), data.split("test")
    assert [name for name in files if name.endswith(".txt")] == [f"{name}.txt" for name in dataset.ids]
    first = files[f"{dataset.ids[0]}.txt"].decode().splitlines()
    assert first and {int(line.split()[1]) for line in first} <= set(IDS.values())
    assert "mean │ 100.0 │ 100.0" in cells(verdict.score)
    script = pytest.importorskip("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
    if not hasattr(np, "in1d"):
        monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    monkeypatch.setattr(script, "writeDict2JSON", lambda *_: None)
    with zipfile.ZipFile(out) as file:
        file.extractall(tmp_path / "results")
    script.args.predictionPath, script.args.predictionWalk = str(tmp_path / "results"), None
    script.args.gtInstancesFile = str(tmp_path / "gt.json")
    script.args.JSONOutput, script.args.quiet = False, True
    truths = sorted(map(str, (root / "cityscapes/gtFine/val").rglob("*_instanceIds.png")))
    found = [script.getPrediction(truth, script.args) for truth in truths]
    result = script.evaluateImgLists(found, truths, script.args)
    assert result["averages"]["allAp"] == 1


@pytest.mark.fidelity
def test_coco_as_pycocotools_reads_it(root, tmp_path):
    from pycocotools.coco import COCO as Official
    from pycocotools.cocoeval import COCOeval

    out, _, data, verdict = made("coco", root, tmp_path)
    ((name, content),) = members(out).items()
    assert name == "detections_val2017_mine_results.json"
    results = json.loads(content)
    assert set(results[0]) == {"image_id", "category_id", "segmentation", "score"}
    assert {one["category_id"] for one in results} <= set(data.category_ids), "raw ids"
    truth = Official(str(root / "coco/annotations/instances_val2017.json"))
    evaluation = COCOeval(truth, truth.loadRes(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1) and "│ AP │ 100.0" in cells(verdict.score)


def test_context_says_what_its_labels_are(root, tmp_path):
    out, _, data, verdict = made("context", root, tmp_path)
    files = members(out)
    assert files.pop("classes.txt").decode().split("\n")[:-1] == list(data.classes)
    assert sorted(files) == sorted(f"{name}.png" for name in data.split("test").ids)
    assert "mean (mIoU, mAcc) │ 100.0" in cells(verdict.score)
    other = PascalContext(str(root / "context"), background=False, test_split="val", workers=0)
    faults = submit.check(submit.ContextSubmission("val"), out, other)
    assert "names other classes" in text(faults) and "num_classes 59, background: no" in text(faults)


# ------------------------------------------------------------------ what is refused


def png(values, mode=None, size=None) -> bytes:
    picture = Image.fromarray(np.asarray(values, np.uint8))
    picture = picture if mode is None else picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def spoil_first(change):
    def spoil(files):
        name = next(name for name in files if name.endswith(".png"))
        files[name] = change(files[name])

    return spoil


def again(content: bytes, change) -> bytes:
    """The PNG with other values, and its palette."""
    picture = Image.open(io.BytesIO(content))
    colours, values = picture.getpalette(), np.array(picture)
    picture = Image.fromarray(change(values.copy()))
    if colours:
        picture.putpalette(colours)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def with_value(value):
    def change(values):
        values[0, 0] = value
        return values

    return spoil_first(lambda content: again(content, change))


def drop(files):
    files.pop(next(iter(files)))


LABEL_FAULTS = {
    "missing": (drop, "1 case: missing"),
    "too many": (lambda files: files.update({"readme.txt": b"hello"}), "not of this split"),
    "other folder": (lambda files: files.update({f"x/{k}": files.pop(k) for k in list(files)}), "3 cases: missing"),
    "size": (spoil_first(lambda content: again(content, lambda v: v[1:])), "not of the size of its image"),
    "colours": (spoil_first(lambda content: png(np.array(Image.open(io.BytesIO(content))), "RGB")), "of mode RGB"),
    "cut off": (spoil_first(lambda content: content[:-40]), "no readable picture"),
    "no picture": (spoil_first(lambda content: b"text"), "no readable picture"),
}
FAULTS = {
    "voc": LABEL_FAULTS
    | {
        "void": (with_value(255), "holds the value 255; legal are 0..20"),
        "grey": (spoil_first(lambda content: png(np.array(Image.open(io.BytesIO(content))))), "of mode L, but it must"),
    },
    "context": LABEL_FAULTS | {"value": (with_value(60), "holds the value 60; legal are 0..59")},
    "cityscapes": LABEL_FAULTS
    | {
        "value": (with_value(34), "holds the value 34; legal are 0..33"),
        "train ids": (
            lambda files: files.update({k: again(v, lambda a: a % 19) for k, v in files.items()}),
            "these look like train ids",
        ),
    },
}
FAULTS["context"].pop("other folder")


@pytest.mark.parametrize(("kind", "fault"), [(kind, fault) for kind, faults in FAULTS.items() for fault in faults])
def test_faults_of_label_maps(kind, fault, root, tmp_path):
    out, *_ = made(kind, root, tmp_path)
    files = members(out)
    spoil, rule = FAULTS[kind][fault]
    spoil(files)
    verdict = look(kind, root, pack(tmp_path / f"spoiled{out.suffix}", files))
    assert rule in text(verdict), text(verdict)
    assert verdict.score is None
    assert look(kind, root, out).faults == []


def test_another_palette(root, tmp_path):
    out, *_ = made("voc", root, tmp_path)
    files = members(out)
    name = next(iter(files))
    picture = Image.open(io.BytesIO(files[name]))
    picture.putpalette([255 - part for part in picture.getpalette()])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    files[name] = buffer.getvalue()
    assert "its palette is not the benchmark's" in text(look("voc", root, pack(tmp_path / "s.tgz", files)))


def test_comp5_is_recognised(root, tmp_path):
    data = data_of("voc", root, "val")
    out = tmp_path / "r.tgz"
    submit.make(submit.VOCSubmission("val", comp="comp5"), Oracle(data), data, out)
    assert all("/comp5_val_cls/" in name for name in members(out))
    assert look("voc", root, out).faults == []
    assert "missing" in text(submit.check(submit.VOCSubmission("val", comp="comp6"), out, data))


def edit_text(change):
    def spoil(files):
        name = next(name for name in files if name.endswith(".txt"))
        files[name] = change(files[name].decode()).encode()

    return spoil


def first_line(pattern):
    def change(content):
        parts = content.splitlines()[0].split(" ")
        return content.replace(content.splitlines()[0], pattern.format(*parts), 1)

    return edit_text(change)


OBJECT_FAULTS = {
    "no text": (drop, "missing: the server wants one for every image"),
    "a mask missing": (lambda files: files.pop(next(k for k in files if k.endswith(".png"))), "1 case: missing"),
    "a mask too many": (lambda files: files.update({"masks/x.png": png(np.zeros(SIZE))}), "not of this split"),
    "a name": (first_line("{0} car {2}"), "not a path, a labelId and a confidence"),
    "a label": (first_line("{0} 2 {2}"), "a labelId without objects; legal are 24, 25"),
    "spaces": (first_line("{0}  {1} {2}"), "not a path, a labelId"),
    "not finite": (first_line("{0} {1} nan"), "a confidence that is not finite"),
    "outside": (first_line("../{0} {1} {2}"), "the path of the mask leaves the archive"),
    "absolute": (first_line("/{0} {1} {2}"), "the path of the mask leaves the archive"),
    "twice": (edit_text(lambda content: content + content.splitlines()[0] + "\n"), "named in more than one line"),
    "size": (spoil_first(lambda content: png(np.ones((9, 9)))), "not of the size of its image"),
}


@pytest.mark.parametrize("fault", OBJECT_FAULTS)
def test_faults_of_cityscapes_objects(fault, root, tmp_path):
    out, *_ = made("objects", root, tmp_path)
    files = members(out)
    spoil, rule = OBJECT_FAULTS[fault]
    spoil(files)
    verdict = look("objects", root, pack(tmp_path / "s.zip", files))
    assert rule in text(verdict) and verdict.score is None, text(verdict)


def entry(**changes):
    def spoil(results):
        results[0].update(changes)
        return results

    return spoil


COCO_FAULTS = {
    "image": (entry(image_id=12345), "its image_id is not a number of this split's list"),
    "image as text": (entry(image_id="9"), "its image_id is not a number"),
    "label for id": (entry(category_id=0), "are they labels 0..79?"),
    "gap": (entry(category_id=2), "are they labels 0..79?"),
    "score": (entry(score=float("nan")), "its score is not a finite number"),
    "polygon": (entry(segmentation=[[0, 0, 5, 0, 5, 5]]), "not compressed run lengths"),
    "size": (entry(segmentation={"size": list(SIZE[::-1]), "counts": "0"}), "not of the image's size (height, width)"),
    "runs": (entry(segmentation={"size": list(SIZE), "counts": "04"}), "do not cover the image"),
    "garbage": (entry(segmentation={"size": list(SIZE), "counts": "é~"}), "do not cover the image"),
    "keys": (lambda results: [{"image_id": 9}, *results], "lacks one of category_id"),
    "empty": (lambda results: [], "no list of results, or an empty one"),
    "too many": (lambda results: results + [results[0]] * 101, "more than 100 results"),
}


@pytest.mark.parametrize("fault", COCO_FAULTS)
def test_faults_of_coco(fault, root, tmp_path):
    out, *_ = made("coco", root, tmp_path)
    ((name, content),) = members(out).items()
    spoil, rule = COCO_FAULTS[fault]
    out.unlink()
    verdict = look("coco", root, pack(out, {name: json.dumps(spoil(json.loads(content))).encode()}))
    assert rule in text(verdict) and verdict.score is None, text(verdict)


def test_coco_names(root, tmp_path):
    out, _, data, _ = made("coco", root, tmp_path)
    ((name, content),) = members(out).items()
    out.unlink()
    assert "must hold exactly detections_val2017_mine_results.json" in text(
        look("coco", root, pack(out, {f"results/{name}": content}))
    )
    other = pack(tmp_path / "results.zip", {"results.json": content})
    assert "Call it detections_val2017_ALG_results.zip" in text(look("coco", root, other))
    with pytest.raises(ValueError, match=r"Call it detections_val2017_ALG_results\.zip"):
        submit.make(submit.COCOSubmission("val"), Oracle(data), data, tmp_path / "mine.zip")


def test_archives_that_are_none(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no archive"):
        look("voc", root, tmp_path / "none.tgz")
    (tmp_path / "text.tgz").write_text("hello")
    with pytest.raises(DataError, match=r"no whole zip or tar archive \([^\n]+\)\.$"):
        look("voc", root, tmp_path / "text.tgz")
    out, *_ = made("voc", root, tmp_path)
    (tmp_path / "cut.tgz").write_bytes(out.read_bytes()[:-200])
    with pytest.raises(DataError, match="no whole zip or tar"):
        look("voc", root, tmp_path / "cut.tgz")
    files = members(out)
    assert "archives that end in .tgz or .tar.gz" in text(look("voc", root, pack(tmp_path / "r.zip", files)))


def test_links_are_no_results(root, tmp_path):
    out, *_ = made("voc", root, tmp_path)
    files = members(out)
    first = next(iter(files))
    secret = tmp_path / "secret.png"
    secret.write_bytes(files[first])
    with tarfile.open(tmp_path / "s.tgz", "w:gz") as file:
        link = tarfile.TarInfo(first)
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        file.addfile(link)
        for name, content in list(files.items())[1:]:
            one = tarfile.TarInfo(name)
            one.size = len(content)
            file.addfile(one, io.BytesIO(content))
    assert "a link or device, not a file" in text(look("voc", root, tmp_path / "s.tgz"))


def test_twice(root, tmp_path):
    out, *_ = made("cityscapes", root, tmp_path)
    name, content = next(iter(members(out).items()))
    with pytest.warns(UserWarning), zipfile.ZipFile(out, "a") as file:
        file.writestr(name, content)
    assert "there more than once" in text(look("cityscapes", root, out))


# ------------------------------------------------------------------ nothing is left behind, nothing is lost


def test_a_failure_leaves_nothing(root, tmp_path):
    data = data_of("voc", root, "val")
    oracle = Oracle(data)

    def failing(batch, number):
        if number == 2:
            raise DataError("a broken image")
        return Oracle.predict_step(oracle, batch, number)

    oracle.predict_step = failing
    with pytest.raises(DataError, match="a broken image"):
        submit.make(submit.VOCSubmission("val"), oracle, data, tmp_path / "r.tgz")
    oracle.predict_step = lambda batch, number: [torch.full(mask.shape, 21) for mask in batch["mask"]]
    with pytest.raises(DataError, match=r"r\.tgz was not made: it would be refused(.|\n)*holds the value 21"):
        submit.make(submit.VOCSubmission("val"), oracle, data, tmp_path / "r.tgz")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(root, tmp_path):
    out, submission, data, _ = made("voc", root, tmp_path)
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match="Nothing is overwritten"):
        submit.make(submission, Oracle(data), data, out)
    assert out.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_equal_predictions_give_equal_zips(root, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (made("objects", root, tmp_path / name)[0].read_bytes() for name in ("a", "b"))
    assert first == second


def test_other_classes_are_refused(root, tmp_path):
    data = data_of("context", root, "val")
    oracle = Oracle(data)
    oracle.classes = data.classes[1:]
    with pytest.raises(ValueError, match=r"trained on 59 classes \(aeroplane, .*PascalContext has 60 \(background"):
        submit.make(submit.ContextSubmission("val"), oracle, data, tmp_path / "r.zip")


# ------------------------------------------------------------------ the command

RUN = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--data.workers", "0", "--data.batch_size", "2"]


@pytest.fixture(scope="module")
def semantic(root, tmp_path_factory):
    """A checkpoint trained on VOC for one step."""
    out = tmp_path_factory.mktemp("voc") / "run"
    words = ["--data", "VOC", "--data.root", str(root / "voc"), "--data.crop", "32", "--out", str(out)]
    assert main(["fit", "--model", "Tiny", *words, *RUN]) == 0
    return out / "checkpoints/best.ckpt"


def command(capsys, *words, status=0) -> str:
    assert main(["submit", *map(str, words)]) == status
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split())


def test_the_command_for_voc(root, semantic, tmp_path, capsys):
    out = tmp_path / "out/voc.tgz"
    printed = command(capsys, "voc", semantic, "--out", out, "--device", "cpu")
    assert "good. PASCAL VOC segmentation test, 4 images, 4 files" in printed and "Next: http://host.robots" in printed
    assert all("comp6_test_cls" in name for name in members(out))
    assert "good" in command(capsys, "voc", "--check", out, "--data.root", root / "voc")
    assert "Nothing is overwritten" in command(capsys, "voc", semantic, "--out", out, status=1)
    val = tmp_path / "val.tgz"
    printed = command(capsys, "voc", semantic, "--out", val, "--split", "val", "--comp", "comp5", "--device", "cpu")
    assert "This is a rehearsal" in printed and "mean (mIoU, mAcc)" in printed
    assert all("comp5_val_cls" in name for name in members(val))
    test = ["--ckpt_path", str(semantic), "--trainer.accelerator", "cpu", "--out", str(tmp_path / "t")]
    assert main(["test", *test]) == 0
    score = json.loads((tmp_path / "t/scores_test.json").read_text())["test/mIoU"]
    capsys.readouterr()
    printed = command(capsys, "voc", "--check", val, "--split", "val", "--data.root", root / "voc")
    assert f"mean (mIoU, mAcc) │ {100 * score:.1f}" in printed
    files = members(val)
    drop(files)
    printed = command(
        capsys,
        "voc",
        "--check",
        pack(tmp_path / "s.tgz", files),
        "--split",
        "val",
        "--data.root",
        root / "voc",
        status=1,
    )
    assert "1 faults" in printed and "missing" in printed


def test_wrong_usage(root, semantic, tmp_path, capsys):
    def refused(*words, status=2):
        return command(capsys, *words, status=status)

    where = ["--data.root", str(root / "voc")]
    assert "--out" in refused("voc", semantic)
    assert "must end in .tgz" in refused("voc", semantic, "--out", tmp_path / "a.zip", "--device", "cpu")
    assert "--check looks at an archive" in refused("voc", semantic, "--check", tmp_path / "a.tgz")
    assert "there is no option --foo" in refused("voc", semantic, "--out", tmp_path / "a.tgz", "--foo", "1")
    assert "no test split to submit" in refused("context", semantic, "--split", "test", "--out", tmp_path / "a.zip")
    assert "--comp is of voc" in refused("context", semantic, "--comp", "comp5", "--out", tmp_path / "a.zip")
    assert "for instance segmentation, and this one is for semantic" in refused(
        "coco", semantic, "--out", tmp_path / "detections_test-dev2017_a_results.zip"
    )
    words = ["--data.root", str(root / "cityscapes"), "--device", "cpu"]
    assert "trained on 21 classes" in refused("cityscapes", semantic, "--out", tmp_path / "a.zip", *words)
    assert "There is no archive" in refused("voc", "--check", tmp_path / "none.tgz", *where, status=1)
    assert "BENCHMARK is 'imagenet'. Choose from voc" in refused("imagenet", semantic)
    assert list(tmp_path.iterdir()) == []


def test_without_the_test_images(root, semantic, tmp_path, capsys):
    import shutil

    shutil.copytree(root / "voc", tmp_path / "voc")
    (tmp_path / "voc/VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt").unlink()
    words = ["--out", tmp_path / "a.tgz", "--data.root", tmp_path / "voc", "--device", "cpu"]
    assert "VOC2012test.tar" in command(capsys, "voc", semantic, *words, status=1)


def untrained(model, path: Path) -> Path:
    """A checkpoint of a model as it is, which names no dataset."""
    import pytorch_lightning as pl

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


@pytest.fixture
def finder():
    """A detector that finds one bright box per colour, for any classes."""
    from test_instance_model import FinderModel

    return lambda data: FinderModel(
        data.num_classes, classes=list(data.classes), palette=list(data.palette), test_short_side=None
    )


def test_seglight_test_prints_both_kinds_of_ap(root, finder, tmp_path, capsys):
    data = data_of("cityscapes", root, "val", "instance")
    best = untrained(finder(data), tmp_path / "best.ckpt")
    words = ["--data", "CityscapesInstances", "--data.root", str(root / "cityscapes"), "--data.workers", "0"]
    words += ["--ckpt_path", str(best), "--trainer.accelerator", "cpu", "--out", str(tmp_path / "t")]
    assert main(["test", *words]) == 0
    scores = json.loads((tmp_path / "t/scores_test.json").read_text())
    assert {"test/AP", "test/AP50", "test/cityscapes_AP", "test/cityscapes_AP50"} <= set(scores)
    assert "Cityscapes AP" in scores["cityscapes_definition"] and "COCO's rules" in scores["definition"]
    assert (tmp_path / "t/cityscapes_test.csv").read_text().startswith("class,AP,AP50")
    printed = " ".join(capsys.readouterr().out.split())
    assert "Cityscapes, instance level" in printed and "mean, masks" in printed
    val = tmp_path / "val.zip"
    where = ["--data.root", root / "cityscapes"]
    printed = command(capsys, "cityscapes", best, "--out", val, "--split", "val", "--device", "cpu", *where)
    ap = f"mean │ {100 * scores['test/cityscapes_AP']:.1f} │ {100 * scores['test/cityscapes_AP50']:.1f} │"
    assert ap in printed and "This is a rehearsal" in printed
    check = ["--check", val, "--split", "val", "--task", "instance", *where]
    assert ap in command(capsys, "cityscapes", *check)
    assert "missing" in command(capsys, "cityscapes", *check[:4], *where, status=1), "as pixel level"


def test_the_command_for_coco(root, finder, tmp_path, capsys):
    best = untrained(finder(data_of("coco", root, "val")), tmp_path / "best.ckpt")
    out, where = tmp_path / "detections_test-dev2017_a_results.zip", ["--data.root", root / "coco"]
    printed = command(capsys, "coco", best, "--out", out, "--device", "cpu", *where)
    assert "test, 4 images, 1 file looked at" in printed and "cocodataset.org/#upload" in printed
    assert "good" in command(capsys, "coco", "--check", out, *where)


def test_context_from_the_command(root, tmp_path, capsys):
    from tiny import Tiny

    data = PascalContext(str(root / "context"), background=False, workers=0)
    model = Tiny(59, classes=list(data.classes), palette=list(data.palette))
    best = untrained(model, tmp_path / "best.ckpt")
    where = ["--data.root", root / "context", "--data.background", "false"]
    printed = command(capsys, "context", best, "--out", tmp_path / "c.zip", "--device", "cpu", *where)
    assert "has no server" in printed and "num_classes 59, background: no, order: alphabetical" in printed
    check = ["--check", tmp_path / "c.zip"]
    assert "names other classes" in command(capsys, "context", *check, *where[:2], status=1)
    assert "good" in command(capsys, "context", *check, *where)


def test_only_the_best_hundred_of_coco_are_kept():
    """In whatever order they come: the server counts no more of an image."""
    scores = np.arange(1, 151) / 200
    mask = coco.encode(np.asfortranarray(np.ones((2, 2), np.uint8)))
    found = {"labels": np.zeros(150, int), "scores": scores, "rles": [mask] * 150}
    data = type("Data", (), {"category_ids": [18]})
    one = submit.COCOSubmission("val")
    one.name = "a.zip"
    one.entries(data, "7", 0, found)
    kept = [result["score"] for result in json.loads(one.closing(data)[0][1])]
    assert kept == sorted(scores.tolist(), reverse=True)[:100]


def test_names_are_compared_in_time_that_grows_with_their_number():
    """An instance submission has as many files as objects."""
    from seglight.submit.benchmark import compare_names

    names = [f"masks/{i:06}.png" for i in range(30_000)]
    begin = time.perf_counter()
    faults = compare_names([*names[1:], names[5], "odd"], names)
    assert time.perf_counter() - begin < 2
    assert [(fault.what if hasattr(fault, "what") else fault.rule)[:11] for fault in faults] == [
        "missing: th", "not of this", "there more ",
    ]  # fmt: skip
