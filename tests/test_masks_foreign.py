"""Masks of somebody else's by their import path, and channels that contexts do not see."""

from dataclasses import replace

import pytest
import torch

from ijepa_fast.config import ConfigError, Mask
from ijepa_fast.masks.samplers import make_sampler
from ijepa_fast.methods.ijepa import IJEPA, seen_channels
from tests.small import setup_of


def ijepa(strategy, channels=3, **mask):
    torch.manual_seed(0)
    setup = setup_of(32, 8, mean=(0.5,) * channels, std=(0.2,) * channels)
    setup = replace(setup, mask=Mask(strategy=strategy, **mask), data=replace(setup.data, channels=channels))
    return IJEPA(setup)


def test_masks_of_a_module_train():
    method = ijepa("tests.my_masks:halves")
    draw = method.draw(3, seed=1, step=5)
    assert draw.context_tokens == 3 * 8
    assert draw.target_size == 2
    loss, _ = method(torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8), draw)
    loss.backward()
    assert loss.isfinite()
    later = method.draw(2, seed=1, step=5, first=1, batch=3)
    assert torch.equal(later.target_index, draw.target_index[:, 1:] - 16)


@pytest.mark.parametrize(
    ("strategy", "options", "words"),
    [
        ("tests.my_masks:by_batch", {}, "expected the same target of an image whatever images it is drawn with"),
        ("tests.my_masks:outside", {}, "expected target patches from 0 to 15, got 16 to 16"),
        ("tests.my_masks:nothing", {}, "expected a sampler that is called with images, seed, step and first, got None"),
        ("tests.my_masks:empty", {}, "expected at least one patch in every context"),
        ("tests.my_masks:missing", {}, "expected the import path of a module and a function in it"),
        ("tests.my_masks:halves", {"min_keep": 3}, "unexpected keyword argument 'min_keep'; its options are those of"),
    ],
)
def test_what_is_no_sampler_is_named(strategy, options, words):
    with pytest.raises(ValueError, match=f"mask.strategy={strategy}: {words}|{words}"):
        make_sampler(strategy, (4, 4), **options)(4, 0, 0)


def test_a_command_that_reads_a_run_imports_no_masks():
    setup = replace(setup_of(32, 8), mask=Mask(strategy="tests.my_masks:halves"), foreign=False)
    with pytest.raises(ConfigError, match="only strategies of this package are imported here"):
        IJEPA(setup)


def test_hidden_channels_are_zero_to_the_context_alone():
    method = ijepa("channels", channels=6, min_keep=1)
    draw = method.draw(4, seed=0, step=2)
    assert draw.channels.sum(1).tolist() == [3] * 4
    images = torch.randint(1, 256, (4, 32, 32, 6), dtype=torch.uint8)
    patches = method.patchify(images)
    seen = method.seen(patches, draw).view(4, 16, 6, 64)
    assert torch.equal(seen, patches.view(4, 16, 6, 64) * draw.channels[:, None, :, None])
    hidden, plain = method(images, draw)[0], method(images, replace(draw, channels=None))[0]
    assert hidden != plain
    assert torch.equal(method.targets(patches, draw), method.targets(patches, replace(draw, channels=None)))


def test_hidden_channels_are_a_function_of_the_place():
    whole = seen_channels(8, 3, 7, 0, 13, 5)
    assert torch.equal(whole[3:6], seen_channels(3, 3, 7, 3, 13, 5))
    assert not torch.equal(whole, seen_channels(8, 3, 8, 0, 13, 5))
    assert whole.sum(1).tolist() == [8] * 8


@pytest.mark.parametrize(
    ("strategy", "channels", "mask", "words"),
    [
        ("channels", 1, {}, "expected images of several channels, got data.channels=1"),
        ("multiblock", 6, {"hidden_channels": 0.5}, "mask.hidden_channels: has no meaning for"),
    ],
)
def test_hidden_channels_where_they_mean_nothing(strategy, channels, mask, words):
    with pytest.raises(ValueError, match=words):
        ijepa(strategy, channels, **mask)
