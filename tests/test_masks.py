"""Pasting and encoding against grid_sample, a loop over pixels, and pycocotools on the pasted masks."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco

from seglight import masks as ours
from seglight.masks import areas, boxes, decode, encode, paste


def sampled(grids: torch.Tensor, windows: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Values float64 (N, H, W) at the pixels' centres, by grid_sample over the whole image, as detectron2 does."""
    height, width = size
    out = torch.zeros(len(grids), height, width, dtype=torch.float64)
    for n, (grid, (x0, y0, x1, y1)) in enumerate(zip(grids.double(), windows.double(), strict=True)):
        if x1 <= x0 or y1 <= y0:
            continue
        x = (torch.arange(width, dtype=torch.float64) + 0.5 - x0) / (x1 - x0) * 2 - 1
        y = (torch.arange(height, dtype=torch.float64) + 0.5 - y0) / (y1 - y0) * 2 - 1
        at = torch.stack([x[None].expand(size), y[:, None].expand(size)], -1)
        out[n] = F.grid_sample(grid[None, None], at[None], align_corners=False, padding_mode="zeros")[0, 0]
    return out


def case(seed: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int], float]:
    """Grids, windows, size and threshold: windows in, across, around and out of the image, large, thin and tiny."""
    draw = torch.Generator().manual_seed(seed)
    size = tuple(torch.randint(1, 60, (2,), generator=draw).tolist())
    n, m = int(torch.randint(1, 90, (), generator=draw)), (1, 2, 7, 14, 28)[seed % 5]
    whole = torch.tensor([size[1], size[0]])
    centre = (torch.rand(n, 2, generator=draw) * 1.4 - 0.2) * whole
    half = torch.exp(torch.randn(n, 2, generator=draw) * 1.5 + 2) / 2
    windows = torch.cat([centre - half, centre + half], 1)
    if seed % 3 == 0:
        windows = windows.round()
    if seed % 7 == 0:
        windows[0] = torch.tensor([0.0, 0.0, size[1], size[0]])
    grids = torch.rand(n, m, m, generator=draw)
    if seed % 4 == 0:
        grids = (grids > 0.5).float()
    if seed % 4 == 1:
        grids = F.avg_pool2d(grids, 3, 1, 1, count_include_pad=False)
    if seed % 6 == 5:
        grids[::2] = 1  # full columns of the image, where runs go on from one to the next
    return grids, windows, size, (0.5, 0.3, 0.9)[seed % 3]


@pytest.mark.fidelity
@pytest.mark.parametrize("seed", range(60))
def test_paste_is_grid_sample_and_encode_is_pycocotools_of_it(seed):
    grids, windows, size, threshold = case(seed)
    values, dense = sampled(grids, windows, size), paste(grids, windows, size, threshold)
    assert dense.dtype == torch.bool and dense.shape == (len(grids), *size)
    sure = (values - threshold).abs() > 1e-6
    assert torch.equal(dense[sure], (values >= threshold)[sure])
    expected = coco.encode(np.asfortranarray(dense.numpy().transpose(1, 2, 0).astype(np.uint8)))
    assert encode(grids, windows, size, threshold) == expected


def test_paste_equals_a_loop_over_pixels():
    draw = np.random.default_rng(0)
    grid, (x0, y0, x1, y1), (height, width), m = draw.random((5, 5)), (2.3, -1.2, 9.9, 8.5), (7, 11), 5

    def cell(i: int, j: int) -> float:
        return grid[i, j] if 0 <= i < m and 0 <= j < m else 0.0

    expected = np.zeros((height, width), dtype=bool)
    for y in range(height):
        for x in range(width):
            v, u = (y + 0.5 - y0) / (y1 - y0) * m - 0.5, (x + 0.5 - x0) / (x1 - x0) * m - 0.5
            i, j = math.floor(v), math.floor(u)
            a, b = v - i, u - j
            value = (1 - a) * ((1 - b) * cell(i, j) + b * cell(i, j + 1))
            value += a * ((1 - b) * cell(i + 1, j) + b * cell(i + 1, j + 1))
            expected[y, x] = value >= 0.5
    dense = paste(torch.tensor(grid)[None], torch.tensor([[x0, y0, x1, y1]]), (height, width))[0]
    assert 0 < expected.sum() < expected.size and np.array_equal(dense.numpy(), expected)


def test_a_value_on_the_threshold_belongs_to_the_mask():
    """0.5 everywhere stays 0.5 wherever it is read within the outer cells' centres."""
    windows = torch.tensor([[-0.37, 0.81, 37.77, 41.3]])
    inner = paste(torch.full((1, 28, 28), 0.5), windows, (50, 50))[0]
    x = torch.arange(50) + 0.5
    cell_x, cell_y = 38.14 / 28, 40.49 / 28
    across = (x >= -0.37 + cell_x / 2) & (x <= 37.77 - cell_x / 2)
    down = (x >= 0.81 + cell_y / 2) & (x <= 41.3 - cell_y / 2)
    assert torch.equal(inner, down[:, None] & across[None])
    one = paste(torch.ones(1, 28, 28), torch.tensor([[10.5, 20.5, 30.5, 41.5]]), (50, 50))[0]
    assert one.nonzero().amin(0).tolist() == [20, 10] and one.nonzero().amax(0).tolist() == [41, 30]  # 0.5 on the edge


def test_a_full_window_covers_the_pixels_whose_centres_it_holds():
    dense = paste(torch.ones(2, 14, 14), torch.tensor([[1.0, 2.0, 4.0, 5.0], [1.4, 2.6, 4.4, 5.6]]), (8, 8))
    assert dense[0].nonzero().tolist() == [[y, x] for y in (2, 3, 4) for x in (1, 2, 3)]
    assert dense[1].nonzero().tolist() == [[y, x] for y in (3, 4, 5) for x in (1, 2, 3)]


@pytest.mark.parametrize(
    "window",
    [
        (3.6, 3.6, 4.4, 4.4),  # between centres
        (4.0, 4.0, 4.0, 9.0),  # no width
        (6.0, 6.0, 2.0, 2.0),  # inside out
        (20.0, 0.0, 30.0, 8.0),  # beside the image
        (-30.0, -30.0, -1.0, -1.0),
        (0.0, 1e6, 8.0, 2e6),
    ],
)
def test_windows_without_a_pixel_give_an_empty_mask(window):
    (rle,) = encode(torch.ones(1, 28, 28), torch.tensor([window]), (8, 10))
    assert rle == coco.encode(np.zeros((8, 10), dtype=np.uint8, order="F"))


def test_windows_far_larger_than_the_image_and_smaller_than_a_pixel():
    rles = encode(torch.ones(2, 28, 28), torch.tensor([[-1e9, -1e9, 1e9, 1e9], [4.4, 3.4, 4.6, 3.6]]), (8, 10))
    assert areas(rles).tolist() == [80, 1]
    assert rles[0] == coco.encode(np.ones((8, 10), dtype=np.uint8, order="F"))
    assert boxes(rles).tolist() == [[0, 0, 10, 8], [4, 3, 5, 4]]


def test_no_masks():
    nothing = torch.zeros(0, 28, 28), torch.zeros(0, 4)
    assert encode(*nothing, (5, 6)) == [] and paste(*nothing, (5, 6)).shape == (0, 5, 6)
    assert decode([]).shape == (0, 0, 0) and decode([], (5, 6)).shape == (0, 5, 6)
    assert areas([]).shape == (0,) and boxes([]).shape == (0, 4)


def test_areas_of_many():
    """pycocotools 2.0.11 counts in a uint8."""
    dense = np.zeros((600, 9, 8), dtype=bool)
    for n, mask in enumerate(dense):
        mask.reshape(-1)[: n % 72] = True
    rles = encode(torch.from_numpy(dense[:, :8, :8].copy()).float(), torch.tensor([[0.0, 0, 8, 8]] * 600), (8, 8))
    assert areas(rles).tolist() == dense[:, :8, :8].sum((1, 2)).tolist()
    assert areas(tuple(rles)).dtype == np.int64


def test_decode_areas_and_boxes():
    grids, windows, size, _ = case(8)
    rles, dense = encode(grids, windows, size), paste(grids, windows, size).numpy()
    out = decode(rles)
    assert out.dtype == bool and out.flags.c_contiguous and np.array_equal(out, dense)
    assert np.array_equal(areas(rles), dense.sum((1, 2))) and areas(rles).dtype == np.int64
    for box, one in zip(boxes(rles), dense, strict=True):
        y, x = np.nonzero(one)
        assert box.tolist() == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0])


def test_half_precision_and_gradients_are_welcome():
    grids, windows, size, _ = case(4)
    half = grids.bfloat16().requires_grad_()
    assert encode(half, windows.half(), size) == encode(half.detach().float(), windows.half().float(), size)


@pytest.mark.gpu
def test_masks_of_a_gpu_give_the_same():
    grids, windows, size, _ = case(3)
    assert encode(grids.cuda(), windows.cuda(), size) == encode(grids, windows, size)
    dense = paste(grids.cuda(), windows.cuda(), size)
    assert dense.is_cuda and torch.equal(dense.cpu(), paste(grids, windows, size))


def test_lengths_of_more_than_one_group_of_bits():
    """Runs of up to 4 million pixels: strings of up to five characters a run, and negative differences."""
    windows = torch.tensor([[5.0, 1000.0, 9.0, 1900.0], [0.0, 0.0, 2000.0, 2100.0], [1990.0, 0.0, 2000.0, 2100.0]])
    grids = torch.ones(3, 2, 2)
    grids[0, 0, 1] = 0
    for rle, dense in zip(encode(grids, windows, (2100, 2000)), paste(grids, windows, (2100, 2000)), strict=True):
        assert rle == coco.encode(np.asfortranarray(dense.numpy().astype(np.uint8)))


def test_encoding_needs_no_memory_of_the_image():
    draw = torch.Generator().manual_seed(0)
    corner = torch.rand(100, 2, generator=draw) * 1900
    windows = torch.cat([corner, corner + 50 + 100 * torch.rand(100, 2, generator=draw)], 1)
    grids = torch.rand(100, 28, 28, generator=draw)
    encode(grids, windows, (2048, 2048))
    tracemalloc.start()
    encode(grids, windows, (2048, 2048))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2048 * 2048 / 20


def test_batches_of_masks_do_not_see_each_other(monkeypatch):
    grids, windows, size, _ = case(11)
    whole = encode(grids, windows, size)
    monkeypatch.setattr(ours, "TOGETHER", 3)
    assert encode(grids, windows, size) == whole
    assert [encode(grids[i : i + 1], windows[i : i + 1], size)[0] for i in range(len(grids))] == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": torch.ones(2, 1, 4, 4)}, r"shape \(2, 1, 4, 4\), but must be probabilities \(N, m, m\)"),
        ({"masks": torch.ones(2, 4, 5)}, "square grids"),
        ({"masks": torch.ones(2, 4, 4, dtype=torch.uint8)}, "torch.uint8"),
        ({"windows": torch.ones(3, 4)}, r"shape \(3, 4\) for 2 masks"),
        ({"windows": torch.tensor([[0, 0, 1, 1], [0, math.nan, 1, 1]])}, "Mask 1 of 2 has the window"),
        ({"windows": torch.tensor([[0, 0, math.inf, 1], [0, 0, 1, 1]])}, "Mask 0 of 2 has the window"),
        ({"masks": torch.full((2, 4, 4), math.nan)}, "Mask 0 of 2 has values that are not finite"),
        ({"size": (0, 4)}, r"image size is \(0, 4\)"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": 1.5}, "threshold is 1.5"),
    ],
)
def test_bad_input(change, message):
    good = {"masks": torch.ones(2, 4, 4), "windows": torch.tensor([[0.0, 0.0, 4.0, 4.0]] * 2), "size": (5, 6)}
    for function in (paste, encode):
        function(**good)
        with pytest.raises(ValueError, match=message):
            function(**{**good, **change})
