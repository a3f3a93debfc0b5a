"""The digits' split, order and augmentation; labels of image folders."""
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

from vitprune.data import augment, create_eval_loader, load_digits


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


def folder(root, names):
    for value, name in enumerate(names):
        (root / name).mkdir()
        Image.new("RGB", (300, 280), (40 * value, 0, 0)).save(root / name / "picture.png")
    return root


def test_labels_are_wordnet_ids_not_positions(tmp_path):
    folder(tmp_path, ["n01443537", "n02129165"])  # goldfish 1, lion 291
    (images, labels), = create_eval_loader(tmp_path, workers=0)
    assert labels.tolist() == [1, 291] and images.shape == (2, 3, 224, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(images[1, :, 0, 0], (torch.tensor([40 / 255, 0, 0]) - mean) / std)


def test_integer_folders_need_a_class_map(tmp_path):
    folder(tmp_path, ["0", "1", "10", "2"])
    with pytest.raises(ValueError, match="integer folder names do not say which class they mean; got '0'"):
        create_eval_loader(tmp_path)
    (_, labels), = create_eval_loader(tmp_path, class_map={str(i): i for i in range(11)}, workers=0)
    assert sorted(labels.tolist()) == [0, 1, 2, 10]


def test_unknown_folders_are_refused(tmp_path):
    folder(tmp_path, ["cat"])
    with pytest.raises(ValueError, match="WordNet ids of ImageNet-1k.*got 'cat'"):
        create_eval_loader(tmp_path)
    with pytest.raises(ValueError, match="class_map must name every folder .* lacks 'cat'"):
        create_eval_loader(tmp_path, class_map={"dog": 0})
    with pytest.raises(ValueError, match="source must be a folder"):
        create_eval_loader(tmp_path / "none")


def test_evaluation_refuses_a_picture_it_cannot_read(tmp_path):
    folder(tmp_path, ["n01443537", "n02129165"])
    (tmp_path / "n02129165" / "broken.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"broken.png must be a picture that can be read"):
        list(create_eval_loader(tmp_path, image_size=32, resize=36, workers=0))
