"""U-Net against the paper: sizes, counts, wiring, initialisation, border weights, tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layer_table import layer_table, stored
from torch import nn

import seglight
from seglight.losses import cross_entropy
from seglight.models.unet import (
    UNet,
    UNetNetwork,
    border_weights,
    input_for_output,
    legal_input_size,
    output_size,
    separate,
)


def tiny(in_channels=1, num_classes=2, **options):
    torch.manual_seed(0)
    return UNetNetwork(in_channels, num_classes, width=2, **options).eval()


# ------------------------------------------------------------------------------------------------- the network


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("in_channels", "num_classes", "total"), [(1, 2, 31_030_658), (3, 2, 31_031_810), (3, 21, 31_033_045)]
)
def test_parameter_counts(in_channels, num_classes, total):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNetNetwork(in_channels, num_classes).parameters()) == total


@pytest.mark.fidelity
def test_the_released_network_is_an_option():
    with torch.device("meta"):
        released = UNetNetwork(relu_after_up=True, wide_last_up=True)
        assert sum(p.numel() for p in released.parameters()) == 31_100_354
        assert released(torch.empty(1, 1, 188, 204))["out"].shape == (1, 2, 4, 20)
    assert released.up[3][0].out_channels == 128 and released.merge[3][0].in_channels == 192


@pytest.mark.fidelity
def test_layer_table():
    with torch.device("meta"):
        network = UNetNetwork()
    table = layer_table(network)
    assert table == stored("unet")
    assert sum(" conv " in line or " deconv " in line for line in table.splitlines()) == 23


@pytest.mark.fidelity
@pytest.mark.parametrize(("side", "out"), [(572, 388), (188, 4), (204, 20), (700, 516)])
def test_sizes(side, out):
    assert output_size(side) == out
    with torch.device("meta"):
        network = UNetNetwork(3, 5)
        assert network(torch.empty(2, 3, side, 188))["out"].shape == (2, 5, out, 4)


@pytest.mark.fidelity
def test_sizes_inside():
    """The numbers in the paper's figure."""
    sizes = []
    with torch.device("meta"):
        network = UNetNetwork()
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.register_forward_hook(lambda m, i, out: sizes.append(out.shape[-1]))
        network(torch.empty(1, 1, 572, 572))
    assert sizes == [570, 568, 282, 280, 138, 136, 66, 64, 30, 28,
                     56, 54, 52, 104, 102, 100, 200, 198, 196, 392, 390, 388, 388]  # fmt: skip


def test_size_helpers_agree_with_the_network():
    legal = [side for side in range(1, 400) if _takes(side)]
    assert legal == list(range(188, 400, 16))
    for side in set(range(1, 400)) - set(legal):
        with pytest.raises(ValueError, match=f"input side of {side} pixels"):
            output_size(side)
    for at_least in range(1, 300):
        assert legal_input_size(at_least) == next(side for side in legal if side >= at_least)
    for out in range(1, 150):
        assert input_for_output(out) == next(side for side in legal if output_size(side) >= out)


def _takes(side):
    """Whether unpadded convolutions and poolings of an even size lead to an output."""
    for _ in range(4):
        side -= 4
        if side <= 0 or side % 2:
            return False
        side //= 2
    side -= 4
    for _ in range(4):
        side = 2 * side - 4
    return side > 0


@pytest.mark.parametrize(
    ("side", "near"), [(571, "556 or 572"), (573, "572 or 588"), (64, "is 188"), (187, "is 188"), (196, "188 or 204")]
)
def test_illegal_sizes_name_the_nearest_legal_ones(side, near):
    with pytest.raises(ValueError, match=rf"input side of {side} pixels.*{near}"):
        tiny()(torch.zeros(1, 1, 188, side))


@pytest.mark.fidelity
def test_initialisation():
    """Gaussian weights of variance 2 / (k * k * C_in), zero biases."""
    torch.manual_seed(0)
    network = UNetNetwork(1, 2, width=32)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            expected = (2 / (layer.kernel_size[0] ** 2 * layer.in_channels)) ** 0.5
            spread = 5 * expected / (2 * layer.weight.numel()) ** 0.5  # five standard errors
            assert layer.weight.std().item() == pytest.approx(expected, abs=spread)
            assert (layer.bias == 0).all()


@pytest.mark.fidelity
def test_concatenation_takes_the_centre_of_the_encoder_first():
    network = tiny()
    seen = {}
    network.down[3].register_forward_hook(lambda m, i, out: seen.update(encoder=out))
    network.up[0].register_forward_hook(lambda m, i, out: seen.update(up=out))
    network.merge[0].register_forward_pre_hook(lambda m, i: seen.update(joined=i[0]))
    with torch.no_grad():
        network(torch.randn(1, 1, 572, 572))
    encoder, joined = seen["encoder"], seen["joined"]
    assert encoder.shape[-1] == 64 and joined.shape[-1] == 56
    assert torch.equal(joined[:, :16], encoder[..., 4:60, 4:60])
    assert torch.equal(joined[:, 16:], seen["up"])


@pytest.mark.fidelity
@pytest.mark.parametrize("relu", [False, True])
def test_relu_after_the_up_convolution_is_an_option(relu):
    network = tiny(relu_after_up=relu)
    lowest = []
    for up in network.up:
        up.register_forward_hook(lambda m, i, out: lowest.append(out.min()))
    network(torch.randn(1, 1, 188, 188))
    assert all((low >= 0) == relu for low in lowest)


@pytest.mark.fidelity
def test_dropout_follows_the_two_deepest_stages_only():
    network = tiny().train()
    shares = []
    for stage in network.down:
        nn.init.ones_(stage[2].bias)  # no zeros but those of dropout
        nn.init.zeros_(stage[2].weight)
        stage.register_forward_hook(lambda m, i, out: shares.append((out == 0).float().mean().item()))
    network(torch.randn(4, 1, 188, 188))
    assert shares == pytest.approx([0, 0, 0, 0.5, 0.5], abs=0.1)


def test_every_parameter_gets_a_gradient():
    network = tiny(relu_after_up=True)
    nn.functional.cross_entropy(network(torch.randn(2, 1, 188, 204))["out"], torch.ones(2, 4, 20).long()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


# ---------------------------------------------------------------------------------------------- border weights


def brute_force(instances, w0, sigma, inside=False):
    """The definition, pixel by pixel."""
    objects = [np.argwhere(instances == n) for n in np.unique(instances) if n > 0]
    foreground = (instances > 0).mean()
    weights = np.zeros(instances.shape)
    for pixel in np.ndindex(instances.shape):
        weights[pixel] = 0.5 / (foreground if instances[pixel] else 1 - foreground)
        distances = sorted(np.sqrt(((cells - pixel) ** 2).sum(1)).min() for cells in objects)
        if (inside or not instances[pixel]) and len(distances) > 1:
            weights[pixel] += w0 * np.exp(-((distances[0] + distances[1]) ** 2) / (2 * sigma**2))
    return weights


@pytest.mark.fidelity
@pytest.mark.parametrize(("sigma", "inside"), [(5.0, False), (0.8, False), (5.0, True)])
def test_border_weights_equal_their_definition(sigma, inside):
    generator = np.random.default_rng(0)
    instances = np.zeros((40, 31), dtype=np.int32)
    for number in (1, 2, 4, 5, 7):  # numbers may be missing
        top, left = generator.integers(0, 30), generator.integers(0, 22)
        instances[top : top + generator.integers(2, 9), left : left + generator.integers(2, 9)] = number
    assert len(np.unique(instances)) == 6
    weights = border_weights(instances, sigma=sigma, inside=inside)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, brute_force(instances, 10, sigma, inside), rtol=1e-5, atol=1e-5)


@pytest.mark.fidelity
def test_border_weights_peak_where_two_objects_are_closest():
    y, x = np.mgrid[:60, :80]
    instances = np.zeros((60, 80), dtype=np.int32)
    instances[(y - 30) ** 2 + (x - 22) ** 2 <= 15**2] = 1
    instances[(y - 30) ** 2 + (x - 56) ** 2 <= 15**2] = 2
    weights = border_weights(instances)
    row, column = np.unravel_index(weights.argmax(), weights.shape)
    assert row == 30 and 37 < column < 41  # the gap of three pixels, 38 to 40
    assert weights[30, 39] - weights[0, 0] == pytest.approx(10 * np.exp(-(4**2) / 50), rel=1e-5)
    assert weights[instances > 0].max() == weights[instances > 0].min()
    alone = border_weights((instances == 1).astype(np.int32))
    assert len(np.unique(alone)) == 2  # one object has no neighbour


def test_border_weights_balance_classes_and_skip_ignored_pixels():
    labels = np.zeros((10, 10), dtype=np.uint8)
    labels[:5, :2], labels[5:, 3:5], labels[0, 9] = 1, 4, 255
    weights = border_weights(np.zeros((10, 10), dtype=np.int32), labels)
    sums = [weights[labels == k].sum() for k in (0, 1, 4)]
    assert sums == pytest.approx([33, 33, 33])
    assert weights[0, 9] == 0
    assert (border_weights(np.zeros((4, 4), dtype=np.int32), np.full((4, 4), 255, np.uint8)) == 0).all()


def test_separate_numbers_connected_parts_of_one_class():
    mask = np.array([[1, 1, 0, 2], [0, 0, 1, 2], [3, 255, 1, 1]], dtype=np.uint8)
    parts = separate(mask)
    expected = np.array([[1, 1, 0, 3], [0, 0, 2, 3], [4, 0, 2, 2]])
    assert np.array_equal(parts, expected)
    assert np.array_equal(separate(mask, background=1) > 0, np.isin(mask, [0, 2, 3]))


# --------------------------------------------------------------------------------------------------- the model


@pytest.mark.fidelity
@pytest.mark.parametrize("size", [(100, 100), (57, 133), (132, 97)])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_tiles_stitch_to_the_result_of_the_whole_image(size, in_channels):
    torch.manual_seed(0)
    model = UNet(num_classes=3, in_channels=in_channels, width=2, test_tile=204).eval()
    image = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    with torch.inference_mode():
        stitched = model(image)
        # One tile over everything; numpy mirrors as often as needed, however small the image.
        pads = [(94, legal_input_size(side + 188) - side - 94) for side in size]
        whole = np.pad(model.normalize(image).numpy(), ((0, 0), (0, 0), *pads), mode="reflect")
        whole = model.network(torch.from_numpy(whole))["out"][..., 2 : 2 + size[0], 2 : 2 + size[1]]
    assert stitched.shape == (2, 3, *size)
    torch.testing.assert_close(stitched, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.fidelity
def test_rotations_average_probabilities(tmp_path):
    torch.manual_seed(0)
    plain = UNet(num_classes=3, width=2, test_tile=252).eval()
    for layer in plain.network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias)
    nn.init.normal_(plain.network.score.weight, std=20)  # classes far apart
    checkpoint = {"state_dict": plain.state_dict()}
    plain.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "best.ckpt")
    image = torch.randint(0, 256, (2, 3, 60, 44), dtype=torch.uint8)
    with torch.inference_mode():
        quarters = [plain(image.rot90(k, (2, 3))).softmax(1).rot90(-k, (2, 3)) for k in range(4)]
        four = seglight.load(tmp_path / "best.ckpt", test_rotations=4)(image)
        torch.testing.assert_close(four.exp(), sum(quarters) / 4, rtol=1e-4, atol=1e-5)
        seven = seglight.load(tmp_path / "best.ckpt", test_rotations=7)(image)
    assert seven.shape == (2, 3, 60, 44)
    torch.testing.assert_close(seven.exp().sum(1), torch.ones(2, 60, 44))
    far = [(seven.exp() - other).abs().mean() for other in (sum(quarters) / 4, quarters[0], quarters[0].roll(20, 3))]
    assert 0 < far[0] < far[2], "seven turns must agree with the four where the network does"
    assert far[1] > 1e-3


def batch_of(side):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (2, 3, *side), dtype=torch.uint8, generator=generator),
        "mask": torch.randint(0, 2, (2, *side), dtype=torch.uint8, generator=generator),
        "image_id": ["a", "b"],
    }


def test_the_loss_sees_the_centre_of_the_label():
    model = UNet(num_classes=2, width=2)
    batch = batch_of((204, 188))
    mask = batch["mask"]
    perfect = nn.functional.one_hot(mask[:, 92:-92, 92:-92].long(), 2).permute(0, 3, 1, 2) * 100.0
    assert perfect.shape[-2:] == (20, 4)
    assert model.loss({"out": perfect}, batch)["loss"] < 1e-6
    assert model.loss({"out": perfect.roll(1, -1)}, batch)["loss"] > 10


@pytest.mark.parametrize("side", [(101, 130), (128, 204), (40, 4)])
def test_mirrored_context_makes_every_label_count(side, monkeypatch):
    """A network that returns the image inside its margin must see label and image aligned."""
    batch = batch_of(side)
    batch["image"] = (batch["mask"] * 255)[:, None].expand(-1, 3, -1, -1)
    model = UNet(num_classes=2, width=2)
    seen = []

    class Centre(nn.Module):
        def forward(self, image):
            for edge in image.shape[-2:]:
                output_size(edge)  # refuses illegal sizes
            inside = image[..., 92:-92, 92:-92]
            return {"out": torch.cat([0.5 - inside, inside - 0.5], 1) * 100}

    model.network = Centre()
    monkeypatch.setattr(model, "track", lambda losses: seen.append(losses["loss"]))
    assert model.training_step(batch, 0) < 1e-6
    assert len(seen) == 1


def test_border_weighted_loss_equals_its_definition():
    model = UNet(num_classes=2, width=2, border_weight=True, border_w0=7.0, border_sigma=3.0)
    batch = batch_of((204, 188))
    batch["mask"][0, :100] = 255
    scores = torch.randn(2, 2, 20, 4, requires_grad=True)
    total = weight = 0.0
    for score, mask in zip(scores, batch["mask"][:, 92:-92, 92:-92], strict=True):
        w = border_weights(separate(mask.numpy()), mask.numpy(), 7.0, 3.0)
        log_p = score.log_softmax(0)
        for y, x in np.ndindex(20, 4):
            if mask[y, x] != 255:
                total = total - w[y, x] * log_p[mask[y, x].long(), y, x]
                weight += w[y, x]
    torch.testing.assert_close(model.loss({"out": scores}, batch)["loss"], total / weight)
    batch["mask"].fill_(255)
    nothing = model.loss({"out": scores}, batch)["loss"]
    nothing.backward()
    assert nothing == 0 and (scores.grad == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"border_weight": True},
        {"in_channels": 3},
        {"context": "crop"},
        {"wide_last_up": True, "border_weight": True, "border_inside": True},
    ],
)
def test_a_training_step_moves_every_weight(options):
    from pytorch_lightning import Trainer

    torch.manual_seed(0)
    model = UNet(num_classes=2, width=2, relu_after_up=True, lr=0.1, weight_decay=0.0, **options)
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([batch_of((204, 188))], batch_size=None))
    assert not [name for name, p in model.network.named_parameters() if torch.equal(p, before[name])]


def test_checkpoint_rebuilds_the_model(tmp_path):
    model = UNet(num_classes=3, in_channels=3, width=2, relu_after_up=True).eval()
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "best.ckpt")
    rebuilt = seglight.load(tmp_path / "best.ckpt", test_tile=204)
    image = torch.randint(0, 256, (1, 3, 30, 21), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(rebuilt(image), model(image), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="relu_after_up"):
        UNet(num_classes=3, in_channels=3, width=2).on_load_checkpoint(checkpoint)


def test_options_are_checked_when_the_model_is_built():
    with pytest.raises(ValueError, match="in_channels is 4"):
        UNet(num_classes=2, in_channels=4)
    with pytest.raises(ValueError, match="input side of 512 pixels"):
        UNet(num_classes=2, width=2, test_tile=512)
    with pytest.raises(ValueError, match="at least 204"):
        UNet(num_classes=2, width=2, test_tile=188)
    with pytest.raises(ValueError, match="test_rotations is 0"):
        UNet(num_classes=2, width=2, test_rotations=0)
    assert UNet(num_classes=2, width=2).preprocessing == "grey"
    assert UNet(num_classes=2, width=2, in_channels=3).preprocessing == "torch"


def test_the_ridge_reaches_into_the_objects_if_asked():
    mask = torch.zeros(1, 20, 20, dtype=torch.uint8)
    mask[:, 4:9, 4:9] = mask[:, 4:9, 10:15] = 1
    outputs = {"out": torch.randn(1, 2, 20, 20, generator=torch.Generator().manual_seed(0))}
    losses = [
        UNet(2, width=2, border_weight=True, border_inside=inside).loss(outputs, {"mask": mask})["loss"]
        for inside in (False, True)
    ]
    assert losses[0] != losses[1]


def test_class_weights_and_border_weights_multiply():
    mask = torch.zeros(1, 20, 20, dtype=torch.uint8)
    mask[:, 4:9, 4:9] = 1
    scores = torch.randn(1, 2, 20, 20, generator=torch.Generator().manual_seed(0))
    model = UNet(2, width=2, border_weight=True, class_weights=[1.0, 4.0])
    weights = torch.from_numpy(border_weights(separate(mask[0].numpy()), mask[0].numpy()))[None]
    expected = cross_entropy(scores, mask, [1.0, 4.0], weights)
    torch.testing.assert_close(model.loss({"out": scores}, {"mask": mask})["loss"], expected)


def test_weighted_losses_are_summed_if_asked():
    mask = torch.zeros(1, 20, 20, dtype=torch.uint8)
    mask[:, 4:9, 4:9] = mask[:, 4:9, 11:16] = 1
    outputs = {"out": torch.randn(1, 2, 20, 20, generator=torch.Generator().manual_seed(0))}
    mean, total = (
        UNet(2, width=2, border_weight=True, loss_reduction=kind).loss(outputs, {"mask": mask})["loss"]
        for kind in ("mean", "sum")
    )
    weights = border_weights(separate(mask[0].numpy()), mask[0].numpy())
    assert float(total / mean) == pytest.approx(weights.sum(), rel=1e-5)
