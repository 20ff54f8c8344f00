import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slimfront.trainables.data.transforms import Augment, augment, channel_statistics


def images(n: int = 200, channels: int = 2, height: int = 5, width: int = 7) -> Tensor:
    return torch.randint(
        1,
        256,
        (n, channels, height, width),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def windows(image: Tensor, crop: int) -> list[Tensor]:
    """Slow and obvious: every crop of the padded image, and its mirror image."""
    height, width = image.shape[1:]
    padded = F.pad(image, (crop,) * 4)
    cuts = [
        padded[:, y : y + height, x : x + width]
        for y in range(2 * crop + 1)
        for x in range(2 * crop + 1)
    ]
    return [*cuts, *(cut.flip(2) for cut in cuts)]


def test_every_augmented_image_is_a_crop_or_a_mirrored_crop_of_its_own_image() -> None:
    stored = images()
    varied = augment(stored, Augment(crop=2, flip=True), generator())
    assert varied.dtype == torch.uint8
    found = [
        [i for i, cut in enumerate(windows(image, 2)) if torch.equal(cut, new)]
        for image, new in zip(stored, varied, strict=True)
    ]
    assert all(len(where) == 1 for where in found)
    assert len({where[0] for where in found}) > 35  # of 50 possible ones, each image takes its own


def test_flip_mirrors_about_half_of_the_images_and_leaves_the_others() -> None:
    stored = images(1000)
    varied = augment(stored, Augment(flip=True), generator())
    mirrored = (varied == stored.flip(3)).flatten(1).all(1)
    same = (varied == stored).flatten(1).all(1)
    assert bool((mirrored ^ same).all())
    assert 400 < int(mirrored.sum()) < 600


def test_crop_alone_never_mirrors() -> None:
    stored = images(50)
    for image, new in zip(stored, augment(stored, Augment(crop=1), generator()), strict=True):
        assert any(torch.equal(new, cut) for cut in windows(image, 1)[:9])


def test_randomness_comes_from_the_generator_only() -> None:
    stored, options = images(), Augment(crop=2, flip=True)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = augment(stored, options, generator(5))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, augment(stored, options, generator(5)))
    assert not torch.equal(first, augment(stored, options, generator(6)))


def test_several_generators_vary_a_part_each_as_they_would_by_themselves() -> None:
    stored, options = images(), Augment(crop=2, flip=True)
    parts = [augment(part, options, generator(n)) for n, part in enumerate(stored.split(50))]
    assert torch.equal(
        augment(stored, options, *(generator(n) for n in range(4))), torch.cat(parts)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_gives_the_same_images_as_the_cpu() -> None:
    stored, options = images(), Augment(crop=2, flip=True)
    assert torch.equal(
        augment(stored, options, generator()), augment(stored.cuda(), options, generator()).cpu()
    )


def test_the_channel_statistics_are_those_of_the_float_images() -> None:
    stored = images()
    mean, std = channel_statistics(stored)
    assert mean.shape == std.shape == (2, 1, 1)
    assert mean.dtype == torch.float32
    assert torch.allclose(mean.flatten(), stored.double().mean((0, 2, 3)).float())
    assert torch.allclose(std.flatten(), stored.double().std((0, 2, 3), correction=0).float())
