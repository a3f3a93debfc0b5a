"""The digits' split, order and augmentation."""
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits
from timm.models.vision_transformer import VisionTransformer

import vitprune
from vitprune.digits import augment, load_digits
from vitprune.evaluate import evaluate_source


def rows(images):
    return {image.numpy().tobytes() for image in images}


def test_split_is_fixed_stratified_and_covers_every_picture_once():
    training, held_out = load_digits(seed=0)
    other = load_digits(seed=7)
    assert (len(training.images), len(held_out.images)) == (1197, 600)
    assert torch.equal(other[1].images, held_out.images) and torch.equal(other[0].images, training.images)
    assert not rows(training.images) & rows(held_out.images)
    both = torch.cat([training.images, held_out.images]).squeeze(1).mul(16).numpy()
    assert sorted(map(bytes, both.astype(np.uint8))) == sorted(map(bytes, sklearn_digits().images.astype(np.uint8)))
    share = torch.bincount(held_out.labels) / torch.bincount(torch.cat([training.labels, held_out.labels]))
    assert (share - 600 / 1797).abs().max() < 0.01


def test_order_and_augmentation_are_functions_of_seed_and_epoch():
    def batch(seed, epoch):
        return next(iter(load_digits(32, seed)[0].at_epoch(epoch)))

    torch.manual_seed(1)
    first = batch(3, 2)
    torch.manual_seed(2)
    again = batch(3, 2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], batch(3, 4)[1]) and not torch.equal(first[1], batch(4, 2)[1])


def test_training_drops_the_short_batch_and_evaluation_counts_each_picture_once():
    training, held_out = load_digits(100)
    sizes = [len(labels) for _, labels in training]
    assert sizes == [100] * 11 and len(training) == 11
    assert torch.equal(torch.cat([labels for _, labels in held_out]), held_out.labels)
    images = torch.cat([images for images, _ in training])
    assert images.shape == (1100, 1, 8, 8) and abs(images.mean()) < 0.1 and abs(images.std() - 1) < 0.2  # resampling blurs


def test_evaluation_is_not_augmented():
    _, held_out = load_digits()
    images, _ = next(iter(held_out))
    torch.testing.assert_close(images * held_out.std + held_out.mean, held_out.images)


def test_augment_without_any_change_is_the_identity_and_moves_by_at_most_the_shift():
    images = torch.rand(16, 2, 8, 8)
    random = torch.Generator().manual_seed(0)
    torch.testing.assert_close(augment(images, random, shift=0, degrees=0, scale=0), images)
    spot = torch.zeros(64, 1, 9, 9)
    spot[:, :, 4, 4] = 1
    moved = augment(spot, random, shift=1, degrees=0, scale=0)
    assert moved[:, :, 3:6, 3:6].sum().item() == pytest.approx(64, rel=1e-5)
    assert (moved - spot).abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize("size", [0, 1198])
def test_batch_size_out_of_range(size):
    with pytest.raises(ValueError, match=rf"batch_size must be in 1..1197, got {size}"):
        load_digits(size)


def test_every_seed_of_a_run_makes_batches():
    training, _ = load_digits(seed=2 ** 32 - 1)
    assert len(next(iter(training.at_epoch(7)))[1]) == 128


def test_evaluation_refuses_what_digits_have_not():
    model = vitprune.prune(VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=16, depth=1, num_heads=1),
                           blocks=vitprune.BlockPruning(granularity=16))
    for name, value in {"resize": 9, "eval_split": "train", "class_map": "x.json", "skip_corrupt": True}.items():
        with pytest.raises(ValueError, match=f"evaluate: {name} must be left out for the digits"):
            evaluate_source(model, "digits", **{name: value})
