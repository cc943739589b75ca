"""Photos of one group are never query and support of one episode; without groups every episode is what it was."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from hsnet.errors import ConfigError, DataError
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.episodes.published import reference_episodes
from pipeline.episodes.stream import EpisodeStream
from pipeline.episodes.ways import Ways
from pipeline.store.export import sample_index
from pipeline.supports import choose_supports

GROUPS = (0, 0, 0, 1, 1, 2, 2, 2, 3, 4)


@pytest.fixture
def index():
    """Ten photos of five things; classes 0 and 1 are listed for all of them, class 2 for some."""
    entries = tuple((image, c) for image in range(10) for c in ((0, 1, 2) if image % 2 else (0, 1)))
    return DatasetIndex(
        "folder", {0: "cat", 1: "dog", 2: "cow"}, tuple(f"{i}.jpg" for i in range(10)), {0: {"test": Split(entries)}},
        groups=GROUPS,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"balance": "class"}, {"repeat_supports": False}])
@pytest.mark.parametrize("order", ["list", "class"])
def test_no_support_is_of_the_group_of_its_query(index, order, options):
    index = replace(index, query_order=order)
    stream = EpisodeStream(index, 0, "test", 3, 0, **options)
    episodes = [stream[number] for number in range(300)]
    assert all(index.groups[s] != index.groups[e.query] for e in episodes for s in e.supports)
    drawn = {(e.query, s) for e in episodes for s in e.supports}
    assert drawn == {(q, s) for q in range(10) for s in range(10) if GROUPS[q] != GROUPS[s]}, "all others are"
    if "repeat_supports" in options:
        assert all(len(set(e.supports)) == 3 for e in episodes)
    ways = Ways(index, 0, "test", 2, 0, shots=3, absent=0.3)
    some = [ways(number, episode) for number, episode in enumerate(episodes)]
    assert all(GROUPS[s] != GROUPS[e.query] for e in some for _, supports in e.classes for s in supports)


def test_photos_alone_are_as_if_there_were_no_groups(index):
    plain, alone = replace(index, groups=()), replace(index, groups=tuple(range(10)))
    assert plain.mates(3) == alone.mates(3) == (3,)
    assert "groups" not in plain.to_json()
    assert alone.digest != plain.digest
    # The draws have the digest in their key, so episodes are compared by what may be drawn.
    assert EpisodeStream(plain, 0, "test", 2, 0).class_ids == EpisodeStream(alone, 0, "test", 2, 0).class_ids


def test_too_few_photos_of_other_groups(index):
    one = replace(index, groups=(0,) * 9 + (1,))
    EpisodeStream(one, 0, "test", 5, 0)[0]
    with pytest.raises(ConfigError, match="9 of the 10 photos of class 0 'cat' are of one group"):
        EpisodeStream(one, 0, "test", 2, 0, repeat_supports=False)
    with pytest.raises(ConfigError, match=r"10 of the 10 .* \(that of 0\.jpg\), and a query of it needs 1 support of"):
        EpisodeStream(replace(index, groups=(0,) * 10), 0, "test", 1, 0)
    with pytest.raises(ConfigError, match="know no groups of photos"):
        reference_episodes(index, 0, 1)


def test_photos_of_a_class_are_counted_once_over_all_lists(index):
    half = Split(tuple(entry for entry in index.split(0, "test").entries if entry[0] < 5))
    twice = replace(
        index, splits={**index.splits, 1: {"trn": half, "val": half}}, classes={**index.classes, 9: "ghost"}
    )
    assert twice.photos_per_class() == {0: 10, 1: 10, 2: 5, 9: 0}
    assert DatasetIndex.from_columns(twice.to_columns()).photos_per_class() == twice.photos_per_class()
    assert twice.held_out() == {0: (0, 1, 2), 1: ()}


def test_groups_survive_what_an_index_goes_through(index):
    for again in (DatasetIndex.from_json(index.to_json()), DatasetIndex.from_columns(index.to_columns())):
        assert again == index
        assert again.digest == again.content_digest() == index.digest
    assert sample_index(index, [2, 3, 4, 8]).groups == (0, 1, 1, 2)
    with pytest.raises(DataError, match="9 groups for 10 images"):
        replace(index, groups=GROUPS[:9])
    with pytest.raises(DataError, match="must be a number from 0"):
        replace(index, groups=(*GROUPS[:9], 99))


def test_supports_are_tried_on_queries_of_other_groups_only(index):
    runner = SimpleNamespace(
        workers=1, map=lambda make, work: ((pairs, [[1, 2]] * len(pairs.supports)) for pairs in work)
    )
    pairs = choose_supports(lambda: None, lambda: None, index, fold=0, runner=runner).pairs
    groups = dict(zip(index.images, GROUPS, strict=True))
    of_cat = {(pair["query"], pair["support"]) for pair in pairs if pair["class_id"] == 0}
    assert of_cat == {(q, s) for q in index.images for s in index.images if groups[q] != groups[s]}
