"""Batches of images: normalised by the equation, augmented as a loop would, resumed on the very next batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qatana.errors import DataError
from qatana.jobs.images import ImageBatches, ImageData, crop_flip


@pytest.fixture
def small() -> ImageData:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (23, 2, 8, 6), dtype=torch.uint8, generator=generator)
    y = torch.arange(23)
    return ImageData(x, y, x[:5], y[:5], tuple(map(str, range(23))), (0.25, 0.5), (0.5, 0.125))


def test_normalise_is_the_equation_bit_for_bit(small: ImageData) -> None:
    mean, std = (np.array(c, np.float32).reshape(1, 2, 1, 1) for c in (small.mean, small.std))
    expected = (small.train_x.numpy().astype(np.float32) / np.float32(255) - mean) / std
    np.testing.assert_array_equal(small.normalise(small.train_x).numpy(), expected)


def test_crop_flip_equals_a_loop(small: ImageData) -> None:
    pad, count = 3, 23
    generator = torch.Generator().manual_seed(1)
    corners = torch.randint(0, 2 * pad + 1, (count, 2), generator=generator)
    corners[0], corners[1] = torch.tensor([0, 0]), torch.tensor([2 * pad, 2 * pad])  # both far ends
    flips = torch.rand(count, generator=generator) < 0.5
    padded = np.pad(small.train_x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    expected = []
    for image, (row, column), flip in zip(padded, corners.tolist(), flips.tolist(), strict=True):
        crop = image[:, row : row + 8, column : column + 6]
        expected.append(crop[:, :, ::-1] if flip else crop)
    actual = crop_flip(small.train_x, corners, flips, pad)
    assert actual.dtype == torch.uint8
    np.testing.assert_array_equal(actual.numpy(), np.stack(expected))


def test_every_image_once_per_epoch_in_another_order(small: ImageData) -> None:
    batches = ImageBatches(small, "train", batch_size=5)
    orders = [torch.cat([y for _, y in batches.epoch(n)]).tolist() for n in range(3)]
    assert [len(y) for _, y in batches] == [5, 5, 5, 5, 3]
    assert len(batches) == 5
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    for x, y in batches.epoch(1):  # images and labels stay together
        assert torch.equal(x, small.normalise(small.train_x[y]))


@pytest.mark.parametrize("augment", [False, True])
def test_epoch_resumes_exactly(small: ImageData, augment: bool) -> None:
    whole = list(ImageBatches(small, "train", 5, augment=augment, seed=11).epoch(4))
    rest = list(ImageBatches(small, "train", 5, augment=augment, seed=11).epoch(4, start=2))
    assert len(rest) == 3
    for (x, y), (x_again, y_again) in zip(whole[2:], rest, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    other = torch.cat([y for _, y in ImageBatches(small, "train", 5, augment=augment, seed=12).epoch(4)])
    assert other.tolist() != torch.cat([y for _, y in whole]).tolist()


def test_batches_do_not_touch_the_global_generator(small: ImageData) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(ImageBatches(small, "train", augment=True))
    assert torch.equal(torch.rand(3), expected)


def test_test_part_is_in_order_and_whole(small: ImageData) -> None:
    for _ in range(2):
        assert torch.cat([y for _, y in ImageBatches(small, "test", 2)]).tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([y for _, y in ImageBatches(small, "train", 2, shuffle=False, limit=3)]).tolist() == [
        0,
        1,
        2,
    ]


def test_augmentation_uses_every_offset_and_half_the_flips() -> None:
    """One bright pixel shows where each image went: with pad 2 there are 25 places, each mirrored or not."""
    count = 5000
    x = torch.zeros(count, 1, 9, 15, dtype=torch.uint8)
    x[:, :, 4, 3] = 255
    y = torch.zeros(count, dtype=torch.int64)
    batches = ImageBatches(ImageData(x, y, x, y, ("a",), (0.0,), (1.0,)), "train", 512, augment=True, pad=2)
    places = torch.cat([batch for batch, _ in batches]).flatten(1).argmax(1)
    rows, columns = places // 15, places % 15
    mirrored = columns > 7
    # A crop at offset o in 0..4 moves row 4 to 6 - o and column 3 to 5 - o, which a mirror sends to 9 + o.
    offsets = torch.stack((6 - rows, torch.where(mirrored, columns - 9, 5 - columns)))
    shares = torch.stack([row.bincount() for row in offsets]) / count

    # 5 standard deviations of a binomial share; the seed is fixed, so this either holds or does not.
    assert shares.shape == (2, 5)
    assert torch.all((shares - 0.2).abs() < 5 * (0.2 * 0.8 / count) ** 0.5)
    assert abs(float(mirrored.float().mean()) - 0.5) < 5 * (0.25 / count) ** 0.5
    assert len({(place, bool(flip)) for place, flip in zip(places.tolist(), mirrored, strict=True)}) == 50


def test_bad_batch_options_are_refused(small: ImageData) -> None:
    faults: list[dict[str, Any]] = [{"batch_size": 0}, {"pad": -1}, {"limit": 0}]
    for options in faults:
        with pytest.raises(DataError, match="must be at least 1"):
            ImageBatches(small, "train", **options)
    with pytest.raises(DataError, match="unknown part 'tests'; did you mean 'test'"):
        ImageBatches(small, "tests")  # pyright: ignore[reportArgumentType]
