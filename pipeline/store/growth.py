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

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hsnet.errors import StoreError, StoreMismatch
from pipeline.datasets.index import DatasetIndex
from pipeline.features.recipe import Recipe, difference_lines
from pipeline.store.arrays import array_layouts
from pipeline.store.attributes import read_facts, read_index, read_placement, write_facts, write_state
from pipeline.store.markers import remove_shard, sweep_partials
from pipeline.store.mirror import named, publish, remove_remote_arrays, remove_remote_shard
from pipeline.store.place import sole_writer
from pipeline.store.states import Placement, State, StoreFacts, row_ranges


@dataclass(frozen=True)
class Grown:
    """How a data set differs from the one that a store was finished for."""

    images_before: int
    images_new: int
    """0 if only its lists or classes changed."""
    classes_new: tuple[str, ...]


def growth(root: Path, recipe: Recipe, index: DatasetIndex) -> Grown | None:
    """What a store lacks of a data set; None if it is its own, or the recipe is another anyway. Writes nothing.

    Raises:
        StoreMismatch: the data set has not only grown. Names every difference with both values.
        StoreError: what is at `root` cannot be read.
    """
    facts = read_facts(root)
    state = facts.states[facts.current]
    if state.digest == index.digest or facts.recipe != recipe:
        return None
    old = read_index(root, state)
    differences = _obstacles(old, index)
    if differences:
        raise StoreMismatch(
            f"{root} was extracted from another data set, or this one has not only grown since:\n"
            f"{difference_lines(differences)}\n"
            f"A store takes in more images, more classes and other lists; the images and classes it has must stay as "
            f"they are. Put back what is gone, or extract into a new store (`hsnet extract ... --store PATH`). "
            f"Nothing was changed.",
            differences,
        )
    names = [name for class_id, name in sorted(index.classes.items()) if class_id not in old.classes]
    return Grown(len(old.images), len(index.images) - len(old.images), tuple(names))


def grow(root: Path, recipe: Recipe, index: DatasetIndex) -> None:
    """Make room for what `growth` found; readers of the store see nothing of it yet.

    Raises:
        StoreMismatch, StoreError: as `growth`; another process is writing the store, or the disk refused.
    """
    with named(root), sole_writer(root):
        if growth(root, recipe, index) is None:
            return
        try:
            _grow(root, read_facts(root), index)
        except OSError as error:
            raise StoreError(
                f"{root} cannot be made ready for more images: {error}. Nothing of what it holds was changed. Mend "
                f"the cause and run the same command again."
            ) from error


def make_current(root: Path, digest: str) -> None:
    """Give readers the state of a data set from now on, all of whose shards are there. By the store's writer only.

    Raises:
        StoreError: the disk refused.
    """
    facts = read_facts(root)
    place = facts.find(digest)
    if place is None or place == facts.current:
        return
    try:
        write_facts(root, replace(facts, current=place))
        publish(root)
    except OSError as error:
        raise StoreError(
            f"{root}: all new images are there, but the store cannot be told so: {error}. Run the same command again."
        ) from error


def _obstacles(old: DatasetIndex, new: DatasetIndex) -> dict[str, tuple[object, object]]:
    """What keeps a store of one data set from being one of the other."""
    found: dict[str, tuple[object, object]] = {}
    gone = set(old.images) - set(new.images)
    if old.name != new.name:
        found["data set"] = (old.name, new.name)
    if gone:
        first = next(image for image in old.images if image in gone)
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        found["image in the data set"] = (f"{first}{more}", "not there")
    for class_id, name in sorted(old.classes.items()):
        if new.classes.get(class_id) != name:
            found[f"class {class_id}"] = (name, new.classes.get(class_id, "not there"))
    if old.label_dtype != new.label_dtype:
        found["label type"] = (old.label_dtype.name, new.label_dtype.name)
        found["ignore label"] = (old.ignore_label, new.ignore_label)
    if old.has_ignore != new.has_ignore:
        found["ignore label in use"] = (old.has_ignore, new.has_ignore)
    return found


def _grow(root: Path, facts: StoreFacts, index: DatasetIndex) -> None:
    layouts = array_layouts(facts.recipe, index.label_dtype, facts.shard_images)
    names = tuple(layout.name for layout in layouts)
    sweep_partials(root, names)
    known = facts.find(index.digest)
    if known is None:
        kept, old = _base(root, facts, index)
        number = 1 + max(state.number for state in facts.states)
        new = State(index.digest, len(index.images), number)
        states = (*facts.states[: kept + 1], new)
        after = replace(facts, states=states)
        before = read_placement(root, facts, kept)
        write_state(root, new, index, _rows(old, before, index, row_ranges(after.counts, facts.shard_images)[-1]))
        publish(root)
        dropped = facts.states[kept + 1 :]
        if dropped:
            # Before the attributes: they must always list a state as long as the arrays are.
            for layout in layouts:
                layout.resize(root, facts.rows(kept))
            for shard in range(_shards(after), _shards(facts)):
                remove_remote_shard(root, shard, names)
                remove_shard(root, shard, names)
        publish(root)
        write_facts(root, after)
        publish(root)
        facts = after
        for state in dropped:
            remove_remote_arrays(root, [state.index, state.row])
            shutil.rmtree(root / state.index, ignore_errors=True)
            shutil.rmtree(root / state.row, ignore_errors=True)
    for layout in layouts:
        layout.resize(root, facts.rows(len(facts.states) - 1))
    publish(root)


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
