"""Workers that do cells, on this machine or a SLURM cluster (submitit)."""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.live import Live

from experiments import terminal
from experiments.config.cluster import Cluster
from experiments.runs import accelerators, board, cells, sbatch
from experiments.runs.cells import LAUNCH, WORKER, Cell
from experiments.training.stopping import Stopped, at_once

FOLDER = "workers"
RESTARTS = 3  # of a worker that dies, in one launch
CACHE = "JAX_COMPILATION_CACHE_DIR"
NO_LIMIT = 60 * 24 * 365  # minutes of a local worker


@dataclasses.dataclass(frozen=True)
class Work:
    """Cells, and the command that workers do them by.

    Attributes:
      program: the command, as `python -m experiments.compare`.
      words: the words after it, for a worker.
      out: folder of the cells.
      cells: all of them.
      is_finished: says of a cell whether nothing of it is left.
      tried: does a cell in this process, as `cells.work` takes it.
    """

    program: str
    words: Sequence[str]
    out: Path
    cells: Sequence[Cell]
    is_finished: Callable[[Cell], bool]
    tried: Callable[[Cell], str | None]

    @property
    def module(self) -> str:
        """Module of the command."""
        return self.program.split()[-1]


@dataclasses.dataclass
class Worker:
    """A worker and its job.

    Attributes:
      number: its number, from 0.
      name: name in the notes of cells; another one each time it begins.
      job: submitit's job.
      deaths: how often it ended without a result.
    """

    number: int
    name: str
    job: Any
    deaths: int = 0


def prepare(cluster: Cluster) -> None:
    """Keeps this process from the accelerators, which are the workers'.

    Raises:
      ModuleNotFoundError: submitit is missing.
      ValueError: there are fewer accelerators than workers.
    """
    by_submitit = cluster.is_used and not cluster.print_sbatch
    if by_submitit and importlib.util.find_spec("submitit") is None:
        raise ModuleNotFoundError(
            "--cluster needs submitit: the extra `cluster`, or pip install submitit"
        )
    if cluster.is_slurm or cluster.cluster == "local":
        jax.config.update("jax_platforms", accelerators.CPU)
    if cluster.cluster == "local":
        accelerators.of_workers(cluster.workers)


def done(cluster: Cluster, work: Work, console: Console) -> list[str]:
    """Does cells, by workers or in this process; returns what failed.

    Raises:
      SystemExit: a script was printed, or the workers could not begin.
    """
    if not cluster.is_used or not work.cells:
        return cells.work(work.out, work.cells, work.tried, console)
    with terminal.exit_on_error(work.program):
        found = launch(cluster, work, console)
    if found is None:
        raise SystemExit(0)
    return found


def launch(cluster: Cluster, work: Work, console: Console) -> list[str] | None:
    """Runs workers until all cells are done; returns what failed or is left.

    Prints a table of the cells meanwhile. With `print_sbatch` it prints the script and
    returns None.

    Raises:
      OSError: the folder's file system does not lock.
      Stopped, KeyboardInterrupt: local workers were told to save and have ended.
    """
    cells.check_locks(work.out)
    folder = (work.out / FOLDER).absolute()
    folder.mkdir(exist_ok=True)
    environment = {CACHE: os.environ.get(CACHE) or str(folder / "compiled")}
    if cluster.print_sbatch:
        command = [sys.executable, "-m", work.module, *work.words]
        print(sbatch.script(cluster, command, folder, environment, Path.cwd()), end="")
        return None
    os.environ.update(environment)
    crew = Crew(cluster, work, folder)
    with at_once(), crew.stopped_with_this(console):
        crew.begin()
        _watch(crew, work, console)
    failed = [text for worker in crew.workers if (text := crew.failure(worker))]
    failed += [n["failed"] for c in work.cells if (n := c.note()) and "failed" in n]
    if not failed and (left := [c for c in work.cells if not work.is_finished(c)]):
        names = "; ".join(cell.name for cell in left)
        failed.append(
            f"Not finished: {names}. The workers' logs in {folder} may say why; the "
            "same command goes on."
        )
    return failed


class Crew:
    """The workers of one launch.

    Attributes:
      workers: them, once they began.
    """

    def __init__(self, cluster: Cluster, work: Work, folder: Path):
        # Here, as it is an extra.
        import submitit

        self.cluster, self.work, self.folder = cluster, work, folder
        self.id = f"{os.getpid()} {time.time_ns()}"
        self.workers: list[Worker] = []
        name = cluster.cluster
        self.executor = submitit.AutoExecutor(folder, cluster=name)
        self.environments = [{} for _ in range(cluster.workers)]
        if name == "slurm":
            self.executor.update_parameters(**_slurm(cluster, work))
        elif name == "local":
            self.environments = accelerators.of_workers(cluster.workers)
            self.executor.update_parameters(timeout_min=NO_LIMIT)

    def begin(self) -> None:
        """Submits all workers, as one array where that exists."""
        names = [str(number) for number in range(self.cluster.workers)]
        given = [self._given(number, name) for number, name in enumerate(names)]
        jobs = self.executor.map_array(run, *zip(*given, strict=True))
        self.workers = [
            Worker(number, name, job)
            for number, (name, job) in enumerate(zip(names, jobs, strict=True))
        ]

    def alive(self) -> list[Worker]:
        """Returns the workers that have not ended, and begins those anew that died.

        SLURM itself does that for those that it stopped.
        """
        for worker in self.workers:
            if self._died(worker) and worker.deaths < RESTARTS:
                worker.deaths += 1
                worker.name = f"{worker.number} again, {worker.deaths}"
                given = self._given(worker.number, worker.name)
                worker.job = self.executor.submit(run, *given)
        return [worker for worker in self.workers if not worker.job.done()]

    def failure(self, worker: Worker) -> str | None:
        """Returns why a worker that has ended did not do its part."""
        if not worker.job.done():
            return None
        error = worker.job.exception()
        log = worker.job.paths.stderr
        if error is None:
            return None
        return f"Worker {worker.number} ended early, see {log}."

    @contextlib.contextmanager
    def stopped_with_this(self, console: Console) -> Iterator[None]:
        """Has local workers save and end when this process is told to stop."""
        try:
            yield
        except (KeyboardInterrupt, Stopped):
            if self.cluster.cluster == "slurm" and self.workers:
                first = self.workers[0].job.job_id.partition("_")[0]
                text = f"The workers go on; scancel {first} stops them."
                console.print(text, soft_wrap=True)
            if self.cluster.cluster == "local":
                self._stop()
            raise

    def _stop(self) -> None:
        for worker in self.workers:
            if not worker.job.done():
                # Of submitit's process beside the worker, which passes it on.
                os.kill(int(worker.job.job_id), signal.SIGTERM)
        while any(not worker.job.done() for worker in self.workers):
            time.sleep(0.2)

    def _died(self, worker: Worker) -> bool:
        job = worker.job
        local = self.cluster.cluster == "local"
        return local and job.done() and not job.paths.result_pickle.exists()

    def _given(self, number: int, name: str) -> tuple[str, list[str], dict[str, str]]:
        """Returns the arguments of `run`."""
        ids = {LAUNCH: self.id, WORKER: name}
        environment = self.environments[number] | ids
        return self.work.module, list(self.work.words), environment


def run(module: str, words: list[str], environment: dict[str, str]) -> None:
    """Runs a command as a worker; failures of cells are in their notes.

    Signals are no longer submitit's, which would ignore SIGTERM.

    Raises:
      Stopped: it was told to stop.
    """
    os.environ.update(environment)
    with at_once():
        try:
            importlib.import_module(module).main(words)
        except Stopped:
            raise
        except SystemExit as end:
            print(end, file=sys.stderr)


def _watch(crew: Crew, work: Work, console: Console) -> None:
    """Shows the cells until all workers have ended.

    Of jobs that SLURM has not begun yet none is waited for once all cells are done.
    """
    if crew.cluster.cluster == "debug":
        for worker in crew.workers:
            worker.job.result()
    said = None
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while alive := crew.alive():
            names = [worker.name for worker in alive]
            states = board.states(work.cells, work.is_finished, names)
            live.update(board.shown(states), refresh=True)
            if not console.is_terminal and (now := board.brief(states)) != said:
                console.print(now, soft_wrap=True)
                said = now
            if crew.cluster.is_slurm and all(s.kind == "done" for s in states):
                break
            time.sleep(0.5)
    states = board.states(work.cells, work.is_finished, [])
    console.print(board.shown(states))


def _slurm(cluster: Cluster, work: Work) -> dict[str, Any]:
    """Returns the parameters of submitit that make the script of `sbatch.script`."""
    own = sbatch.options(cluster, work.module.rpartition(".")[2])
    return {
        "name": own.pop("job-name"),
        "timeout_min": max(1, round(60 * cluster.hours)),
        "slurm_additional_parameters": own,
        "slurm_setup": [f"export {CACHE}={os.environ[CACHE]}"],
        "slurm_teardown": sbatch.AGAIN,
    }
