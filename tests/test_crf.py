"""The CRF against its formula in loops, against a lattice made of dictionaries, and against pydensecrf2."""

import json
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from test_cli import fit, refused
from tiny import Blocks, BlockScenes, Tiny

import seglight
from seglight import crf
from seglight.cli import main
from seglight.data.scenes import scene

PRESETS = list(crf.PRESETS)
CLASSES = 8


def example(index=0, size=(48, 48), sure=4.0):
    """A scene with the noise of a camera, log-probabilities as blurred as a network's, and the true labels."""
    drawn = scene(0, index, size)
    grain = np.random.default_rng(index).normal(0, 4, drawn.image.shape)
    image = torch.from_numpy((drawn.image + grain).clip(0, 255).astype(np.uint8)).permute(2, 0, 1)
    mask = torch.from_numpy(drawn.mask).long()
    mask[mask == 255] = 0
    logits = F.one_hot(mask, CLASSES).permute(2, 0, 1)[None].float()
    logits = sure * F.avg_pool2d(logits, 9, stride=4, padding=4, count_include_pad=False)
    logits += 0.8 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(index))
    return image, F.interpolate(logits, size=size, mode="bilinear")[0].log_softmax(0), mask


def blobs(size=(40, 56), noise=1.5):
    """Two flat colours divided by a slanted edge; a network that knows the sides on average, not the edge."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    mask = (x > 20 + y // 3).long()
    generator = torch.Generator().manual_seed(3)
    image = torch.tensor([[200, 60, 50], [40, 80, 190]])[mask].permute(2, 0, 1)
    image = (image + torch.randint(-4, 5, image.shape, generator=generator)).to(torch.uint8)
    scores = F.avg_pool2d(2.0 * mask[None, None] - 1, 15, 1, 7)[0]
    logits = torch.cat([-scores, scores]) + noise * torch.randn(2, *size, generator=generator)
    return image, logits.log_softmax(0), mask


def accuracy(log_probabilities, mask):
    return (log_probabilities.argmax(0) == mask).float().mean().item()


def same(one, other):
    return (one.argmax(0) == other.argmax(0)).float().mean().item()


# ---------------------------------------------------------------- the formula


@pytest.mark.fidelity
def test_exact_mean_field_is_the_formula():
    """Loops over pixels, in double precision."""
    image, log_p, _ = example(size=(48, 48))
    image, log_p = image[:, 20:25, 10:16], log_p[:3, 20:25, 10:16].log_softmax(0)
    p = crf.CRF(w1=2.5, sigma_alpha=3.0, sigma_beta=20.0, w2=1.5, sigma_gamma=1.2, iterations=3)
    height, width = image.shape[1:]
    points = [(y, x) for y in range(height) for x in range(width)]
    colour = image.double().numpy()

    def k1(a, b):
        place = (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2
        return math.exp(
            -place / (2 * p.sigma_alpha**2)
            - ((colour[:, a[0], a[1]] - colour[:, b[0], b[1]]) ** 2).sum() / (2 * p.sigma_beta**2)
        )

    def k2(a, b):
        return math.exp(-((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / (2 * p.sigma_gamma**2))

    degree = [{a: sum(k(a, b) for b in points) for a in points} for k in (k1, k2)]
    unary = {a: log_p[:, a[0], a[1]].double().numpy() for a in points}
    belief = {a: np.exp(unary[a]) for a in points}
    for _ in range(p.iterations):
        scores = {}
        for a in points:
            scores[a] = unary[a].copy()
            for w, k, d in ((p.w1, k1, degree[0]), (p.w2, k2, degree[1])):
                for b in points:
                    scores[a] += w * k(a, b) / math.sqrt(d[a] * d[b]) * belief[b]
        belief = {a: np.exp(s) / np.exp(s).sum() for a, s in scores.items()}
    expected = np.stack([belief[a] for a in points], 1).reshape(3, height, width)
    found = crf.mean_field_exact(image, log_p, p).exp().numpy()
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found - log_p.exp().numpy()).max() > 0.1


@pytest.mark.fidelity
def test_presets_are_the_published_ones():
    assert tuple(crf.PRESETS["deeplabv2_resnet101"])[:6] == (4, 67, 3, 3, 1, 10)
    assert tuple(crf.PRESETS["deeplabv2_vgg"])[:6] == (4, 121, 5, 3, 3, 10)
    assert tuple(crf.PRESETS["deconvnet"])[:6] == (5, 20, 3, 3, 3, 10)


# ---------------------------------------------------------------- the lattice


def literal_filter(features):
    """Adams et al. 2010 with dictionaries, one point at a time: the kernel matrix (N, N), not normalised."""
    d, count = features.shape
    table, simplices = {}, []
    for n in range(count):
        scaled = [features[i, n] * math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2)) for i in range(d)]
        lifted = [sum(scaled[i:]) - (i * scaled[i - 1] if i else 0) for i in range(d + 1)]
        nearest = [(d + 1) * round(v / (d + 1)) for v in lifted]
        excess = sum(nearest) // (d + 1)
        order = sorted(range(d + 1), key=lambda i: lifted[i] - nearest[i])  # the smallest difference first
        for i in order[:excess] if excess > 0 else []:
            nearest[i] -= d + 1
        for i in order[excess:] if excess < 0 else []:
            nearest[i] += d + 1
        rest = [(lifted[i] - nearest[i]) / (d + 1) for i in range(d + 1)]
        order = sorted(range(d + 1), key=lambda i: -rest[i])
        vertex, vertices = tuple(nearest), []
        for k in range(d + 1):
            upper = rest[order[d - k]]
            lower = rest[order[d + 1 - k]] if k else rest[order[0]] - 1
            vertices.append((vertex, upper - lower))
            table.setdefault(vertex, len(table))
            last = order[d - k]
            vertex = tuple(v + 1 - (d + 1 if i == last else 0) for i, v in enumerate(vertex))
        simplices.append(vertices)
    splat = np.zeros((len(table), count))
    for n, vertices in enumerate(simplices):
        for vertex, weight in vertices:
            splat[table[vertex], n] += weight
    blurred = splat
    for axis in range(d + 1):
        values = blurred.copy()
        for vertex, row in table.items():
            for sign in (1, -1):
                other = tuple(v + sign * (1 - (d + 1 if i == axis else 0)) for i, v in enumerate(vertex))
                if other in table:
                    values[row] += 0.5 * blurred[table[other]]
        blurred = values
    return splat.T @ blurred


@pytest.mark.fidelity
@pytest.mark.parametrize("d, reach, kind", [(2, 4, torch.int32), (5, 2.5, torch.int32), (5, 600, torch.int64)])
def test_lattice_equals_a_literal_one(d, reach, kind):
    rng = np.random.default_rng(d)
    centres = rng.uniform(-reach, reach, (d, 8))
    features = torch.from_numpy(np.repeat(centres, 9, 1) + rng.normal(0, 0.7, (d, 72))).float()
    assert crf._simplices(features)[0].dtype == kind
    kernel = crf._Kernel(features, 2.0)
    matrix = literal_filter(features.double().numpy())
    scale = 1 / np.sqrt(matrix.sum(1))
    expected = 2 * scale[:, None] * matrix * scale
    found = kernel.gather(kernel.spread(torch.eye(72))).numpy()
    # Features of 600 have four digits after the point in float32.
    assert np.abs(found - expected).max() < (1e-5 if reach < 100 else 2e-3)
    assert (expected > 1e-3).mean() > 0.05


def test_every_point_is_the_weighted_mean_of_its_vertices():
    features = 6 * torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
    keys, weights, steps = crf._simplices(features)
    assert torch.allclose(weights.sum(0), torch.ones(400), atol=1e-5) and weights.min() > -1e-5
    # Known steps lead from the first vertex to the others; their weighted mean is the way to the point.
    direction = {int(step): -6 * torch.eye(6)[i] + 1 for i, step in enumerate(steps)}
    hops = torch.stack([torch.stack([direction[int(s)] for s in jump]) for jump in keys.diff(dim=0)])
    offset = (hops.cumsum(0) * weights[1:, :, None]).sum(0)
    scaled = features * torch.tensor([math.sqrt(2 / 3) * 6 / math.sqrt((i + 1) * (i + 2)) for i in range(5)])[:, None]
    lifted = torch.stack([scaled[i:].sum(0) - (i * scaled[i - 1] if i else 0) for i in range(6)], 1)
    first = lifted - offset
    apart = (first - first[:, :1]) / 6
    assert torch.allclose(apart, apart.round(), atol=1e-4), "coordinates of a vertex differ by multiples of d + 1"


def test_keys_are_not_shared():
    """Points that fill a small part of the lattice: each vertex and each neighbour has a key of its own."""
    features = 3 * torch.rand(3, 4000, generator=torch.Generator().manual_seed(0))
    keys, _, steps = crf._simplices(features)
    c = (keys[..., None] // steps[1:]) % torch.cat([steps[2:] // steps[1:-1], steps.new_tensor([2**20])])
    assert torch.equal((c * steps[1:]).sum(-1), keys)
    c = c.flatten(0, 1)
    unique = c.unique(dim=0)
    assert len(unique) == len(keys.unique()) and len(unique) > 50
    nearby = torch.cat([unique + s * v for s in (-1, 1) for v in (*torch.eye(3).int(), -torch.ones(3).int())]).int()
    assert (nearby >= 0).all()
    every = torch.cat([unique, nearby]).unique(dim=0)
    assert len((every * steps[1:]).sum(1).unique()) == len(every)


@pytest.mark.fidelity
@pytest.mark.parametrize("preset", PRESETS)
def test_lattice_agrees_with_brute_force(preset):
    """Within 1e-2 in the mean over pixels, far less than the CRF changes; single doubtful pixels may change sides."""
    for index in range(2):
        image, log_p, _ = example(index)
        fast, exact = crf.mean_field(image, log_p, preset), crf.mean_field_exact(image, log_p, preset)
        gap = (fast.exp() - exact.exp()).abs().sum(0) / 2
        assert gap.mean() < 0.02 and (fast.exp() - exact.exp()).abs().mean() < 1e-2
        assert gap.mean() < 0.1 * (log_p.exp() - exact.exp()).abs().sum(0).mean() / 2
        assert gap.median() < 1e-3 and same(fast, exact) > 0.98


@pytest.mark.fidelity
@pytest.mark.parametrize("preset", PRESETS)
def test_flat_regions_agree_with_brute_force_everywhere(preset):
    image, log_p, _ = blobs(noise=0.5)
    fast, exact = crf.mean_field(image, log_p, preset), crf.mean_field_exact(image, log_p, preset)
    assert (fast.exp() - exact.exp()).abs().max() < 1e-2


def peer(image, log_p, preset):
    dense = pytest.importorskip("pydensecrf.densecrf", reason="pip install pydensecrf2 to compare with it")
    p = crf.PRESETS[preset]
    classes, height, width = log_p.shape
    field = dense.DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(-log_p.reshape(classes, -1).numpy()))
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    field.addPairwiseBilateral(sxy=p.sigma_alpha, srgb=p.sigma_beta, rgbim=pixels, compat=p.w1)
    field.addPairwiseGaussian(sxy=p.sigma_gamma, compat=p.w2)
    return torch.from_numpy(np.array(field.inference(p.iterations))).view(classes, height, width)


@pytest.mark.fidelity
@pytest.mark.parametrize("preset", PRESETS)
def test_same_labels_as_pydensecrf(preset):
    for index in range(2):
        image, log_p, _ = example(index, (121, 160))
        theirs, ours = peer(image, log_p, preset), crf.mean_field(image, log_p, preset)
        assert same(ours, theirs) >= 0.995 and (ours.exp() - theirs).abs().max() < 1e-2
        pruned = crf.mean_field(image, log_p, crf.PRESETS[preset]._replace(prune=0.5))
        assert same(pruned, theirs) >= 0.995


@pytest.mark.fidelity
@pytest.mark.parametrize("preset", PRESETS)
def test_same_labels_as_pydensecrf_on_photos(preset, real_data):
    folder = real_data / "voc2012/VOCdevkit/VOC2012"
    for path in sorted((folder / "SegmentationClass").glob("*.png"))[::250]:
        photo = np.array(Image.open(folder / "JPEGImages" / f"{path.stem}.jpg").convert("RGB"))
        image = torch.from_numpy(photo).permute(2, 0, 1)[:, 100:260, 100:300]
        mask = torch.from_numpy(np.array(Image.open(path))).long()[100:260, 100:300]
        mask[mask == 255] = 0
        logits = F.avg_pool2d(F.one_hot(mask, 21).permute(2, 0, 1)[None].float(), 17, 8, 8, count_include_pad=False)
        logits = 4 * logits + 0.8 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        log_p = F.interpolate(logits, size=mask.shape, mode="bilinear")[0].log_softmax(0)
        assert same(crf.mean_field(image, log_p, preset), peer(image, log_p, preset)) >= 0.995


# ---------------------------------------------------------------- properties


@pytest.mark.fidelity
@pytest.mark.parametrize("mean_field", [crf.mean_field, crf.mean_field_exact])
def test_no_weights_leave_the_softmax(mean_field):
    image, log_p, _ = example()
    for iterations in (1, 10):
        p = crf.CRF(w1=0, sigma_alpha=50, sigma_beta=3, w2=0, sigma_gamma=3, iterations=iterations)
        assert torch.allclose(mean_field(image, log_p, p), log_p, atol=1e-5)
    assert (mean_field(image, log_p, p._replace(w2=3)) - log_p).abs().max() > 1


@pytest.mark.fidelity
@pytest.mark.parametrize("mean_field", [crf.mean_field, crf.mean_field_exact])
def test_labels_that_all_agree_stay(mean_field):
    """Identical certain labels are a fixed point; identical doubtful ones keep their winner and grow surer."""
    image, _, _ = example()
    for sure in (2.0, 60.0):
        logits = torch.zeros(5, 48, 48)
        logits[3] = sure
        found = mean_field(image, logits, "deeplabv2_vgg")
        assert (found.argmax(0) == 3).all()
        assert (found[3] >= logits.log_softmax(0)[3] - 1e-6).all()
    assert torch.allclose(found.exp()[3], torch.ones(48, 48))


@pytest.mark.fidelity
@pytest.mark.parametrize("preset", PRESETS)
def test_edges_follow_the_image(preset):
    image, log_p, mask = blobs()
    before, after = accuracy(log_p, mask), accuracy(crf.mean_field(image, log_p, preset), mask)
    assert before < 0.85 and after > 0.985
    uniform = torch.full_like(image, 127)
    assert accuracy(crf.mean_field(uniform, log_p, preset), mask) < after - 0.005, "the edge comes from the colours"


def test_order_of_classes_and_constants_do_not_matter():
    image, log_p, _ = example()
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(0))
    plain = crf.mean_field(image, log_p, "deconvnet")
    assert torch.allclose(crf.mean_field(image, log_p[order], "deconvnet").exp(), plain[order].exp(), atol=1e-3)
    shift = torch.randn(48, 48, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(crf.mean_field(image, log_p + shift, "deconvnet").exp(), plain.exp(), atol=1e-3)
    assert torch.allclose(plain.exp().sum(0), torch.ones(48, 48), atol=1e-5)


@pytest.mark.parametrize("classes", [2, 15, 16, 33])
def test_any_number_of_classes(classes):
    """Both ways to the softmax: an added class that is impossible everywhere changes nothing."""
    image, _, _ = example()
    logits = torch.randn(classes, 48, 48, generator=torch.Generator().manual_seed(classes))
    wider = torch.cat([logits, torch.full((40, 48, 48), -math.inf)])
    found = crf.mean_field(image, wider, "deeplabv2_vgg")
    assert torch.allclose(found[:classes].exp(), crf.mean_field(image, logits, "deeplabv2_vgg").exp(), atol=1e-3)
    assert found.isfinite().all() and found[classes:].max() < -60


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (2, 3)])
def test_any_size(size):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    log_p = torch.randn(4, *size, generator=generator).log_softmax(0)
    found = crf.mean_field(image, log_p)
    assert found.shape == log_p.shape and found.dtype == torch.float32
    assert (found.exp() - crf.mean_field_exact(image, log_p).exp()).abs().mean() < 2e-2


@pytest.mark.parametrize("classes", [3, 20])
def test_large_weights_do_not_overflow(classes):
    image, _, _ = example()
    logits = torch.randn(classes, 48, 48, generator=torch.Generator().manual_seed(0))
    found = crf.mean_field(image, logits, {"preset": "deconvnet", "w1": 300})
    assert found.isfinite().all() and torch.allclose(found.exp().sum(0), torch.ones(48, 48), atol=1e-5)


def test_stripes_do_not_show(monkeypatch):
    image, log_p, _ = example()
    whole = crf.mean_field(image, log_p)
    monkeypatch.setattr(crf, "STRIPE", 1000)
    assert torch.equal(crf.mean_field(image, log_p), whole)


def test_pruning_leaves_out_what_is_nowhere_likely():
    image, log_p, _ = example()
    p = crf.PRESETS["deeplabv2_vgg"]
    likely = log_p.exp().amax((1, 2)) > 0.4
    assert 1 < likely.sum() < CLASSES
    found = crf.mean_field(image, log_p, p._replace(prune=0.4))
    assert (found[~likely] < -87).all() and found.isfinite().all()
    alone = crf.mean_field(image, log_p[likely], p)
    assert torch.allclose(found[likely].exp(), alone.exp(), atol=1e-3)
    # A threshold that no class reaches leaves all of them in.
    doubtful = 0.01 * log_p
    everything = crf.mean_field(image, doubtful, p._replace(prune=0.9))
    assert torch.allclose(everything, crf.mean_field(image, doubtful, p), atol=1e-4)


def test_half_precision_and_memory_layout_do_not_matter():
    image, log_p, _ = example()
    plain = crf.mean_field(image, log_p)
    turned = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(crf.mean_field(turned, log_p), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crf.mean_field(image, log_p), plain)
    assert crf.mean_field(image, log_p.bfloat16()).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_gpu_gives_the_same(preset):
    image, log_p, _ = example(size=(121, 160))
    there = crf.mean_field(image.cuda(), log_p.cuda(), preset)
    assert there.is_cuda
    assert (there.cpu().exp() - crf.mean_field(image, log_p, preset).exp()).abs().max() < 1e-2


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "value, message",
    [
        ("deeplab_vgg", "Did you mean deeplabv2_vgg"),
        ("zzz", "Known: deeplabv2_resnet101, deeplabv2_vgg, deconvnet"),
        (7, "the name of a preset"),
        ({"preset": "deconvet"}, "Did you mean deconvnet"),
        ({"preset": "deconvnet", "sigma_alfa": 3}, "Did you mean sigma_alpha"),
        ({"w1": 4, "w2": 3, "sigma_alpha": 50}, "lacks sigma_beta, sigma_gamma"),
        ({"preset": "deconvnet", "sigma_beta": 0}, "sigma_beta is 0; it must be a number above 0"),
        ({"preset": "deconvnet", "sigma_gamma": math.inf}, "above 0"),
        ({"preset": "deconvnet", "w1": -1}, "w1 is -1; it must be a number, at least 0"),
        ({"preset": "deconvnet", "w2": "3"}, "w2 is '3'"),
        ({"preset": "deconvnet", "iterations": 2.5}, "a whole number, at least 1"),
        ({"preset": "deconvnet", "iterations": 0}, "a whole number, at least 1"),
        ({"preset": "deconvnet", "prune": 1.0}, "at least 0 and below 1"),
    ],
)
def test_wrong_parameters_are_explained(value, message):
    with pytest.raises(ValueError, match=message):
        crf.parameters(value)
    if value != 7:
        with pytest.raises(ValueError, match=message):
            Tiny(num_classes=2, test_crf=value)


def test_parameters_start_from_a_preset():
    p = crf.parameters({"preset": "deconvnet", "iterations": 5})
    assert p == crf.PRESETS["deconvnet"]._replace(iterations=5)
    assert crf.parameters({"w1": 1, "sigma_alpha": 2, "sigma_beta": 3, "w2": 4, "sigma_gamma": 5.5})[4:] == (5.5, 10, 0)


def test_wrong_arrays_are_explained():
    image, log_p, _ = example()
    with pytest.raises(ValueError, match=r"uint8 \(3, H, W\)"):
        crf.mean_field(image.float(), log_p)
    with pytest.raises(ValueError, match=r"uint8 \(3, H, W\)"):
        crf.mean_field(image.permute(1, 2, 0), log_p)
    with pytest.raises(ValueError, match="Resize the logits"):
        crf.mean_field(image, log_p[:, ::2])
    for bad in (math.nan, -math.inf):
        broken = log_p.clone()
        broken[:, 5, 5] = bad
        with pytest.raises(ValueError, match="nan"):
            crf.mean_field(image, broken)
    with pytest.raises(ValueError, match="sigmas are too small"):
        crf.mean_field(image, log_p, {"preset": "deconvnet", "sigma_beta": 1e-4, "sigma_alpha": 1e-3})


# ---------------------------------------------------------------- in the models


STRONG = {"preset": "deeplabv2_vgg", "sigma_beta": 30.0}


def quiet(**options):
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    return pl.Trainer(accelerator="cpu", **dict.fromkeys(off, False), **options)


@pytest.fixture
def models():
    """The same weights without and with a CRF."""
    torch.manual_seed(0)
    data = Blocks()
    plain = Tiny(num_classes=4, classes=list(data.classes)).eval()
    refined = Tiny(num_classes=4, classes=list(data.classes), test_crf=STRONG).eval()
    refined.load_state_dict(plain.state_dict())
    return plain, refined


def test_labels_are_those_of_the_crf_at_image_size(models):
    plain, refined = models
    images = [torch.from_numpy(BlockScenes(6, 0).read(i)[0]).permute(2, 0, 1) for i in (0, 0, 1, 3)]
    images[1] = images[1].flip(-1)
    labels, scores = refined.labels(images)
    before, same_scores = plain.labels(images)
    assert all(torch.equal(a, b) for a, b in zip(scores, same_scores, strict=True)), "scores stay the network's"
    assert any(not torch.equal(a, b) for a, b in zip(labels, before, strict=True))
    for image, label in zip(images, labels, strict=True):
        expected = crf.mean_field(image, plain(image[None])[0], STRONG).argmax(0)
        assert label.dtype == torch.uint8 and torch.equal(label.long(), expected)
    assert torch.equal(refined.labels([images[0].float()])[0][0], labels[0])
    assert torch.equal(refined.labels(images, refine=False)[0][0], before[0])
    array = images[0].permute(1, 2, 0).contiguous().numpy()
    assert np.array_equal(refined.predict(array).labels, labels[0].numpy())
    flipped = Tiny(num_classes=4, test_crf=STRONG, test_flip=True).eval()
    flipped.load_state_dict(plain.state_dict())
    assert torch.equal(flipped.labels([images[1]])[0][0].flip(-1), flipped.labels([images[0]])[0][0])


def test_test_validate_and_predict_use_it_and_fit_does_not(models, monkeypatch):
    _, refined = models
    calls = []
    real = crf.mean_field
    monkeypatch.setattr(crf, "mean_field", lambda *a: calls.append(1) or real(*a))
    quiet(max_steps=2, num_sanity_val_steps=1).fit(refined, datamodule=Blocks())
    assert not calls and refined.scores is not None
    for verb in ("validate", "test", "predict"):
        getattr(quiet(), verb)(refined, datamodule=Blocks())
        assert len(calls) == 5, verb
        calls.clear()


def test_scores_of_the_test_are_those_of_the_refined_labels(models):
    plain, refined = models
    tables = []
    for model in (plain, refined):
        quiet().test(model, datamodule=Blocks(), verbose=False)
        tables.append(torch.as_tensor(model.scores.table))
    assert tables[0].sum() == tables[1].sum() and not torch.equal(tables[0], tables[1])


def test_a_checkpoint_may_be_tested_with_another_crf(tmp_path, models):
    _, refined = models
    trainer = quiet(max_steps=1, limit_val_batches=0)
    trainer.fit(refined, datamodule=Blocks())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert seglight.load(tmp_path / "m.ckpt").test_crf == crf.parameters(STRONG)
    assert seglight.load(tmp_path / "m.ckpt", test_crf=None).test_crf is None
    other = seglight.load(tmp_path / "m.ckpt", test_crf="deconvnet")
    assert other.test_crf == crf.PRESETS["deconvnet"] and "test_crf" not in other.architecture()


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fit("--out", "run") == 0
    best = "run/checkpoints/best.ckpt"
    tested = ["test", "--ckpt_path", best, "--trainer.accelerator", "cpu"]
    assert main([*tested, "--model.test_crf", json.dumps(STRONG)]) == 0
    assert main([*tested, "--model.test_crf", "deconvnet"]) == 0
    first, second = (json.loads((tmp_path / f"run/{name}/scores_test.json").read_text()) for name in ("test", "test-2"))
    assert first["test/mIoU"] != second["test/mIoU"]
    Image.fromarray(BlockScenes(1, 0).read(0)[0]).save("a.png")
    words = ["predict", "--ckpt_path", best, "--source", "a.png", "--device", "cpu", "--model.test_crf"]
    assert main([*words, "deeplabv2_vgg", "--out", "p"]) == 0 and (tmp_path / "p/a.png").is_file()
    assert main([*words, json.dumps(STRONG), "--out", "q"]) == 0
    capsys.readouterr()
    assert main([*words, "deeplabv3", "--out", "r"]) == 2
    assert "Did you mean deeplabv2_vgg" in capsys.readouterr().err
    line = refused(capsys, "fit", "--model", "Tiny", "--data", "Blocks", "--model.test_crf", "deconvnett")
    assert "Did you mean deconvnet" in line


@pytest.mark.parametrize("reach", range(40, 300, 10))
def test_keys_do_not_overflow(reach):
    """A point at each end of every axis: the last key is nearly the number of keys."""
    corners = torch.cartesian_prod(*[torch.tensor([0.0, float(reach)])] * 5).t().contiguous()
    keys, _, _ = crf._simplices(corners)
    assert (keys >= 0).all()
