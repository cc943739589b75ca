"""Prediction on photos: sizes, votes, names, and queries or supports that are not as they should be."""

from __future__ import annotations

import json
import os
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from fakes import predict_with
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hsnet.backbone import BACKBONES, FrozenBackbone
from hsnet.correlation import build_pyramid
from hsnet.errors import CheckpointMismatch, ConfigError, DataError, DeviceMemoryError
from hsnet.fusion import vote
from hsnet.model import HSNet, predict_mask, resize_logits
from pipeline.bank.reading import Reader
from pipeline.datasets.images import network_image, read_photo, resize_label
from pipeline.datasets.own_support import read_support
from pipeline.datasets.queries import Queries, list_queries, names_of
from pipeline.datasets.shapes import Shapes
from pipeline.features.recipe import Recipe
from pipeline.features.weights import Weights, load_weights
from pipeline.heads.checkpoint import Checkpoint, CheckpointInfo, load_checkpoint, save_checkpoint
from pipeline.predict.stage import PredictSummary, read_results, subfolder, tasks_of, write_results
from pipeline.predict.writing import Result, Task, Work, decisions_in

SIZE = 64


@pytest.fixture(scope="module")
def weights() -> Weights:
    return load_weights("squeezenet1_1")


@pytest.fixture(scope="module")
def checkpoint(weights: Weights, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """An untrained head, its last bias set so that it answers with some object and some background."""
    torch.manual_seed(3)
    layers = list(reversed(BACKBONES["squeezenet1_1"].layers))
    head = HSNet(layers).eval()
    read = read_support(*support(photos, "a"))
    levels = FrozenBackbone("squeezenet1_1", weights.state_dict)(
        torch.from_numpy(network_image(read.photo, SIZE))[None]
    )
    with torch.no_grad():
        logits = head(build_pyramid(levels, levels, torch.ones(1, SIZE, SIZE)))
        head.decode_fine[-1].bias[0] += (logits[:, 1] - logits[:, 0]).median()
    recipe = Recipe.of("squeezenet1_1", weights.sha256, SIZE, "int8")
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    info = CheckpointInfo(recipe=recipe, learner={"layers": layers}, step=0, origin="test")
    save_checkpoint(path, head.state_dict(), info)
    return load_checkpoint(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos of one class with masks, of different sizes and shapes."""
    folder = tmp_path_factory.mktemp("photos")
    data = Shapes(size=96)
    images = data.index.split(0, "test").by_class[0]
    for name, i, size in (("a", images[0], (96, 96)), ("b", images[1], (150, 80)), ("c", images[2], (70, 111))):
        data.image(i).resize(size).save(folder / f"{name}.jpg", quality=95)
        mask = resize_label((data.label(i) == 1).astype(np.uint8) * 255, size[::-1])
        Image.fromarray(mask).save(folder / f"{name}.png")
    return folder


def support(photos: Path, name: str) -> tuple[Path, Path]:
    return photos / f"{name}.jpg", photos / f"{name}.png"


def test_equals_the_stages_by_hand(checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path) -> None:
    """Two supports: K one-shot predictions at the photo's own size, then the vote."""
    supports = [support(photos, "a"), support(photos, "c")]
    summary = predict_with(checkpoint, weights, supports, [photos / "b.jpg"], tmp_path)

    backbone = FrozenBackbone("squeezenet1_1", weights.state_dict)

    def levels(photo: Image.Image) -> list[torch.Tensor]:
        return backbone(torch.from_numpy(network_image(photo, SIZE))[None])

    query = read_photo(photos / "b.jpg")
    votes = []
    with torch.no_grad():
        for pair in supports:
            read = read_support(*pair)
            mask = torch.from_numpy(resize_label(read.mask.astype(np.uint8), (SIZE, SIZE)))[None]
            logits = checkpoint.learner()(build_pyramid(levels(query), levels(read.photo), mask))
            votes.append(predict_mask(resize_logits(logits, (80, 150))))
    expected = vote(torch.stack(votes))[0].numpy()
    assert 0 < expected.mean() < 1, "a test of masks that are all one value would prove little"

    (prediction,) = summary.written
    with Image.open(prediction.mask) as written:
        assert written.mode == "L"
        assert np.array_equal(np.asarray(written), expected * np.uint8(255))
    assert prediction.object_share == pytest.approx(expected.mean())
    assert summary.shots == 2


def test_masks_and_overlays_have_the_size_of_their_photo(
    checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path
) -> None:
    queries = list_queries([photos / "b.jpg", photos / "c.jpg"])
    summary = predict_with(checkpoint, weights, [support(photos, "a")], queries, tmp_path / "new" / "out")
    sizes = [(read_photo(p.mask).size, read_photo(p.overlay).size) for p in summary.written]
    assert sizes == [((150, 80), (150, 80)), ((70, 111), (70, 111))]
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == [
        "b_mask.png", "b_overlay.jpg", "c_mask.png", "c_overlay.jpg", "results.jsonl",
    ]  # fmt: skip


def test_support_features_are_computed_once(
    checkpoint: Checkpoint, weights: Weights, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []
    original = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, photo: seen.append(photo.size) or original(self, photo))
    queries = [photos / "b.jpg", photos / "c.jpg"]
    predict_with(checkpoint, weights, [support(photos, "a")], queries, tmp_path)
    assert seen == [(96, 96), (150, 80), (70, 111)]


def test_a_corrupt_photo_in_the_middle_is_listed_and_the_rest_done(
    checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ac":
        (folder / f"{name}.jpg").write_bytes((photos / f"{name}.jpg").read_bytes())
    (folder / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:900])
    events: list[tuple[int, int]] = []
    queries = list_queries([folder])
    out = tmp_path / "out"
    summary = predict_with(
        checkpoint, weights, [support(photos, "a")], queries, out, on_event=lambda *event: events.append(event)
    )
    assert [p.query.name for p in summary.written] == ["a.jpg", "c.jpg"]
    ((failed, reason),) = summary.failed
    assert failed.name == "b.jpg"
    assert str(failed) in reason
    assert events == [(1, 3), (2, 3), (3, 3)]
    assert len(list(out.glob("*_*"))) == 4


def test_weights_of_another_training_are_refused(checkpoint: Checkpoint, photos: Path, tmp_path: Path) -> None:
    other = load_weights("squeezenet1_1", "random:1")
    with pytest.raises(CheckpointMismatch) as caught:
        predict_with(checkpoint, other, [support(photos, "a")], [photos / "b.jpg"], tmp_path / "out")
    assert caught.value.differences == {"weights": (checkpoint.recipe.weights, other.sha256)}
    assert not (tmp_path / "out").exists()


def test_bad_supports_stop_before_anything_is_written(
    checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.png"
    Image.new("L", (96, 96)).save(empty)
    for pair, said in (
        ((photos / "a.jpg", empty), "marks no object"),
        ((photos / "a.jpg", photos / "b.png"), "150 x 80"),
        ((photos / "gone.jpg", photos / "a.png"), r"gone\.jpg"),
    ):
        with pytest.raises(DataError, match=said):
            predict_with(checkpoint, weights, [support(photos, "a"), pair], [photos / "b.jpg"], tmp_path / "out")
    with pytest.raises(ConfigError, match="Give either --bank or --support"):
        predict_with(checkpoint, weights, [], [photos / "b.jpg"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fusion", ["logits", "probabilities", "joint"])
def test_supports_may_be_combined_otherwise(
    checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path, fusion: str
) -> None:
    """One support is its own answer; a threshold marks less the higher it is."""

    def share(folder: str, names: str, **how: Any) -> float:
        supports = [support(photos, name) for name in names]
        summary = predict_with(checkpoint, weights, supports, [photos / "b.jpg"], tmp_path / folder, **how)
        return summary.written[0].object_share

    assert share("one", "a", fusion=fusion) == share("vote", "a")
    both = share("two", "ac", fusion=fusion)
    assert share("more", "ac", fusion=fusion, tau=0.4) > both > share("less", "ac", fusion=fusion, tau=0.6)


def test_query_may_be_the_support(checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path) -> None:
    assert predict_with(checkpoint, weights, [support(photos, "a")], [photos / "a.jpg"], tmp_path).written


def test_out_folder_is_not_the_query_folder(
    checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path
) -> None:
    before = sorted(photos.iterdir())
    with pytest.raises(ConfigError, match="query's own folder"):
        predict_with(checkpoint, weights, [support(photos, "a")], [photos / "b.jpg"], photos)
    assert sorted(photos.iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        predict_with(checkpoint, weights, [support(photos, "a")], [photos / "b.jpg"], tmp_path / "file")


def test_a_link_in_the_out_folder_is_replaced_not_followed(
    checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    out = tmp_path / "out"
    out.mkdir()
    (out / "b_mask.png").symlink_to(precious)
    predict_with(checkpoint, weights, [support(photos, "a")], [photos / "b.jpg"], out)
    assert precious.read_text() == "keep me"
    assert not (out / "b_mask.png").is_symlink()


def test_hostile_names(checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path) -> None:
    """Whatever a file is called, its outputs stay in the folder and can be told apart."""
    folder = tmp_path / "in"
    folder.mkdir()
    names = [
        "x" * 240 + ".jpg",
        "x" * 240 + "2.jpg",
        "-rf.jpg",
        "a\nb.jpg",
        "a\\b.jpg",
        "….jpg",
        os.fsdecode(b"\xff.jpg"),
    ]
    for name in names:
        (folder / name).write_bytes((photos / "a.jpg").read_bytes())
    out = tmp_path / "out"
    summary = predict_with(checkpoint, weights, [support(photos, "a")], list_queries([folder]), out)
    assert not summary.failed
    assert len(list(out.iterdir())) == 2 * len(names) + 1
    assert all(p.mask.parent == out and p.mask.is_file() for p in summary.written)


def test_output_names() -> None:
    queries = [Path("in/dog.jpg"), Path("in/dog.png"), Path("in/DOG-2.jpg"), Path("other/dog.jpg"), Path("..jpg")]
    assert list(names_of(queries)) == ["dog", "dog-2", "DOG-2-2", "dog-3", "query"]


def test_list_queries(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", "deep.jpg/c.jpg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [p.name for p in list_queries([tmp_path / "in", tmp_path / "in" / "notes.txt"])] == [
        "a.png", "b.JPG", "notes.txt",
    ]  # fmt: skip
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no photo.*\.jpg"):
        list_queries([tmp_path / "none"])
    with pytest.raises(DataError, match="does not exist"):
        list_queries([tmp_path / "gone"])


def test_masks_beside_photos_are_no_queries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A class folder holds 1.jpg with its mask 1.png; a PNG photo of its own is a query."""
    for name in ("1.jpg", "1.png", "2.jpg", "photo.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [path.name for path in list_queries([tmp_path])] == ["1.jpg", "2.jpg", "photo.png"]
    assert "1 PNG file beside a photo of the same name taken as a mask, not as a query: 1.png" in caplog.text
    assert list(list_queries([tmp_path / "1.png"])) == [tmp_path / "1.png"], "asked for by name"


def run(checkpoint: Checkpoint, weights: Weights, photos: Path, out: Path, **how: Any) -> PredictSummary:
    queries = [photos / "b.jpg", photos / "c.jpg"]
    return predict_with(checkpoint, weights, [support(photos, "a")], queries, out, **how)


def masks_in(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in out.rglob("*_*") if path.is_file()}


def test_what_is_there_is_kept_and_the_rest_made(
    checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path
) -> None:
    """A whole file is a new one (renamed into place), so its inode tells whether it was written again."""

    class Killed(BaseException):
        pass

    def die(done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(checkpoint, weights, photos, tmp_path, on_event=die)
    before = masks_in(tmp_path)
    assert set(before) == {"b_mask.png", "b_overlay.jpg"}
    summary = run(checkpoint, weights, photos, tmp_path)
    after = masks_in(tmp_path)
    assert (summary.photos, summary.kept, summary.unusable) == (2, 1, 0)
    assert {name: after[name] for name in before} == before
    assert set(after) == {"b_mask.png", "b_overlay.jpg", "c_mask.png", "c_overlay.jpg"}
    fresh = run(checkpoint, weights, photos, tmp_path / "fresh")
    assert [item.object_share for item in summary.written] == [item.object_share for item in fresh.written]
    assert run(checkpoint, weights, photos, tmp_path).kept == 2


def test_a_lack_of_memory_is_told_and_the_masks_before_it_stay(
    checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no photo that cannot be used: the next one would find no more memory."""
    taken = Work.look

    def look(self: Work, model: Any, path: Path, photo: Image.Image) -> Any:
        if path.name == "c.jpg":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return taken(self, model, path, photo)

    with monkeypatch.context() as patched:
        patched.setattr(Work, "look", look)
        with pytest.raises(DeviceMemoryError, match=r"smaller --image-size or --tile, or .*written so far are whole"):
            run(checkpoint, weights, photos, tmp_path)
    assert set(masks_in(tmp_path)) == {"b_mask.png", "b_overlay.jpg"}
    summary = run(checkpoint, weights, photos, tmp_path)
    assert (summary.photos, summary.kept, summary.unusable) == (2, 1, 0)


def test_masks_of_other_settings_are_made_anew(
    checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path
) -> None:
    own = tmp_path / "photos"
    own.mkdir()
    for path in photos.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "out"
    run(checkpoint, weights, own, out)
    assert run(checkpoint, weights, own, out, tau=0.3, fusion="logits").kept == 0
    assert run(checkpoint, weights, own, out, tau=0.3, fusion="logits").kept == 2
    (out / "b_mask.png").write_bytes((out / "b_mask.png").read_bytes()[:30])  # not whole
    (out / "c_overlay.jpg").unlink()
    assert run(checkpoint, weights, own, out, tau=0.3, fusion="logits").kept == 0
    Image.new("RGB", (40, 40)).save(own / "b.jpg")  # another photo of that name
    assert run(checkpoint, weights, own, out, tau=0.3, fusion="logits").kept == 1


def test_what_somebody_accepted_stays(
    checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(checkpoint, weights, photos, tmp_path)
    before = masks_in(tmp_path)
    decisions = {str(photos / "b.jpg"): "corrected", str(photos / "c.jpg"): "rejected"}
    (tmp_path / "review.json").write_text(json.dumps({"format": 1, "photos": decisions}))
    assert run(checkpoint, weights, photos, tmp_path, tau=0.3, fusion="logits").kept == 1
    after = masks_in(tmp_path)
    assert {name for name in before if before[name] == after[name]} == {"b_mask.png", "b_overlay.jpg"}
    text = PngInfo()
    text.add_text("hsnet", json.dumps({"made": "", "object_share": 0.1, "classes": {"mug": {}}}))
    Image.new("L", (150, 80)).save(tmp_path / "b_mask.png", pnginfo=text)
    before = masks_in(tmp_path)
    assert run(checkpoint, weights, photos, tmp_path).unusable == 1
    assert masks_in(tmp_path)["b_mask.png"] == before["b_mask.png"]
    assert "was accepted or corrected with other classes (mug)" in caplog.text
    (tmp_path / "review.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        run(checkpoint, weights, photos, tmp_path)


def test_decisions_on_many_photos_are_read(tmp_path: Path) -> None:
    said = {f"/photos/a-long-name-of-a-folder/photo-{number}.jpg": "accepted" for number in range(20_000)}
    (tmp_path / "review.json").write_text(json.dumps({"format": 1, "photos": said}))
    assert decisions_in(tmp_path) == said
    assert decisions_in(tmp_path / "none") == {}


def test_masks_only(checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path) -> None:
    summary = run(checkpoint, weights, photos, tmp_path, overlay=False)
    assert set(masks_in(tmp_path)) == {"b_mask.png", "c_mask.png"}
    assert [item.overlay for item in summary.written] == [None, None]
    run(checkpoint, weights, photos, tmp_path)
    assert len(masks_in(tmp_path)) == 4
    run(checkpoint, weights, photos, tmp_path, overlay=False, tau=0.4)
    assert set(masks_in(tmp_path)) == {"b_mask.png", "c_mask.png"}, "an overlay of other masks would lie"


def test_many_photos_go_into_subfolders(
    checkpoint: Checkpoint, weights: Weights, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.predict.stage.PER_FOLDER", 1)
    summary = run(checkpoint, weights, photos, tmp_path)
    assert {item.mask.parent.parent for item in summary.written} == {tmp_path}
    assert {len(item.mask.parent.name) for item in summary.written} == {2}
    assert run(checkpoint, weights, photos, tmp_path).kept == 2


def test_subfolders_stay_small() -> None:
    for photos, digits in ((10_000, 0), (10_001, 2), (1_000_000, 2), (1_000_001, 4)):
        assert len(subfolder("dog", photos)) == digits
    filled = Counter(subfolder(f"photo-{number}", 200_000) for number in range(200_000))
    assert len(filled) == 256
    assert max(filled.values()) < 1.2 * 200_000 / 256


def test_results_are_a_stream_and_no_list(tmp_path: Path) -> None:
    """A pipe that makes nothing: after each result the one before is gone."""
    alive: list[weakref.ref[Result]] = []
    most = 0

    def pipe(work: Work, tasks: Iterator[Task]) -> Iterator[Result]:
        nonlocal most
        for task in tasks:
            result = Result(task, {}, 0.5)
            alive.append(weakref.ref(result))
            yield result
            del result
            most = max(most, sum(one() is not None for one in alive[-50:]))

    queries = Queries()
    queries.add(tmp_path, [f"{number}.jpg" for number in range(1000)])
    lines = tmp_path / "results.jsonl"
    assert write_results(pipe(cast(Any, None), tasks_of(queries, tmp_path, True)), lines, 1000) == (0, 0)
    assert most <= 2
    assert len(list(read_results(lines))) == 1000


def test_a_million_names_are_held_as_names(tmp_path: Path) -> None:
    queries = Queries()
    tracemalloc.start()
    queries.add(tmp_path, [f"photo-{number:07d}.jpg" for number in range(20_000)])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / 20_000 < 100
    assert queries[-1] == tmp_path / "photo-0019999.jpg"
    assert queries[1:3] == [tmp_path / "photo-0000001.jpg", tmp_path / "photo-0000002.jpg"]
    queries.add(tmp_path / "more", ["a.jpg"])
    assert [queries[19_999].name, queries[20_000]] == ["photo-0019999.jpg", tmp_path / "more" / "a.jpg"]


def test_files_of_results_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of results"):
        list(read_results(tmp_path / "none.jsonl"))
    (tmp_path / "cut.jsonl").write_text('{"query": "a.jpg", "mas')
    with pytest.raises(DataError, match="cut off"):
        list(read_results(tmp_path / "cut.jsonl"))
