"""N-way evaluation: with one class the 1-way one, with several a label map whose every pixel is counted."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from hsnet.errors import ConfigError, DataError
from hsnet.model import HSNet, resize_logits
from hsnet.ways import SCORES
from pipeline.common.files import write_table
from pipeline.episodes.drawing import PlannedTest, make
from pipeline.episodes.protocols import FUSIONS, Policy, Protocol, resolve
from pipeline.episodes.stream import Episode
from pipeline.evaluate.nway import evaluate_ways, fit_background
from pipeline.evaluate.plan import EvaluationPlan, plan_evaluation
from pipeline.evaluate.stage import evaluate
from pipeline.heads.catalogue import Method
from pipeline.heads.cosine import CosineSegmenter
from pipeline.heads.location import LocationSegmenter
from pipeline.heads.segmenters import Answers, LearnedSegmenter
from pipeline.loading.batch import load_batch, load_ways
from pipeline.scores.rows import count_columns
from pipeline.scores.way_rows import counts_column, read_way_results
from pipeline.scores.way_scores import score_ways


def learner():
    """An untrained head that answers both ways."""
    torch.manual_seed(0)
    model = HSNet((4, 2, 2), (4, 8, 16)).eval()
    with torch.no_grad():
        model.decode_fine[-1].bias.copy_(torch.tensor([0.0, 0.0]))
        model.decode_fine[-1].weight.mul_(10)
    return LearnedSegmenter(model)


class Truthful:
    """Knows the query's object, and where the class is not shown, that it is not."""

    def answer(self, batch, joint=(), alone=None):
        truth = torch.stack([torch.zeros_like(batch.target), batch.target], 1).float()
        return Answers(torch.stack([truth] * batch.shots), dict.fromkeys(joint, truth))


class Everywhere(Truthful):
    """Finds every class in every pixel, all of them equally."""

    def answer(self, batch, joint=(), alone=None):
        return super().answer(replace(batch, target=torch.ones_like(batch.target)), joint)


def plan_of(source, make=learner, **options):
    names = [field.name for field in fields(Protocol)]
    choices = {"shots": (1,), "episodes": 12} | {name: options.pop(name) for name in names if name in options}
    method = Method(make, {"name": "a test"})
    return EvaluationPlan(method=method, source=source, protocol=resolve(**choices), **{"fold": 0, **options})


def rows_of(result):
    return result.rows.drop_columns(["seconds"]).to_pylist()


@pytest.mark.parametrize("make_head", [learner, lambda: CosineSegmenter(0.7)], ids=["learned", "cosine"])
def test_one_way_of_n_is_one_way(tiny_source, tiny_shapes, make_head):
    """Every row, count, score and interval; all ways to combine supports, at both sizes, whatever tau."""
    fusions = FUSIONS if make_head is learner else FUSIONS[:3]
    given = {"shots": (1, 3), "fusions": fusions, "dataset": tiny_shapes, "tau": 0.4, "strict": True}
    plan = plan_of(tiny_source, make_head, **given)
    one, several = evaluate(plan), evaluate_ways(plan)
    assert several.background.score == 0
    alone = one.rows.drop_columns(["seconds"]).to_pylist()
    assert len(alone) == 12 * 2 * len(fusions)
    for row, ways in zip(alone, rows_of(several), strict=True):
        for name in ("episode", "fold", "seed", "shots", "fusion", "query", "manifest", "store", "checkpoint"):
            assert ways[name] == row[name]
        assert (ways["classes"], ways["class_names"]) == ([row["class_id"]], [row["class_name"]])
        assert (ways["supports"], ways["object_pixels"]) == ([row["supports"]], [row["object_pixels"]])
        for policy in (Policy(size, ignore) for size in ("network", "original") for ignore in (True, False)):
            (outside, found), (missed, inside) = np.reshape(ways[counts_column(policy)], (2, 2)).tolist()
            counts = outside, inside, outside + found + missed, inside + found + missed
            assert tuple(row[name] for name in count_columns(policy)) == counts
    for score, ways in zip(one.scores, several.scores, strict=True):
        close(ways.figures.miou, score.miou_interval)
        close(ways.figures.fb_iou, score.fb_iou_interval)
        assert {part.name: part.value.value for part in ways.classes if part.value} == pytest.approx(
            {tiny_source.index.classes[c]: iou for c, iou in score.per_class.items() if score.episodes_per_class[c]}
        )
        assert ways.figures.alarm_pixels is None


def close(first, second):
    for name in ("value", "low", "high"):
        assert getattr(first, name) == pytest.approx(getattr(second, name), abs=1e-9)


def test_perfect_answers_score_100_without_false_alarms(tiny_source):
    result = evaluate_ways(plan_of(tiny_source, Truthful, ways=3, absent=0.3, episodes=40))
    (score,) = result.scores
    figures = score.figures
    assert figures.miou.value == figures.fb_iou.value == 100
    rates = [getattr(figures, name).value for name in ("confused", "stray_pixels", "alarm_pixels", "alarm_episodes")]
    assert rates == [0, 0, 0, 0]
    assert score.ways == 3
    assert score.empty > 5
    assert score.partial == 40 - score.empty
    assert result.facts["ways"] == 3


def test_heads_that_find_everything_raise_every_alarm(tiny_source):
    plan = plan_of(tiny_source, Everywhere, ways=2, absent=0.5, episodes=40)
    result = evaluate_ways(plan, background=0.0)
    (score,) = result.scores
    assert score.figures.alarm_pixels.value == score.figures.alarm_episodes.value == 100
    # Where all classes are found equally, the lower number wins: that of the query has no advantage by coming first.
    for row in result.rows.to_pylist():
        cells = np.reshape(row["confusion"], (3, 3))
        lowest = row["classes"].index(min(row["classes"])) + 1
        assert cells[:, lowest].sum() == cells.sum() == 64 * 64
    nothing = evaluate_ways(plan, background=2.0).scores[0].figures
    assert nothing.alarm_pixels.value == nothing.miou.value == 0


def test_a_row_is_counted_as_its_words_say(tiny_source):
    """One label map again, from the photos' names, class by class with the 1-way answers."""
    score = 0.02
    result = evaluate_ways(plan_of(tiny_source, lambda: CosineSegmenter(0.7), ways=3, episodes=6), background=score)
    numbers = {image: number for number, image in enumerate(tiny_source.index.images)}
    for row in result.rows.to_pylist():
        query = numbers[row["query"]]
        margins, truth = [], np.zeros((64, 64), int)
        label = tiny_source.labels([query])[0].numpy()
        for place, (class_id, supports) in enumerate(zip(row["classes"], row["supports"], strict=True)):
            batch = load_batch(tiny_source, [Episode(query, tuple(numbers[s] for s in supports), class_id)]).to("cpu")
            logits = resize_logits(CosineSegmenter(0.7).answer(batch).logits[0], (64, 64))[0]
            margins.append((logits[1] - logits[0]).numpy())
            truth[label == class_id + 1] = place + 1
        best = np.argmax(margins, 0)
        found = np.where(np.max(margins, 0) > score, best + 1, 0)
        wanted = [int(((truth == t) & (found == p)).sum()) for t in range(4) for p in range(4)]
        assert row["confusion"] == wanted
        assert row["object_pixels"] == [int((truth == place + 1).sum()) for place in range(3)]
        assert row["class_names"] == [tiny_source.index.classes[c] for c in row["classes"]]


def test_a_query_of_several_classes_is_labelled_with_all_of_them(tiny_source):
    """Two classes in one label map: the truth has both, and so have the counts."""
    entries = tiny_source.index.split(0, "test").by_class
    (first, images), (second, others) = list(entries.items())[:2]
    both = tiny_source.labels([images[0]])[0].clone()
    both[:20, :20] = second + 1

    class Twice:
        def __getattr__(self, name):
            return getattr(tiny_source, name)

        def labels(self, wanted):
            maps = tiny_source.labels(wanted)
            for place, image in enumerate(wanted):
                if image == images[0]:
                    maps[place] = both
            return maps

    episode = Episode(images[0], (images[1],), first, ((second, (others[1],)),))
    loaded = load_ways(Twice(), [episode])
    assert torch.equal(loaded.truth[0] == 2, both == second + 1)
    assert torch.equal(loaded.of_class(0).target[0], both == first + 1)
    assert torch.equal(loaded.of_class(1).target[0], both == second + 1)
    alone = load_batch(tiny_source, [Episode(images[0], (others[1],), second)])
    assert torch.equal(loaded.of_class(1).support_mask, alone.support_mask)
    for mine, theirs in zip(loaded.of_class(1).support, alone.support, strict=True):
        assert torch.equal(mine, theirs)


def test_the_background_is_fitted_on_training_classes_alone(tiny_source):
    plan = plan_of(tiny_source, lambda: CosineSegmenter(0.5), ways=3, absent=0.2, episodes=8)
    asked = []

    class Watched:
        def __getattr__(self, name):
            return getattr(tiny_source, name)

        def labels(self, images):
            asked.extend(images)
            return tiny_source.labels(images)

    fitted = fit_background(replace(plan, source=Watched()), episodes=40)
    novel = {image for image, _ in tiny_source.index.split(0, "test").entries}
    assert asked
    assert not novel & set(asked)
    assert fitted.score > 0
    assert fitted.fit["role"] == "trn"

    def on_training(score):
        training = plan_of(tiny_source, lambda: CosineSegmenter(0.5), ways=3, absent=0.2, episodes=40, role="trn")
        parts = evaluate_ways(training, background=score).scores[0].classes
        return np.mean([part.value.value for part in parts if part.value])

    near = int((SCORES - fitted.score).abs().argmin())
    best = on_training(fitted.score)
    assert best == pytest.approx(fitted.fit["miou"], abs=1e-6)
    assert all(best >= on_training(float(SCORES[near + step])) for step in (-60, -8, -1, 1, 8))
    assert best > on_training(0.0)


def test_the_score_is_fitted_by_default_for_several_classes_and_kept_with_the_rows(tiny_source, tmp_path):
    seen = []
    plan = plan_of(tiny_source, lambda: LocationSegmenter(torch.ones(64, 64, dtype=torch.bool)), ways=2, episodes=6)
    result = evaluate_ways(plan, on_event=lambda done, total: seen.append((done, total)))
    assert result.background.fit is not None
    assert {total for _, total in seen} == {106}
    assert seen[-1] == (106, 106)
    write_table(tmp_path / "rows.parquet", result.rows)
    back = read_way_results(tmp_path / "rows.parquet")
    assert back.facts["background"] == {"score": result.background.score, "fit": result.background.fit}
    assert tuple(score_ways([back])) == result.scores


def test_rows_do_not_depend_on_the_order_of_work(tiny_source):
    class Backwards:
        workers = 2

        def map(self, make_worker, items):
            worker = make_worker()
            for item in reversed(list(items)):
                yield item, worker(item)

    plan = plan_of(tiny_source, lambda: CosineSegmenter(0.7), ways=2, shots=(1, 2), episodes=55, absent=0.2)
    backwards = evaluate_ways(plan, background=0.1, runner=Backwards())
    assert rows_of(backwards) == rows_of(evaluate_ways(plan, background=0.1))
    assert [row["episode"] for row in rows_of(backwards)] == [*range(55)] * 2


def test_bad_settings_are_named(tiny_source):
    classes = len(tiny_source.index.split(0, "test").class_ids)
    with pytest.raises(ConfigError, match=f"needs {classes + 1} classes with photos, there are {classes} "):
        evaluate_ways(plan_of(tiny_source, Truthful, ways=classes + 1), background=0.0)
    with pytest.raises(ConfigError, match="background must be a number or 'fit', got 'often'"):
        evaluate_ways(plan_of(tiny_source, Truthful, ways=2), background="often")
    for options in ({"ways": 3}, {"absent": 0.5}):
        with pytest.raises(ConfigError, match=r"are evaluated by pipeline\.evaluate\.nway"):
            evaluate(plan_of(tiny_source, Truthful, **options))
    manifest = make(tiny_source.index, 0, 1, episodes=5, ways=2)
    planned = (PlannedTest((1,), 0, manifest),)
    with pytest.raises(DataError, match="holds 2-way episodes, 0 of them with no class shown; the protocol asks"):
        evaluate(plan_of(tiny_source, Truthful, manifests=planned))
    with pytest.raises(DataError, match="holds 2-way episodes, 3-way ones were asked for"):
        evaluate_ways(plan_of(tiny_source, Truthful, ways=3, manifests=planned))
    with pytest.raises(DataError, match="holds 2-way episodes, 3-way ones were asked for"):
        plan_evaluation(lambda: tiny_source, resolve(), head="untrained", manifest=manifest, ways=3)
    plan = plan_evaluation(lambda: tiny_source, resolve(), head="untrained", manifest=manifest)
    assert (plan.protocol.ways, plan.protocol.absent, plan.protocol.episodes) == (2, 0.0, 5)


def test_a_fold_with_too_few_training_classes_asks_for_the_score(tiny_source):
    from pipeline.datasets.index import DatasetIndex, Split

    index = tiny_source.index
    entries = tuple(entry for entry in index.split(0, "trn").entries if entry[1] == index.split(0, "trn").class_ids[0])
    splits = {0: {"trn": Split(entries), "test": index.split(0, "test")}}
    narrow = DatasetIndex(index.name, index.classes, index.images, splits)
    plan = plan_of(tiny_source, Truthful, ways=2, index=narrow)
    with pytest.raises(ConfigError, match=r"cannot be fitted on the training classes: .* there are 1 .*--background 0"):
        evaluate_ways(plan)
    assert evaluate_ways(plan, background=0.0).scores[0].figures.miou.value > 0
