"""Training on Ray: the loop of `pipeline.train` in a group of workers, one per GPU or share of the CPUs."""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster.session import session
from hsnet.errors import ClusterError, HSNetError
from pipeline.common.process_group import Distributed
from pipeline.heads.config import RunConfig
from pipeline.heads.run_dir import RunDir
from pipeline.loading.source import FeatureSource
from pipeline.train import Event, FitSummary, check_run, fit

MAX_FAILURES = 3
"""Times the group is started again, from the run's last save, after losing a worker."""
_POLL_SECONDS = 0.5


class Mailbox:
    """Lives in a process of its own: what the group tells the driver, and whether the driver wants it to stop."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._outcome: FitSummary | HSNetError | None = None
        self._stop = False

    def post(self, event: Event) -> bool:
        """Take an event."""
        self._events.append(event)
        return True

    def finish(self, outcome: FitSummary | HSNetError) -> None:
        """Take how the run ended. A later attempt's end replaces an earlier one's."""
        self._outcome = outcome

    def failed(self) -> bool:
        """Whether a rank met an error of the user's: the others must not try again."""
        return isinstance(self._outcome, HSNetError)

    def ask_to_stop(self) -> None:
        self._stop = True

    def stop_wanted(self) -> bool:
        return self._stop

    def collect(self) -> tuple[list[Event], FitSummary | HSNetError | None]:
        """Events since the last call, and the outcome if there is one."""
        events, self._events = self._events, []
        return events, self._outcome


def fit_on_ray(
    config: RunConfig,
    make_source: Callable[[], FeatureSource],
    run_dir: Path,
    *,
    workers: int,
    address: str | None = None,
    device: str = "cpu",
    micro_batch: int | None = None,
    resident: str = "off",
    stop: Callable[[], bool] = lambda: False,
    on_event: Callable[[Event], None] | None = None,
) -> FitSummary:
    """`pipeline.train.fit` on Ray Train: the batch is split over `workers`, gradients are averaged (DDP).

    Args:
        make_source: opens the features, here and once in every worker; pickled to them.
        run_dir: on a file system that all machines of the group share.
        workers: processes in the group; each gets its share of the CPUs, or one GPU. 0 takes one worker per GPU of
            the cluster, or a single one without GPUs.
        address: a Ray cluster; None starts one on this machine for the length of the call.
        device: "cpu" (gloo) or "cuda" (nccl).
        resident: as in `fit`; with "device" every process keeps a copy, with "host" a machine one for all.
        stop: asked about twice a second; True makes the group save and end.

    Returns, raises: as `fit`; and ClusterError if Ray cannot be reached or loses the group too often. The run then
    goes on from its last save when it is started again.
    """
    # Mistakes show here, before Ray's quarter of a minute of starting.
    check_run(config, make_source())
    run_dir = run_dir.absolute()
    RunDir(run_dir, config)
    options = {"micro_batch": micro_batch, "resident": resident}
    given = {"config": config, "make_source": make_source, "run_dir": run_dir, "options": options}
    with session(address or "local", num_cpus=max(workers, os.cpu_count() or 1)):
        return _fit_in_session(given, workers, device.startswith("cuda"), stop, on_event)


def _fit_in_session(
    given: dict[str, Any],
    workers: int,
    on_gpu: bool,
    stop: Callable[[], bool],
    on_event: Callable[[Event], None] | None,
) -> FitSummary:
    """Train what `_worker_loop` is given, with Ray being there."""
    import ray
    from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    workers = workers or (int(ray.cluster_resources().get("GPU", 0)) if on_gpu else 0) or 1
    cpus = _cpus_each(workers, on_gpu)
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    # Ray Train keeps notes of its own beside the run; they are of no use once it has ended.
    run_dir = given["run_dir"]
    notes = run_dir.with_name(f".{run_dir.name}.ray-{uuid.uuid4().hex[:8]}")
    trainer = TorchTrainer(
        _worker_loop,
        train_loop_config={**given, "threads": cpus, "mailbox": mailbox},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if on_gpu else {"CPU": cpus},
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RayRunConfig(
            name="train",
            storage_path=str(notes),
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=MAX_FAILURES),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    # Otherwise Ray changes the workers' directory, and relative paths in the options mean something else there.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    try:
        failure = _watch(trainer, mailbox, stop, on_event)
        events, outcome = ray.get(mailbox.collect.remote())
        _tell(events, on_event)
    finally:
        shutil.rmtree(notes, ignore_errors=True)
    if isinstance(outcome, HSNetError):
        raise outcome
    if failure is not None and not isinstance(failure, (TrainingFailedError, ray.exceptions.RayError)):
        raise failure  # a bug, ours or Ray's
    if failure is not None or outcome is None:
        raise ClusterError(
            f"The training group failed {MAX_FAILURES + 1} times: {_reason(failure)} If a machine ran out of memory, "
            f"use a smaller --micro-batch. {run_dir} is unharmed; the same command goes on from its last save."
        ) from failure
    return outcome


def _cpus_each(workers: int, on_gpu: bool) -> int:
    """CPUs for each worker: an even share that fits the machines there are.

    Raises:
        ClusterError: the group does not fit at all. Ray itself would wait for more machines without a word.
    """
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def places(kind: str, each: int) -> int:
        return sum(int(machine.get(kind, 0) // each) for machine in machines)

    if on_gpu and places("GPU", 1) < workers:
        raise ClusterError(
            f"{workers} workers need a GPU each, Ray has {places('GPU', 1)}. Use fewer --workers, or --device cpu."
        )
    if places("CPU", 1) < workers:
        raise ClusterError(f"{workers} workers need a CPU each, Ray has {places('CPU', 1)}. Use fewer --workers.")
    share = max(1, sum(int(machine.get("CPU", 0)) for machine in machines) // workers)
    return next(cpus for cpus in range(share, 0, -1) if places("CPU", cpus) >= workers)


def _reason(failure: BaseException | None) -> str:
    """The last line of what failed: of a traceback, the one that names the error."""
    causes = list((getattr(failure, "worker_failures", None) or {}).values())
    lines = str(causes[0] if causes else failure or "").strip().splitlines()
    return lines[-1].rstrip(".") + "." if lines else "it ended without a result."


def _watch(
    trainer: Any, mailbox: Any, stop: Callable[[], bool], on_event: Callable[[Event], None] | None
) -> BaseException | None:
    """Run the trainer on a thread, so that this one can pass on events and the wish to stop."""
    import ray

    failures: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the thread that waits
            failures.append(error)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    asked = False
    while thread.is_alive():
        if not asked and stop():
            ray.get(mailbox.ask_to_stop.remote())
            asked = True
        events, _ = ray.get(mailbox.collect.remote())
        _tell(events, on_event)
        thread.join(_POLL_SECONDS)
    return failures[0] if failures else None


def _tell(events: list[Event], on_event: Callable[[Event], None] | None) -> None:
    for event in events if on_event else ():
        assert on_event is not None
        on_event(event)


def _worker_loop(given: dict[str, Any]) -> None:
    """One rank.

    An error of the user's goes to the mailbox before it is raised. Raising ends the other ranks too, which may be
    waiting for this one; Ray then starts the group again, and all ranks return at once.
    """
    import ray
    from ray.train.torch import get_device

    mailbox, device = given["mailbox"], get_device()
    if ray.get(mailbox.failed.remote()):
        return
    torch.set_num_threads(given["threads"])
    ranks = Distributed()
    asked, wanted = 0.0, False

    def stop() -> bool:
        nonlocal asked, wanted
        # One rank asks for all (they add up their answers), and not more often than a person would notice.
        if ranks.rank == 0 and not wanted and time.monotonic() - asked > _POLL_SECONDS:
            asked, wanted = time.monotonic(), ray.get(mailbox.stop_wanted.remote())
        return wanted

    try:
        summary = fit(
            given["config"],
            given["make_source"](),
            given["run_dir"],
            ranks=ranks,
            device=str(device),
            stop=stop,
            on_event=mailbox.post.remote,
            **given["options"],
        )
    except HSNetError as error:
        ray.get(mailbox.finish.remote(error))
        raise
    if ranks.rank == 0:
        ray.get(mailbox.finish.remote(summary))
