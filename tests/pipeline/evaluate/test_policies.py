"""One pass gives every policy, fewer shots and every fusion; a protocol says which is the headline."""

import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hsnet.errors import ConfigError, DataError
from hsnet.fused import FusedHSNet
from hsnet.fusion import foreground, fuse
from hsnet.model import HSNet, resize_logits
from pipeline.datasets.unseen import unseen_classes
from pipeline.episodes.drawing import PlannedTest, make, of_protocol
from pipeline.episodes.manifest import episodes_in
from pipeline.episodes.protocols import FUSIONS, POLICIES, Policy, resolve
from pipeline.evaluate import blocks
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.evaluate.stage import Rules, _part_rows, evaluate, score
from pipeline.heads.catalogue import Method
from pipeline.heads.cosine import CosineSegmenter
from pipeline.heads.segmenters import LearnedSegmenter
from pipeline.loading.batch import load_batch, read_batch
from pipeline.loading.source import StoreSource
from pipeline.scores.rows import COUNTS, count_columns


def learner():
    torch.manual_seed(0)
    model = HSNet((4, 2, 2), (4, 8, 16)).eval()
    with torch.no_grad():
        model.decode_fine[-1].bias.zero_()
        model.decode_fine[-1].weight.mul_(10)
    return LearnedSegmenter(model)


NOT_CHOICES = ("fusions", "dataset", "manifests", "resident", "index")


def run(source, make_segmenter=learner, **options):
    """Choices of the protocol by name; what else there is goes into the plan."""
    others = {name: options.pop(name) for name in NOT_CHOICES if name in options}
    plan = EvaluationPlan(
        method=Method(make_segmenter, {"checkpoint": "sha256:c"}),
        source=source,
        fold=0,
        protocol=resolve(**{"shots": (1,), "episodes": 12, **options}),
        **others,
    )
    return evaluate(plan)


class Stretched:
    """A data set whose masks are larger than the network's size and not square, with an ignored border."""

    def __init__(self, source):
        self.source = source
        self.index = source.index

    def label(self, image):
        small = self.source.labels([image])[0].numpy()
        large = small[np.arange(90) * 64 // 90][:, np.arange(120) * 64 // 120]
        large[:3] = self.index.ignore_label
        return large.astype(np.uint8)


@pytest.fixture
def with_ignore(tiny_source):
    class WithIgnore:
        index = replace(tiny_source.index, has_ignore=True)

        def __getattr__(self, name):
            return getattr(tiny_source, name)

    return WithIgnore()


def test_all_policies_come_from_one_pass(with_ignore):
    data = Stretched(with_ignore)
    passes = []

    class Counting:
        def __init__(self):
            self.inner = learner()

        def answer(self, batch, joint=(), alone=None):
            passes.append(batch.size)
            return self.inner.answer(batch, joint)

    rows = run(with_ignore, Counting, dataset=data, shots=(1, 3), fusions=FUSIONS).rows.to_pylist()
    assert sum(passes) == 12, "every episode is predicted once"
    assert [(row["shots"], row["fusion"], row["episode"]) for row in rows] == [
        (shots, fusion, number) for shots in (1, 3) for fusion in FUSIONS for number in range(12)
    ]
    numbers = {name: number for number, name in enumerate(with_ignore.index.images)}
    for row in rows:
        area = {
            policy: row[f"union_background{policy.suffix}"] + row[f"intersection{policy.suffix}"] for policy in POLICIES
        }
        assert area[Policy("network", False)] == 64 * 64
        assert area[Policy("original", False)] == 90 * 120
        assert area[Policy("original", True)] == 87 * 120
        target = with_ignore.labels([numbers[row["query"]]])[0] == row["class_id"] + 1
        assert row["object_pixels"] == int(target.sum())


def test_an_original_size_count_by_hand(with_ignore):
    """Logits go straight from the learner's size to the photo's: no detour over the network's."""
    data = Stretched(with_ignore)
    result = run(with_ignore, dataset=data, shots=(2,), episodes=3, resolution="original")
    planned = of_protocol(resolve(shots=(2,), episodes=3), with_ignore.index, 0)[0]
    episode = episodes_in(planned.manifest, with_ignore.index)[1]
    batch = load_batch(with_ignore, [episode])
    logits = FusedHSNet(learner().model)(batch.query, batch.support, batch.support_mask)
    mask = fuse(logits[:, None], (90, 120))[0].numpy()
    label = data.label(episode.query)
    valid, truth = label != 255, label == episode.class_id + 1
    row = result.rows.to_pylist()[1]
    assert [row[name] for name in count_columns(Policy("original", True))] == [
        int((valid & ~mask & ~truth).sum()),
        int((valid & mask & truth).sum()),
        int((valid & ~(mask & truth)).sum()),
        int((valid & (mask | truth)).sum()),
    ]
    assert result.scores[0] == score(
        result.rows, 2, with_ignore.index.split(0, "test").class_ids, Policy("original", True)
    )


def test_classes_of_other_data_are_scored_at_original_size_too(with_ignore):
    """The lists are narrowed, the photos are the data set's all the same."""
    seen = with_ignore.index.split(0, "test").class_ids[0]
    index = unseen_classes(with_ignore.index, [with_ignore.index.classes[seen]]).index
    rows = run(with_ignore, dataset=Stretched(with_ignore), index=index).rows.to_pylist()
    assert len(rows) == 12
    assert seen not in {row["class_id"] for row in rows}
    assert all(row["union_original"] > 0 for row in rows)


def test_every_fusion_is_the_one_it_says(tiny_source):
    result = run(tiny_source, shots=(1, 2, 3), episodes=4, fusions=FUSIONS)
    planned = of_protocol(resolve(shots=(1, 2, 3), episodes=4), tiny_source.index, 0)[0]
    episode = episodes_in(planned.manifest, tiny_source.index)[2]
    batch = load_batch(tiny_source, [episode])
    fused = FusedHSNet(learner().model)
    contexts = fused.encode(batch.query, batch.support, batch.support_mask)
    logits = fused.decode(contexts)
    rows = {(row["shots"], row["fusion"], row["episode"]): row for row in result.rows.to_pylist()}
    for k in (2, 3):
        wanted = {name: fuse(logits[:k, None], (64, 64), name) for name in ("vote", "logits", "probabilities")}
        wanted["joint"] = foreground(resize_logits(fused.joint(contexts[:k, None]), (64, 64)))
        for fusion, mask in wanted.items():
            # Other episodes in a pass may turn a pixel whose logits tie.
            assert abs(rows[k, fusion, 2]["intersection"] - int((mask & batch.target).sum())) <= 2, (k, fusion)
            assert abs(rows[k, fusion, 2]["union"] - int((mask | batch.target).sum())) <= 2, (k, fusion)
    joint = [[rows[k, "joint", number]["union"] for number in range(4)] for k in (2, 3)]
    assert joint[0] != joint[1]
    for episode_number in range(4):
        alone = {tuple(rows[1, fusion, episode_number][name] for name in COUNTS) for fusion in FUSIONS}
        assert len(alone) == 1, "one support is its own answer however it is combined"
    three = {tuple(rows[3, fusion, number][name] for number in range(4) for name in COUNTS) for fusion in FUSIONS}
    assert len(three) > 2


def test_the_protocol_decides_the_headline(tiny_source):
    votes = run(tiny_source, shots=(3,), fusions=FUSIONS)
    means = run(tiny_source, shots=(3,), fusions=FUSIONS, fusion="probabilities")
    strict = run(tiny_source, shots=(3,), tau=0.9)
    ids = tiny_source.index.split(0, "test").class_ids
    assert votes.scores[0] == score(means.rows, 3, ids, fusion="vote")
    assert means.scores[0] == score(votes.rows, 3, ids, fusion="probabilities")
    assert strict.scores != votes.scores
    assert means.facts["protocol"]["fusion"] == "probabilities"
    assert means.facts["protocol_digest"] != votes.facts["protocol_digest"]


def test_several_seeds_are_several_sets_of_episodes(tiny_source):
    both = run(tiny_source, seeds=(0, 7), episodes=5)
    alone = run(tiny_source, seeds=(7,), episodes=5)
    assert both.scores[0].episodes == 10
    second = [row for row in both.rows.drop_columns(["seconds"]).to_pylist() if row["seed"] == 7]
    assert second == alone.rows.drop_columns(["seconds"]).to_pylist()
    assert len(set(both.rows["manifest"].to_pylist())) == 2
    assert set(both.rows["manifest"].to_pylist()) == set(both.facts["manifests"])


def test_a_manifest_gives_the_rows_of_its_protocol(tiny_source):
    manifest = make(tiny_source.index, 0, 3, episodes=12, seed=4)
    from_file = run(tiny_source, manifests=[PlannedTest((1, 3), 4, manifest)])
    drawn = run(tiny_source, shots=(1, 3), seeds=(4,))
    assert from_file.rows.drop_columns(["seconds"]) == drawn.rows.drop_columns(["seconds"])
    assert {manifest.first(k).digest for k in (1, 3)} == set(from_file.rows["manifest"].to_pylist())
    other = replace(manifest, data="sha256:" + "0" * 64)
    with pytest.raises(DataError, match="manifest is of another data set"):
        run(tiny_source, manifests=[PlannedTest((3,), 4, other)])


def test_images_in_memory_change_no_row(tiny_source):
    rows = [run(tiny_source, episodes=8, resident=where).rows for where in ("off", "host", "device")]
    assert rows[0].drop_columns(["seconds"]) == rows[1].drop_columns(["seconds"]) == rows[2].drop_columns(["seconds"])


def test_rows_carry_the_digests(tiny_source):
    class Stored(StoreSource):
        def __init__(self):
            self.store = SimpleNamespace(identity="sha256:s", path="s.zarr", codec=None)

        index, recipe, skipped = tiny_source.index, tiny_source.recipe, ()
        features, labels = tiny_source.features, tiny_source.labels

    rows = run(Stored(), episodes=3).rows.to_pylist()
    assert {(row["store"], row["checkpoint"]) for row in rows} == {("sha256:s", "sha256:c")}
    assert all(row["seconds"] > 0 for row in rows)
    assert {row["store"] for row in run(tiny_source, episodes=3).rows.to_pylist()} == {""}, "features made on the fly"


def test_what_cannot_be_scored_is_refused_before_work(tiny_source, with_ignore):
    with pytest.raises(ConfigError, match="original size need the photos' own masks"):
        run(tiny_source, resolution="original")
    with pytest.raises(DataError, match="not the one behind the features"):
        run(tiny_source, dataset=Stretched(with_ignore))
    with pytest.raises(ConfigError, match="fusion must be one of"):
        run(tiny_source, fusions=("median",))
    with pytest.raises(ConfigError, match="'cosine' answers each support by itself"):
        run(tiny_source, lambda: CosineSegmenter(0.5), shots=(2,), fusions=("joint",))


@pytest.mark.parametrize("step", [1, 3, 25])
def test_other_episodes_in_a_pass_hardly_matter(tiny_source, monkeypatch, step):
    """The rule is fixed (so rows repeat to the pixel); what it is moves only pixels whose logits tie to rounding."""
    usual = run(tiny_source, shots=(1, 2)).rows.to_pylist()
    monkeypatch.setattr("pipeline.evaluate.blocks.step", lambda block: step)
    for mine, other in zip(usual, run(tiny_source, shots=(1, 2)).rows.to_pylist(), strict=True):
        assert all(abs(mine[name] - other[name]) <= 2 for name in COUNTS)
        assert {name: mine[name] for name in ("episode", "query", "supports", "object_pixels", "manifest")} == {
            name: other[name] for name in ("episode", "query", "supports", "object_pixels", "manifest")
        }


def test_masks_are_decoded_ahead_and_each_once(with_ignore, monkeypatch):
    """On the thread that reads, in the episodes' order, and not all of them before the first answer."""
    monkeypatch.setattr(blocks, "BLOCK", 4)
    decoded, at_first_answer = [], []

    class Listening(Stretched):
        def label(self, image):
            decoded.append((image, threading.current_thread()))
            return super().label(image)

    class Waiting:
        def __init__(self):
            self.inner = learner()

        def answer(self, batch, joint=(), alone=None):
            time.sleep(0.05)  # whoever reads may run ahead as far as it can
            at_first_answer.append(len(decoded))
            return self.inner.answer(batch, joint)

    rows = run(with_ignore, Waiting, dataset=Listening(with_ignore), episodes=40).rows.to_pylist()
    names = [with_ignore.index.images[image] for image, _ in decoded]
    assert sorted(names) == sorted(row["query"] for row in rows)
    assert threading.main_thread() not in {thread for _, thread in decoded}
    assert at_first_answer[0] <= 4 * (1 + blocks.READ_AHEAD) + 4, "a block in use, one ahead, one being read"
    assert rows == [
        row | {"seconds": rows[number]["seconds"]}
        for number, row in enumerate(run(with_ignore, dataset=Stretched(with_ignore), episodes=40).rows.to_pylist())
    ]


def test_a_block_is_looked_at_once_when_it_is_done(with_ignore, monkeypatch):
    """Three parts of a block, two sizes, two fusions: one copy to the host."""
    looked, taken = [], blocks._looked_at

    def counting(figures):
        looked.append(len(figures))
        return taken(figures)

    monkeypatch.setattr(blocks, "_looked_at", counting)
    monkeypatch.setattr(blocks, "step", lambda block: 5)
    rows = run(with_ignore, dataset=Stretched(with_ignore), fusions=("logits",), shots=(1, 2), episodes=30).rows
    assert rows.num_rows == 30 * 2 * 2
    assert looked == [5, 1], "25 episodes by five, and the five that are left"


def test_answers_are_counted_without_looking_at_a_number(with_ignore, monkeypatch):
    """Tensors of the device "meta" have no numbers: whoever asks for one gets an error."""
    monkeypatch.setattr(FusedHSNet, "_autocast", lambda self, device: nullcontext())
    protocol = resolve(shots=(1, 3), episodes=4)
    episodes = tuple(episodes_in(of_protocol(protocol, with_ignore.index, 0)[0].manifest, with_ignore.index))
    block = blocks.Block(0, episodes, (1, 3), 0, {1: "a", 3: "b"})
    data = Stretched(with_ignore)
    loaded = blocks.with_masks(with_ignore, episodes, read=read_batch, dataset=data).made().to("meta")
    head = LearnedSegmenter(learner().model.to("meta"))
    part = _part_rows(head, loaded, episodes, block, with_ignore.index, Rules(0, FUSIONS, protocol, data))
    assert part.figures.is_meta
    # Object pixels; for two numbers of shots, every fusion and four policies the four counts.
    assert part.figures.shape == (4 + 2 * len(FUSIONS) * 4 * 4 * 4,)
