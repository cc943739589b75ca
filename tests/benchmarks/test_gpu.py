"""The GPU benchmark on a CPU, tiny: every part runs, failures are rows, what is done is written whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import table as readme_table
from benchmarks import timing
from benchmarks.gpu import blocks, facts, run, shard, table
from benchmarks.gpu.measuring import Bench, Memory, attempt
from benchmarks.gpu.product import product
from hsnet.conv4d import CenterPivotConv4d

SCRIPT = timing.ROOT / "benchmarks" / "gpu" / "run.py"
TINY = ("--device=cpu", "--size=64", "--quick")
HIDDEN = """
import runpy, sys
hidden = set("ray zarr numcodecs click rich safetensors pyarrow yaml pycocotools scipy tensorboardX timm".split())
hidden |= {"google_crc32c", "cluster", "commands", "cli"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *args):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, *args)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def bench(*arguments: str, backbone: str = "resnet50") -> Bench:
    return Bench(run.parse([*TINY, *arguments]), torch.device("cpu"), backbone)


@pytest.mark.slow
def test_all_parts_run_with_torch_and_torchvision_alone(tmp_path):
    out = tmp_path / "gpu.json"
    chosen = ["--parts=all", "--backbones=resnet50", "--work=train,eval5", "--ways=baseline,exact,fastest"]
    command = [sys.executable, "-c", HIDDEN, str(SCRIPT), *TINY, *chosen, "--peak-tflops=1", f"--out={out}"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "say nothing about a GPU" in done.stdout
    (stored,) = timing.read(out)["runs"]
    assert set(stored["switches"]) >= {"cudnn.benchmark"}
    found = {one["work"]: one for one in stored["measurements"]}
    learned = {"train2", "eval5x1", "sparse-train2", "sparse-evaluate2"}
    layers = {"conv-squeeze-8x8-1", "conv-squeeze-8x8-2", "conv-squeeze-8x8-3", "conv-mix-8x8"}
    layers |= {"conv-squeeze-4x4-1", "conv-mix-4x4"}
    others = {"blocks-float32", "profile-float32", "blocks-bfloat16", "profile-bfloat16", "agreement"}
    others |= {"agreement-features", "repeat", "copies1", "copies4", "files", "codec", "prefetch", "product"}
    assert set(found) == learned | layers | others

    for work in ("train2", "eval5x1"):
        ways = found[work]["variants"]
        assert set(ways) == {"baseline", "exact", "fastest"}
        assert ways["baseline"]["ratio"]["of_medians"] == 1
        assert ways["exact"]["logits_diff"] < 2e-2
        assert 0 < ways["exact"]["share_of_peak"] < 1
        assert all(way["episodes_per_s"] > 0 for way in ways.values())
    assert found["sparse-train2"]["variants"]["sparse"]["logits_diff"] < 1e-6

    agree = found["agreement"]["rows"]
    assert 0 < agree["device, float32, every position: logits"]["value"] < 1e-6
    assert agree["device, bfloat16, every position: logits"]["value"] < 1e-2
    assert agree["device, float32, every position: gradients"]["value"] < 1e-5 * agree["largest gradient"]["value"]
    assert found["agreement-features"]["rows"]["device, float32"]["value"] < 1e-6
    assert {row["value"] for row in found["repeat"]["rows"].values()} == {0}  # a CPU repeats itself
    assert found["codec"]["rows"]["largest difference from the host's decoding"]["value"] == 0
    # What cannot be measured says why.
    assert found["copies1"]["rows"]["pinned"] == {"failed": "needs CUDA"}
    assert "No module named" in found["files"]["rows"]["project's store, crc32c"]["failed"]
    assert "needs zarr" in found["product"]["rows"]["product"]["failed"]
    failed = [row for one in found.values() for row in one.get("rows", {}).values() if "failed" in row]
    assert len(failed) == 5, failed
    assert found["prefetch"]["rows"]["read ahead, pageable"]["episodes_per_s"] > 0
    assert "conv2d" in found["profile-float32"]["rows"]["convolutions called"]["note"]

    text = out.with_suffix(".md").read_text()
    assert text.count("\n| ") > 100
    assert "| left out: needs zarr" in text
    assert "train2" not in readme_table.table(timing.newest([out]))  # README's table is of 400 px


@pytest.mark.slow
def test_the_product_is_measured_where_it_is_installed():
    options = bench("--train-batch=2", backbone="squeezenet1_1")
    found = {one["work"]: one for one in product(options)}
    assert set(found) == {"extract", "fit-int8", "fit-coded", "evaluate-int8", "resume"}
    rows = [row for one in found.values() for row in one["rows"].values()]
    assert not [row for row in rows if "failed" in row]
    assert all(row["value"] > 0 for row in rows if row["unit"] != "% of weights differ")
    assert found["resume"]["rows"]["float32"]["value"] == 0  # to the bit, on a CPU


def test_without_a_gpu_the_script_says_how_to_try_it():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="--device cpu"):
        run.parse([])


@pytest.mark.parametrize("arguments", [("--parts=learner,speed",), ("--ways=fast",)])
def test_unknown_parts_and_ways_are_refused(arguments):
    with pytest.raises(SystemExit, match=r"Unknown (part: speed|way: fast)\. Choose of: .* Nothing was run"):
        run.parse([*TINY, *arguments])


def test_a_way_that_runs_out_of_memory_is_a_row_and_the_others_go_on(monkeypatch):
    from benchmarks.gpu import learner, ways

    class Large(ways.PublishedWay):
        def step(self) -> float:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.5 GiB.\nmore")

    monkeypatch.setattr(ways, "PublishedWay", Large)
    options = bench("--work=train", "--ways=baseline,exact")
    (measured,) = learner.learner(options)
    assert measured["variants"]["baseline"]["failed"].startswith("out of memory: CUDA out of memory")
    assert measured["variants"]["exact"]["episodes_per_s"] > 0
    assert "ratio" not in measured["variants"]["exact"]
    described = {"machine": {"cpu": "x"}, "versions": {}, "date": "d", "commit": "c", "measurements": [measured]}
    assert "| published way, float32 | – | – | – | – | – | out of memory: CUDA" in table.markdown(described)
    # README's table can be made of it.
    run_facts = {"machine": {"gpu": "GPU"}, "versions": {"torch": "2"}, "date": "2026-01-01", "commit": "c"}
    key = ("cuda", "resnet50", "train2", readme_table.SIZE)
    assert "GPU" in readme_table.table({key: {**measured, "run": run_facts}})


def test_a_way_that_fails_while_it_is_timed_is_left_out():
    calls = []

    def breaks() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("device-side assert")

    rows = bench().rows({"good": lambda: None, "bad": breaks})
    assert rows["bad"] == {"failed": "RuntimeError: device-side assert"}
    assert rows["good"]["unit"] == "ms"
    assert attempt(lambda: 1 / 0) == (None, "ZeroDivisionError: division by zero")


def test_memory_counts_the_private_pool_of_a_graph():
    """A graph's pool stays reserved, though nothing in it is allocated any more."""
    state = {"allocated": 100, "reserved": 200, "free": 1000, "peak": 0, "reserved_peak": 0}
    cuda = SimpleNamespace(
        synchronize=lambda _: None,
        memory_allocated=lambda _: state["allocated"],
        memory_reserved=lambda _: state["reserved"],
        mem_get_info=lambda _: (state["free"], 2000),
        reset_peak_memory_stats=lambda _: state.update(peak=state["allocated"], reserved_peak=state["reserved"]),
        max_memory_allocated=lambda _: state["peak"],
        max_memory_reserved=lambda _: state["reserved_peak"],
    )
    memory = Memory(torch.device("cuda"), cuda)
    state.update(allocated=110, reserved=700, free=480)  # captured
    memory.begin()
    assert memory.read() == {"peak_bytes": 10, "reserved_bytes": 500, "device_bytes": 520}


def test_facts_come_from_nvidia_smi_or_are_unknown(tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '570.1, 1980, 1980, 2619, 700.00, 120.5, 40, 0x0, Enabled'\n")
    program.chmod(0o755)
    said = facts.asked(str(program))
    assert (said["driver"], said["clock_mhz"], said["power_limit_w"]) == ("570.1", "1980", "700.00")
    program.write_text("#!/bin/sh\necho a, b\necho c, d\n")  # two GPUs, and nobody says which is meant
    assert set(facts.asked(str(program)).values()) == {"unknown"}
    assert set(facts.asked(str(tmp_path / "none")).values()) == {"unknown"}
    assert facts.gpu_facts(torch.device("cpu")) == {}


@pytest.mark.parametrize(("side", "grid", "stride"), [(3, (5, 6), 2), (5, (13, 13), 4), (3, (2, 2), 1), (3, (1, 1), 1)])
def test_rows_are_the_same_convolution(side, grid, stride):
    torch.manual_seed(0)
    layer = CenterPivotConv4d(3, 4, side, stride).double()
    volume = torch.randn(2, 3, *grid, 6, 7, dtype=torch.float64, requires_grad=True)
    wanted = layer(volume)
    wanted.square().sum().backward()
    gradients = [volume.grad, *(one.grad.clone() for one in layer.parameters())]
    layer.zero_grad()
    rows = blocks._rows_of(volume.detach()).requires_grad_()
    found = blocks.RowsConv4d(layer)(rows)
    found.square().sum().backward()
    torch.testing.assert_close(found.permute(0, 3, 1, 2, 4, 5), wanted, rtol=0, atol=1e-12)
    ours = [rows.grad.permute(0, 3, 1, 2, 4, 5), *(one.grad for one in layer.parameters())]
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_the_small_store_file_keeps_images_and_notices_damage(tmp_path):
    shapes, path = [(2, 3, 3, 4), (1, 2, 2, 8)], tmp_path / "features.bin"
    images = [[torch.randint(-127, 128, shape, dtype=torch.int8) for shape in shapes] for _ in range(3)]
    shard.write(path, images)
    reader = shard.Reader(path, shapes)
    out = reader.empty(2)
    reader.batch([2, 0], out)
    for level in range(2):
        assert torch.equal(out[level], torch.stack([images[2][level], images[0][level]]))
    damaged = bytearray(path.read_bytes())
    damaged[5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="checksum of image 0"):
        shard.Reader(path, shapes).read(0, out, 0)
    path.write_bytes(damaged[-30:])
    with pytest.raises(ValueError, match="cut off"):
        shard.Reader(path, shapes)


def test_the_hour_is_under_55_minutes_and_has_every_part():
    assert sum(step.seconds for step in run.HOUR) < run.LONGEST == 55 * 60
    assert {step.part for step in run.HOUR} == set(run.PARTS)
    for step in run.HOUR:
        run.parse(["--device=cpu", "--parts", step.part, *step.arguments])


@pytest.mark.slow
def test_a_part_that_passes_its_time_is_cut_and_what_it_measured_is_kept(tmp_path, capsys):
    out = tmp_path / "hour.json"
    described = {"date": "d", "commit": "c", "machine": {"cpu": "x"}, "versions": {}}
    results = run.Results(described, out)
    arguments = [*TINY, "--backbones=resnet50", f"--out={out}", "--date=d"]
    steps = [run.Step("copies", 60), run.Step("copies", 0), run.Step("conv", 1)]
    run.run_hour(steps, results, arguments, scratch=tmp_path)
    (stored,) = json.loads(out.read_text())["runs"]
    found = {one["work"]: one for one in stored["measurements"]}
    assert {"copies1", "copies4", "copies", "conv"} == set(found)
    assert "left out" in found["copies"]["rows"]["copies"]["failed"]
    assert "cut: not done after 1 s" in found["conv"]["rows"]["conv"]["failed"]
    text = out.with_suffix(".md").read_text()
    assert "cut: not done after 1 s" in text
    assert "GB/s" in text
    assert sorted(one.name for one in tmp_path.iterdir()) == ["hour.json", "hour.md"]  # no scratch is left


@pytest.mark.slow
def test_an_interrupted_hour_has_written_what_was_done(tmp_path):
    out = tmp_path / "hour.json"
    command = [sys.executable, str(SCRIPT), *TINY, "--hour", "--parts=copies,conv", "--repeats=2", f"--out={out}"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=alone) as hour:
        assert hour.stdout is not None
        for line in hour.stdout:
            if line.startswith("resnet50 squeeze"):  # a first measurement is in the file before it is shown whole
                break
        time.sleep(0.1)
        hour.send_signal(signal.SIGTERM)
        hour.stdout.read()
        assert hour.wait(60) == 128 + signal.SIGTERM
    (stored,) = timing.read(out)["runs"]
    works = [one["work"] for one in stored["measurements"]]
    assert works[-1] == "interrupted"
    assert len(works) > 1
    assert "ended before its last part" in out.with_suffix(".md").read_text()


def test_covered_time_is_counted_once():
    assert blocks.covered([]) == 0
    assert blocks.covered([(0, 10), (2, 3), (12, 13)]) == 11
