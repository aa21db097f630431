"""Datasets to break for the tests of the data doctor, and how its findings are judged."""

from pathlib import Path

from PIL import Image

from seglight.data import formats
from seglight.data.scenes import scene
from seglight.doctor import examine

SIZE = (96, 112)
SCENES = {"train": [*range(8), 11], "val": [*range(100, 106)]}


def write_originals(home):
    """A small dataset in each format; their folders by name."""
    splits = {split: [scene(3, i, SIZE) for i in numbers] for split, numbers in SCENES.items()}
    made = {
        name: getattr(formats, f"write_{name}")(home / name, splits) for name in ("voc", "coco", "cityscapes", "folder")
    }
    for masks in ("palette", "rgb"):
        made[masks] = formats.write_folder(home / masks, splits, masks)
    return made


def found(source, **options):
    """Findings by rule, of all severities."""
    findings = {}
    for one in examine(source, **{"workers": 0, **options}).findings:
        assert one.rule not in findings, f"{one.rule} twice: {one.head} | {findings.get(one.rule)}"
        findings[one.rule] = one
    return findings


def alarms(findings):
    return {rule for rule, one in findings.items() if one.severity != "note"}


def picture(path):
    with Image.open(path) as image:
        return image.copy()


def judge(fault, root, expected, findings, clean):
    """One more finding than in the sound data, with these places and this remedy."""
    rules, places, fix = expected
    rules = {rules} if isinstance(rules, str) else rules
    extra = set(findings) - set(clean)
    assert len(extra) == 1 and extra <= rules, f"{fault}: {[one.head for one in findings.values()]}"
    one = findings[extra.pop()]
    names = {Path(str(place)).name for place in places}
    assert {Path(place.name).name for place in one.places} == names, f"{one.head} {one.places}"
    assert fix in one.fix, one.fix
    assert one.what.endswith(".") and one.head[0] != " "
    return one


def save_like(path, labels):
    before = picture(path)
    after = Image.fromarray(labels)
    after.putpalette(before.getpalette())
    after.save(path)
