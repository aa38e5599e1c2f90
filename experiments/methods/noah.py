"""NOAH (Zhang et al., arXiv 2206.04673): a search over VPT, LoRA and Adapter modules.

First a supernet trains, with prompts in every block, LoRA at its query, key and value
and an adapter after its MLP, all as large as they may be; of each a random part counts
in a step, in the first so many blocks. An evolutionary search then asks the supernet
which sizes are best on validation, under a limit of parameters, and the best subnet
trains from the start. Sizes of 1, 5 and 10 as in the authors' subnets for VTAB (their
supernet's config has up to 100); the supernet's rate, 15 generations of 50 and the
limit as in their code, which at these sizes only a ViT-B's largest subnets exceed.
Simplified: query, key and value have factors of their own; a block's prompts leave
behind it, where in the authors' code those of the last block that has any stay; and a
mutation changes sizes, too. At inference LoRA merges, prompts and adapters stay;
finding them costs the supernet's training and 800 evaluations on validation.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray
from rich.progress import Progress

from experiments.config.run_config import RunConfig
from experiments.methods import adapter, lora, plain_vit, prompts
from experiments.methods.evolution import Space, Subnet, evolve
from experiments.methods.first_stage import Places
from experiments.methods.settings import Searched
from experiments.training import evaluation, sharding
from experiments.training.fit import fit
from experiments.training.session import Setting
from snella_jax.models import Model, unstack
from snella_jax.models.vit import ViTConfig
from snella_jax.nnx.surgery import become, freeze, mixed_class
from snella_jax.ops.matmul import matmul

KINDS = ("prompts", "lora", "adapter")
SUPERNET = "noah_supernet"


class Size(nnx.Variable):
    """int32 `[*stack]`: how much of a module counts, from its start."""


class SomePrompts(nnx.Module):
    """Mixed into the attention of a block with prompts: it sees only some of them."""

    room: int
    size: Size

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        attention: Any = super()
        seen = x.shape[1] - self.room + self.size[...]
        return attention.__call__(x, length=seen)


class SomeColumns(nnx.Module):
    """Mixed into LoRA's factors: only some columns count."""

    a: nnx.Variable
    b: nnx.Variable
    size: Size

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... m"]:
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        return matmul(_first(matmul(x, a), self.size[...]), b.T)


class SomeUnits(nnx.Module):
    """Mixed into a bottleneck: only some hidden units count, and of none nothing."""

    down: adapter.Dense
    up: adapter.Dense
    size: Size

    def __call__(self, x: Float[Array, "B T D"], act: Any) -> Float[Array, "B T D"]:
        size = self.size[...]
        y = self.up(_first(act(self.down(x)), size))
        return jnp.where(size > 0, y, 0)


class Drawing(nnx.Module):
    """Mixed into a ViT: draws the sizes where a key says that it trains."""

    space: Space

    def __call__(self, images: Array, key: PRNGKeyArray | None = None) -> Array:
        base: Any = super()
        if key is not None:
            own, key = jax.random.split(key)
            assign(self, _drawn(self.space, own))
        return base.__call__(images, key)


MIXINS = SomePrompts, SomeColumns, SomeUnits  # in the order of KINDS


def supernet(model: Model, own: Searched, trainable: str, rngs: nnx.Rngs) -> Any:
    """A copy of a ViT with all modules at their largest.

    Raises:
      ValueError: as `space`, `trainable` matches nothing, or the model is no ViT.
    """
    plain_vit.require(model, "NOAH")
    net: Any = nnx.clone(model)
    room = max(own.sizes)
    for block in [net.blocks] if net.config.stacked else net.blocks:
        _join(block, net.config, (room,) * len(KINDS), rngs.params())
        block.attn.room = room
        stack = block.attn.query.kernel.shape[:-2]
        for mixin, nodes in zip(MIXINS, _modules(block), strict=True):
            for node in nodes:
                node.size = Size(jnp.full(stack, room, jnp.int32))
                become(node, mixed_class(mixin, type(node)))
    net.space = space(own, net.config)
    become(net, mixed_class(Drawing, type(net)))
    freeze(net, trainable)
    return net


def adapt(model: Model, places: Places, trainable: str, rngs: nnx.Rngs) -> Any:
    """A copy of a ViT, as a list of blocks, with modules of given sizes.

    Args:
      model: a ViT, not adapted.
      places: for each of `KINDS` a size for every block, 0 for none.
      trainable: regex of what trains besides.
      rngs: of what the modules start from.

    Raises:
      ValueError: `trainable` matches nothing.
    """
    adapted = nnx.clone(model)
    freeze(adapted, trainable)
    adapted = unstack(adapted)
    for index, block in enumerate(adapted.blocks):
        sizes = tuple(int(places[kind][index]) for kind in KINDS)
        _join(block, adapted.config, sizes, rngs.params())
    return adapted


def assign(net: Any, sizes: Int[Array, "kinds blocks"]) -> None:
    """Sets what counts of a supernet, in place."""
    if net.config.stacked:
        blocks = [(net.blocks, sizes)]
    else:
        blocks = [(block, sizes[:, i]) for i, block in enumerate(net.blocks)]
    for block, own in blocks:
        for size, nodes in zip(own, _modules(block), strict=True):
            for node in nodes:
                node.size = Size(size)


def space(own: Searched, config: ViTConfig) -> Space:
    """What is searched.

    Raises:
      ValueError: its smallest subnet is beyond the limit.
    """
    depths = tuple(max(1, round(share * config.depth)) for share in own.depths)
    found = Space(config.depth, len(KINDS), depths, own.sizes)
    least = parameters(found.smallest, config.width)
    if own.limit < least:
        raise ValueError(f"noah.limit={own.limit}: the smallest subnet has {least}.")
    return found


def parameters(net: Subnet, width: int) -> int:
    """Of a subnet's modules in a ViT of some width.

    >>> parameters(((2, 0), (1, 1), (3, 0)), 8)
    171
    """
    tokens, ranks, units = net
    bottlenecks = sum(n * (2 * width + 1) + width for n in units if n)
    return sum(tokens) * width + sum(ranks) * 3 * 2 * width + bottlenecks


@dataclasses.dataclass(frozen=True)
class Search:
    """The first stage: trains the supernet, then finds the best subnet."""

    def locate(self, setting: Setting) -> Places:
        """Sizes by kind; the supernet trains on the training split alone.

        Raises:
          FloatingPointError: a loss or update that is not finite.
          ValueError: as `space`.
        """
        config, own = setting.config, setting.config.noah
        config = dataclasses.replace(config, protocol="choose", search=False, ema=0.0)
        if own.supernet_epochs is not None:
            config = dataclasses.replace(config, epochs=own.supernet_epochs)
        setting = dataclasses.replace(setting, config=config)
        net = self.supernet(config, setting.base)
        recipe = dataclasses.replace(config.recipe("noah"), lr=own.supernet_lr)
        fitted = fit(SUPERNET, "NOAH's supernet", net, setting, recipe)
        best = _searched(fitted.model, own, setting)
        return {kind: np.array(row) for kind, row in zip(KINDS, best, strict=True)}

    def typical(self, config: RunConfig, base: Model) -> Places:
        """The middle one of the sizes, everywhere, whatever the limit.

        Raises:
          ValueError: as `space`, or the model is no ViT.
        """
        plain_vit.require(base, "NOAH")
        space(config.noah, base.config)
        middle = sorted(config.noah.sizes)[len(config.noah.sizes) // 2]
        return {kind: np.full(base.config.depth, middle) for kind in KINDS}

    def supernet(self, config: RunConfig, base: Model) -> Any:
        """What trains in this stage."""
        rngs = nnx.Rngs(config.seed + 1)
        return supernet(base, config.noah, config.trainable, rngs)


def _searched(net: Any, own: Searched, setting: Setting) -> Subnet:
    """The subnet of a trained supernet that is best on validation.

    All validation images stay on the devices, in float32.
    """
    width = net.config.width
    graphdef, _, rest = nnx.split(net, Size, ...)
    rest = sharding.place(rest, setting.mesh)
    count = evaluation.counter(graphdef)
    validation = setting.task.validation
    transform = setting.transforms[1]
    batches = list(evaluation.batches(validation, transform, setting.mesh))

    def accuracy(subnet: Subnet) -> float:
        assign(net, jnp.array(subnet, jnp.int32))
        sizes = sharding.place(nnx.state(net, Size), setting.mesh)
        right = sum(int(count((sizes, rest), batch)) for batch in batches)
        return right / len(validation)

    def allowed(subnet: Subnet) -> bool:
        return parameters(subnet, width) <= own.limit

    found = evolve(
        net.space,
        accuracy,
        allowed,
        population=own.population,
        parents=own.parents,
        seed=setting.config.seed,
    )
    scores: dict[Subnet, float] = {}
    with Progress(console=setting.console) as bar:
        total = own.population * (own.generations + 1)
        shown = bar.add_task("NOAH's search", total=total)
        for generation in range(own.generations + 1):
            scores = next(found)
            value = next(iter(scores.values()))
            text = f"NOAH's search {generation}/{own.generations} val {value:.1%}"
            bar.update(
                shown, completed=own.population * (generation + 1), description=text
            )
            if not setting.console.is_terminal:  # a log file has no bar
                setting.console.print(text, soft_wrap=True)
    best = next(iter(scores))
    setting.console.print(
        f"NOAH: the best of {len(scores)} subnets has {parameters(best, width):,} "
        f"parameters, {scores[best]:.1%} on validation in the supernet. Block by block:"
    )
    for kind, row in zip(KINDS, best, strict=True):
        setting.console.print(f"  {kind} {', '.join(map(str, row))}", soft_wrap=True)
    return best


def _modules(block: Any) -> tuple[list[Any], ...]:
    """What has a size in a block of the supernet, for each of `KINDS`."""
    attention = block.attn
    layers = attention.query, attention.key, attention.value
    return [attention], [layer.lora for layer in layers], [block.mlp.bottleneck]


def _join(
    block: Any, config: ViTConfig, sizes: tuple[int, ...], key: PRNGKeyArray
) -> None:
    """Gives a block, or a stack of them, its modules; none where a size is 0."""
    tokens, rank, units = sizes
    if tokens:
        shape = (*block.attn.query.kernel.shape[:-2], tokens)
        prompts.join(block, prompts.drawn(config, shape, jax.random.fold_in(key, 0)))
    if rank:
        layers = block.attn.query, block.attn.key, block.attn.value
        for index, layer in enumerate(layers, 1):
            lora.join(layer, rank, jax.random.fold_in(key, index))
    if units:
        adapter.join(block.mlp, "sequential", units, jax.random.fold_in(key, 4))


def _drawn(space: Space, key: PRNGKeyArray) -> Int[Array, "kinds blocks"]:
    """Sizes of a random subnet."""
    one, two = jax.random.split(key)
    depths = jax.random.choice(one, jnp.array(space.depths), (space.kinds, 1))
    shape = space.kinds, space.blocks
    sizes = jax.random.choice(two, jnp.array(space.sizes), shape)
    return jnp.where(jnp.arange(space.blocks) < depths, sizes, 0)


def _first(x: Float[Array, "... n"], count: Int[Array, ""]) -> Float[Array, "... n"]:
    """The first so many columns; the others are 0."""
    return jnp.where(jnp.arange(x.shape[-1]) < count, x, 0)
