"""What all semantic models share: windows, resizing to the image, losses, what the CRF is given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_models_base import quiet
from tiny import Tiny, picture
from torch.utils.data import DataLoader

from seglight import crf, inference


@pytest.mark.parametrize("align_corners", [False, True])
def test_windows_step_by_two_thirds_rounded_up(align_corners):
    model = Tiny(num_classes=4, test_window=8, align_corners=align_corners).eval()
    image = model.normalize(picture(21, 19)[None])
    with torch.no_grad():
        expected = inference.sliding(model.logits, image, 8, 6, align_corners=align_corners)
        assert torch.equal(model.protocol(image), expected)


def test_the_loss_is_summed_if_asked():
    image, mask = picture(8, 8)[None], torch.randint(0, 4, (1, 8, 8), dtype=torch.uint8)
    mask[:, :3] = 255
    losses = []
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        model = Tiny(num_classes=4, loss_reduction=reduction).eval()
        losses.append(model.loss(model.network(model.normalize(image)), {"mask": mask})["loss"].item())
    assert losses[1] == pytest.approx(40 * losses[0], rel=1e-5)


@pytest.mark.parametrize("align_corners", [False, True])
def test_scores_and_labels_are_resized_as_the_model_says(align_corners):
    torch.manual_seed(0)
    model, image = Tiny(num_classes=4, align_corners=align_corners).eval(), picture(17, 161)
    with torch.no_grad():
        small = model.network(model.normalize(image[None]))["out"]
        expected = F.interpolate(small, (17, 161), mode="bilinear", align_corners=align_corners)
        assert torch.equal(model(image[None]), expected)
        (labels,), _ = model.labels([image])
    assert torch.equal(labels.long(), expected.argmax(1)[0])


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_crf_gets_scores_resized_as_the_model_says(align_corners, monkeypatch):
    model, seen = Tiny(num_classes=4, test_crf="deeplabv2_vgg", align_corners=align_corners), []
    monkeypatch.setattr(crf, "mean_field", lambda image, scores, *_: seen.append(scores) or scores)
    scores = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    model._refined(picture(9, 17), scores)
    assert torch.equal(seen[0], F.interpolate(scores[None], (9, 17), mode="bilinear", align_corners=align_corners)[0])


def test_float_images_reach_the_crf_as_their_nearest_bytes(monkeypatch):
    image, scores = picture(6, 7), torch.randn(4, 6, 7, generator=torch.Generator().manual_seed(0))
    model = Tiny(num_classes=4, test_crf="deeplabv2_vgg")
    seen = []
    monkeypatch.setattr(crf, "mean_field", lambda pixels, scores, *_: seen.append(pixels) or scores)
    for noise in (0.0, -0.4, 0.4):  # as a resizing or a division leaves it
        model._refined(image.float() + noise, scores)
    assert all(torch.equal(pixels, image) for pixels in seen) and len(seen) == 3


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_validation_loss_resizes_as_the_training_does(align_corners):
    torch.manual_seed(0)
    model, image = Tiny(num_classes=4, align_corners=align_corners).eval(), picture(17, 17)
    mask = torch.randint(0, 4, (17, 17), dtype=torch.uint8)
    batch = {"image": [image], "mask": [mask], "image_id": ["a"]}
    found = quiet().validate(model, DataLoader([batch], batch_size=None), verbose=False)[0]["val/loss"]
    with torch.no_grad():
        expected = model.loss(model.network(model.normalize(image[None])), {"mask": mask[None]})["loss"]
    assert found == pytest.approx(float(expected), rel=1e-5)
