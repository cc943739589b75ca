"""Evaluation: rows that any number of workers repeats, and scores made of them."""

import json
from dataclasses import fields, replace

import pyarrow.parquet as pq
import pytest
import torch

from hsnet.errors import ConfigError, DataError
from hsnet.fusion import vote
from hsnet.model import HSNet
from pipeline.common.files import require_writable, write_table
from pipeline.episodes.protocols import Protocol, resolve
from pipeline.episodes.stream import EpisodeStream
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.evaluate.stage import evaluate, score
from pipeline.heads.catalogue import Method, made
from pipeline.heads.cosine import CosineSegmenter, cosine_scores, fit_cosine_threshold
from pipeline.heads.location import LocationSegmenter, fit_location_mask
from pipeline.heads.segmenters import Answers, LearnedSegmenter, pairs_per_pass
from pipeline.loading.batch import load_batch
from pipeline.scores.rows import COUNTS


def learner():
    """An untrained head that answers both ways: the last bias decides where its near-constant logits fall."""
    torch.manual_seed(0)
    model = HSNet((4, 2, 2), (4, 8, 16)).eval()
    with torch.no_grad():
        model.decode_fine[-1].bias.copy_(torch.tensor([0.0, 0.0]))
        model.decode_fine[-1].weight.mul_(10)
    return model


class Truthful:
    """Answers with the truth for the first support, with nothing for the others."""

    def answer(self, batch, joint=(), alone=None):
        truth = torch.stack([torch.zeros_like(batch.target), batch.target], 1).float()
        nothing = torch.stack([torch.ones_like(batch.target), torch.zeros_like(batch.target)], 1).float()
        return Answers(torch.stack([truth] + [nothing] * (batch.shots - 1)), dict.fromkeys(joint, truth))


def run(source, make=lambda: LearnedSegmenter(learner()), **options):
    """Choices of the protocol by name; what else there is goes into the plan, a runner to `evaluate`."""
    names = [field.name for field in fields(Protocol)]
    choices = {"shots": (1,), "episodes": 30} | {name: options.pop(name) for name in names if name in options}
    runner, method = options.pop("runner", None), Method(make, {"name": "a test"})
    plan = EvaluationPlan(method=method, source=source, protocol=resolve(**choices), **{"fold": 0, **options})
    return evaluate(plan, runner=runner)


def counted(rows):
    """Rows without the only column that two runs may differ in."""
    return rows.drop_columns(["seconds"])


def test_perfect_answers_score_100(tiny_source):
    result = run(tiny_source, Truthful)
    assert result.scores[0].miou == 100
    assert result.scores[0].fb_iou == 100
    assert set(result.scores[0].per_class) == set(tiny_source.index.split(0, "test").class_ids)
    assert sum(result.scores[0].episodes_per_class.values()) == 30


def test_counts_of_a_row_are_those_of_its_episode(tiny_source):
    """Recount one row from its image ids with plain numpy."""
    result = run(tiny_source, shots=(3,), episodes=4)
    row = result.rows.to_pylist()[2]
    numbers = {image: number for number, image in enumerate(tiny_source.index.images)}
    value = row["class_id"] + 1
    truth = (tiny_source.labels([numbers[row["query"]]]) == value)[0].numpy()
    batch = load_batch(tiny_source, [next_episode(numbers, row)])
    prediction = vote(LearnedSegmenter(learner()).answer(batch).masks((64, 64)))[0].numpy()
    assert [row[name] for name in COUNTS] == [
        int((~prediction & ~truth).sum()),
        int((prediction & truth).sum()),
        int((~(prediction & truth)).sum()),
        int((prediction | truth).sum()),
    ]
    assert row["class_name"] == tiny_source.index.classes[row["class_id"]]
    assert len(row["supports"]) == 3


def next_episode(numbers, row):
    from pipeline.episodes.stream import Episode

    return Episode(numbers[row["query"]], tuple(numbers[s] for s in row["supports"]), row["class_id"])


def test_fewer_shots_come_from_the_same_pass(tiny_source):
    """1-shot rows of a 1,3-shot evaluation are those of a 1-shot evaluation."""
    both = run(tiny_source, shots=(3, 1))
    alone = run(tiny_source, shots=(1,))
    assert [s.shots for s in both.scores] == [1, 3]
    first = [row for row in counted(both.rows).to_pylist() if row["shots"] == 1]
    assert first == counted(alone.rows).to_pylist()


def test_a_score_comes_with_its_intervals(tiny_source):
    (scores,) = run(tiny_source, lambda: CosineSegmenter(0.7)).scores
    for value, found in ((scores.miou, scores.miou_interval), (scores.fb_iou, scores.fb_iou_interval)):
        assert found.value == value
        assert found.low < value < found.high
    (perfect,) = run(tiny_source, Truthful).scores
    assert (perfect.miou_interval.low, perfect.miou_interval.high) == (100, 100)


def test_rows_do_not_depend_on_the_order_of_work(tiny_source):
    class Backwards:
        workers = 2

        def map(self, make_worker, items):
            worker = make_worker()
            for item in reversed(list(items)):
                yield item, worker(item)

    backwards = run(tiny_source, shots=(1, 2), episodes=60, runner=Backwards()).rows
    assert counted(backwards) == counted(run(tiny_source, shots=(1, 2), episodes=60).rows)
    keys = [(row["shots"], row["episode"]) for row in backwards.to_pylist()]
    assert keys == [(shots, episode) for shots in (1, 2) for episode in range(60)]


def test_reference_episodes_repeat_the_published_order(tiny_source):
    """Queries go through the test list; every K draws its own 1,000 episodes."""
    result = run(tiny_source, Truthful, draw="reference", episodes=1000, shots=(1, 2))
    rows = [row for row in result.rows.to_pylist() if row["shots"] == 1]
    listed = [tiny_source.index.images[image] for image, _ in tiny_source.index.split(0, "test").entries]
    assert len(rows) == 1000
    assert [row["query"] for row in rows[: len(listed)]] == listed
    assert sorted(facts["shots"] for facts in result.facts["manifests"].values()) == [1, 2]


def test_ignored_pixels_are_counted_in_their_own_columns(tiny_source):
    """With an ignore label the published counts leave those pixels out; the `_all` columns do not."""

    class WithBoundary:
        def __init__(self, source):
            self.source = source

        def __getattr__(self, name):
            return getattr(self.source, name)

        def labels(self, images):
            labels = self.source.labels(images).clone()
            labels[:, :8] = self.source.index.ignore_label
            return labels

    from dataclasses import replace

    class Index(WithBoundary):
        @property
        def index(self):
            return replace(self.source.index, has_ignore=True)

    row = run(Index(tiny_source), episodes=1).rows.to_pylist()[0]
    assert row["union_background"] + row["intersection"] == 64 * 56
    assert row["union_background_all"] + row["intersection_all"] == 64 * 64


def test_scores_come_from_the_rows_alone(tiny_source, tmp_path):
    result = run(tiny_source, shots=(1, 2))
    write_table(tmp_path / "rows.parquet", result.rows)
    table = pq.read_table(tmp_path / "rows.parquet")
    stored = json.loads(table.schema.metadata[b"hsnet"])
    assert stored["method"] == {"name": "a test"}
    assert stored["data"] == tiny_source.index.digest
    class_ids = tiny_source.index.split(0, "test").class_ids
    assert tuple(score(table, k, class_ids) for k in (1, 2)) == result.scores
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


@pytest.mark.parametrize("pairs", [1, 2, 4, 100])
def test_passes_are_split_without_changing_a_mask(tiny_source, monkeypatch, pairs):
    """One shot of an episode at a time, two of three, one episode with all its shots, and everything at once."""
    stream = EpisodeStream(tiny_source.index, 0, "test", 3, 0)
    batch = load_batch(tiny_source, [stream[number] for number in range(3)])
    whole = LearnedSegmenter(learner()).answer(batch).masks((64, 64))
    assert whole.shape == (3, 3, 64, 64)
    assert whole.any()
    monkeypatch.setattr("pipeline.heads.segmenters.pairs_per_pass", lambda batch, model: pairs)
    # Another batch size rounds differently; a pixel whose logits tie within 1e-6 may change sides.
    assert int((LearnedSegmenter(learner()).answer(batch).masks((64, 64)) != whole).sum()) <= 4


def test_the_arithmetic_is_the_segmenters(tiny_source):
    stream = EpisodeStream(tiny_source.index, 0, "test", 1, 0)
    batch = load_batch(tiny_source, [stream[number] for number in range(8)])
    exact, near = (LearnedSegmenter(learner(), name).answer(batch).masks((64, 64)) for name in ("float32", "bfloat16"))
    assert 0 < int((exact != near).sum()) < 0.2 * exact.numel()


def test_passes_are_as_large_as_the_device_likes(tiny_source, monkeypatch):
    batch = load_batch(tiny_source, [tiny_episode(tiny_source)] * 3)
    many = pairs_per_pass(batch)
    assert 1 < many < pairs_per_pass(replace(batch, target=batch.target.to("meta")))
    monkeypatch.setattr("pipeline.heads.segmenters.PASS_ELEMENTS", {"cpu": 1})
    assert pairs_per_pass(batch) == 1


def tiny_episode(source):
    from pipeline.episodes.stream import EpisodeStream

    return EpisodeStream(source.index, 0, "test", 1, 0)[0]


def test_cosine_threshold_is_the_best_on_training_episodes(tiny_source):
    fitted = fit_cosine_threshold(tiny_source, 0, episodes=40)
    assert 0 < fitted.threshold < 1

    def on_training(threshold):
        return run(tiny_source, lambda: CosineSegmenter(threshold), role="trn", episodes=40).scores[0].miou

    best = on_training(fitted.threshold)
    assert best > 0
    assert all(best >= on_training(other) for other in (0.1, fitted.threshold - 0.05, fitted.threshold + 0.05, 0.9))


def test_location_is_one_mask_that_fits_training_objects_best(tiny_source):
    fitted = fit_location_mask(tiny_source, 0, episodes=40)
    assert 0 < fitted.mask.float().mean() < 1

    def on_training(mask):
        return run(tiny_source, lambda: LocationSegmenter(mask), role="trn", episodes=40).scores[0].miou

    best = on_training(fitted.mask)
    everywhere, middle = torch.ones_like(fitted.mask), torch.zeros_like(fitted.mask)
    middle[24:40, 24:40] = True
    assert best > on_training(everywhere)
    assert best > on_training(middle)
    rows = run(tiny_source, lambda: fitted, shots=(1, 2), episodes=6).rows.to_pylist()
    ones, twos = ([row["union"] for row in rows if row["shots"] == k] for k in (1, 2))
    assert ones == twos, "more supports change nothing"


def test_cosine_scores_are_high_on_the_object_of_the_support_itself(tiny_source):
    """Query and support the same photo: every object position finds itself."""
    from pipeline.episodes.stream import Episode

    episode = tiny_episode(tiny_source)
    batch = load_batch(tiny_source, [Episode(episode.query, (episode.query,), episode.class_id)])
    scores = cosine_scores(batch)[0, 0]
    inside = batch.target[0]
    assert scores[inside].mean() > scores[~inside].mean() + 0.1


def test_only_the_answers_that_are_scored_are_asked_for(tiny_source):
    asked = []

    class Asking(Truthful):
        def answer(self, batch, joint=(), alone=None):
            asked.append((tuple(joint), alone))
            return super().answer(batch, joint, alone)

    for fusion in ("joint", "logits"):
        run(tiny_source, Asking, shots=(1, 3), episodes=2, fusion=fusion)
    assert asked == [((3,), 1), ((), 3)]
    with_one = run(tiny_source, shots=(1, 3), episodes=4, fusion="joint").rows
    with_all = run(tiny_source, shots=(1, 3), episodes=4, fusion="joint", fusions=("vote",)).rows
    kept = [row for row in counted(with_all).to_pylist() if row["fusion"] == "joint"]
    assert counted(with_one).to_pylist() == kept


def test_a_head_that_compares_with_the_background_asks_for_one(tiny_source):
    class OnlyObjects:
        codec = None

        def labels(self, images):
            labels = tiny_source.labels(images)
            return labels.flatten(1).amax(1)[:, None, None].expand_as(labels).contiguous()

        def __getattr__(self, name):
            return getattr(tiny_source, name)

    method = made("contrast", tiny_source)
    plan = EvaluationPlan(method=method, source=OnlyObjects(), protocol=resolve(episodes=4), fold=0)
    with pytest.raises(DataError, match=r"Head 'contrast' compares .* Nothing was computed"):
        evaluate(plan)


def test_bad_settings_are_named(tiny_source, tmp_path):
    with pytest.raises(ConfigError, match="no fold 9"):
        run(tiny_source, fold=9)
    with pytest.raises(ConfigError, match="5-shot episode needs 6 images of its class"):
        run(tiny_source, shots=(5,), repeat_supports=False)
    with pytest.raises(ConfigError, match="shots must be a whole number from 1, got 0"):
        run(tiny_source, shots=(0,))
    with pytest.raises(ConfigError, match="episodes must be a whole number from 1, got 0"):
        run(tiny_source, episodes=0)
    first = tiny_source.index.split(0, "test").entries[0][0]
    with pytest.raises(ConfigError, match="need 1 images that were skipped"):
        run(tiny_source, Truthful, draw="reference", skipped=[first])
    (tmp_path / "file").write_text("")
    for bad in (tmp_path, tmp_path / "file" / "rows.parquet"):
        with pytest.raises(DataError, match="Nothing was computed"):
            require_writable(bad)
    require_writable(tmp_path / "new" / "rows.parquet")
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(DataError, match="Cannot write"):
        write_table(tmp_path / "file" / "rows.parquet", run(tiny_source, Truthful, episodes=1).rows)
