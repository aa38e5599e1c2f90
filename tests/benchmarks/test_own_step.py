"""Memory of a user's own step: what it allocates, and what is wrong with a name."""

import json
import sys

import jax
import pytest

from experiments.benchmarks import memory

STEPS = '''
import jax
import jax.numpy as jnp
import optax
from flax import nnx
import snella_jax as snella

made = []


class Net(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.Linear(32, 256, rngs=rngs)
        self.head = nnx.Linear(256, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.fc1(x)))


def loss_fn(model, x):
    return model(x).mean()


def tuning():
    """Donates; its arrays are never computed."""
    config = snella.SnellaConfig(rank=4, targets="fc1", trainable="head")
    state = snella.Tuning.create(
        Net(nnx.Rngs(0)), config, optax.adam(1e-3), epochs=2, steps_per_epoch=1,
        rngs=nnx.Rngs(1),
    )
    made.append(state.trainable["head"]["kernel"][...])
    step = jax.jit(lambda state, x: state.step(loss_fn, x), donate_argnums=0)
    return step, (state, jnp.ones((16, 32)))


def plain():
    return lambda x, y: (x @ y, x), (jnp.ones((64, 128)), jnp.ones((128, 8)))


def wrong():
    return jnp.ones(3)
'''


@pytest.fixture
def steps(tmp_path, monkeypatch):
    (tmp_path / "my_steps.py").write_text(STEPS, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "out"
    sys.modules.pop("my_steps", None)


def measured(out, name):
    (row,) = memory.main([f"--function=my_steps:{name}", "--out", str(out)])
    return row


def test_a_step_is_measured_by_its_shapes(steps, capsys):
    """Arguments by hand: float32 matrices; a result that is an argument is copied."""
    row = measured(steps, "plain")
    assert json.loads((steps / "memory.json").read_text("utf-8")) == [row]
    assert row["argument_bytes"] == 4 * (64 * 128 + 128 * 8)
    assert row["result_bytes"] == pytest.approx(4 * (64 * 8 + 64 * 128), abs=64)
    said = " ".join(capsys.readouterr().out.split())
    assert "GiB in one step of my_steps:plain" in said
    for remedy in ('memory="lean"', "nnx.remat", "sketch", "frozen_dtype=jnp.bfloat16"):
        assert remedy in said


def test_a_tuning_is_measured_without_its_arrays(steps):
    row = measured(steps, "tuning")
    weights = 4 * (32 * 256 + 256 + 256 * 2 + 2)
    assert row["argument_bytes"] > weights + 4 * 16 * 32 + 3 * 4 * 4 * (32 + 256)
    assert row["result_bytes"] < 1000 < row["temporary_bytes"]  # donated
    (kernel,) = sys.modules["my_steps"].made
    assert isinstance(kernel, jax.core.Tracer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_steps", "--function my_steps: expected MODULE:FUNCTION"),
        ("my_steps:none", "my_steps has no function none"),
        ("no_such_steps:tuning", "No module named 'no_such_steps'"),
        ("my_steps:wrong", "returned a .*: expected a step and the tuple"),
    ],
)
def test_a_wrong_name_is_an_error_in_a_line(steps, name, message):
    with pytest.raises(SystemExit, match=message):
        memory.main([f"--function={name}", "--out", str(steps)])
    assert not steps.exists()
