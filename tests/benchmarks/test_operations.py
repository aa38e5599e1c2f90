"""Operations of matmuls, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments.benchmarks.operations import matmul_flops
from snella_jax.models import vit

X, W = jnp.ones((2, 3)), jnp.ones((3, 3))
ONE = 2 * 2 * 3 * 3


def scanned(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]


def branched(x, w):
    many, few = (lambda x: x @ w @ w), (lambda x: x @ w)
    return jax.lax.cond(x.sum() > 0, many, few, x)


def again(x, w):
    return jax.value_and_grad(
        lambda x: jax.checkpoint(lambda x: jnp.sin(x @ w))(x).sum()
    )(x)


def unused(x, w):
    return jax.lax.scan(lambda x, _: ((x[0] @ w, x[1] + 1), None), (x, x), length=5)[0][
        1
    ]


def sharded(x, w):
    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )
    return jax.shard_map(
        jnp.dot, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )(x, w)


@pytest.mark.parametrize(
    ("run", "times"),
    [
        (jnp.dot, 1),
        (jax.jit(jnp.dot), 1),
        (scanned, 5),
        (branched, 2),
        (again, 3),  # forward, forward again, backward
        (unused, 0),
        (sharded, 1),
    ],
)
def test_matmuls_are_counted(run, times):
    assert matmul_flops(jax.make_jaxpr(run)(X, W).jaxpr) == times * ONE


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_counted(groups):
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 6))
    run = jax.make_jaxpr(
        lambda x, k: jax.lax.conv_general_dilated(
            x,
            k,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
    )
    counted = matmul_flops(run(x, kernel).jaxpr)
    assert counted == 2 * (6 * 6) * 6 * (3 * 3 * 4 // groups)


def test_a_block_that_is_computed_again_costs_up_to_a_forward_more():
    def counted(remat):
        config = vit.ViTConfig(
            16, 2, 2, patch_size=4, image_size=8, num_classes=3, remat=remat
        )
        graphdef, state = nnx.split(vit.ViT(config, rngs=nnx.Rngs(0)))

        def loss(state):
            return nnx.merge(graphdef, state)(jnp.ones((2, 8, 8, 3))).sum()

        forward, both = (jax.make_jaxpr(f)(state) for f in (loss, jax.grad(loss)))
        return [matmul_flops(program.jaxpr) for program in (forward, both)]

    forward, usual = counted("none")
    assert 2.5 * forward < usual < counted("blocks")[1] <= usual + forward
