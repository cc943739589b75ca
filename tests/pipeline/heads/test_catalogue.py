"""What can be evaluated, by name: facts that tell it apart and, from them, the method again."""

import pytest
import torch

from hsnet.errors import ConfigError, DataError
from hsnet.model import HSNet
from pipeline.episodes.stream import EpisodeStream
from pipeline.heads.catalogue import Method, made, made_again, trained
from pipeline.heads.checkpoint import CheckpointInfo, save_checkpoint
from pipeline.loading.batch import load_batch


@pytest.fixture
def head(tmp_path, tiny_config, tiny_source):
    """A checkpoint of fold 1, with its method."""
    config = tiny_config(fold=1)
    info = CheckpointInfo(
        recipe=config.recipe, learner=config.learner_arguments, step=1, origin="a test", config=config, classes=("cat",)
    )
    save_checkpoint(tmp_path / "head.safetensors", HSNet(**config.learner_arguments).state_dict(), info)
    return trained(tmp_path / "head.safetensors", tiny_source, arithmetic="bfloat16")


def answers(method, source):
    stream = EpisodeStream(source.index, 0, "test", 1, 0)
    return method.make().answer(load_batch(source, [stream[0], stream[1]])).logits


def test_a_method_is_made_again_from_its_facts(head, tiny_source):
    again = made_again(head.facts, tiny_source, checkpoint=head.path)
    assert (again.facts, again.path) == (head.facts, head.path)
    assert again.make().arithmetic == "bfloat16"
    renamed = made_again({**head.facts, "name": "trained"}, tiny_source, checkpoint=head.path)
    assert renamed.facts == head.facts, "as rows called it before there were two trained heads"
    for name in ("cosine", "untrained", "contrast", "tune"):
        method = made(name, tiny_source, seed=3)
        assert (method.facts["name"], method.checkpoint, method.path) == (name, "", None)
        again = made_again(method.facts, tiny_source)
        assert again.facts == method.facts
        assert torch.equal(answers(again, tiny_source), answers(method, tiny_source))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "location"}, "'location' cannot be made again"),
        ({"name": "cosine"}, "do not say how their 'cosine' method was made"),
        ({"name": "untrained", "seed": "x"}, "do not say how their 'untrained' method was made"),
        ({"name": "pseudo"}, "'pseudo' cannot be made again"),  # a head of earlier versions
        ({"checkpoint": "sha256:other"}, "is not the checkpoint of the rows:\n  rows        sha256:other"),
    ],
)
def test_what_the_facts_do_not_give(head, tiny_source, change, message):
    with pytest.raises(DataError, match=message):
        made_again({**head.facts, **change}, tiny_source, checkpoint=head.path)
    with pytest.raises(DataError, match="do not say where their checkpoint is"):
        made_again(head.facts, tiny_source)


def test_a_head_knows_what_it_has_seen(head, tiny_source):
    index = tiny_source.index
    assert (head.held_out, head.names_seen()) == (1, ("cat",))
    assert head.classes_seen(index, 1) == ()
    assert head.classes_seen(index, 0) == tuple(sorted(index.split(0, "test").class_ids))
    imported = Method(head.make, {"name": "trained", "trained_on": None, "classes": None})
    assert (imported.held_out, imported.classes_seen(index, 0)) == (None, ())
    assert imported.names_seen(index, 2) == tuple(index.classes[c] for c in index.split(2, "trn").class_ids)
    with pytest.raises(ConfigError, match="--trained-on"):
        imported.names_seen()
