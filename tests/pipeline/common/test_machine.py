"""What a process may use: of a machine and of the containers around it, by files as the kernel shows them."""

import os
import sys

import pytest

from pipeline.common import machine

GIB = 1 << 30
MEMINFO = f"""MemTotal:       {64 << 20} kB
MemFree:        {1 << 20} kB
MemAvailable:   {40 << 20} kB
HugePages_Total:       0
"""


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Writes files of /proc and /sys/fs/cgroup for the code under test."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "cgroup")

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    write({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"})
    return write


def limit(folder, bytes_free, kept=0):
    """Files of a version 2 group of 10 GiB with so much free; the kernel keeps `kept` bytes of files in it."""
    return {
        f"{folder}/memory.max": f"{10 * GIB}\n",
        f"{folder}/memory.current": f"{10 * GIB - bytes_free + kept}\n",
        f"{folder}/memory.stat": f"anon 5\nactive_file {kept // 4}\ninactive_file {kept - kept // 4}\nfile_dirty 7\n",
    }


def test_a_machine_without_containers(kernel):
    assert machine.memory() == (40 * GIB, 64 * GIB)
    assert machine.cores() == len(os.sched_getaffinity(0))


def test_a_container_s_limit_counts_and_its_kept_files_are_free(kernel):
    kernel(limit("cgroup", 3 * GIB, kept=2 * GIB))
    assert machine.memory() == (3 * GIB, 10 * GIB)


def test_a_container_without_a_limit_has_the_machine_s_memory(kernel):
    kernel({"cgroup/memory.max": "max\n", "cgroup/memory.current": f"{GIB}\n", "cgroup/cpu.max": "max 100000\n"})
    assert machine.memory() == (40 * GIB, 64 * GIB)
    assert machine.cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("inner", "outer"), [(2, 4), (4, 2)])
def test_the_tightest_of_nested_groups_holds(kernel, inner, outer):
    kernel({"proc/self/cgroup": "0::/slurm/job_7/step_0\n"})
    kernel(limit("cgroup/slurm/job_7/step_0", inner * GIB) | limit("cgroup/slurm/job_7", outer * GIB))
    assert machine.memory() == (2 * GIB, 10 * GIB)


def test_groups_of_version_1(kernel):
    kernel(
        {
            "proc/self/cgroup": "4:memory:/docker/ab\n3:cpuset:/\n1:cpu,cpuacct:/docker/ab\n0::/\n",
            "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cgroup/memory/memory.usage_in_bytes": f"{50 * GIB}\n",
            "cgroup/memory/docker/ab/memory.limit_in_bytes": f"{8 * GIB}\n",
            "cgroup/memory/docker/ab/memory.usage_in_bytes": f"{9 * GIB}\n",
            "cgroup/memory/docker/ab/memory.stat": "cache 5\ninactive_file 1073741824\n",
            "cgroup/cpu/docker/ab/cpu.cfs_quota_us": "50000\n",
            "cgroup/cpu/docker/ab/cpu.cfs_period_us": "100000\n",
        }
    )
    assert machine.memory() == (0, 8 * GIB)
    assert machine.cores() == 0.5


def test_a_quota_of_cores(kernel):
    kernel({"cgroup/cpu.max": "25000 100000\n"})
    assert machine.cores() == 0.25


def test_other_systems_have_no_such_files(kernel, tmp_path):
    (tmp_path / "proc" / "meminfo").unlink()
    (tmp_path / "proc" / "self" / "cgroup").unlink()
    assert machine.memory() is None
    assert machine.cores() == len(os.sched_getaffinity(0))


def test_this_machine_is_plausible():
    free, total = machine.memory()
    assert 1 << 28 < free <= total < 1 << 46
    assert machine.cores() > 0


def test_an_environment_says_how_the_gpu_rounds(monkeypatch):
    monkeypatch.setattr("hsnet.numerics.facts", lambda: {"TF32 in convolutions": "off"})
    assert machine.environment()["TF32 in convolutions"] == "off"
    assert "system" in machine.environment()
    monkeypatch.delitem(sys.modules, "torch")
    assert "TF32 in convolutions" not in machine.environment(), "nothing was calculated"
