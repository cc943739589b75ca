"""Training on Ray: the loop of `pipeline.train` in a group of workers, one per GPU or share of the CPUs."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster import nodes
from cluster.session import session
from hsnet.errors import ClusterError, HSNetError, StoreError
from hsnet.numerics import has_bfloat16, set_numerics
from pipeline.common.lock import sole_writer
from pipeline.common.process_group import Distributed
from pipeline.heads.config import RunConfig
from pipeline.heads.run_dir import RunDir
from pipeline.loading.source import FeatureSource
from pipeline.train import Event, FitSummary, check_run, fit

MAX_FAILURES = 3
"""Times in a row the group is started again, from the run's last save, without a step that is new."""
GROW_SECONDS = 60.0
"""How often a group that works looks whether the cluster has room for more workers."""
START_SECONDS = 20.0
"""How long a group that is started again waits for all of its workers; then it goes on with those that there are."""

_POLL_SECONDS = 0.5
_LOOK_SECONDS = 3.0
_SILENT_SECONDS = 30.0

log = logging.getLogger(__name__)


class Mailbox:
    """Lives in a process of its own: what the group tells the driver, and whether the driver wants it to stop.

    On the driver's machine, so that it is lost with the driver or not at all; if its process alone dies, Ray starts it
    again, empty: progress that was not collected is not shown, and the driver repeats what it wants.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._outcome: FitSummary | HSNetError | None = None
        self._stop = False
        self._places: dict[int, tuple[str, str]] = {}
        self._group: tuple[int, int] | None = None

    def join(self, rank: int, world_size: int, node: str, gpu: str = "") -> tuple[int, ...]:
        """A rank is about to train; when all are there, the driver is told of the group once.

        Args:
            gpu: identity of its GPU; "" if it has none.

        Returns:
            All ranks that are on this GPU, if they are several: NCCL cannot serve two.
        """
        if rank in self._places:  # the group was started again
            self._places.clear()
        self._places[rank] = node, gpu
        sharing = tuple(sorted(other for other, place in self._places.items() if gpu and place == (node, gpu)))
        if len(self._places) == world_size:
            self._group = world_size, len({node for node, _ in self._places.values()})
            self._places.clear()
        return sharing if len(sharing) > 1 else ()

    def group(self) -> tuple[int, int] | None:
        """Workers and nodes of a group that began since the last call."""
        group, self._group = self._group, None
        return group

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
    workers: int | tuple[int, int],
    address: str | None = None,
    device: str = "cpu",
    micro_batch: int | None = None,
    resident: str = "off",
    baseline: bool = False,
    allow_mixed: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_event: Callable[[Event], None] | None = None,
) -> FitSummary:
    """`pipeline.train.fit` on Ray Train: the batch is split over `workers`, gradients are averaged (DDP).

    Args:
        make_source: opens the features, here and once in every worker; pickled to them.
        run_dir: on a file system that all machines of the group share.
        workers: processes in the group; each gets its share of the CPUs, or one GPU. 0 takes one worker per GPU of
            the cluster, or a single one without GPUs. When a machine is lost, the group goes on with as many as fit on
            the others, from the last save. (least, most): it begins with as many as fit, grows with the cluster, and
            waits for machines rather than train with fewer than `least`. Never more than a step has episodes.
        address: a Ray cluster; None starts one on this machine for the length of the call.
        device: "cpu" (gloo) or "cuda" (nccl).
        allow_mixed: as in `cluster.session.session`.
        baseline: as in `fit`.
        resident: as in `fit`; with "device" every process keeps a copy, with "host" a machine one for all.
        stop: asked about twice a second; True makes the group save and end.

    Returns, raises: as `fit`; and ClusterError if Ray cannot be reached or loses the group too often. The run then
    goes on from its last save when it is started again.
    """
    # Mistakes show here, before Ray's quarter of a minute of starting.
    check_run(config, make_source())
    run_dir = run_dir.absolute()
    RunDir(run_dir, config)
    options = {"micro_batch": micro_batch, "resident": resident, "baseline": baseline}
    given = {"config": config, "make_source": make_source, "run_dir": run_dir, "options": options}
    surely = workers if isinstance(workers, int) else workers[0]
    with session(address or "local", num_cpus=max(surely, os.cpu_count() or 1), allow_mixed=allow_mixed):
        return _fit_in_session(given, workers, device.startswith("cuda"), stop, on_event)


@dataclass(frozen=True)
class Size:
    """How large the group may be, and what each of its workers takes."""

    least: int
    most: int
    cpus: int
    on_gpu: bool

    @classmethod
    def of(cls, workers: int | tuple[int, int], on_gpu: bool, episodes: int) -> Size:
        """What was asked for, no more than a step's episodes, on the machines there are now.

        Raises:
            ClusterError: it does not fit. Ray itself would wait for more machines without a word.
        """
        asked = workers or (nodes.total("GPU") if on_gpu else 0) or 1
        elastic = isinstance(asked, tuple)
        least, most = asked if isinstance(asked, tuple) else (1, asked)
        if most > episodes:
            log.info("%d workers would be more than a step's %d episodes: %d are used", most, episodes, episodes)
            least, most = min(least, episodes), episodes
        room = min(nodes.places({"CPU": 1, "GPU": 1} if on_gpu else {"CPU": 1}), most)
        begin = max(room, least) if elastic else most
        size = cls(least, most, _cpus_each(begin, on_gpu), on_gpu)
        if elastic and begin < most:
            log.info("There is room for %s of %d now; the group grows with the cluster", _count(begin, "worker"), most)
        return size

    @property
    def each(self) -> dict[str, float]:
        return {"CPU": 1, "GPU": 1} if self.on_gpu else {"CPU": self.cpus}


def _fit_in_session(
    given: dict[str, Any],
    workers: int | tuple[int, int],
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

    size = Size.of(workers, on_gpu, given["config"].episodes_per_step)
    run_dir = given["run_dir"]
    # Ray Train keeps notes of its own beside the run; they are of no use once it has ended.
    with _notes(run_dir) as notes, _environment_of_ray_train():
        mailbox = _post_office()
        watch = _Watch(mailbox, size, stop, on_event)
        failure: BaseException | None = None
        for attempt in itertools.count():
            begun_at = watch.step
            trainer = TorchTrainer(
                _worker_loop,
                train_loop_config={**given, "threads": size.cpus, "mailbox": mailbox},
                scaling_config=ScalingConfig(
                    num_workers=(size.least, size.most) if size.most > 1 else 1,
                    use_gpu=on_gpu,
                    resources_per_worker=size.each,
                    elastic_resize_monitor_interval_s=GROW_SECONDS,
                ),
                torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
                run_config=RayRunConfig(
                    name=f"train{attempt}",
                    storage_path=str(notes),
                    failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=MAX_FAILURES),
                    logging_config=LoggingConfig(log_level="ERROR"),
                ),
            )
            failure, outcome = watch.until_the_end(trainer)
            lost = isinstance(failure, (TrainingFailedError, ray.exceptions.RayError))
            # Machines that come and go may take more groups than that, as long as each of them gets further.
            if outcome is not None or not lost or watch.step <= begun_at:
                break
            log.warning("The group failed %d times, but got on: it is started again", MAX_FAILURES + 1)
    if isinstance(outcome, HSNetError):
        raise outcome
    if failure is not None and not isinstance(failure, (TrainingFailedError, ray.exceptions.RayError)):
        raise failure  # a bug, ours or Ray's
    if failure is not None or outcome is None:
        raise ClusterError(
            f"The training group failed {MAX_FAILURES + 1} times in a row without a new step: {_reason(failure)} If a "
            f"machine ran out of memory, use a smaller --micro-batch. {run_dir} is unharmed; the same command goes on "
            "from its last save."
        ) from failure
    return outcome


def _cpus_each(workers: int, on_gpu: bool) -> int:
    """CPUs for each worker: an even share that fits the machines there are.

    Raises:
        ClusterError: the group does not fit at all. Ray itself would wait for more machines without a word.
    """
    gpus, cpus = nodes.places({"GPU": 1}), nodes.places({"CPU": 1})
    if on_gpu and gpus < workers:
        raise ClusterError(f"{workers} workers need a GPU each, Ray has {gpus}. Use fewer --workers, or --device cpu.")
    if cpus < workers:
        raise ClusterError(f"{workers} workers need a CPU each, Ray has {cpus}. Use fewer --workers.")
    share = max(1, nodes.total("CPU") // workers)
    return next(cpus for cpus in range(share, 0, -1) if nodes.places({"CPU": cpus}) >= workers)


def _reason(failure: BaseException | None) -> str:
    """The last line of what failed: of a traceback, the one that names the error."""
    causes = list((getattr(failure, "worker_failures", None) or {}).values())
    lines = str(causes[0] if causes else failure or "").strip().splitlines()
    return lines[-1].rstrip(".") + "." if lines else "it ended without a result."


def _post_office() -> Any:
    """A mailbox on this machine, started again if its process dies."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    make = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    return make(Mailbox).remote()


@contextmanager
def _notes(run_dir: Path) -> Iterator[Path]:
    """A folder beside the run for Ray Train, gone afterwards; what killed commands left there goes, too."""
    for left in run_dir.parent.glob(f".{run_dir.name}.ray-*"):
        # The folder of a command that works is locked.
        with suppress(StoreError, OSError), sole_writer(left, patience_s=0):
            shutil.rmtree(left, ignore_errors=True)
    notes = run_dir.with_name(f".{run_dir.name}.ray-{uuid.uuid4().hex[:8]}")
    try:
        notes.mkdir(parents=True)
        with sole_writer(notes):
            yield notes
    finally:
        shutil.rmtree(notes, ignore_errors=True)


@contextmanager
def _environment_of_ray_train() -> Iterator[None]:
    with ExitStack() as held:
        # Otherwise Ray changes the workers' directory, and relative paths in the options mean something else there.
        for name, value in (
            ("RAY_CHDIR_TO_TRIAL_DIR", "0"),
            ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_SECONDS)),
        ):
            if name not in os.environ:
                os.environ[name] = value
                held.callback(os.environ.pop, name, None)
        yield


class _Watch:
    """The driver while the group works: passes on events, the wish to stop, and what it has to say of lost machines."""

    def __init__(
        self, mailbox: Any, size: Size, stop: Callable[[], bool], on_event: Callable[[Event], None] | None
    ) -> None:
        self.mailbox, self.size, self.stop, self.on_event = mailbox, size, stop, on_event
        self.step = 0  # the last that was done so far, in any group
        self.outcome: FitSummary | HSNetError | None = None
        self.nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in nodes.alive()}
        self.looked = self.heard = time.monotonic()

    def until_the_end(self, trainer: Any) -> tuple[BaseException | None, FitSummary | HSNetError | None]:
        """Run the trainer on a thread, so that this one can do the rest; how it failed, and what the ranks said."""
        failures: list[BaseException] = []

        def run() -> None:
            try:
                trainer.fit()
            except BaseException as error:  # handed to the thread that waits
                failures.append(error)

        thread = threading.Thread(target=run, name="ray-train", daemon=True)
        thread.start()
        while thread.is_alive():
            self._collect()
            self._look()
            thread.join(_POLL_SECONDS)
        self._collect()
        return failures[0] if failures else None, self.outcome

    def _collect(self) -> None:
        import ray

        try:
            if self.stop():
                # Again and again: a mailbox that was started anew has forgotten it.
                ray.get(self.mailbox.ask_to_stop.remote(), timeout=_LOOK_SECONDS)
            group, (events, outcome) = ray.get(
                [self.mailbox.group.remote(), self.mailbox.collect.remote()], timeout=_LOOK_SECONDS
            )
        except ray.exceptions.RayError as error:  # dead, and started again in a moment
            log.debug("The mailbox does not answer: %s", error)
            return
        if group:
            log.info("The group: %s on %s", _count(group[0], "worker"), _count(group[1], "node"))
        if events or group:
            self.heard = time.monotonic()
        self.outcome = outcome or self.outcome
        for event in events:
            self.step = max(self.step, event.step)
            if self.on_event:
                self.on_event(event)

    def _look(self) -> None:
        """Say which machines were lost, and what is waited for."""
        now = time.monotonic()
        if now - self.looked < _LOOK_SECONDS:
            return
        self.looked = now
        there = {node["NodeID"]: node["NodeManagerHostname"] for node in nodes.alive()}
        for node in self.nodes.keys() - there.keys():
            log.warning(
                "The cluster lost %s (node %s): if it worked for this run, the group starts again from the last save "
                "on %d CPUs and %d GPUs",
                self.nodes[node],
                node[:8],
                nodes.total("CPU"),
                nodes.total("GPU"),
            )
        self.nodes = there
        room = nodes.places(self.size.each)
        if room < self.size.least and self.stop():
            # No rank is there to save and end, and the last save holds all that can be kept.
            raise KeyboardInterrupt
        if now - self.heard > _SILENT_SECONDS:
            self.heard = now
            why = "is being started, or waits for CPUs and GPUs that others hold"
            if room < self.size.least:
                why = "waits for machines (Ctrl-C ends the command; the run is saved)"
            log.info(
                "No step for %d s: the group %s. It needs room for %s at least; %d CPUs and %d GPUs have it for %d",
                _SILENT_SECONDS,
                why,
                _count(self.size.least, "worker"),
                nodes.total("CPU"),
                nodes.total("GPU"),
                room,
            )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


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
    set_numerics()
    ranks = Distributed()
    node, gpu = ray.get_runtime_context().get_node_id(), ""
    if device.type == "cuda":
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    sharing = ray.get(mailbox.join.remote(ranks.rank, ranks.world_size, node, gpu))
    asked, wanted = 0.0, False

    def stop() -> bool:
        nonlocal asked, wanted
        # One rank asks for all (they add up their answers), and not more often than a person would notice.
        if ranks.rank == 0 and not wanted and time.monotonic() - asked > _POLL_SECONDS:
            asked, wanted = time.monotonic(), ray.get(mailbox.stop_wanted.remote())
        return wanted

    try:
        _require_own_gpu(sharing, ranks.world_size, gpu)
        _require_bfloat16(given["config"], device)
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


def _require_bfloat16(config: RunConfig, device: torch.device) -> None:
    """Refuse what this rank's GPU would only imitate. The driver may not have seen it."""
    if config.arithmetic == "bfloat16" and device.type == "cuda" and not has_bfloat16(str(device)):
        raise ClusterError(
            f"The run calculates in bfloat16, which the {torch.cuda.get_device_name(device)} of "
            f"{socket.gethostname()} cannot. Begin a run with --arithmetic float32, or train on other GPUs."
        )


def _require_own_gpu(sharing: Sequence[int], ranks: int, gpu: str) -> None:
    """Refuse a GPU that several ranks were given, before NCCL waits for it or ends in words of its own."""
    if sharing:
        raise ClusterError(
            f"Ranks {' and '.join(map(str, sharing))} of {ranks} were given one GPU, {gpu} of {socket.gethostname()}: "
            f"{len(sharing)} ranks, 1 GPU. Every rank needs its own. Use fewer --workers, or start Ray's nodes with "
            "the --num-gpus that they have, and without RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES."
        )
