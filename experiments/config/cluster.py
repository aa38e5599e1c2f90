"""Options of commands whose cells several workers share."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Workers, each with one accelerator, which take cells until none is left."""

    cluster: Literal["local", "slurm", "debug"] | None = None
    """local: workers on this machine. slurm: an array of jobs. debug: in this process.
    Default: no workers, this process does it all."""
    workers: int = 1
    """Number of workers, each with one accelerator."""
    hours: float = 24.0
    """Time limit of a worker on SLURM; it saves, and is queued again."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, as partition=gpu gpus-per-node=0 (for none)."""
    print_sbatch: bool = False
    """Print the script of the SLURM array, for sbatch, and run nothing."""

    @property
    def is_used(self) -> bool:
        """True if workers do the work, and not this process."""
        return self.cluster is not None or self.print_sbatch

    @property
    def is_slurm(self) -> bool:
        """True if the workers are jobs of SLURM."""
        return self.cluster == "slurm" or self.print_sbatch

    @property
    def sbatch_options(self) -> dict[str, str]:
        """What `sbatch` says, by name with dashes."""
        pairs = (word.partition("=")[::2] for word in self.sbatch)
        return {name.lstrip("-").replace("_", "-"): value for name, value in pairs}

    def check(self) -> None:
        """Raises a `ValueError` on values that do not fit together."""
        usual = Cluster()
        if not self.is_used and self != usual:
            raise ValueError(
                "workers, hours and sbatch are options of --cluster: expected it, too."
            )
        if self.print_sbatch and self.cluster not in (None, "slurm"):
            raise ValueError(f"print_sbatch: a script of SLURM, not {self.cluster}'s.")
        if self.workers < 1 or self.hours <= 0:
            raise ValueError(
                f"workers={self.workers}, hours={self.hours}: expected at least one, "
                "and more than 0."
            )
        if not self.is_slurm and (self.sbatch or self.hours != usual.hours):
            raise ValueError("hours and sbatch are options of SLURM's workers.")
        if wrong := [word for word in self.sbatch if not word.partition("=")[2]]:
            raise ValueError(f"sbatch={wrong[0]}: expected NAME=VALUE.")
