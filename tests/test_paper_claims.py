"""The pictures of the paper claims show what they should, the statistics are right, and one claim is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments/paper_claims"))
import claims
from scenes import Claim, Scenes


def test_the_interval_is_students():
    better, worse = [0.5, 0.7, 0.6, 0.9], [0.4, 0.5, 0.6, 0.5]
    mean, low, high = claims.interval(better, worse)
    expected = stats.ttest_rel(better, worse).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((0.175, expected.low, expected.high))


def test_only_the_strip_tells_suns_from_moons():
    pictures = Scenes(40, 0, "context", 96)
    seen = set()
    for i in range(40):
        image, mask = pictures.read(i)
        kinds = set(np.unique(mask)) - {0}
        assert len(kinds) == 1 and not mask[48 + 14 :].any()
        warm = image[-4:, :, 0].mean() > image[-4:, :, 2].mean()
        assert kinds == {1 if warm else 2}
        assert abs(image[mask > 0].astype(float).mean(0) - 240).max() < 3  # discs of one colour
        seen |= kinds
    assert seen == {1, 2}


@pytest.mark.parametrize("kind", ["wires", "context", "edges"])
def test_pictures_come_from_seed_and_index(kind):
    data, again = Claim(kind, side=64, seed=3), Claim(kind, side=64, seed=3)
    for split in ("train", "val"):
        one, two = data.dataset(split).read(1), again.dataset(split).read(1)
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(data.dataset("train").read(1)[0], data.dataset("val").read(1)[0])
    assert set(np.unique(data.dataset("train").read(0)[1])) <= set(range(len(data.classes)))


def test_every_claim_builds():
    for claim in claims.CLAIMS.values():
        data = Claim(**claim.data)
        names = set(claim.models)
        assert {name for pair in claim.better for name in pair} <= names
        assert max(claim.score) < data.num_classes
        for build in claim.models.values():
            assert build in names if isinstance(build, str) else build(data).num_classes == data.num_classes


def test_recorded_numbers():
    """The README says of every claim what its seeds say, and there is a figure of it."""
    folder = Path(claims.__file__).parent / "figures"
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for name, record in json.loads((folder / "claims.json").read_text()).items():
        claim, scores = claims.CLAIMS[name], record["scores"]
        assert (folder / f"{name}.png").is_file()
        assert list(scores) == list(claim.models)
        (row,) = (line for line in readme.splitlines() if f"figures/{name}.png" in line)
        for better, worse in claim.better:
            found = claims.interval(scores[better], scores[worse])
            assert record["differences"][f"{better} - {worse}"] == pytest.approx(found)
            mean, low, high = (100 * value for value in found)
            assert f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" in row
            assert ("does not show" in row) == (low <= 0)
        assert row.endswith(f"| {len(next(iter(scores.values())))} |")


@pytest.mark.slow
@pytest.mark.fidelity
def test_atrous_convolution_finds_what_strides_lose():
    claim = claims.CLAIMS["atrous"]
    for seed in (0, 1):
        scores = claims.run(claim, seed, steps=60)
        assert scores["atrous, stride 8"] > scores["stride 32"] + 0.05
