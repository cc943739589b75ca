"""Taking more images of a data set into a store that is there, without changing a byte of what it holds of the old.

A growth is written in three steps, each of which leaves a whole store if it is the last:

1. `grow`: the new index and the rows of its images are written beside the old ones; then the attributes list the new
   state behind the current one; then the arrays are made longer. Readers still get the old state.
2. `pipeline.extract.stage` makes the shards of the new images.
3. `make_current`: the attributes name the new state as the current one.

Killed on the way, the same extraction goes on where it was. If the data set has changed again by then so that the
unfinished state cannot be gone on with (an image was taken out that could not be read), that one is given up: a shard
it had finished is kept if the next one wants the same images in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hsnet.errors import StoreError, StoreMismatch
from pipeline.datasets.index import DatasetIndex
from pipeline.features.recipe import Recipe, difference_lines
from pipeline.store.arrays import array_layouts
from pipeline.store.attributes import (
    DatasetState,
    Placement,
    StoreFacts,
    read_facts,
    read_index,
    read_placement,
    row_ranges,
    write_facts,
)
from pipeline.store.local_place import Place
from pipeline.store.markers import sweep_partials
from pipeline.store.place import place_of
from pipeline.store.skeleton import write_state


@dataclass(frozen=True)
class Grown:
    """How a data set differs from the one that a store was finished for."""

    images_before: int
    images_new: int
    """0 if only its lists or classes changed."""
    classes_new: tuple[str, ...]


def growth(place: Place, recipe: Recipe, index: DatasetIndex) -> Grown | None:
    """What a store lacks of a data set; None if it is its own, or the recipe is another anyway. Writes nothing.

    Args:
        place: of the store, synced.

    Raises:
        StoreMismatch: the data set has not only grown. Names every difference with both values.
        StoreError: what is there cannot be read.
    """
    with place.named():
        facts = read_facts(place.root)
        state = facts.states[facts.current]
        if state.digest == index.digest or facts.recipe != recipe:
            return None
        old = read_index(place.root, state)
    differences = _obstacles(old, index)
    if differences:
        raise StoreMismatch(
            f"{place.path} was extracted from another data set, or this one has not only grown since:\n"
            f"{difference_lines(differences)}\n"
            f"A store takes in more images, more classes and other lists; the images and classes it has must stay as "
            f"they are. Put back what is gone, or extract into a new store (`hsnet extract ... --store PATH`). "
            f"Nothing was changed.",
            differences,
        )
    names = [name for class_id, name in sorted(index.classes.items()) if class_id not in old.classes]
    return Grown(len(old.images), len(index.images) - len(old.images), tuple(names))


def grow(path: str | Path | Place, recipe: Recipe, index: DatasetIndex) -> None:
    """Make room for what `growth` found; readers of the store see nothing of it yet.

    Raises:
        StoreMismatch, StoreError: as `growth`; another process is writing the store, or the disk refused.
    """
    place = place_of(path)
    with place.sole_writer():
        if growth(place, recipe, index) is None:
            return
        try:
            _grow(place, read_facts(place.root), index)
        except OSError as error:
            raise StoreError(
                f"{place.path} cannot be made ready for more images: {error}. Nothing of what it holds was changed. "
                f"Mend the cause and run the same command again."
            ) from error


def make_current(place: Place, digest: str) -> None:
    """Give readers the state of a data set from now on, all of whose shards are there. By the store's writer only.

    Raises:
        StoreError: the disk refused.
    """
    facts = read_facts(place.root)
    state = facts.find(digest)
    if state is None or state == facts.current:
        return
    try:
        write_facts(place.root, replace(facts, current=state))
        place.publish()
    except OSError as error:
        raise StoreError(
            f"{place.path}: all new images are there, but the store cannot be told so: {error}. Run the same command "
            f"again."
        ) from error


def _obstacles(old: DatasetIndex, new: DatasetIndex) -> dict[str, tuple[object, object]]:
    """What keeps a store of one data set from being one of the other."""
    differences: dict[str, tuple[object, object]] = {}
    gone = set(old.images) - set(new.images)
    if old.name != new.name:
        differences["data set"] = (old.name, new.name)
    if gone:
        first = next(image for image in old.images if image in gone)
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        differences["image in the data set"] = (f"{first}{more}", "not there")
    for class_id, name in sorted(old.classes.items()):
        if new.classes.get(class_id) != name:
            differences[f"class {class_id}"] = (name, new.classes.get(class_id, "not there"))
    if old.label_dtype != new.label_dtype:
        differences["label type"] = (old.label_dtype.name, new.label_dtype.name)
        differences["ignore label"] = (old.ignore_label, new.ignore_label)
    if old.has_ignore != new.has_ignore:
        differences["ignore label in use"] = (old.has_ignore, new.has_ignore)
    return differences


def _grow(place: Place, facts: StoreFacts, index: DatasetIndex) -> None:
    root = place.root
    layouts = array_layouts(facts.recipe, index.label_dtype, facts.shard_images)
    names = tuple(layout.name for layout in layouts)
    sweep_partials(root, names)
    place.break_seal()
    if facts.find(index.digest) is None:
        kept, old = _base(root, facts, index)
        number = 1 + max(state.number for state in facts.states)
        new = DatasetState(index.digest, len(index.images), number)
        states = (*facts.states[: kept + 1], new)
        after = replace(facts, states=states)
        before = read_placement(root, facts, kept)
        write_state(root, new, index, _rows(old, before, index, row_ranges(after.counts, facts.shard_images)[-1]))
        place.publish()
        dropped = facts.states[kept + 1 :]
        if dropped:
            # Before the attributes: they must always list a state as long as the arrays are.
            for layout in layouts:
                layout.resize(root, facts.rows(kept))
            for shard in range(_shards(after), _shards(facts)):
                place.remove_shard(shard, names)
            place.publish()
        write_facts(root, after)
        place.publish()
        facts = after
        # The first state, whose images are in the order of their rows, is never dropped.
        place.remove_arrays(name for state in dropped for name in (state.index_array, state.rows_array))
    for layout in layouts:
        layout.resize(root, facts.rows(len(facts.states) - 1))
    place.publish()


def _base(root: Path, facts: StoreFacts, index: DatasetIndex) -> tuple[int, DatasetIndex]:
    """The state to add to: the last one if the data set still holds all of it, or the current one."""
    last = len(facts.states) - 1
    if last > facts.current:
        try:
            unfinished = read_index(root, facts.states[last])
            if not _obstacles(unfinished, index):
                return last, unfinished
        except StoreError:
            pass  # nobody was ever given it
    return facts.current, read_index(root, facts.states[facts.current])


def _rows(old: DatasetIndex, placement: Placement, new: DatasetIndex, added: range) -> np.ndarray:
    """(images,) int64: old images stay where they are, new ones get the rows of `added` in their order."""
    rows = {name: placement.row(image) for image, name in enumerate(old.images)}
    free = iter(added)
    return np.array([rows[name] if name in rows else next(free) for name in new.images], np.int64)


def _shards(facts: StoreFacts) -> int:
    return sum(-(-count // facts.shard_images) for count in facts.counts)
