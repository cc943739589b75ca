"""The episode stream's promises, and the published code's own episodes (golden f, tests/golden/README.md)."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsnet.errors import ConfigError
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.episodes.manifest import of_episodes
from pipeline.episodes.published import reference_episodes
from pipeline.episodes.stream import Episode, EpisodeStream, novel_images

Entry = tuple[str, int]


def make_index(
    name: str, splits: dict[int, dict[str, list[Entry]]], query_order: str = "list", **fields
) -> DatasetIndex:
    """An index whose images are those of the lists of (image id, class id)."""
    entries = [entry for roles in splits.values() for listed in roles.values() for entry in listed]
    images = tuple(sorted({image for image, _ in entries}))
    number = {image: i for i, image in enumerate(images)}
    return DatasetIndex(
        name=name,
        classes={c: f"class{c:02d}" for c in sorted({c for _, c in entries})},
        images=images,
        splits={
            fold: {role: Split(tuple((number[image], c) for image, c in listed)) for role, listed in roles.items()}
            for fold, roles in splits.items()
        },
        query_order=query_order,
        **{"has_ignore": name == "pascal", **fields},
    )


def small_index(query_order: str = "list", sizes: tuple[int, ...] = (7, 8, 9, 7)) -> DatasetIndex:
    """Two folds; classes 0, 1 are novel in fold 0 and 2, 3 in fold 1."""

    def listed(side: str, classes: tuple[int, ...]) -> list[Entry]:
        return [(f"{side}_{c}_{i}", c) for i in range(max(sizes)) for c in classes if i < sizes[c]]

    folds = ((0, 1), (2, 3))
    return make_index(
        "own",
        {
            fold: {
                "trn": listed("trn", folds[1 - fold]),
                "val": listed("val", folds[1 - fold]),
                "test": listed("val", folds[fold]),
            }
            for fold in (0, 1)
        },
        query_order,
    )


ORDERS = st.sampled_from(["list", "class"])
ROLES = st.sampled_from(["trn", "val", "test"])


@settings(deadline=None, max_examples=40)
@given(ORDERS, ROLES, st.integers(0, 1), st.integers(), st.lists(st.integers(0, 10**9), max_size=6), st.booleans())
def test_an_episode_does_not_depend_on_what_was_read_before(order, role, fold, seed, numbers, repeat):
    index = small_index(order)

    def fresh() -> EpisodeStream:
        return EpisodeStream(index, fold, role, 3, seed, repeat_supports=repeat)

    used = fresh()
    forward = [used[i] for i in numbers]
    assert [used[i] for i in reversed(numbers)] == forward[::-1]
    assert [fresh()[i] for i in numbers] == forward


@settings(deadline=None, max_examples=60)
@given(ORDERS, ROLES, st.integers(0, 1), st.integers(0, 99), st.integers(0, 500), st.booleans(), st.integers(1, 6))
def test_what_an_episode_holds(order, role, fold, seed, number, repeat, shots):
    index = small_index(order)
    episode = EpisodeStream(index, fold, role, shots, seed, repeat_supports=repeat)[number]
    pool = index.split(fold, role).by_class[episode.class_id]
    assert episode.query in pool
    assert len(episode.supports) == shots
    assert set(episode.supports) <= set(pool) - {episode.query}
    if not repeat:
        assert len(set(episode.supports)) == shots
    one = EpisodeStream(index, fold, role, 1, seed, repeat_supports=repeat)[number]
    assert (one.query, one.class_id, one.supports[0]) == (episode.query, episode.class_id, episode.supports[0])


@settings(deadline=None, max_examples=25)
@given(ROLES, st.integers(0, 1), st.integers(0, 99), st.integers(0, 5))
def test_every_cycle_uses_every_entry_once(role, fold, seed, cycle):
    index = small_index()
    stream = EpisodeStream(index, fold, role, 1, seed)
    first = cycle * stream.epoch_length
    episodes = [stream[i] for i in range(first, first + stream.epoch_length)]
    assert sorted((e.query, e.class_id) for e in episodes) == sorted(index.split(fold, role).entries)
    again = [stream[i].query for i in range(first + stream.epoch_length, first + 2 * stream.epoch_length)]
    assert again != [e.query for e in episodes]


def test_draws_are_uniform():
    """Chi-square of classes, queries and supports of the "class" order; 99.9 % points for 1, 6 and 6 degrees."""
    index = small_index("class", sizes=(7, 7, 7, 7))
    stream = EpisodeStream(index, 0, "trn", 1, 0)
    episodes = [stream[i] for i in range(4200)]
    of_class = [e for e in episodes if e.class_id == 2]
    for values, kinds, limit in (
        ([e.class_id for e in episodes], 2, 10.83),
        ([e.query for e in of_class], 7, 22.46),
        ([e.supports[0] for e in of_class], 7, 22.46),
    ):
        counts = Counter(values)
        assert len(counts) == kinds
        assert chi_square(counts) < limit


def chi_square(counts: Counter) -> float:
    expected = counts.total() / len(counts)
    return sum((n - expected) ** 2 / expected for n in counts.values())


def test_supports_without_repetition_are_uniform_and_exhaust_the_class():
    index = small_index(sizes=(4, 4, 4, 4))
    stream = EpisodeStream(index, 0, "test", 3, 0, repeat_supports=False)
    orders = Counter(stream[i].supports for i in range(4800) if stream[i].query == stream.entries[0][0])
    assert len(orders) == 6  # 3! orders of the other three images
    assert chi_square(orders) < 20.52  # 99.9 % point, 5 degrees


def test_seed_role_fold_and_data_set_give_other_sequences():
    index, other = small_index(), small_index(sizes=(7, 8, 9, 8))

    def order(*args, index=index):
        """Positions in the list: comparable between splits."""
        stream = EpisodeStream(index, *args)
        return tuple(stream.entries.index((stream[i].query, stream[i].class_id)) for i in range(12))

    variants = [order(0, "trn", 1, 0), order(0, "trn", 1, 1), order(0, "val", 1, 0), order(1, "trn", 1, 0)]
    variants.append(order(0, "trn", 1, 0, index=other))
    assert len(set(variants)) == len(variants)
    assert order(0, "trn", 1, 0) == order(0, "trn", 5, 0)


def test_validation_and_test_share_no_class_and_no_query():
    index = small_index()
    seen = {
        role: {stream[i] for i in range(300)}
        for role in ("val", "test")
        for stream in [EpisodeStream(index, 0, role, 1, 0)]
    }
    assert not {e.class_id for e in seen["val"]} & {e.class_id for e in seen["test"]}
    assert not {e.query for e in seen["val"]} & {e.query for e in seen["test"]}


def test_the_stream_is_the_same_everywhere():
    """Fixed values: a change here makes every recorded result unrepeatable."""
    index = make_index("own", {0: {"test": [(f"{c}_{i}", c) for c in (0, 1) for i in range(6)]}})
    stream = EpisodeStream(index, 0, "test", 2, 7)
    stream._key = ("sha256:0", 0, "test", 7)  # instead of the digest, which has tests of its own
    numbers = (0, 1, 2, 11, 12, 10**9)
    assert [astuple(stream[i])[:3] for i in numbers] == [
        (2, (0, 5), 0),
        (6, (9, 8), 1),
        (1, (5, 2), 0),
        (4, (5, 3), 0),
        (5, (1, 0), 0),
        (8, (10, 6), 1),
    ]
    stream._by_list = False
    assert [astuple(stream[i])[:3] for i in numbers] == [
        (0, (1, 5), 0),
        (11, (8, 7), 1),
        (0, (5, 2), 0),
        (6, (11, 10), 1),
        (7, (8, 6), 1),
        (7, (10, 6), 1),
    ]


def test_excluded_images_are_never_drawn():
    index = small_index()
    left_out = set(index.split(0, "trn").by_class[2][:4]) | {index.split(0, "trn").by_class[3][0]}
    stream = EpisodeStream(index, 0, "trn", 2, 0, exclude=left_out)
    assert stream.epoch_length == len(index.split(0, "trn").entries) - 5
    drawn = {image for i in range(200) for image in (stream[i].query, *stream[i].supports)}
    assert not drawn & left_out
    assert drawn == {image for image, _ in stream.entries}


def test_novel_images_can_be_dropped():
    index = small_index()
    with_novel = {index.split(0, "trn").by_class[2][1], index.split(0, "trn").by_class[3][2]}

    def present(image: int) -> tuple[int, ...]:
        return (0, 2) if image in with_novel else (2, 3)

    assert novel_images(index, 0, "trn", present) == with_novel
    stream = EpisodeStream(index, 0, "trn", 1, 0, drop_novel=present)
    assert {image for image, _ in index.split(0, "trn").entries} - {i for i, _ in stream.entries} == with_novel
    assert EpisodeStream(index, 0, "trn", 1, 0).epoch_length == stream.epoch_length + 2


@pytest.mark.parametrize("order", ["list", "class"])
def test_a_class_too_small_for_the_shots(order):
    index = small_index(order)
    distinct = partial(EpisodeStream, index, 0, "test", repeat_supports=False)
    distinct(shots=6, seed=0)
    EpisodeStream(index, 0, "test", 7, 0)[0]  # a support comes twice
    with pytest.raises(ConfigError, match=r"7-shot episode needs 8 images.*class 0 'class00' has 7 of 7 listed"):
        distinct(shots=7, seed=0)
    with pytest.raises(ConfigError, match=r"class 1 'class01' has 6 of 8 listed"):
        distinct(shots=6, seed=0, exclude=index.split(0, "test").by_class[1][:2])
    with pytest.raises(ConfigError, match="at least 1 support"):
        EpisodeStream(index, 0, "test", 0, 0)


@pytest.mark.parametrize("order", ["list", "class"])
def test_a_class_with_one_image_is_an_error_not_an_endless_loop(order):
    index = small_index(order, sizes=(7, 1, 9, 7))
    for make in (lambda: EpisodeStream(index, 0, "test", 1, 0), lambda: reference_episodes(index, 0, 1)):
        with pytest.raises(ConfigError, match=r"1-shot episode needs 2 images.*'class01' has 1 of 1"):
            make()


def test_an_empty_split_and_a_wrong_fold():
    index = small_index()
    with pytest.raises(ConfigError, match="no images to draw episodes from"):
        EpisodeStream(index, 0, "test", 1, 0, exclude=range(len(index.images)))
    for fold, role in ((7, "test"), (0, "train")):
        with pytest.raises(ConfigError):
            EpisodeStream(index, fold, role, 1, 0)
    with pytest.raises(IndexError):
        EpisodeStream(index, 0, "test", 1, 0)[-1]


@settings(deadline=None, max_examples=40)
@given(ORDERS, st.integers(0, 99), st.integers(1, 60), st.integers(1, 6), st.booleans())
def test_balanced_classes(order, seed, turns, shots, repeat):
    """Every class equally often, every image of a class once before one comes again, in any order of reading."""
    index = small_index(order)

    def fresh(shots: int = shots) -> EpisodeStream:
        return EpisodeStream(index, 0, "test", shots, seed, repeat_supports=repeat, balance="class")

    stream = fresh()
    episodes = [stream[i] for i in range(2 * turns)]
    assert [stream[i] for i in reversed(range(2 * turns))] == episodes[::-1]
    assert fresh()[2 * turns - 1] == episodes[-1]
    assert Counter(e.class_id for e in episodes) == {0: turns, 1: turns}
    assert [replace(e, supports=e.supports[:1]) for e in episodes] == [fresh(1)[i] for i in range(2 * turns)]
    for class_id, images in index.split(0, "test").by_class.items():
        queries = [e.query for e in episodes if e.class_id == class_id]
        for start in range(0, len(queries), len(images)):
            assert len(set(queries[start : start + len(images)])) == len(queries[start : start + len(images)])
        assert all(set(e.supports) <= set(images) - {e.query} for e in episodes if e.class_id == class_id)


def test_balanced_classes_leave_no_class_out():
    index = small_index()
    gone = index.split(0, "test").by_class[1]
    assert EpisodeStream(index, 0, "test", 1, 0, exclude=gone).class_ids == (0,)
    with pytest.raises(ConfigError, match=r"class 1 'class01' has 0 of 8 listed"):
        EpisodeStream(index, 0, "test", 1, 0, exclude=gone, balance="class")
    with pytest.raises(ConfigError, match="balance must be 'listed' or 'class', got 'even'"):
        EpisodeStream(index, 0, "test", 1, 0, balance="even")


# --- the published code's episodes -----------------------------------------------------------------------------


def as_golden(index: DatasetIndex, episodes: list[Episode]) -> list[list[object]]:
    return [[index.images[e.query], [index.images[s] for s in e.supports], e.class_id] for e in episodes]


def pascal_list(lines: list[str]) -> list[Entry]:
    return [(line.split("__")[0], int(line.split("__")[1]) - 1) for line in lines]


@pytest.fixture(scope="module")
def synthetic(golden: Path) -> dict:
    return json.loads((golden / "f_episodes_synthetic.json").read_text())


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("fold", [0, 2])
def test_published_pascal_episodes(synthetic, fold, shots):
    index = make_index("pascal", {fold: {"test": pascal_list(synthetic["pascal_lists"][f"val/fold{fold}"])}})
    wanted = synthetic[f"pascal_fold{fold}_shot{shots}"]
    assert as_golden(index, reference_episodes(index, fold, shots, n=20)) == wanted


def test_published_pascal_training_episodes(synthetic):
    lists = synthetic["pascal_lists"]
    index = make_index("pascal", {1: {"trn": pascal_list([x for g in (0, 2, 3) for x in lists[f"trn/fold{g}"]])}})
    wanted = synthetic["pascal_fold1_trn_shot1"]
    assert as_golden(index, reference_episodes(index, 1, 1, n=20, role="trn")) == wanted


@pytest.mark.parametrize("shots", [1, 5])
def test_published_coco_episodes(synthetic, shots):
    listed = [(image, int(c)) for c, images in synthetic["coco_val_fold1"].items() for image in images]
    index = make_index("coco", {1: {"test": listed}}, query_order="class")
    assert as_golden(index, reference_episodes(index, 1, shots, n=20)) == synthetic[f"coco_fold1_shot{shots}"]


@pytest.mark.parametrize("shots", [1, 5])
def test_published_fss_episodes(synthetic, shots):
    categories = sorted(synthetic["fss_categories_file"])
    listed = [(image, 760 + categories.index(image.split("/")[0])) for image in synthetic["fss_order"]]
    index = make_index("fss", {0: {"test": listed}})
    wanted = synthetic[f"fss_test_shot{shots}"]
    assert as_golden(index, reference_episodes(index, 0, shots, n=20)) == wanted


@pytest.mark.parametrize(
    "case", [f"{d}_shot{k}" for d in ("pascal_fold0", "pascal_fold1", "coco_fold0") for k in (1, 5, 10)]
)
def test_published_episodes_of_the_real_lists(golden, shared, case):
    wanted = json.loads((golden / "f_episodes_real_fingerprints.json").read_text())[case]
    name, fold, shots = case.split("_")[0], int(case.split("_")[1][4:]), int(case.split("shot")[1])
    data = shared / "data"
    if name == "pascal":
        listed = pascal_list((data / f"pascal-splits/val/fold{fold}.txt").read_text().split())
    else:
        content = pickle.loads((data / f"coco-splits/val/fold{fold}.pkl").read_bytes())
        listed = [(image, c) for c, images in content.items() for image in images]
    index = make_index(name, {fold: {"test": listed}}, query_order="list" if name == "pascal" else "class")
    episodes = reference_episodes(index, fold, shots)
    assert as_golden(index, episodes[:3]) == wanted["first3"]
    assert as_golden(index, episodes[-1:]) == [wanted["last"]]
    assert of_episodes(index, fold, "test", episodes, {}).fingerprint == f"sha256:{wanted['sha256']}"
    assert sum(len(set(e.supports)) < shots for e in episodes) == wanted["episodes_with_duplicate_support"]
