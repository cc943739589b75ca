"""The main job from the command line on a tiny generated data set: each command's result, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from fakes import invoke, machine
from PIL import Image
from safetensors.torch import load_file

import cli
from commands import groups, options
from hsnet.errors import CheckpointMismatch, StoreIncomplete, StoreMismatch
from pipeline.heads.training import DEFAULT_RECIPE, PUBLISHED, RECIPES

ROOT = Path(cli.__file__).parent
SHAPES = ("shapes", "--data-option", "size=64", "--data-option", "trn_per_class=2", "--data-option", "val_per_class=3")
BACKBONE = ("--backbone", "squeezenet1_1", "--image-size", "64")
QUICK = ("--batch-size", "4", "--validate-every", "2", "--validate-episodes", "4")


def failure(*args: str | Path) -> str:
    result = invoke(*args)
    assert result.exit_code == 1, result.stdout + result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr[result.stderr.index("Error: ") :]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a short run, and photos with masks."""
    folder = tmp_path_factory.mktemp("job")
    first = machine("extract", *SHAPES, *BACKBONE, "--store", folder / "s.zarr")
    assert (first["images"], first["written_shards"], first["reused_shards"]) == (160, 10, 0)
    run = machine("train", "--store", folder / "s.zarr", "--run-dir", folder / "run", "--steps", "4", *QUICK)
    assert (run["steps"], run["finished"]) == (4, True)
    from pipeline.datasets.shapes import Shapes

    data = Shapes(size=90)
    for name, i in zip("abc", data.index.split(0, "test").by_class[0], strict=False):
        data.image(i).save(folder / f"{name}.jpg")
        Image.fromarray((data.label(i) == 1).astype("uint8")).save(folder / f"{name}.png")
    return folder


def test_extract_again_does_nothing_and_says_so(job: Path) -> None:
    again = invoke("extract", *SHAPES, *BACKBONE, "--store", job / "s.zarr")
    assert "160 images" in again.stdout
    assert "10 of 10 shards were there" in again.stdout


def test_extract_refuses_a_store_of_another_recipe(job: Path) -> None:
    other = ("--backbone", "squeezenet1_1", "--image-size", "96")
    message = failure("extract", *SHAPES, *other, "--store", job / "s.zarr")
    assert "image_size" in message
    assert "64" in message
    assert "96" in message
    with pytest.raises(StoreMismatch):
        raise_cause("extract", *SHAPES, *other, "--store", job / "s.zarr")


def raise_cause(*args: str | Path) -> None:
    """Raise the error behind a command's message."""
    with pytest.raises(groups.Failure) as caught:
        cli.main.main([str(arg) for arg in args], standalone_mode=False)
    assert caught.value.__cause__ is not None
    raise caught.value.__cause__


def test_dry_run_writes_nothing(tmp_path: Path, job: Path) -> None:
    plan = machine("extract", *SHAPES, *BACKBONE, "--store", tmp_path / "new.zarr", "--dry-run")
    assert not list(tmp_path.iterdir())
    assert (plan["images"], plan["shards"], plan["shards_done"]) == (160, 10, 0)
    stored = machine("store", "info", job / "s.zarr")
    assert stored["bytes"] <= plan["bytes_needed"] < 1.3 * stored["bytes"]
    there = machine("extract", *SHAPES, *BACKBONE, "--store", job / "s.zarr", "--dry-run")
    assert (there["shards_done"], there["bytes_needed"]) == (10, 0)


def test_dry_run_needs_no_weights_and_knows_what_cannot_work(tmp_path: Path) -> None:
    """Sizes follow from the network alone: nothing is downloaded to compute them."""
    network = ("--backbone", "resnet101", "--weights", tmp_path / "not-there.pth")
    plan = machine("extract", *SHAPES, *network, "--store", tmp_path / "new.zarr", "--dry-run")
    assert plan["bytes_needed"] == pytest.approx(160 * (20.9e6 + 400**2), rel=0.01)
    bad = ("--backbone", "squeezenet1_1", "--image-size", "400")
    for dry in ((), ("--dry-run",)):
        message = failure("extract", *SHAPES, *bad, "--store", tmp_path / "new.zarr", *dry)
        assert "work: 388 and 401" in message
    assert not list(tmp_path.iterdir())


def test_without_an_image_size_the_backbone_is_read_at_one_that_works(tmp_path: Path) -> None:
    shown = invoke("extract", *SHAPES, "--backbone", "squeezenet1_1", "--store", tmp_path / "s.zarr", "--dry-run")
    assert shown.exit_code == 0, shown.stderr
    assert "image size 401 px, the nearest to the published 400 that squeezenet1_1 can be read at" in shown.stderr
    quiet = invoke(
        "extract", *SHAPES, "--backbone", "resnet50", "--store", tmp_path / "r.zarr", "--dry-run",
    )  # fmt: skip
    assert "image size" not in quiet.stderr


def test_store_info(job: Path) -> None:
    text = invoke("store", "info", job / "s.zarr").stdout
    assert "160 images, 32 classes" in text
    assert "complete" in text
    info = machine("store", "info", job / "s.zarr")
    assert info["recipe"]["image_size"] == 64
    assert len(info["per_class"]) == 32
    first = info["per_class"][0]
    assert first == {"id": 0, "name": "plain disc", "photos": first["photos"], "held_out_in": [0]}
    assert re.search(rf"plain disc +{first['photos']} +0\n", text)
    assert sum(c["held_out_in"] == [3] for c in info["per_class"]) == 8


def test_checkpoint_info(job: Path) -> None:
    assert "squeezenet1_1" in invoke("checkpoint", "info", job / "run").stdout
    info = machine("checkpoint", "info", job / "run")
    assert info["recipe"]["image_size"] == 64
    assert info["config"]["fold"] == 0


def test_train_goes_on_with_a_finished_run_and_refuses_another(job: Path) -> None:
    shutil.copytree(job / "run", job / "longer")
    more = machine("train", "--store", job / "s.zarr", "--run-dir", job / "longer", "--steps", "5", *QUICK)
    assert (more["resumed_at"], more["steps"]) == (4, 5)
    message = failure("train", "--store", job / "s.zarr", "--run-dir", job / "run", "--fold", "1", *QUICK)
    assert "fold" in message
    assert "another --run-dir" in message


def test_a_new_run_takes_the_default_recipe_and_one_that_goes_on_its_own(job: Path, tmp_path: Path) -> None:
    def values(name: str) -> dict[str, Any]:
        stored = json.loads((tmp_path / name / "config.json").read_text())
        return {choice: stored[choice] for choice in PUBLISHED}

    def train(name: str, *more: object) -> dict[str, Any]:
        return machine("train", "--store", job / "s.zarr", "--run-dir", tmp_path / name, *QUICK, *more)

    train("new", "--steps", "1")
    assert values("new") == dict(RECIPES[DEFAULT_RECIPE])
    train("published", "--steps", "1", "--recipe", "hsnet")
    assert values("published") == dict(PUBLISHED)
    assert train("published", "--steps", "2")["resumed_at"] == 1
    assert values("published") == dict(PUBLISHED)
    refused = ("train", "--store", job / "s.zarr", "--run-dir", tmp_path / "published", *QUICK, "--steps", "2")
    assert "begun with --recipe hsnet" in failure(*refused, "--average", "0.5")
    own = (
        "--recipe",
        "hsnet",
        "--optimiser",
        "adamw",
        "--weight-decay",
        "0.1",
        "--schedule",
        "cosine",
        "--warmup",
        "1",
    )
    own += ("--warmup", "1", "--clip", "2", "--average", "0.5", "--both-directions", "--lr", "0.002")
    train("own", "--steps", "2", *own)
    assert values("own") == {
        "learning_rate": 0.002,
        "optimiser": "adamw",
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup": 1,
        "clip": 2.0,
        "average": 0.5,
        "both_directions": True,
    }
    assert "moving average, decay 0.5" in invoke("checkpoint", "info", tmp_path / "own").stdout
    assert "moving average" not in invoke("checkpoint", "info", tmp_path / "published").stdout
    longer = ("train", "--store", job / "s.zarr", "--run-dir", tmp_path / "own", *QUICK, "--steps", "3")
    assert "cosine schedule ends with its last step" in failure(*longer)


def test_epochs_are_passes_over_the_training_list(job: Path, tmp_path: Path) -> None:
    arguments = ("--store", job / "s.zarr", "--run-dir", tmp_path / "r", "--epochs", "1", "--batch-size", "24")
    # 24 base classes x 2 images = 48 episodes, 24 a step
    assert machine("train", *arguments, "--select-on", "none")["steps"] == 2
    both = ("--store", job / "s.zarr", "--run-dir", tmp_path / "b", *arguments[4:], "--select-on", "none")
    assert machine("train", *both, "--both-directions")["steps"] == 4, "12 episodes are 24 losses"


def test_evaluate_prints_a_table_writes_rows_and_speaks_json(job: Path, tmp_path: Path) -> None:
    arguments = ("--store", job / "s.zarr", "--shots", "1,2", "--episodes", "10")
    shown = invoke("evaluate", "--checkpoint", job / "run", *arguments, "--out", tmp_path / "rows.parquet")
    assert shown.exit_code == 0, shown.stderr
    facts, table, note = shown.stdout.split("\n\n")
    assert "95 % intervals" in note
    assert facts.splitlines()[0].startswith("protocol   default (sha256:")
    lines = table.splitlines()
    assert lines[0].split() == ["1-shot", "2-shot"]
    assert [line.split()[0] for line in lines[2:5]] == ["mIoU", "FB-IoU", "episodes"]
    assert len(lines) == 5 + 8, "one line for each held-out class"
    rows = pq.read_table(tmp_path / "rows.parquet")
    assert len(rows) == 20
    assert re.fullmatch(r"mIoU( +[\d.]+ \[[\d.]+, [\d.]+\]){2}", lines[2])
    result = machine("evaluate", "--checkpoint", job / "run", *arguments)
    assert [scores["shots"] for scores in result["scores"]] == [1, 2]
    assert result["facts"]["method"]["name"] == "hsnet"


def test_one_pass_scores_every_policy_and_fusion(job: Path, tmp_path: Path) -> None:
    """Shapes are drawn, so their masks at the photos' own size are always at hand."""
    arguments = ("--checkpoint", job / "run", "--store", job / "s.zarr", "--episodes", "4", "--shots", "2")
    result = machine("evaluate", *arguments, *SHAPES[1:], "--fusion", "all", "--out", tmp_path / "r.parquet")
    rows = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert {row["fusion"] for row in rows} == {"vote", "logits", "probabilities", "joint"}
    assert all(row["union_original_all"] is not None for row in rows)
    assert result["facts"]["protocol"]["name"] == "default"
    assert result["facts"]["fusions"] == ["vote", "logits", "probabilities", "joint"]


def test_protocols_are_overridden_choice_by_choice(job: Path) -> None:
    arguments = ("--head", "untrained", "--store", job / "s.zarr", "--shots", "1", "--episodes", "4")
    plain = machine("evaluate", *arguments)["facts"]
    named = machine("evaluate", *arguments, "--protocol", "balanced", "--set", "tau=0.4")["facts"]
    assert named["protocol"]["balance"] == "class"
    assert named["protocol"]["tau"] == 0.4
    assert named["protocol_digest"] != plain["protocol_digest"]
    wrong = invoke("evaluate", *arguments, "--set", "tau=high")
    assert wrong.exit_code == 2
    assert "tau must be a number, got 'high'" in wrong.stderr
    assert "at original size need the photos' own masks" in failure(
        "evaluate", *arguments, "--set", "resolution=original"
    )


def test_a_manifest_fixes_the_episodes(job: Path, tmp_path: Path) -> None:
    store = ("--store", job / "s.zarr")
    made = machine(
        "episodes", "make", *store, "--shots", "2", "--episodes", "6", "--seed", "3", "--out", tmp_path / "m"
    )
    (path,) = tmp_path.iterdir()
    facts = machine("evaluate", "--head", "untrained", *store, "--manifest", path)["facts"]
    assert list(facts["manifests"]) == [made[0]["digest"]]
    assert facts["seeds"] == [3]
    both = machine("evaluate", "--head", "untrained", *store, "--manifest", path, "--shots", "1,2")["facts"]
    assert len(both["manifests"]) == 2
    val = tmp_path / "val.parquet"
    machine("episodes", "make", *store, "--role", "val", "--shots", "1", "--episodes", "6", "--out", val)
    of_val = machine("evaluate", "--head", "untrained", *store, "--manifest", val)["facts"]
    assert (of_val["role"], of_val["protocol"]["episodes"]) == ("val", 6)
    refused = invoke("evaluate", "--head", "untrained", *store, "--manifest", path, "--seed", "4")
    assert "--manifest says which episodes" in refused.stderr


def test_a_head_is_tested_on_classes_of_other_data_that_it_has_not_seen(job: Path, tmp_path: Path) -> None:
    arguments = ("--checkpoint", job / "run", "--store", job / "s.zarr", "--episodes", "4", "--transfer")
    shown = invoke("evaluate", *arguments, "--json")
    assert shown.exit_code == 0, shown.stderr
    assert "Tested on 8 classes the head has not seen" in shown.stderr
    own = machine("evaluate", *arguments[:-1])["facts"]["classes"]
    assert json.loads(shown.stdout)["facts"]["classes"] == own, "on its own data: those it held out"


def test_a_head_is_tested_on_its_own_fold_unless_another_is_asked_for(job: Path, tmp_path: Path) -> None:
    """On another fold of the same data it knows the classes, and the user is told."""
    store = ("--store", job / "s.zarr")
    machine("train", *store, "--run-dir", tmp_path / "run", "--fold", "2", "--steps", "1", *QUICK)
    own = invoke("evaluate", "--checkpoint", tmp_path / "run", *store, "--episodes", "2", "--json")
    assert json.loads(own.stdout)["facts"]["fold"] == 2
    assert "Warning" not in own.stderr
    other = invoke("evaluate", "--checkpoint", tmp_path / "run", *store, "--episodes", "2", "--fold", "0")
    assert "Warning: the head was trained on 8 of the 8 classes tested here" in other.stderr
    assert "held out fold 2, not fold 0" in other.stderr
    told = json.loads(
        invoke("evaluate", "--checkpoint", tmp_path / "run", *store, "--episodes", "2", "--fold", "0", "--json").stdout
    )["facts"]["classes_trained_on"]
    assert len(told) == 8


def test_choices_that_move_scores_are_recorded(job: Path, tmp_path: Path) -> None:
    store = ("--store", job / "s.zarr")
    arguments = ("--head", "untrained", *store, "--episodes", "2", "--distinct-supports")
    assert machine("evaluate", *arguments)["facts"]["protocol"]["repeat_supports"] is False
    machine("train", *store, "--run-dir", tmp_path / "run", "--steps", "1", "--boundary", "ignore", *QUICK)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["boundary"] == "ignore"


@pytest.mark.parametrize("head", options.HEADS)
def test_heads_without_a_checkpoint(job: Path, head: str) -> None:
    result = machine("evaluate", "--head", head, "--store", job / "s.zarr", "--episodes", "5", "--shots", "1,2")
    assert result["facts"]["method"]["name"] == head
    (listed,) = (one for one in machine("heads") if one["name"] == head)
    assert result["facts"]["protocol"]["fusion"] == (listed["fusion"] or "vote")
    assert 0 <= result["scores"][0]["miou"] <= 100


def test_what_evaluate_and_train_refuse(job: Path, tmp_path: Path) -> None:
    store = ("--store", job / "s.zarr")
    assert "fold 9" in failure("evaluate", "--head", "untrained", *store, "--fold", "9")
    assert "fold 9" in failure("train", *store, "--run-dir", tmp_path / "r", "--fold", "9")
    assert "did you mean 'contrast'?" in failure("evaluate", "--head", "contrasts", *store)
    few = failure("evaluate", "--head", "untrained", *store, "--shots", "3", "--distinct-supports")
    assert "3" in few
    assert "class" in few
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ("8:1", "'8:1' must be MIN:MAX with 1 <= MIN <= MAX"),
        ("0:4", "'0:4' must be MIN:MAX with 1 <= MIN <= MAX"),
        ("a:b", "'a:b' is neither a whole number nor MIN:MAX such as 1:8"),
        ("1:", "'1:' is neither a whole number nor MIN:MAX such as 1:8"),
        ("1:2:3", "'1:2:3' is neither a whole number nor MIN:MAX such as 1:8"),
        ("-1", "-1 is less than 0"),
        ("two", "'two' is not a whole number"),
        ("999:1000", "--workers 999 is far more than this machine's"),
    ],
)
def test_workers_that_are_no_number_and_no_range(job: Path, tmp_path: Path, workers: str, message: str) -> None:
    refused = invoke("train", "--store", job / "s.zarr", "--run-dir", tmp_path / "r", f"--workers={workers}")
    assert refused.exit_code in (1, 2)
    assert message in " ".join(refused.output.split())
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_features_is_refused(job: Path, tmp_path: Path) -> None:
    store = tmp_path / "96.zarr"
    machine("extract", *SHAPES, "--backbone", "squeezenet1_1", "--image-size", "96", "--store", store)
    with pytest.raises(CheckpointMismatch) as caught:
        raise_cause("evaluate", "--checkpoint", job / "run", "--store", store)
    assert caught.value.differences == {"image_size": (64, 96)}


def test_a_half_written_store_is_not_trained_on(job: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.zarr"
    shutil.copytree(job / "s.zarr", half)
    (half / "_done" / "000003.json").unlink()
    with pytest.raises(StoreIncomplete) as caught:
        raise_cause("train", "--store", half, "--run-dir", tmp_path / "r")
    assert caught.value.missing == (3,)
    assert "1 missing" in invoke("store", "info", half).stdout
    again = machine("extract", *SHAPES, *BACKBONE, "--store", half)
    assert (again["written_shards"], again["reused_shards"]) == (1, 9)


def test_online_features_train_without_a_store(tmp_path: Path) -> None:
    online = ("--features", "online", "--dataset", *SHAPES, *BACKBONE)
    done = machine("train", *online, "--run-dir", tmp_path / "r", "--steps", "2", *QUICK, "--select-on", "none")
    assert done["steps"] == 2
    assert machine("checkpoint", "info", tmp_path / "r")["recipe"]["precision"] == "float32"


def test_predict(job: Path, tmp_path: Path) -> None:
    support = ("--support", f"{job / 'a.jpg'}:{job / 'a.png'}", "--support", f"{job / 'b.jpg'}:{job / 'b.png'}")
    result = machine("predict", "--checkpoint", job / "run", *support, "--query", job / "c.jpg", "--out", tmp_path)
    assert result["shots"] == 2
    assert result["written"][0]["mask"] == str(tmp_path / "c_mask.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "c_mask.png", "c_overlay.jpg", "predict.json", "results.jsonl",
    ]  # fmt: skip


def test_predict_reports_a_corrupt_photo_does_the_rest_and_fails(job: Path, tmp_path: Path) -> None:
    queries = tmp_path / "in"
    queries.mkdir()
    for name in ("1.jpg", "3.jpg"):
        shutil.copy(job / "c.jpg", queries / name)
    (queries / "2.jpg").write_bytes(b"no picture")
    support = ("--support", f"{job / 'a.jpg'}:{job / 'a.png'}")
    done = invoke("predict", "--checkpoint", job / "run", *support, "--query", queries, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "2 of 3 photos" in done.stdout
    assert "Error: 1 of 3 photos could not be used" in done.stderr
    assert "2.jpg" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "1_mask.png", "1_overlay.jpg", "3_mask.png", "3_overlay.jpg", "predict.json", "results.jsonl",
    ]  # fmt: skip


def test_what_predict_refuses(job: Path, tmp_path: Path) -> None:
    base = ("predict", "--checkpoint", job / "run", "--query", job / "c.jpg", "--out", tmp_path / "out")
    good = ("--support", f"{job / 'a.jpg'}:{job / 'a.png'}")
    assert "no mask" in failure(*base, "--support", f"{job / 'a.jpg'}:{tmp_path / 'gone.png'}")
    assert "sha256" in failure(*base, *good, "--weights", "random:1")
    assert "no photo" in failure(*base[:3], *good, "--query", tmp_path, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_import_refuses_a_file_that_would_run_code(tmp_path: Path) -> None:
    import pickle

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Attack(), protocol=2))
    message = failure("checkpoint", "import", tmp_path / "evil.pt", tmp_path / "out.safetensors")
    assert "evil.pt" in message
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]


@pytest.mark.ray
def test_ray_does_the_same_work_and_stdout_holds_json_only(job: Path, tmp_path: Path) -> None:
    """In a process of its own, as Ray writes to the process's stdout past Python's."""
    arguments = ("extract", *SHAPES, *BACKBONE, "--store", tmp_path / "s.zarr", "--workers", "2", "--json")
    process = start(*arguments)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert json.loads(out)["written_shards"] == 10
    files = sorted(
        path.relative_to(job / "s.zarr") for path in (job / "s.zarr").glob("level*/c/**/*") if path.is_file()
    )
    assert len(files) == 30
    for path in files:
        assert (job / "s.zarr" / path).read_bytes() == (tmp_path / "s.zarr" / path).read_bytes(), path


def start(*args: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, args)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with Ctrl-C ignored, and children inherit that: the tests may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupt_when(process: subprocess.Popen[str], there: Path) -> tuple[str, str]:
    """Press Ctrl-C once a file has appeared; stdout and stderr of the end."""
    deadline = time.monotonic() + 120
    while not there.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=120)


def test_ctrl_c_while_training_leaves_a_run_that_goes_on(job: Path, tmp_path: Path) -> None:
    """The interrupted and resumed run ends in the same weights as one that was left alone."""
    arguments = ("train", "--store", job / "s.zarr", *QUICK, "--steps", "30", "--select-on", "none")
    process = start(*arguments, "--run-dir", tmp_path / "cut")
    out, err = interrupt_when(process, tmp_path / "cut" / "metrics.jsonl")
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "The run is saved: give the same command again" in err
    assert "of 30 steps" in out
    resumed = machine(*arguments, "--run-dir", tmp_path / "cut")
    assert 0 < resumed["resumed_at"] < 30
    machine(*arguments, "--run-dir", tmp_path / "whole")
    cut, whole = (load_file(tmp_path / name / "last.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_ctrl_c_while_extracting_keeps_what_is_done(tmp_path: Path) -> None:
    arguments = ("extract", *SHAPES, *BACKBONE, "--store", tmp_path / "s.zarr")
    process = start(*arguments)
    out, err = interrupt_when(process, tmp_path / "s.zarr" / "_done" / "000001.json")
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Finished shards are kept: run the same command again" in err
    assert out == ""
    again = machine(*arguments)
    assert again["reused_shards"] >= 2
    assert again["reused_shards"] + again["written_shards"] == 10
