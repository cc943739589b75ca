"""Part files of an evaluation: one that is killed goes on, and parts of another are refused."""

import gc
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pipeline.evaluate.blocks as blocks_module
from hsnet.errors import DataError, DeviceMemoryError
from pipeline.common.lock import sole_writer
from pipeline.episodes.protocols import resolve
from pipeline.evaluate.blocks import Blocks
from pipeline.evaluate.nway import evaluate_ways
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.evaluate.stage import evaluate, evaluate_to
from pipeline.heads.catalogue import Method
from pipeline.heads.cosine import CosineSegmenter
from pipeline.heads.segmenters import Answers

CODE = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import test_parts as t
from hsnet.backbone import FrozenBackbone
from pipeline.datasets.shapes import Shapes
from pipeline.features.recipe import Recipe
from pipeline.features.weights import load_weights
from pipeline.loading.source import OnlineSource
weights = load_weights("squeezenet1_1")
data = Shapes(size=64, trn_per_class=3, val_per_class=4)
recipe = Recipe.of("squeezenet1_1", weights.sha256, 64, "float32")
source = OnlineSource(data, FrozenBackbone("squeezenet1_1", weights.state_dict), recipe)
blocks = 0
def event(done, total):
    if done >= 50:
        os.kill(os.getpid(), signal.SIGKILL)
t.evaluate_to(t.plan(source), Path(sys.argv[2]), on_event=event)
"""


def plan(source, **changes):
    choices = {"shots": (1, 2), "episodes": 110, "seeds": (3, 1), **changes.pop("choices", {})}
    method = Method(lambda: CosineSegmenter(0.7), {"name": "cosine", "threshold": 0.7})
    values = {"method": method, "source": source, "fold": 0, "protocol": resolve(**choices), "fusions": ("logits",)}
    return EvaluationPlan(**{**values, **changes})


def same(rows, expected):
    """Values and facts; two runs may differ in the seconds, and in how a file numbers the digests."""
    if isinstance(rows, Path):
        rows = pq.read_table(rows)
    assert rows.schema.equals(expected.schema)
    assert rows.schema.metadata[b"hsnet"] == expected.schema.metadata[b"hsnet"]
    return rows.drop_columns(["seconds"]).to_pylist() == expected.drop_columns(["seconds"]).to_pylist()


def parts_of(out):
    return sorted(Path(f"{out}.parts").glob("*.parquet"))


class Stop(Exception):
    pass


def stopped_after(source, out, episodes, **changes):
    """An evaluation that ends early."""

    def event(done, total):
        if done >= episodes:
            raise Stop

    with pytest.raises(Stop):
        evaluate_to(plan(source, **changes), out, on_event=event)


class Fake:
    """Answers "object everywhere", at once."""

    def answer(self, batch, joint=(), alone=None):
        logits = torch.zeros(batch.shots, len(batch.target), 2, 2, 2)
        logits[:, :, 1] = 1
        return Answers(logits, {})


@pytest.fixture(scope="module")
def expected(tiny_source):
    result = evaluate(plan(tiny_source))
    assert 0 < result.scores[0].miou < 100
    return result


def test_the_file_equals_the_rows_in_memory(tiny_source, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.evaluate.parts.ROWS_AT_ONCE", 60)
    outcome = evaluate_to(plan(tiny_source), tmp_path / "rows.parquet")
    assert same(tmp_path / "rows.parquet", expected.rows)
    assert pq.read_metadata(tmp_path / "rows.parquet").num_row_groups > 3
    assert outcome.scores == expected.scores
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]
    assert evaluate_to(plan(tiny_source), None).scores == expected.scores


def test_a_killed_evaluation_goes_on(tiny_source, expected, tmp_path):
    out = tmp_path / "rows.parquet"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    died = subprocess.run([sys.executable, "-c", CODE, str(Path(__file__).parent), str(out)], env=environment)
    assert died.returncode == -signal.SIGKILL
    assert not out.exists()
    assert parts_of(out)
    seen = []
    outcome = evaluate_to(plan(tiny_source), out, on_event=lambda *event: seen.append(event))
    assert seen[0][0] >= 50, "what was answered is not answered again"
    assert seen[-1] == (220, 220)
    assert same(out, expected.rows)
    assert outcome.scores == expected.scores
    assert not Path(f"{out}.parts").exists()


def test_ctrl_c_leaves_parts_too(tiny_source, expected, tmp_path):
    out = tmp_path / "rows.parquet"
    stopped_after(tiny_source, out, 25)
    stopped_after(tiny_source, out, 100)
    assert len(parts_of(out)) >= 2
    evaluate_to(plan(tiny_source), out)
    assert same(out, expected.rows)


def test_damaged_parts_are_made_again(tiny_source, expected, tmp_path, caplog):
    out = tmp_path / "rows.parquet"
    stopped_after(tiny_source, out, 100)
    first, second = parts_of(out)[:2]
    first.write_bytes(first.read_bytes()[:-20])
    second.write_bytes(parts_of(out)[-1].read_bytes())  # another range than its name says
    evaluate_to(plan(tiny_source), out)
    assert caplog.text.count("is damaged: its episodes are answered again") == 2
    assert same(out, expected.rows)


def test_parts_of_other_rules_or_heads_are_refused(tiny_source, tmp_path):
    out = tmp_path / "rows.parquet"
    stopped_after(tiny_source, out, 50)
    before = {path.name: path.read_bytes() for path in Path(f"{out}.parts").iterdir()}
    other = Method(lambda: CosineSegmenter(0.6), {"name": "cosine", "threshold": 0.6})
    for changes, said in (
        ({"method": other}, r"method\n +there +\{.*0\.7\}\n +this call +\{.*0\.6\}"),
        ({"choices": {"seeds": (2,)}}, r"seeds\n +there +\[1, 3\]\n +this call +\[2\]"),
        ({"fusions": ()}, "fusions"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            evaluate_to(plan(tiny_source, **changes), out)
        assert "Nothing was computed or changed" in str(caught.value)
    assert {path.name: path.read_bytes() for path in Path(f"{out}.parts").iterdir()} == before


def test_a_part_of_another_manifest_is_refused_by_name(tiny_source, tmp_path):
    out, strange = tmp_path / "rows.parquet", tmp_path / "strange.parquet"
    stopped_after(tiny_source, strange, 50, choices={"seeds": (7,)})
    stopped_after(tiny_source, out, 50)
    foreign = parts_of(strange)[0]
    shutil.copy(foreign, Path(f"{out}.parts"))
    with pytest.raises(DataError, match=f"{foreign.name} is a part of another evaluation") as caught:
        evaluate_to(plan(tiny_source), out)
    assert foreign.name[:33] in str(caught.value)
    assert not out.exists()
    (Path(f"{out}.parts") / foreign.name).unlink()
    evaluate_to(plan(tiny_source), out)


def test_two_processes_do_not_work_on_one_file(tiny_source, tmp_path):
    out = tmp_path / "rows.parquet"
    stopped_after(tiny_source, out, 50)
    with sole_writer(Path(f"{out}.parts")), pytest.raises(DataError, match="is being written by"):
        evaluate_to(plan(tiny_source), out)


def test_rows_come_home_from_where_the_folder_is_not_seen(tiny_source, expected, tmp_path, monkeypatch):
    """A worker on a machine without the shared disk."""
    asked = []
    monkeypatch.setattr("pipeline.evaluate.parts.still_owned", lambda *given: bool(asked.append(given)))
    out = tmp_path / "rows.parquet"
    evaluate_to(plan(tiny_source), out)
    assert asked
    assert same(out, expected.rows)


def test_a_refused_plan_leaves_no_folder(tiny_source, tmp_path):
    class Broken:
        def answer(self, batch, joint=(), alone=None):
            raise DataError("no answer")

    with pytest.raises(DataError, match="no answer"):
        evaluate_to(plan(tiny_source, method=Method(Broken, {"name": "broken"})), tmp_path / "rows.parquet")
    assert list(tmp_path.iterdir()) == []


def test_several_ways_go_on_too(tiny_source, tmp_path):
    rules = resolve(ways=2, episodes=60, shots=(1,))
    one = replace(plan(tiny_source), protocol=rules, fusions=())
    expected = evaluate_ways(one, background=0.1)
    out = tmp_path / "rows.parquet"

    def event(done, total):
        if done >= 25:
            raise Stop

    with pytest.raises(Stop):
        evaluate_ways(one, background=0.1, out=out, on_event=event)
    assert parts_of(out)
    with pytest.raises(DataError, match="background"):
        evaluate_ways(one, background=0.2, out=out)
    again = evaluate_ways(one, background=0.1, out=out)
    assert same(again.rows, expected.rows)
    assert again.scores == expected.scores


def test_rows_of_another_test_are_not_overwritten(tiny_source, tmp_path, caplog):
    caplog.set_level("INFO", logger="pipeline")
    out = tmp_path / "rows.parquet"
    small = {"choices": {"episodes": 10, "seeds": (1,)}}
    evaluate_to(plan(tiny_source, **small), out)
    before = out.read_bytes()
    other = Method(lambda: CosineSegmenter(0.6), {"name": "cosine", "threshold": 0.6})
    with pytest.raises(
        DataError, match=r"rows of another test:\n +method\n +there +.*0\.7.*\n +this call +.*0\.6"
    ) as caught:
        evaluate_to(plan(tiny_source, **small, method=other), out)
    assert "--overwrite" in str(caught.value)
    assert out.read_bytes() == before
    ways = replace(plan(tiny_source), protocol=resolve(ways=2, episodes=20, shots=(1,)), fusions=())
    with pytest.raises(DataError, match="rows of another test"):
        evaluate_ways(ways, background=0.1, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]
    evaluate_to(plan(tiny_source, **small), out)
    assert "holds rows of the same test; they are made anew" in caplog.text
    evaluate_to(plan(tiny_source, **small, method=other), out, overwrite=True)
    assert out.read_bytes() != before
    thesis = tmp_path / "thesis.parquet"
    thesis.write_text("precious")
    with pytest.raises(DataError, match="is there and holds no rows of an evaluation"):
        evaluate_to(plan(tiny_source, **small), thesis)
    assert thesis.read_text() == "precious"


def test_blocks_are_made_when_they_are_asked_for(tiny_source):
    from pipeline.episodes.drawing import of_protocol
    from pipeline.evaluate.blocks import drawn

    one = plan(tiny_source)
    tests = [drawn(planned, tiny_source.index, []) for planned in of_protocol(one.protocol, tiny_source.index, 0)]
    every = Blocks(tests)
    assert [block.first for block in every] == [0, 25, 50, 75, 100] * 2
    assert every.episodes == 220
    left = Blocks(tests, [(tests[1].manifest, 25, 110)])
    assert [(block.seed, block.first) for block in left] == [(tests[0].seed, n) for n in (0, 25, 50, 75, 100)] + [
        (tests[1].seed, 0)
    ]
    assert left.episodes == 135


def test_no_row_stays_in_memory(tiny_source, tmp_path, monkeypatch):
    """What is kept per episode does not grow with its columns: bytes held are counted as it runs."""
    before, arrow, rows = pa.total_allocated_bytes(), [], []
    monkeypatch.setattr(blocks_module, "TASK_SECONDS", 0.0)  # a block at a time

    def event(done, total):
        arrow.append(pa.total_allocated_bytes() - before)
        rows.append(sum(type(one) is dict and "object_pixels" in one for one in gc.get_objects()))

    method = Method(Fake, {"name": "fake"})
    rules = {"episodes": 250, "seeds": (0,)}
    evaluate_to(plan(tiny_source, method=method, choices=rules), tmp_path / "rows.parquet", on_event=event)
    assert len(rows) == 11
    assert max(rows) <= 4 * 25, "rows of one block: two shots, two fusions"
    assert max(arrow[6:]) <= 1.5 * max(arrow[:6]) + 10_000


def test_a_lack_of_memory_names_the_options_and_keeps_what_was_answered(tiny_source, expected, tmp_path, monkeypatch):
    out, answered = tmp_path / "rows.parquet", []

    def answer(self, batch, joint=(), alone=None):
        answered.append(batch.size)
        if sum(answered) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return taken(self, batch, joint, alone)

    taken = CosineSegmenter.answer
    with monkeypatch.context() as patched:
        patched.setattr(CosineSegmenter, "answer", answer)
        with pytest.raises(DeviceMemoryError, match=r"Out of memory \(CUDA.*\)\. Use --resident off, fewer"):
            evaluate_to(plan(tiny_source), out)
    assert parts_of(out)
    seen = []
    evaluate_to(plan(tiny_source), out, on_event=lambda *event: seen.append(event))
    assert seen[0][0] > 0, "what was answered is not answered again"
    assert same(out, expected.rows)
