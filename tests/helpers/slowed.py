"""Programs that are killed: time passes behind a round's row and its checkpoint."""

_PROGRAM = """
import sys, time
from experiments import {command}
from experiments.training import metric_log
from experiments.training.checkpoints import Checkpoints

def slow(function):
    def slowed(*given, **named):
        function(*given, **named)
        time.sleep(0.25)
    return slowed

metric_log.log, Checkpoints.save = slow(metric_log.log), slow(Checkpoints.save)
{command}.main(sys.argv[1:])
"""


def program(command: str) -> str:
    """The text of a program that runs a command of the experiments slowly."""
    return _PROGRAM.format(command=command)
