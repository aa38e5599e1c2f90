"""Memory that loading a model takes, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

# Loads sys.argv[2] with the module sys.argv[1] in the dtype sys.argv[3]; prints the
# peak of anonymous memory beyond that after the imports, as a share of the weights.
SCRIPT = """
import importlib, sys, threading, time
import jax
from flax import nnx

def anonymous():
    lines = open("/proc/self/status", encoding="utf-8").readlines()
    (line,) = [line for line in lines if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])

load = importlib.import_module(sys.argv[1]).load
jax.numpy.zeros(1).block_until_ready()
start, peaks, done = anonymous(), [0], []

def sample():
    while not done:
        peaks.append(anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=sample)
thread.start()
model = load(sys.argv[2], param_dtype=sys.argv[3])
leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
done.append(True)
thread.join()
print((max(peaks) - start) / sum(leaf.nbytes for leaf in leaves))
"""


def peak(module: str, path: Path, dtype: str) -> float:
    """Returns the peak while `module.load(path, param_dtype=dtype)` runs, on Linux.

    As a share of the weights' own memory.
    """
    command = [sys.executable, "-c", SCRIPT, module, str(path), dtype]
    return float(subprocess.check_output(command, encoding="utf-8"))
