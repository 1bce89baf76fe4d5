"""The sample stream and the counter-based crops: coverage, locality, distribution."""

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_fast.data.crops import TRIES, counter_bits, counter_uniform, random_resized_crop
from ijepa_fast.data.order import SHARDS_MIXED, SampleStream


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 60), seed=st.integers(0, 2**40), shards=st.integers(0, 9))
def test_every_epoch_of_the_stream_is_a_permutation(count, seed, shards):
    groups = np.arange(count) * shards // count if shards else None
    stream = SampleStream(count, seed, groups)
    for epoch in range(3):
        ids = stream[np.arange(epoch * count, (epoch + 1) * count)]
        assert sorted(ids.tolist()) == list(range(count))


def test_epochs_and_seeds_differ_and_nothing_depends_on_the_way_of_asking():
    stream = SampleStream(100, 5)
    whole = stream[np.arange(300)]
    assert len({tuple(part) for part in whole.reshape(3, 100)}) == 3
    pieces = [SampleStream(100, 5)[np.arange(a, a + 30)] for a in range(0, 300, 30)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert not np.array_equal(SampleStream(100, 6)[np.arange(100)], whole[:100])


def test_shards_are_shuffled_on_two_levels():
    shards, per_shard = 4 * SHARDS_MIXED, 10
    groups = np.repeat(np.arange(shards), per_shard)
    order = SampleStream(len(groups), 1, groups)[np.arange(len(groups))]
    parts = groups[order].reshape(4, -1)  # samples of 16 shards each
    assert all(len(set(part)) == SHARDS_MIXED for part in parts)
    assert set(parts[0]) != set(range(SHARDS_MIXED))  # shards are permuted
    assert (np.diff(parts[0]) != 0).mean() > 0.8  # and mixed among each other


def test_counters_are_uniform_and_independent():
    numbers = counter_uniform(1, np.arange(20000), 8)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(numbers.mean(0) - 0.5).max() < 0.01
    assert np.abs(numbers.var(0) - 1 / 12).max() < 0.002
    correlation = np.corrcoef(np.concatenate([numbers[1:], numbers[:-1]], axis=1).T)
    assert np.abs(correlation - np.eye(16)).max() < 0.03
    keys = [(seed, stream) for seed in (1, 2, -1) for stream in (0, 1)]
    firsts = {int(counter_bits(seed, np.array([0]), 1, stream)[0, 0]) for seed, stream in keys}
    assert len(firsts) == len(keys)


def windows_of(size, count=20000, scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3)):
    sizes = np.tile(np.array([size]), (count, 1))
    return random_resized_crop(sizes, counter_uniform(0, np.arange(count), 2 * TRIES + 2), scale, ratio).astype(float)


def reference_windows(size, count, scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3)):
    """Random resized crops one by one, from the description of the transform."""
    rng, (height, width) = np.random.default_rng(0), size
    out = []
    for _ in range(count):
        for _ in range(10):
            area, aspect = height * width * rng.uniform(*scale), np.exp(rng.uniform(*np.log(ratio)))
            w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                out.append((rng.integers(width - w + 1), rng.integers(height - h + 1), w, h))
                break
    return np.array(out, float)


@pytest.mark.parametrize("size", [(375, 500), (224, 224), (32, 32)], ids=["photograph", "square", "small"])
def test_windows_have_the_distribution_of_random_resized_crops(size):
    windows, expected = windows_of(size), reference_windows(size, 6000)
    assert (windows[:, 0] + windows[:, 2]).max() == size[1]  # the last column is reached, and not crossed
    assert (windows[:, 1] + windows[:, 3]).max() == size[0]
    assert windows.min() >= 0
    found, right = (np.quantile(values, [0.1, 0.5, 0.9], axis=0) for values in (windows, expected))
    assert np.abs(found - right).max() <= max(0.03 * max(size), 1)


@pytest.mark.parametrize(
    ("size", "window"),
    [((10, 1000), (493, 0, 13, 10)), ((1000, 10), (0, 493, 10, 13))],
    ids=["wide", "high"],
)
def test_very_long_images_get_the_central_window(size, window):
    windows = windows_of(size, 50, scale=(0.9, 1.0))
    assert windows.tolist() == [list(window)] * 50


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 2)], ids=lambda size: "{}x{}".format(*size))
def test_tiny_images_have_valid_windows(size):
    windows = windows_of(size, 200)
    assert windows[:, 2:].min() >= 1
    assert (windows[:, 0] + windows[:, 2]).max() <= size[1]
    assert (windows[:, 1] + windows[:, 3]).max() <= size[0]
