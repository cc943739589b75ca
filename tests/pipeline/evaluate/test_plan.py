"""What an evaluation will do: the head's own fold, the episodes of a manifest, the masks that are at hand."""

from dataclasses import replace

import pytest

from hsnet.errors import ConfigError
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.drawing import make
from pipeline.episodes.protocols import FUSIONS, resolve
from pipeline.evaluate.plan import plan_evaluation


def plan(source, **options):
    return plan_evaluation(lambda: source, resolve(), **{"head": "untrained", **options})


def test_a_manifest_decides_fold_role_seed_and_shots(tiny_source):
    manifest = make(tiny_source.index, 2, 3, episodes=5, seed=4, role="val", balance="class")
    made = plan(tiny_source, manifest=manifest, shots=(2, 1), fold=0)
    protocol = made.protocol
    assert (made.fold, protocol.role, protocol.seeds, protocol.shots) == (2, "val", (4,), (1, 2))
    assert (protocol.episodes, protocol.balance) == (5, "class")
    assert [planned.manifest.digest for planned in made.manifests] == [manifest.first(2).digest]
    assert plan(tiny_source, manifest=manifest).protocol.shots == (3,)


def test_masks_are_opened_where_somebody_said_where_or_they_are_drawn(tiny_source, tmp_path):
    """The store's shapes have options of their own: those of the defaults are other photos."""
    assert plan(tiny_source).dataset is None
    options = {"size": 64, "trn_per_class": 3, "val_per_class": 4}
    assert plan(tiny_source, data_options=options).dataset.index.digest == tiny_source.index.digest
    asked = plan(tiny_source, reader="shapes").dataset
    assert asked.index.digest == Shapes().index.digest, "refused by evaluate, which names both"

    class OfNobody:
        index = replace(tiny_source.index, name="mine, 3 classes")

        def __getattr__(self, name):
            return getattr(tiny_source, name)

    assert plan(OfNobody()).dataset is None
    with pytest.raises(ConfigError, match="does not say which reader made it"):
        plan(OfNobody(), data_root=tmp_path)


def test_a_head_brings_its_own_way_to_combine_supports(tiny_source):
    assert plan(tiny_source).protocol.fusion == "vote"
    assert plan(tiny_source, head="contrast").protocol.fusion == "joint"
    asked = plan(tiny_source, head="contrast", fusion="vote", fusions=("vote",))
    assert (asked.protocol.fusion, asked.fusions) == ("vote", ("vote",))
    assert plan(tiny_source, head="contrast", fusions=FUSIONS).fusions == FUSIONS
    everything = plan(tiny_source, head="cosine", fusions=FUSIONS)
    assert "joint" not in everything.fusions, "all that it has"
    manifest = make(tiny_source.index, 0, 2, episodes=3)
    with pytest.raises(ConfigError, match="Head 'cosine' answers each support by itself: it has no fusion joint"):
        plan(tiny_source, head="cosine", fusions=("joint",), manifest=manifest)
    with pytest.raises(ConfigError, match=r"No head 'cosin'\. Did you mean cosine"):
        plan(tiny_source, head="cosin")


def test_a_head_that_knows_no_class_is_tested_on_all_of_them(tiny_source):
    tested = plan(tiny_source, head="contrast", transfer=True)
    classes = tested.index.split(tested.fold, "test").class_ids
    assert [tested.index.classes[c] for c in classes] == list(tiny_source.index.classes.values())
    with pytest.raises(ConfigError, match="'cosine' is fitted on classes of the store"):
        plan(tiny_source, head="cosine", transfer=True)
