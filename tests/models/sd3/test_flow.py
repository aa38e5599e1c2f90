"""Noise levels and sampler against slow NumPy in float64, and diffusers' scheduler."""

from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snella_jax.models.sd3 import flow

# What diffusers 0.42.1 visits in 28 steps; `test_the_levels_are_diffusers` says so.
OF_28_STEPS = {0: 1, 1: 0.987381, 2: 0.974108, 25: 0.199827, 26: 0.110906, 27: 0.008929}
SHAPE = (3, 4, 6, 2)
RANDOM = np.random.default_rng(0)
NOISE = RANDOM.normal(size=SHAPE).astype(np.float32)
CONTEXT = RANDOM.normal(size=(3, 5, 2)).astype(np.float32)
POOLED = RANDOM.normal(size=(3, 2)).astype(np.float32)
EMPTY = tuple(RANDOM.normal(size=(1, *x.shape[1:])) for x in (CONTEXT, POOLED))


def velocity(x, time, context, pooled, of=np):
    """A velocity that depends on every argument, and on no other row."""
    bend = of.sin(x * pooled[:, None, None, :]) + context.mean(1)[:, None, None, :]
    return bend * (time / 1000)[:, None, None, None] - 0.3 * x


def by_hand(noise, context, pooled, empty, steps, guidance, shift):
    """Euler's method, one picture and one step after another, in float64."""

    def shifted(s):
        return shift * s / (1 + (shift - 1) * s)

    first, last = shifted(1.0), shifted(0.001)
    levels = [
        shifted(first + (last - first) * i / max(steps - 1, 1)) for i in range(steps)
    ]
    pictures = []
    for x, own_context, own_pooled in zip(
        np.float64(noise), context, pooled, strict=True
    ):
        for sigma, following in zip(levels, [*levels[1:], 0.0], strict=True):
            now = x[None], np.array([1000 * sigma])
            v = velocity(*now, own_context[None], own_pooled[None])
            if empty is not None:
                v_empty = velocity(*now, *empty)
                v = v_empty + guidance * (v - v_empty)
            x = x + (following - sigma) * v[0]
        pictures.append(x)
    return np.stack(pictures)


def sampled(noise=NOISE, context=CONTEXT, pooled=POOLED, empty=EMPTY, **options):
    def model(*arguments):
        return velocity(*arguments, of=jnp)

    return jax.jit(lambda *given: flow.sample(model, *given, **options))(
        noise, context, pooled, empty
    )


@pytest.mark.parametrize("shift", [3.0, 1.0])
def test_the_training_table_is_the_formula(shift):
    table = flow.training_sigmas(shift)
    expected = [shift * i / (1000 + (shift - 1) * i) for i in range(1000, 0, -1)]
    assert table.dtype == np.float32 and table.shape == (1000,)
    np.testing.assert_allclose(table, expected, rtol=2e-7)


def test_the_levels_of_28_steps_are_shifted_twice():
    sigmas = flow.sampling_sigmas(28)
    assert sigmas.dtype == np.float32 and sigmas.shape == (29,) and sigmas[-1] == 0
    for place, sigma in OF_28_STEPS.items():
        assert sigmas[place] == pytest.approx(sigma, abs=6e-7)
    assert list(flow.sampling_sigmas(1)) == [1, 0]


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "28", None])
def test_steps_are_positive_integers(steps):
    with pytest.raises(ValueError, match=f"steps={steps!r}: expected an integer"):
        flow.sampling_sigmas(steps)


@pytest.mark.parametrize("shift", [0, -3.0, float("nan"), float("inf")])
def test_a_shift_is_positive(shift):
    with pytest.raises(ValueError, match="expected a positive number"):
        flow.training_sigmas(shift)


@pytest.mark.parametrize("sigma", [0.25, np.array([0.0, 0.25, 1.0])])
def test_noised_is_on_the_line_from_picture_to_noise(sigma):
    x0 = np.float32(RANDOM.normal(size=SHAPE))
    levels = np.broadcast_to(sigma, 3)
    for x, noise, found, own in zip(
        x0, NOISE, flow.noised(x0, NOISE, sigma), levels, strict=True
    ):
        np.testing.assert_allclose(found, (1 - own) * x + own * noise, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 4, "guidance": 7.0, "shift": 3.0},
        {"steps": 28, "guidance": 2.5, "shift": 1.0},
        {"steps": 1, "guidance": 0.0, "shift": 3.0},
    ],
)
@pytest.mark.parametrize("empty", [EMPTY, None], ids=["guided", "unguided"])
def test_samples_are_eulers_method(options, empty):
    found = sampled(empty=empty, **options)
    expected = by_hand(NOISE, CONTEXT, POOLED, empty, **options)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-6 * abs(expected).max())


def test_guidance_of_1_is_none_at_all():
    found, expected = sampled(steps=4, guidance=1.0), sampled(empty=None, steps=4)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("steps", [28, 1, 5, 50])
def test_the_levels_are_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    # Later versions may shift once: then published pictures are no longer reached.
    assert version("diffusers") == "0.42.1"
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    np.testing.assert_allclose(flow.training_sigmas(), scheduler.sigmas, atol=1e-6)
    scheduler.set_timesteps(steps)
    sigmas = flow.sampling_sigmas(steps)
    np.testing.assert_allclose(sigmas, scheduler.sigmas, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        flow.STEPS * sigmas[:-1], scheduler.timesteps, rtol=0, atol=1e-3
    )
