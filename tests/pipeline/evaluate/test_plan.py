"""What an evaluation will do: the head's own fold, the episodes of a manifest, the masks that are at hand."""

from dataclasses import replace

import pytest
import torch

from hsnet.errors import ConfigError
from hsnet.model import HSNet
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.drawing import make
from pipeline.episodes.protocols import FUSIONS, resolve
from pipeline.evaluate.plan import plan_evaluation
from pipeline.heads.checkpoint import CheckpointInfo, save_checkpoint


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
    with pytest.raises(ConfigError, match=r"No head 'cosin': .*did you mean 'cosine'"):
        plan(tiny_source, head="cosin")


def test_a_head_that_knows_no_class_is_tested_on_all_of_them(tiny_source):
    tested = plan(tiny_source, head="contrast", transfer=True)
    classes = tested.index.split(tested.fold, "test").class_ids
    assert [tested.index.classes[c] for c in classes] == list(tiny_source.index.classes.values())


def test_a_fitted_head_is_tested_on_the_classes_it_was_not_fitted_on(tiny_source, tmp_path, caplog):
    """On its own store, or on the classes of a checkpoint that it is compared with: then on the same episodes."""
    caplog.set_level("INFO", logger="pipeline")
    index = tiny_source.index
    alone = plan(tiny_source, head="location", transfer=True, fold=1)
    fitted = [index.classes[c] for c in index.split(1, "trn").class_ids]
    assert alone.method.facts["fitted_on"] == fitted
    assert "training list of fold 1 of the same store" in caplog.text
    tested = {alone.index.classes[c] for c in alone.index.split(alone.fold, "test").class_ids}
    assert tested == set(index.classes.values()) - set(fitted)

    head = trained_head(tiny_source, tmp_path, classes=("zebra", *list(index.classes.values())[:6]))
    of_head = plan(tiny_source, head=None, checkpoint=head, transfer=True)
    beside = plan(tiny_source, head="location", transfer=True, trained_on=head)
    nothing = plan(tiny_source, head="contrast", transfer=True, trained_on=head)
    assert of_head.index.digest == beside.index.digest == nothing.index.digest
    assert beside.method.facts["fitted_on"] == list(index.classes.values())[:6]
    assert plan(tiny_source, head="contrast", transfer=True).index.digest != nothing.index.digest

    strange = trained_head(tiny_source, tmp_path, classes=("zebra",))
    with pytest.raises(ConfigError, match="has photos of none of the 1 of"):
        plan(tiny_source, head="location", transfer=True, trained_on=strange)
    silent = trained_head(tiny_source, tmp_path, classes=None)
    with pytest.raises(ConfigError, match="does not say which classes it was trained on"):
        plan(tiny_source, head="contrast", transfer=True, trained_on=silent)


def test_classes_that_the_head_knows_by_name_are_told_also_on_other_data(tiny_source, tmp_path, caplog):
    index = tiny_source.index
    held_out = [index.classes[c] for c in index.split(0, "test").class_ids]
    head = trained_head(tiny_source, tmp_path, classes=(held_out[1].upper().replace(" ", "_"), "zebra"))
    known = plan(tiny_source, head=None, checkpoint=head)
    assert known.trained_on == (held_out[1],)
    assert f"trained on 1 of the 8 classes tested here ({held_out[1]})" in caplog.text
    assert "--transfer tests the classes that are new to it" in caplog.text
    caplog.clear()
    assert plan(tiny_source, head=None, checkpoint=head, transfer=True).trained_on == ()
    manifest = make(index, 1, 1, episodes=2)
    assert plan(tiny_source, head=None, checkpoint=head, manifest=manifest).trained_on == ()
    assert "trained on 1 of" not in caplog.text


def trained_head(source, folder, classes):
    """A checkpoint of a head that nobody trained, which says what it was trained on."""
    torch.manual_seed(0)
    learner = {**source.recipe.learner_arguments(), "channels": [4, 8, 16]}
    info = CheckpointInfo(recipe=source.recipe, learner=learner, step=1, origin="a test", classes=classes)
    path = folder / f"{len(classes or ())}.safetensors"
    save_checkpoint(path, HSNet(**learner).state_dict(), info)
    return path
