"""The generated data set: the same everywhere, and hard in the ways real data is."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from hsnet.errors import ConfigError, DataError
from pipeline.datasets import open_dataset
from pipeline.datasets.shapes import CLASSES, FOLDS, SILHOUETTES, TEXTURES, Shapes

SMALL = Shapes(size=64, trn_per_class=2, val_per_class=2)


def test_the_drawing_is_the_same_everywhere():
    """Fixed hash: features, stores and results on shapes compare between machines only while this holds."""
    digest = hashlib.sha256()
    for number in range(0, len(SMALL.index.images), 7):
        digest.update(SMALL.label(number).tobytes())
    assert digest.hexdigest() == "637454bc33a39dceefafa6d0acdb5623814333428e46ec509e37894764fd297b"


def test_colours_are_those_drawn_before():
    # Means, not a hash: the last bit of a sine may differ between platforms, and shift a colour by one step.
    means = np.asarray(SMALL.image(5)).reshape(-1, 3).mean(axis=0)
    np.testing.assert_allclose(means, [115.43, 114.75, 103.22], atol=0.05)


def test_images_do_not_depend_on_order_or_process():
    alone = "from pipeline.datasets.shapes import Shapes; import hashlib; d = Shapes(size=64); "
    code = alone + "print(hashlib.sha256(d.image(9).tobytes() + d.label(9).tobytes()).hexdigest())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    dataset = Shapes(size=64)
    for other in (3, 8, 700):
        dataset.image(other)
    dataset = pickle.loads(pickle.dumps(dataset))
    assert hashlib.sha256(dataset.image(9).tobytes() + dataset.label(9).tobytes()).hexdigest() == there


def test_seed_and_number_change_the_scene_and_the_caller_cannot():
    assert not np.array_equal(SMALL.label(0), Shapes(seed=1, size=64, trn_per_class=2, val_per_class=2).label(0))
    assert not np.array_equal(SMALL.label(0), SMALL.label(32))
    label = SMALL.label(0)
    label[:] = 9
    image = SMALL.image(0)
    image.paste((0, 0, 0), (0, 0, 64, 64))
    assert (SMALL.label(0) != 9).any()
    assert np.asarray(SMALL.image(0)).any()


def test_every_image_shows_the_class_it_is_listed_for():
    listed = {
        entry for fold in range(FOLDS) for role in ("trn", "test") for entry in SMALL.index.split(fold, role).entries
    }
    assert len(listed) == len(SMALL.index.images)
    others = 0
    for number, class_id in listed:
        image, label = SMALL.image(number), SMALL.label(number)
        assert (image.mode, image.size, label.shape, label.dtype) == ("RGB", (64, 64), (64, 64), np.uint8)
        share = (label == class_id + 1).mean()
        assert 0.015 < share < 0.5, (SMALL.index.images[number], share)
        assert label.max() <= len(CLASSES)
        others += len(set(np.unique(label)) - {0, class_id + 1}) > 0
    assert others > 0.9 * len(listed)  # nearly every scene has a distractor


def test_splits_follow_the_rule():
    index = Shapes().index
    assert index.folds == (0, 1, 2, 3)
    assert len(index.classes) == 32 == len(set(index.classes.values()))
    for fold in index.folds:
        novel, base = ({c for c in range(32) if (c % FOLDS == fold) == held_out} for held_out in (True, False))
        trn, val, test = (index.split(fold, role) for role in ("trn", "val", "test"))
        assert (set(trn.class_ids), set(val.class_ids), set(test.class_ids)) == (base, base, novel)
        for split, count in ((trn, 20), (val, 12), (test, 12)):
            assert {len(images) for images in split.by_class.values()} == {count}
        sides = [{image for image, _ in split.entries} for split in (trn, val, test)]
        assert not sides[0] & (sides[1] | sides[2])
        assert not sides[1] & sides[2]


def test_a_fold_holds_out_every_texture_and_silhouettes_of_its_own():
    for fold in range(FOLDS):
        novel = [kind for c, kind in enumerate(CLASSES) if c % FOLDS == fold]
        base = [kind for c, kind in enumerate(CLASSES) if c % FOLDS != fold]
        assert {kind.texture for kind in novel} == set(TEXTURES)
        assert not {kind.silhouette for kind in novel} & {kind.silhouette for kind in base}
    assert {kind.silhouette for kind in CLASSES} == set(SILHOUETTES)


def test_it_opens_by_name_and_names_what_is_wrong():
    dataset = open_dataset("shapes", None, size=48, seed=2)
    assert dataset.image(0).size == (48, 48)
    with pytest.raises(DataError, match="0 to 1023, not 1024"):
        dataset.image(1024)
    with pytest.raises(ConfigError, match="size 16"):
        Shapes(size=16)
    with pytest.raises(ConfigError, match="1 validation"):
        Shapes(val_per_class=1)


def test_other_pictures_are_another_data_set():
    """Same lists, other seed or size: without its own digest a store of one would be finished with the other."""
    digests = {Shapes(seed=seed, size=size).index.digest for seed in (0, 1) for size in (160, 64)}
    assert len(digests) == 4
