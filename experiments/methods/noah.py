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
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray
from rich.progress import Progress

from experiments.methods import adapter, lora, plain_vit, prompts
from experiments.methods.evolution import Space, Subnet, evolve
from experiments.methods.first_stage import Staged
from experiments.methods.method import check_counts
from experiments.training import evaluation, sharding
from experiments.training.fit import fit
from experiments.training.objective import followed
from experiments.training.recipe import Recipe
from experiments.training.session import Places, Scope, Session
from snella_jax.models import unstack
from snella_jax.models.vit import ViTConfig
from snella_jax.nnx.surgery import become, freeze, mixed_class
from snella_jax.ops.matmul import matmul

KINDS = ("prompts", "lora", "adapter")
SUPERNET = "noah_supernet"


@dataclasses.dataclass(frozen=True)
class Noah(Staged):
    """Prompts, LoRA and adapters, as large as a search finds best."""

    title: ClassVar[str] = "NOAH"
    needs_vit: ClassVar[bool] = True

    lr: float = 1e-3
    """Peak learning rate."""
    supernet_lr: float = 5e-4
    """Peak learning rate of the supernet."""
    supernet_epochs: int | None = None
    """Epochs of the supernet. Default: as many as of the subnet that is found."""
    sizes: tuple[int, ...] = (1, 5, 10)
    """Prompts of a block, rank of a matrix, or units of a bottleneck."""
    depths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Shares of the blocks, from the first on, that may have modules of a kind."""
    limit: int = 640_000
    """Maximum number of parameters of the modules."""
    generations: int = 15
    """Generations of the evolution, after the first."""
    population: int = 50
    """Subnets that are tried in a generation."""
    parents: int = 10
    """Number of the best so far, from which a generation comes."""

    def check(self, name: str) -> None:
        """Raises a `ValueError` on settings that would fail in the midst of a run."""
        super().check(name)
        counts = {"limit": self.limit, "population": self.population}
        check_counts(name, parents=self.parents, **counts)
        if not 0 < self.supernet_lr < math.inf:
            raise ValueError(f"{name}.supernet_lr={self.supernet_lr}: expected > 0.")
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"{name}.sizes={self.sizes}: expected positive numbers.")
        if not self.depths or not all(0 < share <= 1 for share in self.depths):
            raise ValueError(f"{name}.depths={self.depths}: expected shares of 1.")
        if self.generations < 0:
            raise ValueError(
                f"{name}.generations={self.generations}: expected at least 0."
            )

    def check_run(self, name: str, scope: Scope, recipe: Recipe) -> None:
        """Raises a `ValueError` on settings that fail `check`, or do not fit a run."""
        super().check_run(name, scope, recipe)
        if (
            self.supernet_epochs is not None
            and self.supernet_epochs <= recipe.warmup_epochs
        ):
            raise ValueError(
                f"{name}.supernet_epochs={self.supernet_epochs}: expected more than "
                f"the {recipe.warmup_epochs} of the warm-up."
            )

    def locate(self, session: Session) -> Places:
        """Trains the supernet, on the training split alone, and finds the best subnet.

        Returns:
          Sizes of its modules in every block, by kind.

        Raises:
          FloatingPointError: a loss or update that is not finite.
          ValueError: as `space`.
        """
        recipe = dataclasses.replace(session.recipe, lr=self.supernet_lr, ema=0.0)
        if self.supernet_epochs is not None:
            recipe = dataclasses.replace(
                recipe, epochs=self.supernet_epochs, steps=None
            )
        task = session.task
        data = dataclasses.replace(
            session.data, train=task.train, follow=task.validation
        )
        session = dataclasses.replace(
            session, recipe=recipe, data=data, followed="validation"
        )
        net = self.supernet(session.base, session.scope)
        fitted = fit(SUPERNET, "NOAH's supernet", net, session)
        best = self.search(fitted.model, session)
        return {kind: np.array(row) for kind, row in zip(KINDS, best, strict=True)}

    def typical(self, base: Any, scope: Scope) -> Places:
        """Returns the middle one of the sizes, everywhere, whatever the limit.

        Raises:
          ValueError: as `space`, or the model is no ViT.
        """
        plain_vit.require(base, "NOAH")
        self.space(base.config)
        middle = sorted(self.sizes)[len(self.sizes) // 2]
        return {kind: np.full(base.config.depth, middle) for kind in KINDS}

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a ViT, as a list of blocks, with modules of given sizes.

        `scope.places` has a size for every block, for each of `KINDS`; 0 for none.

        Raises:
          ValueError: `scope.trainable` matches nothing, or the model is no ViT.
        """
        plain_vit.require(base, "NOAH")
        adapted, rngs = nnx.clone(base), scope.rngs()
        freeze(adapted, scope.trainable)
        adapted = unstack(adapted)
        for index, block in enumerate(adapted.blocks):
            sizes = tuple(int(scope.places[kind][index]) for kind in KINDS)
            _join(block, adapted.config, sizes, rngs.params())
        return adapted

    def merged(self, model: Any) -> Any:
        """Returns a copy with LoRA in the kernels; prompts and adapters stay."""
        return lora.merge(model)

    def supernet(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a ViT with all modules at their largest.

        Raises:
          ValueError: as `space`, `scope.trainable` matches nothing, or the model is no
            ViT.
        """
        plain_vit.require(base, "NOAH")
        net: Any = nnx.clone(base)
        room, rngs = max(self.sizes), scope.rngs()
        for block in [net.blocks] if net.config.stacked else net.blocks:
            _join(block, net.config, (room,) * len(KINDS), rngs.params())
            block.attn.room = room
            stack = block.attn.query.kernel.shape[:-2]
            for mixin, nodes in zip(MIXINS, _modules(block), strict=True):
                for node in nodes:
                    node.size = Size(jnp.full(stack, room, jnp.int32))
                    become(node, mixed_class(mixin, type(node)))
        net.space = self.space(net.config)
        become(net, mixed_class(Drawing, type(net)))
        freeze(net, scope.trainable)
        return net

    def space(self, config: ViTConfig) -> Space:
        """Returns the subnets to search among.

        Raises:
          ValueError: the smallest is beyond the limit.
        """
        depths = tuple(max(1, round(share * config.depth)) for share in self.depths)
        found = Space(config.depth, len(KINDS), depths, self.sizes)
        least = parameters(found.smallest, config.width)
        if self.limit < least:
            raise ValueError(
                f"noah.limit={self.limit}: the smallest subnet has {least}."
            )
        return found

    def search(self, net: Any, session: Session) -> Subnet:
        """Returns the subnet of a trained supernet that is best on validation."""
        width = net.config.width

        def allowed(subnet: Subnet) -> bool:
            return parameters(subnet, width) <= self.limit

        found = evolve(
            net.space,
            _fitness(net, session),
            allowed,
            population=self.population,
            parents=self.parents,
            seed=session.scope.seed,
        )
        metric = followed(session.objective)
        console, scores = session.console, {}
        with Progress(console=console) as bar:
            total = self.population * (self.generations + 1)
            shown = bar.add_task("NOAH's search", total=total)
            for generation in range(self.generations + 1):
                scores = next(found)
                value = metric.text(metric.rank(next(iter(scores.values()))))
                text = f"NOAH's search {generation}/{self.generations} val {value}"
                done = self.population * (generation + 1)
                bar.update(shown, completed=done, description=text)
                if not console.is_terminal:  # a log file has no bar
                    console.print(text, soft_wrap=True)
        best = next(iter(scores))
        value = metric.text(metric.rank(scores[best]))
        console.print(
            f"NOAH: the best of {len(scores)} subnets has "
            f"{parameters(best, width):,} parameters, {value} on "
            "validation in the supernet. Block by block:"
        )
        for kind, row in zip(KINDS, best, strict=True):
            console.print(f"  {kind} {', '.join(map(str, row))}", soft_wrap=True)
        return best


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

    def __call__(
        self, x: Float[Array, "... n"], dtype: DTypeLike
    ) -> Float[Array, "... m"]:
        a, b = self.a[...].astype(dtype), self.b[...].astype(dtype)
        return matmul(_first(matmul(x.astype(dtype), a), self.size[...]), b.T)


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


def assign(net: Any, sizes: Int[Array, "kinds blocks"]) -> None:
    """Sets the sizes of a supernet's modules, in place."""
    if net.config.stacked:
        blocks = [(net.blocks, sizes)]
    else:
        blocks = [(block, sizes[:, i]) for i, block in enumerate(net.blocks)]
    for block, own in blocks:
        for size, nodes in zip(own, _modules(block), strict=True):
            for node in nodes:
                node.size = Size(size)


def parameters(net: Subnet, width: int) -> int:
    """Returns the number of parameters of a subnet's modules in a ViT of some width.

    >>> parameters(((2, 0), (1, 1), (3, 0)), 8)
    171
    """
    tokens, ranks, units = net
    bottlenecks = sum(n * (2 * width + 1) + width for n in units if n)
    return sum(tokens) * width + sum(ranks) * 3 * 2 * width + bottlenecks


def _fitness(net: Any, session: Session) -> Callable[[Subnet], float]:
    """Returns how good a supernet is on validation, as a function of its sizes.

    All validation images stay on the devices, in float32.
    """
    graphdef, _, rest = nnx.split(net, Size, ...)
    rest = sharding.place(rest, session.mesh)
    objective, source = session.objective, session.task.validation
    metric = followed(objective)
    measure = evaluation.measurer(graphdef, objective, session.mesh)
    transform = session.data.transform
    batches = list(evaluation.batches(source, transform, session.mesh))

    def fitness(subnet: Subnet) -> float:
        assign(net, jnp.array(subnet, jnp.int32))
        sizes = sharding.place(nnx.state(net, Size), session.mesh)
        of = (sizes, rest), source, batches, objective
        return metric.rank(evaluation.measured(measure, *of)[metric.name])

    return fitness


def _modules(block: Any) -> tuple[list[Any], ...]:
    """Returns what has a size in a block of the supernet, for each of `KINDS`."""
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
    """Draws the sizes of a random subnet."""
    one, two = jax.random.split(key)
    depths = jax.random.choice(one, jnp.array(space.depths), (space.kinds, 1))
    shape = space.kinds, space.blocks
    sizes = jax.random.choice(two, jnp.array(space.sizes), shape)
    return jnp.where(jnp.arange(space.blocks) < depths, sizes, 0)


def _first(x: Float[Array, "... n"], count: Int[Array, ""]) -> Float[Array, "... n"]:
    """Keeps the first so many columns; the others are 0."""
    return jnp.where(jnp.arange(x.shape[-1]) < count, x, 0)
