"""The fully connected CRF of Krähenbühl & Koltun (2011), which DeepLab v2 and DeconvNet put behind their networks.

Labels x of an image I have the energy (DeepLab v2, section 3.2)

    E(x) = sum_i -log P_i(x_i) + sum_{i<j} [x_i != x_j] (w1 k1(i, j) + w2 k2(i, j))
    k1 = exp(-|p_i - p_j|^2 / (2 sigma_alpha^2) - |I_i - I_j|^2 / (2 sigma_beta^2))
    k2 = exp(-|p_i - p_j|^2 / (2 sigma_gamma^2))

over positions p in pixels and colours 0..255. Mean field repeats Q_i = softmax(log P_i + sum_j (w1 k1 + w2 k2) Q_j).
Two details follow the released code (and pydensecrf) rather than the formula: each kernel matrix K is normalised to
D^-1/2 K D^-1/2, with D the diagonal of its row sums, and a pixel is one of its own neighbours.

`mean_field_exact` evaluates that literally, in O(N^2). `mean_field` filters on a permutohedral lattice (Adams, Baek &
Davis 2010) like the released code: splat, blur and slice are sparse matrices in the form that `F.embedding_bag` takes,
so it needs no compiler and runs on CPU and GPU. The lattice approximates the Gaussian: `mean_field` says how well.
"""

from __future__ import annotations

import difflib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class CRF(NamedTuple):
    """Parameters; colours are RGB 0..255, positions are pixels."""

    w1: float
    """Weight of the bilateral kernel."""
    sigma_alpha: float
    """Its reach over positions."""
    sigma_beta: float
    """Its reach over colours."""
    w2: float
    """Weight of the Gaussian kernel over positions alone."""
    sigma_gamma: float
    """Its reach."""
    iterations: int = 10
    prune: float = 0.0
    """Classes whose probability exceeds this nowhere in the image are left out: faster, and nearly the same labels."""


PRESETS = {
    "deeplabv2_resnet101": CRF(w1=4, sigma_alpha=67, sigma_beta=3, w2=3, sigma_gamma=1),  # as released
    "deeplabv2_vgg": CRF(w1=4, sigma_alpha=121, sigma_beta=5, w2=3, sigma_gamma=3),  # as in the paper
    "deconvnet": CRF(w1=5, sigma_alpha=20, sigma_beta=3, w2=3, sigma_gamma=3),  # as released
}

STRIPE = 4096
"""Pixels whose messages are turned into probabilities at a time on a CPU: they stay in the processor's cache."""
TINY = math.log(torch.finfo(torch.float32).tiny)
"""Stands for the logarithm of probability 0."""


def parameters(value: str | dict[str, Any] | CRF) -> CRF:
    """The CRF that a preset's name or a dict means; a dict may start from a preset: {"preset": NAME, "iterations": 5}.

    Raises:
        ValueError: an unknown name or key, a missing or impossible number.
    """
    if isinstance(value, CRF):
        return _checked(value)
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"There is no CRF preset {value!r}.{_nearest(value, list(PRESETS))}")
        return PRESETS[value]
    if not isinstance(value, dict):
        raise ValueError(f"A CRF is {value!r}; give the name of a preset ({', '.join(PRESETS)}) or a dict of numbers.")
    given = dict(value)
    start = parameters(given.pop("preset"))._asdict() if "preset" in given else dict(CRF._field_defaults)
    for name in given:
        if name not in CRF._fields:
            raise ValueError(f"The CRF has no parameter {name!r}.{_nearest(name, ['preset', *CRF._fields])}")
    missing = [name for name in CRF._fields if name not in start and name not in given]
    if missing:
        raise ValueError(f"The CRF lacks {', '.join(missing)}; give them, or a preset to start from.")
    return _checked(CRF(**{**start, **given}))


def _checked(crf: CRF) -> CRF:
    for name, number in crf._asdict().items():
        positive = name.startswith("sigma") or name == "iterations"
        kind = int if name == "iterations" else (int, float)
        good = isinstance(number, kind) and not isinstance(number, bool) and math.isfinite(number)
        if not good or number < 0 or (positive and number == 0) or (name == "prune" and number >= 1):
            rule = {"iterations": "a whole number, at least 1", "prune": "at least 0 and below 1"}.get(
                name, "a number above 0" if positive else "a number, at least 0"
            )
            raise ValueError(f"The CRF's {name} is {number!r}; it must be {rule}.")
    return crf


def _nearest(word: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(word, choices, 3, 0.4)
    return f" Did you mean {' or '.join(near)}?" if near else f" Known: {', '.join(choices)}."


@torch.no_grad()
def mean_field(
    image: Tensor, log_probabilities: Tensor, crf: str | dict[str, Any] | CRF = "deeplabv2_resnet101"
) -> Tensor:
    """Refine the class probabilities of an image: mean field with both kernels on permutohedral lattices.

    It does what the released C++ does, up to rounding: equal labels, and probabilities within 2e-3 of pydensecrf2's.
    Both approximate `mean_field_exact` equally well. In 36 runs on 64 x 64 crops of photos, probabilities differed from
    it by 0.002 in the mean (0.012 in the worst run) and 97.2 to 100 % of the labels were equal; a few doubtful pixels
    change sides altogether, so the largest difference of a picture is often near 1.

    Args:
        image: uint8 (3, H, W), RGB.
        log_probabilities: float (K, H, W); logits do too, because a constant per pixel changes nothing.
        crf: a preset's name, or parameters.

    Returns:
        float32 (K, H, W), log-probabilities; that of a class left out by `prune` is -87, that of the smallest float.

    Raises:
        ValueError: shapes, types or parameters that do not fit, not-a-number among the probabilities.
    """
    crf = parameters(crf)
    unary = _pixels(image, log_probabilities)
    kept = _kept(unary, crf.prune)
    if kept is not None:
        unary = unary[:, kept].log_softmax(1)
    pairs = zip(_features(image, crf), (crf.w1, crf.w2), strict=True)
    kernels = [_Kernel(features, weight) for features, weight in pairs if weight]
    belief = unary.exp()
    rows = STRIPE if unary.device.type == "cpu" else len(unary)
    for left in reversed(range(crf.iterations)):
        spread = [kernel.spread(belief) for kernel in kernels]
        for top in range(0, len(unary), rows):
            part = slice(top, top + rows)
            total = unary[part].clone()
            for kernel, values in zip(kernels, spread, strict=True):
                total += kernel.gather(values, part)
            if left:
                _softmax(total, out=belief[part])
            else:
                belief[part] = total.log_softmax(1)
    if kept is not None:
        everything = belief.new_full((len(belief), len(log_probabilities)), TINY)
        everything[:, kept] = belief
        belief = everything
    return belief.t().reshape(log_probabilities.shape)


@torch.no_grad()
def mean_field_exact(
    image: Tensor, log_probabilities: Tensor, crf: str | dict[str, Any] | CRF = "deeplabv2_resnet101"
) -> Tensor:
    """As `mean_field`, with kernel matrices of all pairs of pixels: for small images, 64 x 64 take 270 MB.

    `prune` leaves nothing out here, since it is there for speed.
    """
    crf = parameters(crf)
    unary = _pixels(image, log_probabilities)
    total = unary.new_zeros(len(unary), len(unary))
    for weight, features in zip((crf.w1, crf.w2), _features(image, crf), strict=True):
        points = features.t().double()
        kernel = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square_().div_(-2).exp_()
        scale = kernel.sum(1).rsqrt()
        total += (weight * scale[:, None] * kernel * scale).to(total.dtype)
    result = unary
    for _ in range(crf.iterations):
        result = (unary + total @ result.exp()).log_softmax(1)
    return result.t().reshape(log_probabilities.shape)


def _pixels(image: Tensor, log_probabilities: Tensor) -> Tensor:
    """Log-probabilities as float32 (N, K), normalised, after a look at both arguments."""
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        raise ValueError(
            f"The CRF's image is {image.dtype} {tuple(image.shape)}; give uint8 (3, H, W) in RGB, before normalisation."
        )
    if log_probabilities.ndim != 3 or log_probabilities.shape[1:] != image.shape[1:] or not log_probabilities.numel():
        raise ValueError(
            f"The image is {tuple(image.shape)} and the log-probabilities {tuple(log_probabilities.shape)}; they must "
            f"be (K, H, W) of the image's size. Resize the logits to the image first."
        )
    unary = log_probabilities.float().flatten(1).t().contiguous().log_softmax(1).clamp_min_(TINY)
    if unary.sum().isnan():
        raise ValueError("The log-probabilities hold nan, or a pixel without any possible class; look at the network.")
    return unary


def _kept(unary: Tensor, prune: float) -> Tensor | None:
    """Indices of the classes that take part, None for all. Where every class is below the threshold all take part."""
    if not prune:
        return None
    kept = (unary.amax(0) > math.log(prune)).nonzero().view(-1)
    return kept if 0 < len(kept) < unary.shape[1] else None


def _softmax(logits: Tensor, out: Tensor) -> None:
    """Softmax over the last axis into `out`; overwrites `logits`."""
    if logits.device.type != "cpu" or logits.shape[1] >= 16:
        torch.softmax(logits, 1, out=out)
        return
    # torch's kernel wants full vector registers along the axis: with 8 classes it takes five times as long as this.
    logits.sub_(logits.amax(1, keepdim=True)).exp_()
    torch.div(logits, logits.sum(1, keepdim=True), out=out)


def _features(image: Tensor, crf: CRF) -> tuple[Tensor, Tensor]:
    """Points of the bilateral kernel float32 (5, N) and of the Gaussian one (2, N), in standard deviations."""
    height, width = image.shape[1:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float32, device=image.device),
        torch.arange(width, dtype=torch.float32, device=image.device),
        indexing="ij",
    )
    place = torch.stack([x, y]).flatten(1)
    return torch.cat([place / crf.sigma_alpha, image.flatten(1) / crf.sigma_beta]), place / crf.sigma_gamma


class _Kernel:
    """A normalised Gaussian kernel over N points of d dimensions, times a weight, on a lattice of M vertices.

    Each point lies in a simplex of d + 1 vertices. `spread` adds the points' values to their vertices and blurs along
    the d + 1 directions of the lattice, `gather` reads the points' values back. Vertex M has the value 0 and stands for
    all that no point touches. The scale D^-1/2 is part of the weights of both.
    """

    def __init__(self, features: Tensor, weight: float):
        keys, weights, steps = _simplices(features)
        size, points = keys.shape
        ordered, where = keys.view(-1).sort(stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=first[1:])
        start = first.nonzero().view(-1)
        vertices = len(start)
        index = torch.empty_like(ordered, dtype=torch.int32)
        index[where] = first.cumsum(0, dtype=torch.int32).sub_(1)
        self.vertices = index.view(size, points).t().contiguous()
        self.slice_weights = weights.t().contiguous()
        self.points = where.to(torch.int32).remainder_(points)
        self.splat_weights = weights.view(-1)[where]
        self.start = torch.cat([start, start.new_tensor([len(where)])]).to(torch.int32)  # the last bag is empty: 0
        self.neighbours = _neighbours(ordered[start], steps)
        self.blur_weights = weights.new_tensor([1.0, 0.5, 0.5]).expand(vertices + 1, 3).contiguous()
        one = weights.new_ones(points, 1)
        scale = self.gather(self.spread(one)).rsqrt()
        self.slice_weights *= weight * scale
        self.splat_weights *= scale[:, 0][self.points]

    def spread(self, values: Tensor) -> Tensor:
        """Values (N, K) of the points as blurred values (M + 1, K) of the vertices."""
        values = _bags(values, self.points, self.splat_weights, self.start)
        for neighbours in self.neighbours:
            values = _bags(values, neighbours, self.blur_weights)
        return values

    def gather(self, values: Tensor, part: slice = slice(None)) -> Tensor:
        """Values (M + 1, K) of the vertices as those of some points, (n, K)."""
        return _bags(values, self.vertices[part], self.slice_weights[part])


def _bags(values: Tensor, index: Tensor, weights: Tensor, start: Tensor | None = None) -> Tensor:
    """Weighted sums of rows: a sparse matrix times `values`."""
    return F.embedding_bag(index, values, start, mode="sum", per_sample_weights=weights)


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lattice vertices around each point.

    A point of d dimensions is lifted to the plane of d + 1 coordinates with the sum 0. In units of 1 / (d + 1), a
    vertex is a sum of c_i times v_i, i = 1..d, where v_i is 1 - (d + 1) at the coordinate i and 1 elsewhere; coordinate
    0 has such a direction too, v_0 = -sum(v_i). One whole number, the key, holds all c_i.

    Args:
        features: float32 (d, N).

    Returns:
        keys (d + 1, N), int32 where they fit; barycentric weights float32 (d + 1, N); and what a step along each of
        the d + 1 directions adds to a key.

    Raises:
        ValueError: so fine a lattice over so large an image that the keys have no room.
    """
    size = len(features) + 1
    lifted = features.new_zeros(size, features.shape[1])
    for i in reversed(range(1, size)):
        # At this scale splat, blur and slice together have the standard deviation 1 (Adams et al., section 3.1).
        part = features[i - 1] * math.sqrt(2 / 3 / (i * (i + 1)))
        torch.sub(lifted[0], part, alpha=i, out=lifted[i])
        lifted[0] += part
    # The whole parts are a vertex, apart from their sum, which differences do not see. Seen from any vertex of its
    # simplex, a point lies in the direction that the order of its coordinates says.
    whole = lifted.round()
    rest = lifted.sub_(whole)
    rank = torch.zeros_like(rest, dtype=torch.int8)  # how many coordinates have a larger rest
    for i in range(size):
        for j in range(i + 1, size):
            less = (rest[i] < rest[j]).view(torch.int8)
            rank[i] += less
            rank[j] += 1 - less
    rank = rank.long()

    c = whole[0] - whole[1:]
    low = c.amin(1) - 2  # the vertices of a simplex go 1 further both ways, their neighbours 2
    room = (c.amax(1) - low + 3).long().tolist()
    digits = [math.prod(room[:i]) for i in range(size)]
    if digits[-1] >= 2**62:
        raise ValueError("The CRF's sigmas are too small for an image of this size; give larger ones.")
    kind = torch.int32 if digits[-1] < 2**31 else torch.int64
    steps = torch.tensor([-sum(digits[:-1]), *digits[:-1]], dtype=kind, device=c.device)
    keys = torch.empty_like(rank, dtype=kind)
    keys[0] = 0
    for number, lowest, step in zip(c, low, steps[1:], strict=True):
        keys[0] += (number - lowest).to(kind) * step
    rest = torch.empty_like(rest).scatter_(0, rank, rest)
    stride = torch.empty_like(keys).scatter_(0, rank, steps[:, None].expand_as(keys))
    weights = torch.empty_like(rest)
    weights[0] = rest[-1] - rest[0] + 1
    for k in range(1, size):  # from vertex to vertex of a simplex, along the coordinate with the smallest rest left
        torch.add(keys[k - 1], stride[size - k], out=keys[k])
        torch.sub(rest[size - 1 - k], rest[size - k], out=weights[k])
    return keys, weights, steps


def _neighbours(keys: Tensor, steps: Tensor) -> list[Tensor]:
    """For each direction int32 (M + 1, 3): every vertex, the one after it and the one before it; M where there is none.

    Args:
        keys: (M,) of the vertices, ascending.
        steps: what a step along each direction adds to a key.
    """
    count = len(keys)
    found = []
    for step in steps:
        after = torch.searchsorted(keys, keys + step, out_int32=True).clamp_(max=count - 1)
        before = (keys[after] == keys + step).nonzero().view(-1)
        after = after[before]
        triple = torch.full((count + 1, 3), count, dtype=torch.int32, device=keys.device)
        triple[:, 0] = torch.arange(count + 1, device=keys.device)
        triple[before, 1] = after
        triple[after, 2] = before.to(torch.int32)
        found.append(triple)
    return found
