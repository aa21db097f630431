import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from tiny import Blocks, Tiny

import seglight
from seglight.cli import main
from seglight.predict import overrides


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "best.ckpt"
    data = Blocks()
    model = Tiny(num_classes=4, classes=list(data.classes), palette=list(data.palette))
    trainer = pl.Trainer(
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        accelerator="cpu",
        limit_val_batches=0,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(path)
    return path


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (30, 41)), ("b.png", (17, 23)), ("deep/c.png", (9, 50))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_file_array_and_pil_image_give_the_same(checkpoint, pictures):
    model = seglight.load(checkpoint)
    from_file = model.predict(pictures / "b.png")
    array = np.asarray(Image.open(pictures / "b.png"))
    assert from_file.labels.shape == (17, 23) and from_file.labels.dtype == np.uint8
    assert np.array_equal(from_file.labels, model.predict(array).labels)
    assert np.array_equal(from_file.labels, model.predict(Image.open(pictures / "b.png")).labels)
    assert abs(sum(from_file.shares.values()) - 1) < 1e-9
    assert from_file.overlay().size == (23, 17)
    for wrong in (array / 255.0, [array], torch.zeros(3, 17, 23, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\)"):
            model.predict(wrong)
    for empty in (array[:0], Image.new("RGB", (5, 0))):
        with pytest.raises(ValueError, match=r"The picture is 0 pixels high and .* wide; give at least one"):
            model.predict(empty)


def test_saved_label_map_is_a_palette_png_of_the_original_size(checkpoint, pictures, tmp_path):
    prediction = seglight.load(checkpoint).predict(pictures / "a.jpg")
    prediction.save(tmp_path / "out" / "a")
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.mode == "P" and image.size == (41, 30)
        assert np.array_equal(np.asarray(image), prediction.labels)
        assert image.getpalette()[:3] == [10, 10, 10]
    assert (tmp_path / "out" / "a_overlay.jpg").is_file()


def test_folder_pattern_and_broken_files(checkpoint, pictures, tmp_path, capsys):
    (pictures / "broken.jpg").write_bytes((pictures / "a.jpg").read_bytes()[:200])
    out = tmp_path / "out"
    words = ["predict", "--ckpt_path", str(checkpoint), "--device", "cpu", "--out", str(out), "--source"]
    assert main([*words, str(pictures)]) == 1
    said = capsys.readouterr()
    assert "3 of 4 pictures" in said.out and "broken.jpg" in said.err
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.png")) == ["a.png", "b.png", "deep/c.png"]
    before = (out / "a.png").stat().st_mtime_ns
    assert main([*words, str(pictures / "*.jpg")]) == 2
    assert "--overwrite" in capsys.readouterr().err and (out / "a.png").stat().st_mtime_ns == before
    assert main([*words, str(pictures / "a.jpg"), "--overwrite"]) == 0
    assert main([*words, "nowhere/*.jpg"]) == 2 and "matches nothing" in capsys.readouterr().err


def test_same_stem_keeps_both(checkpoint, pictures, tmp_path):
    Image.open(pictures / "a.jpg").save(pictures / "a.png")
    words = [
        "predict",
        "--ckpt_path",
        str(checkpoint),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
        "--source",
        str(pictures),
    ]
    assert main(words) == 0
    assert {"a.jpg.png", "a.png.png", "b.png"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_predicting_into_the_source_never_overwrites_it(checkpoint, pictures, capsys):
    before = (pictures / "b.png").read_bytes()
    words = [
        "predict",
        "--ckpt_path",
        str(checkpoint),
        "--device",
        "cpu",
        "--out",
        str(pictures),
        "--source",
        str(pictures),
    ]
    assert main(words) == 2
    assert (pictures / "b.png").read_bytes() == before


def test_exif_rotation_is_applied(checkpoint, tmp_path):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    assert seglight.load(checkpoint).predict(tmp_path / "phone.jpg").labels.shape == (30, 20)


def test_test_time_options_and_their_typos(checkpoint, pictures, tmp_path, capsys):
    words = ["predict", "--ckpt_path", str(checkpoint), "--device", "cpu", "--source", str(pictures / "a.jpg"), "--out"]
    assert main([*words, str(tmp_path / "1"), "--model.test_flip", "true"]) == 0
    assert main([*words, str(tmp_path / "2"), "--model.tset_flip", "true"]) == 2
    assert "--model.tset_flip" in capsys.readouterr().err


def test_a_dot_in_a_name_is_no_suffix(checkpoint, pictures, tmp_path):
    prediction = seglight.load(checkpoint).predict(pictures / "b.png")
    for name in ("val.2024.000", "val.2024.001", "photo.jpg"):
        prediction.save(tmp_path / "out" / name)
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"val.2024.000.png", "val.2024.001.png", "photo.png"}
    assert (tmp_path / "out/val.2024.001_overlay.jpg").is_file()


def test_a_pattern_keeps_pictures_of_one_name_apart(checkpoint, pictures, tmp_path):
    for folder in ("x", "y"):
        (pictures / folder).mkdir()
        Image.open(pictures / "b.png").save(pictures / folder / "1.png")
    words = ["predict", "--ckpt_path", str(checkpoint), "--device", "cpu", "--out", str(tmp_path / "out"), "--source"]
    assert main([*words, str(pictures / "?/1.png")]) == 0
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")} == {"x/1.png", "y/1.png"}


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", np.uint16), ("F", np.float32)])
def test_pictures_of_more_than_8_bits_are_refused_however_they_come(checkpoint, mode, dtype):
    ramp = Image.fromarray(np.linspace(0, 60000, 400).reshape(20, 20).astype(dtype))
    assert ramp.mode == mode
    with pytest.raises(ValueError, match=f'mode "{mode}", more than 8 bits'):
        seglight.load(checkpoint).predict(ramp)


def test_images_of_a_split_in_subfolders_keep_their_own_files(checkpoint, tmp_path):
    from seglight.callbacks.predictions import Predictions
    from seglight.cli.explain_metric import _saved
    from seglight.data.folder import Folder

    for part in ("images", "masks"):
        (tmp_path / "test" / part / "a").mkdir(parents=True)
        (tmp_path / "train" / part).mkdir(parents=True)
    for i, name in enumerate(("a/b", "a_b", "c")):
        mask = np.full((20, 24), i, np.uint8)
        Image.fromarray(80 * np.dstack([mask] * 3)).save(tmp_path / "test/images" / f"{name}.png")
        Image.fromarray(mask).save(tmp_path / "test/masks" / f"{name}.png")
    data = Folder(root=str(tmp_path), classes=list(Blocks.classes), workers=0)
    model = seglight.load(checkpoint)
    trainer = pl.Trainer(
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        default_root_dir=str(tmp_path / "run"),
        callbacks=[Predictions()],
    )
    trainer.predict(model, datamodule=data)
    saved = tmp_path / "run/predictions"
    assert sorted(str(p.relative_to(saved)) for p in saved.rglob("*.png")) == ["a/b.png", "a_b.png", "c.png"]
    for i, (name, labels, mask) in enumerate(_saved(saved, data, "test")):
        assert (name, mask.min()) == (("a/b", "a_b", "c")[i], i)
        assert np.array_equal(labels, model.predict(tmp_path / "test/images" / f"{name}.png").labels)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.test_flip", "flase"], r"test_flip is 'flase', but Tiny takes test_flip: bool = False\."),
        (["--model.test_scales", "0.5"], r"test_scales is 0\.5, but Tiny takes test_scales: .*list\[float\]"),
        (["--model.test_scales=[0]"], r"test_scales is \[0\]; give factors above 0"),
        (["--model.test_scales", "[0.5"], r"--model\.test_scales is '\[0\.5', which is no YAML"),
        (["--model.test_aggregate", "sofmax"], r"test_aggregate is 'sofmax', but Tiny takes .*'softmax'"),
        (["--model.test_windw", "33"], r"Tiny has no option test_windw\. Did you mean test_window\?"),
        (["--model.test_flip"], r"--model\.test_flip has no value\."),
        (["--model.test_flip", "--model.test_window", "33"], r"--model\.test_flip has no value\."),
        (["--model.lr", "3"], r"--model\.lr .* only test-time options"),
    ],
)
def test_wrong_test_options_are_named(checkpoint, pictures, tmp_path, capsys, words, message):
    start = ["predict", "--ckpt_path", str(checkpoint), "--device", "cpu", "--source", str(pictures / "a.jpg")]
    assert main([*start, "--out", str(tmp_path / "out"), *words]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and len(said.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_only_options_are_split_at_an_equals_sign():
    words = ["--model.test_boxes", "runs/epoch=3-step=10.ckpt", "--model.init_args.test_crf={w1: 5}"]
    assert overrides(words) == {"test_boxes": "runs/epoch=3-step=10.ckpt", "test_crf": {"w1": 5}}


def test_load_names_overrides_that_do_not_fit(checkpoint):
    with pytest.raises(ValueError, match=r"Tiny has no option test_flp\. Did you mean test_flip\?"):
        seglight.load(checkpoint, test_flp=True)
    with pytest.raises(
        ValueError, match=r"trained with num_classes=4, not 3; start from these weights with model.init"
    ):
        seglight.load(checkpoint, num_classes=3)
    assert seglight.load(checkpoint, num_classes=4, test_scales=[1, 0.5]).test_scales == [1, 0.5]


def test_results_stay_in_their_folder(tmp_path):
    from seglight.predict import path_of

    assert path_of(tmp_path, "a/../b") == tmp_path / "a/__/b.png"
    assert path_of(tmp_path, "../../b") == tmp_path / "__/__/b.png"
    assert path_of(tmp_path, "/etc/b", ".json") == tmp_path / "etc/b.json"
    assert path_of(tmp_path, "a\\b") == tmp_path / "a/b.png"
