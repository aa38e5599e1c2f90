"""NOAH: its supernet computes what its subnets do, and the best of them is found."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from experiments.config.images import ImageConfig
from experiments.data.source import Arrays
from experiments.data.task import Task
from experiments.data.transforms import Transform
from experiments.methods import noah
from experiments.methods.evolution import Space, evolve
from experiments.methods.spt import SptLora
from experiments.runs import images, train_method
from experiments.training import evaluation, sharding
from experiments.training.session import Scope
from snella_jax import models
from snella_jax.models.vit import ViT, ViTConfig
from snella_jax.nnx.variables import Factor

TINY = ViTConfig(
    width=8, depth=2, heads=2, patch_size=4, image_size=8, channels=1, num_classes=3
)
OWN = noah.Noah(lr=1e-2, sizes=(1, 3), depths=(0.5, 1.0), population=8, generations=2)
SPACE = Space(blocks=12, kinds=3, depths=(3, 6, 9, 12), sizes=(1, 5, 10))
IMAGES = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
SUBNETS = [
    ((3, 1), (1, 3), (3, 3)),
    ((0, 0), (0, 0), (0, 0)),
    ((1, 0), (3, 0), (0, 0)),
    ((0, 0), (0, 0), (1, 3)),
]


def base():
    model = ViT(TINY, rngs=nnx.Rngs(0))
    model.head.kernel[...] = jax.random.normal(jax.random.key(1), (8, 3))
    return model


def supernet(model=None):
    """With modules as they might be after some training: none starts where it does."""
    net = OWN.supernet(model or base(), Scope("", "head", seed=-1))
    key = jax.random.key(5)
    flat = nnx.to_flat_state(nnx.state(net, Factor))
    for index, (_, variable) in enumerate(flat):
        own = jax.random.fold_in(key, index)
        variable.set_value(0.3 * jax.random.normal(own, variable.shape))
    nnx.update(net, nnx.from_flat_state(flat))
    return net


def subnet(net, sizes, model=None):
    """A model with modules of these sizes, and the starts of the supernet's in them."""
    places = {k: np.array(row) for k, row in zip(noah.KINDS, sizes, strict=True)}
    model = OWN.adapt(model or base(), Scope("", "head", places=places))
    for index, block in enumerate(model.blocks):
        whole = models.unstack(net).blocks[index]
        tokens, rank, units = (row[index] for row in sizes)
        if tokens:
            block.prompts[...] = whole.prompts[...][:tokens]
        for name in ("query", "key", "value") if rank else ():
            own, from_ = getattr(block.attn, name).lora, getattr(whole.attn, name).lora
            own.a[...], own.b[...] = from_.a[...][:, :rank], from_.b[...][:, :rank]
        if units:
            own, from_ = block.mlp.bottleneck, whole.mlp.bottleneck
            own.down.kernel[...] = from_.down.kernel[...][:, :units]
            own.down.bias[...] = from_.down.bias[...][:units]
            own.up.kernel[...] = from_.up.kernel[...][:units]
            own.up.bias[...] = from_.up.bias[...]
    return model


@pytest.mark.parametrize("sizes", SUBNETS)
def test_a_supernet_computes_what_its_subnet_does(sizes):
    net = supernet()
    expected = subnet(net, sizes)(IMAGES)
    noah.assign(net, jnp.array(sizes))
    np.testing.assert_allclose(net(IMAGES), expected, rtol=1e-4, atol=1e-5)
    if not any(itertools.chain(*sizes)):
        np.testing.assert_allclose(expected, base()(IMAGES), rtol=1e-4, atol=1e-5)


def test_what_trains_besides_is_named_as_in_the_base():
    """Whose blocks are stacked, here and in SPT, though theirs are a list."""
    places = {k: np.array([1, 1]) for k in noah.KINDS}
    scope = Scope("", "head|blocks/norm1", places=places)
    own = OWN.adapt(base(), scope)
    found = dataclasses.replace(scope, places={"blocks/0/attn/query": np.arange(9)})
    other = SptLora(rank=1, ease=1.0).adapt(base(), found)
    for model in (own, other):
        trains = nnx.state(model, nnx.Param)["blocks"]
        assert all("norm1" in trains[i] and "norm2" not in trains[i] for i in (0, 1))


def test_blocks_in_a_list_have_sizes_of_their_own():
    stacked = supernet()
    listed = OWN.supernet(models.unstack(base()), Scope("", "head", seed=-1))
    for index, block in enumerate(models.unstack(stacked).blocks):
        nnx.update(listed.blocks[index], nnx.state(block))
    for sizes in SUBNETS:
        for net in (stacked, listed):
            noah.assign(net, jnp.array(sizes))
        np.testing.assert_allclose(listed(IMAGES), stacked(IMAGES), atol=1e-5)


def test_training_draws_sizes_and_only_what_counts_has_a_gradient():
    net = supernet()
    graphdef, factors, rest = nnx.split(net, Factor, ...)

    @jax.jit
    def gradient(key):
        def loss(factors):
            return jnp.sum(nnx.merge(graphdef, factors, rest)(IMAGES, key) ** 2)

        return jax.grad(loss)(factors)

    seen = set()
    for seed in range(20):
        found = gradient(jax.random.key(seed))["blocks"]
        tokens = np.any(found["prompts"][...], -1)
        ranks = np.any(found["attn"]["value"]["lora"]["b"][...], -2)
        units = np.any(found["mlp"]["bottleneck"]["up"]["kernel"][...], -1)
        sizes = tuple(tuple(own.sum(-1).tolist()) for own in (tokens, ranks, units))
        for own in (tokens, ranks, units):  # the first ones
            assert (np.diff(own.astype(int), axis=-1) <= 0).all()
        for row in sizes:
            assert row[0] in (1, 3) and row[1] in (0, 1, 3)
        biased = np.any(found["mlp"]["bottleneck"]["up"]["bias"][...], -1)
        np.testing.assert_array_equal(biased, np.array(sizes[2]) > 0)
        seen.add(sizes)
    assert len(seen) > 10
    assert (
        net(IMAGES).tolist() == net(IMAGES).tolist()
    )  # nothing is drawn without a key


@pytest.mark.parametrize("sizes", SUBNETS)
def test_parameters_are_those_of_the_modules(sizes):
    modules = nnx.state(subnet(supernet(), sizes), Factor)
    assert noah.parameters(sizes, 8) == sum(x.size for x in jax.tree.leaves(modules))


@pytest.mark.parametrize("seed", range(3))
def test_evolution_finds_what_chance_does_not(seed):
    rng = np.random.default_rng(seed)
    target = SPACE.random(rng)

    def score(net):
        assert net not in seen  # none is tried twice
        seen.append(net)
        return -float(np.abs(np.array(net) - np.array(target)).sum())

    seen = []
    how = {"population": 50, "parents": 10, "seed": seed}
    found = evolve(SPACE, score, lambda net: True, **how)
    rounds = [list(scores.items()) for scores in itertools.islice(found, 16)]
    assert [len(own) for own in rounds] == [50 * (i + 1) for i in range(16)]
    for own in rounds:
        values = [value for _, value in own]
        assert values == sorted(values, reverse=True)
    random = [SPACE.random(rng) for _ in range(len(seen))]
    distance = np.abs(np.array(random) - np.array(target)).sum((1, 2)).min()
    assert rounds[-1][0] == (target, 0) and distance > 10
    again = evolve(SPACE, lambda net: dict(rounds[-1])[net], lambda net: True, **how)
    assert list(next(itertools.islice(again, 15, 16)).items()) == rounds[-1]


def test_every_subnet_has_its_modules_in_the_first_blocks():
    rng = np.random.default_rng(0)
    nets = [SPACE.random(rng) for _ in range(100)]
    children = [SPACE.mutated(rng, net) for net in nets]
    crossed = [SPACE.crossed(rng, *pair) for pair in itertools.pairwise(nets)]
    for net in (*nets, *children, *crossed):
        assert len(net) == 3
        for row in net:
            used = [size for size in row if size]
            assert len(row) == 12 and row[: len(used)] == tuple(used)
            assert len(used) in (3, 6, 9, 12) and set(used) <= {1, 5, 10}
    changed = [a != b for a, b in zip(nets, children, strict=True)]
    assert 20 < sum(changed) < 70
    for child, (one, other) in zip(crossed, itertools.pairwise(nets), strict=True):
        assert all(row in pair for row, pair in zip(child, zip(one, other, strict=True),
                                                    strict=True))  # fmt: skip


def test_evolution_stays_within_the_limit():
    def small(net):
        return sum(map(sum, net)) < 70

    found = evolve(SPACE, lambda net: 0.0, small, population=9, parents=3, seed=0)
    scores = next(itertools.islice(found, 3, 4))
    assert len(scores) > 9 and all(map(small, scores))
    none = evolve(SPACE, lambda net: 0.0, lambda net: False, population=9, parents=3,
                  seed=0)  # fmt: skip
    assert list(next(none)) == [SPACE.smallest]


def test_a_small_space_is_searched_through():
    """More than there is cannot be asked for; it ends nevertheless."""
    space = Space(blocks=2, kinds=1, depths=(1, 2), sizes=(1, 2))
    found = evolve(space, lambda net: net[0][0], lambda net: True, population=50,
                   parents=2, seed=0)  # fmt: skip
    scores = next(itertools.islice(found, 2, 3))
    assert len(scores) == 6  # 1-, 2-, 11, 12, 21, 22


@pytest.fixture
def setting(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 3
    pixels = rng.integers(0, 120, (48, 8, 8, 1)) + 60 * labels[:, None, None, None]
    parts = [Arrays(pixels[i::2].astype(np.uint8), labels[i::2]) for i in (0, 1)]
    task = Task("tiny", 3, parts[0], parts[1], parts[1])
    config = ImageConfig(
        model="none",
        methods=("noah",),
        epochs=2,
        warmup_epochs=0,
        batch=8,
        settings={"noah": OWN},
    )
    quiet = Console(quiet=True)
    found = images.ImageRun(
        config, task, base(), sharding.make("data=1"), quiet, tmp_path
    )
    transform = Transform((8, 8), mean=(0.5,), std=(0.5,))
    vars(found)["transforms"] = (transform, transform)
    return found


def test_the_best_on_validation_is_found(setting):
    """All of the space of one block, against the subnets as models of their own."""
    one = ViT(dataclasses.replace(TINY, depth=1), rngs=nnx.Rngs(0))
    one.head.kernel[...] = jax.random.normal(jax.random.key(1), (8, 3))
    net = supernet(one)
    limit = 3 * 8 + 3 * 6 * 8 + 17 + 8
    own = dataclasses.replace(OWN, population=64, limit=limit)
    best = own.search(net, setting.session("noah"))
    every = itertools.product([(1,), (3,)], repeat=3)
    within = [sizes for sizes in every if noah.parameters(sizes, 8) <= limit]
    assert 4 <= len(within) < 8
    how = setting.task.validation, setting.transforms[1], setting.mesh
    scores = {}
    for sizes in within:
        model = subnet(net, sizes, one)
        found = evaluation.evaluate(model, *how, setting.objective)
        scores[sizes] = found.metrics["accuracy"]
    assert len(set(scores.values())) > 2
    assert best in within and scores[best] == max(scores.values())


@pytest.mark.parametrize("protocol", ["choose", "final"])
def test_the_supernet_trains_before_the_subnet(setting, protocol, monkeypatch):
    """On the training split alone, and is not trained again by a run that goes on."""
    config = dataclasses.replace(setting.config, protocol=protocol)
    setting = dataclasses.replace(setting, config=config)
    transform = Transform((8, 8), mean=(0.5,), std=(0.5,))
    vars(setting)["transforms"] = (transform, transform)
    fitted = train_method.tune("noah", setting)
    lines = (setting.out / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    of = {name: [row for row in rows if row["method"] == name]
          for name in (noah.SUPERNET, "noah")}  # fmt: skip
    assert all("val_accuracy" in row for row in of[noah.SUPERNET])
    assert all(("val_accuracy" in row) == (protocol == "choose") for row in of["noah"])
    assert [len(own) for own in of.values()] == [2, 2]
    with np.load(setting.out / "located_noah.npz") as places:
        sizes = tuple(tuple(places[kind].tolist()) for kind in noah.KINDS)
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(fitted.model, Factor)))
    assert shapes == jax.tree.map(
        jnp.shape, nnx.to_pure_dict(nnx.state(subnet(supernet(), sizes), Factor))
    )
    monkeypatch.setattr(noah.Noah, "locate", None)
    train_method.adapted("noah", setting)


def test_a_limit_that_no_subnet_meets_is_an_error():
    own = dataclasses.replace(OWN, limit=80)
    with pytest.raises(ValueError, match=r"limit=80: the smallest subnet has 81\."):
        own.typical(base(), Scope("", "head"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": ()}, r"noah\.sizes=\(\): expected positive numbers"),
        ({"depths": (0.0,)}, r"noah\.depths=\(0.0,\): expected shares"),
        ({"generations": -1}, r"noah\.generations=-1: expected at least 0"),
        ({"population": 0}, r"noah\.population=0: expected at least 1"),
        ({"supernet_lr": 0.0}, r"noah\.supernet_lr=0.0: expected > 0"),
        ({"supernet_epochs": 1}, r"noah\.supernet_epochs=1: expected more than the 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed, message):
    own = dataclasses.replace(noah.Noah(), **changed)
    with pytest.raises(ValueError, match=message):
        ImageConfig(methods=("noah",), settings={"noah": own}).check()
