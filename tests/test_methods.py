"""Every method moves what it says and nothing else, and is tested as it was trained."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import snella_jax as snella
from experiments import command, fit, folder, mesh, train, tune
from experiments.config import RunConfig
from experiments.data.source import Arrays
from experiments.data.task import Task
from experiments.data.transforms import Transform
from experiments.methods import gps, locate, mosa, sparse, spt
from experiments.methods.trained import METHODS
from experiments.recipe import Recipe
from experiments.settings import Located, Prompted
from snella_jax import models
from snella_jax.models.vit import ViT, ViTConfig

TINY = ViTConfig(
    width=8, depth=2, heads=2, patch_size=4, image_size=8, channels=1, num_classes=3
)
TRANSFORM = Transform((8, 8), mean=(0.5,), std=(0.5,))
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), np.uint8)
SOURCE = Arrays(PIXELS, np.arange(24) % 3)
# So few that some matrices are sensitive and some are not.
LOCATED = {"share": 0.2, "ease": 2.0, "rank": 1}
CONFIG = RunConfig(
    epochs=3,
    warmup_epochs=0,
    spt_lora=Located(**LOCATED),
    spt_adapter=Located(**LOCATED),
    vpt_deep=Prompted(count=2),
)
TARGETS = r"blocks/(attn|mlp)/(query|key|value|out|fc1|fc2)"
OWN = r"head/(kernel|bias)|cls_token"
FACTORS = rf"{TARGETS}/adapter/(a|b|alpha|beta|piece_coeff)"
BOTTLENECKS = r"blocks/mlp/bottleneck/(down|up)/(kernel|bias)"
SUBNET = {"prompts": np.array([2, 1]), "lora": np.array([0, 3]),
          "adapter": np.array([2, 0])}  # fmt: skip
EACH = r"blocks/[01]/(attn|mlp)/(query|key|value|out|fc1|fc2)"
TRAINS = {  # all that trains, and nothing else
    "full": r".*",
    "partial1": r"head/(kernel|bias)|norm/(scale|bias)|blocks/1/.*",
    "mlp3": r"head/layers/[012]/(kernel|bias)",
    "bias": rf"{OWN}|.*/bias",
    "ssf": rf"{OWN}|.*/ssf/(scale|shift)",
    "vpt_shallow": rf"{OWN}|prompts",
    "vpt_deep": rf"{OWN}|blocks/prompts",
    "vqt": r"head/(kernel|bias)|blocks/queries",
    "adapter": rf"{OWN}|{BOTTLENECKS}",
    "adaptformer": rf"{OWN}|{BOTTLENECKS}",
    "mosa": rf"{OWN}|{BOTTLENECKS}",
    "spt_adapter": rf"{OWN}|{EACH}/(bottleneck/(down|up)/(kernel|bias)|sparse/values)",
    "spt_lora": rf"{OWN}|{EACH}/(lora/(a|b)|sparse/values)",
    "gps": rf"{OWN}|{TARGETS}/sparse/values",
    "noah": rf"{OWN}|blocks/[01]/prompts|blocks/1/attn/(query|key|value)/lora/(a|b)"
    r"|blocks/0/mlp/bottleneck/(down|up)/(kernel|bias)",
    "dora": rf"{OWN}|{TARGETS}/(magnitude|lora/(a|b))",
    "lora": rf"{OWN}|{TARGETS}/lora/(a|b)",
    "klora": rf"{OWN}|{TARGETS}/adapter/(a|b|piece_coeff)",
    "mixk": rf"{OWN}|{FACTORS}",
    "snell": rf"{OWN}|{TARGETS}/adapter/(a|b|piece_coeff)",
    "snella": rf"{OWN}|{FACTORS}",
    "snella_masked": rf"{OWN}|{TARGETS}/update/(a|b|alpha|beta|piece_coeff)",
    "snella_released": rf"{OWN}|{TARGETS}/adapter/(a|b|alpha|beta|gamma)",
}
WEIGHTS = 2 * (4 * 8 * 8 + 2 * 8 * 32)  # of the targeted kernels
MOVED = {  # of them, where not all do
    "partial1": WEIGHTS // 2,
    **dict.fromkeys(("mlp3", "bias", "vpt_shallow", "vpt_deep", "vqt"), 0),
    **dict.fromkeys(("adapter", "adaptformer", "mosa"), 0),
    "gps": 2 * (5 * 8 + 32),
    "noah": 3 * 8 * 8,
    **dict.fromkeys(
        ("snell", "snella", "snella_masked", "snella_released"), 0.3 * WEIGHTS
    ),
}


# Attention ignores what is added to all keys alike.
UNMOVED = r"blocks/attn/key/(bias|ssf/shift)"


def base():
    model = ViT(TINY, rngs=nnx.Rngs(0))
    # From a head of 0 nothing behind it would move in the first step.
    model.head.kernel[...] = jax.random.normal(jax.random.key(1), (8, 3))
    return model


def sizes(model):
    return {path: value.size for path, value in leaves(model).items()}


def leaves(model, kind=nnx.Variable):
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {"/".join(map(str, path)): np.array(value[...]) for path, value in flat}


@functools.cache
def scores(rule):
    how = (SOURCE, TRANSFORM, mesh.make("data=1"), 8, 0)
    return locate.scores(base(), CONFIG.targets, rule, *how)


def adapted(name, config=CONFIG):
    stage, own = METHODS[name].stage, base()
    if isinstance(stage, locate.Scoring):
        located = [stage.choose(config, scores(stage.rule))]
    else:
        located = [SUBNET] if stage else []
    model = METHODS[name].adapt(config, own, *located)
    before = leaves(base())  # nothing happened to what was adapted
    assert all(np.array_equal(before[p], value) for p, value in leaves(own).items())
    return model


@functools.cache
def trained(name):
    """The adapted model before and after three epochs, and the epochs."""
    method, model = METHODS[name], adapted(name)
    trainer = train.Trainer(
        model,
        train.Data(SOURCE, None, TRANSFORM, TRANSFORM),
        Recipe(epochs=3, batch=8, lr=3e-2),
        mesh.make("data=1"),
        watch=method.watch(CONFIG),
        competition=method.competition(CONFIG, model),
    )
    with contextlib.closing(trainer):
        rows = list(trainer.epochs(lambda _: None))
        return model, trainer.model, rows


def test_every_method_is_here():
    assert TRAINS.keys() == METHODS.keys()


@pytest.mark.parametrize("name", TRAINS)
def test_what_trains_moves_and_all_else_is_bit_identical(name):
    before, after, rows = trained(name)
    assert rows[-1].train_loss < rows[0].train_loss
    trains = set(leaves(before, nnx.Param))
    every = leaves(before)
    assert trains == {path for path in every if re.fullmatch(TRAINS[name], path)}
    now = leaves(after)
    for path, was in every.items():
        same = np.array_equal(was, now[path])
        counts = path.rsplit("/", 1)[-1] in ("budget", "allocated_at")
        if path in trains:
            # attention ignores what is added to all keys alike
            assert not same or re.fullmatch(UNMOVED, path), path
        elif not (counts and METHODS[name].competition(CONFIG, before)):
            assert same, path
    plain = base() if before.config.stacked else models.unstack(base())
    kept = leaves(plain).keys() & every.keys() - trains
    assert kept or name == "full"
    for path in kept:  # the base's, not others
        np.testing.assert_array_equal(leaves(plain)[path], every[path])


@pytest.mark.parametrize("name", TRAINS)
def test_what_is_tested_computes_what_was_trained(name):
    """And the weights that moved are counted."""
    method = METHODS[name]
    _, after, rows = trained(name)
    after = nnx.clone(after)
    after.eval()
    merged = method.merged(after)
    images = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    np.testing.assert_allclose(merged(images), after(images), rtol=1e-4, atol=1e-5)
    moved = method.moved(CONFIG, base(), after, merged)
    if name in ("spt_lora", "spt_adapter"):  # what was located
        structured, single = (
            sum(size for path, size in sizes(after).items() if part in path)
            for part in ("lora/", "sparse/values")
        )
        assert structured > 0 if name == "spt_lora" else moved == single
        assert 0 < single <= moved < WEIGHTS
    else:
        expected = MOVED.get(name, WEIGHTS)
        assert expected * 0.98 <= moved <= expected + 1
    densities = [row.density for row in rows]
    if name in ("snella", "snella_released"):
        assert densities[0] == 1 and densities[-1] == pytest.approx(0.3, abs=1e-3)
    elif name == "snell":
        assert densities == [pytest.approx(0.3, abs=1e-3)] * 3
    elif name in ("klora", "mixk"):
        assert densities == [1.0] * 3
    else:
        assert densities == [None] * 3


ELSEWHERE = {"ssf", "vpt_shallow", "vpt_deep", "vqt", "mlp3", "noah", "klora", "mixk",
             "snell", "snella", "snella_masked", "snella_released"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TRAINS.keys() - ELSEWHERE))
def test_training_starts_at_the_base(name):
    images = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    model = adapted(name)
    np.testing.assert_allclose(model(images), base()(images), rtol=1e-4, atol=1e-5)


def test_masked_weights_move_by_the_kernel_alone():
    """In NumPy's float64, from the factors after training."""
    before, after, _ = trained("snella_masked")
    merged, was = leaves(METHODS["snella_masked"].merged(after)), leaves(before)
    now = {path: np.float64(value) for path, value in leaves(after).items()}
    share = 0
    for path in was:
        if not path.endswith("update/mask"):
            continue
        layer, mask = path.removesuffix("/update/mask"), was[path]
        a, b, coeff, alpha, beta = (
            now[f"{layer}/update/{name}"]
            for name in ("a", "b", "piece_coeff", "alpha", "beta")
        )
        apart = np.linalg.norm(a[:, :, :, None] - b[:, :, None], axis=-1)
        kappa = np.einsum("lp,lpnm->lnm", coeff, apart)
        powers = np.exp(kappa - kappa.max(2, keepdims=True))
        soft = powers / powers.sum(2, keepdims=True)
        delta = kappa + alpha[:, None, None] * soft + beta[:, None, None]
        kernel = f"{layer}/kernel"
        expected = was[kernel] + mask * delta
        np.testing.assert_allclose(merged[kernel], expected, rtol=1e-4, atol=1e-6)
        share += mask.sum() / WEIGHTS
    assert share == pytest.approx(0.3, abs=1e-3)


def test_snell_gives_every_matrix_the_same_share():
    model = METHODS["snell"].adapt(CONFIG, base())
    budgets = leaves(model, snella.Budget)
    shares = {
        path: budgets[path] / size
        for path, size in (
            ("blocks/attn/query/adapter/budget", 64),
            ("blocks/mlp/fc1/adapter/budget", 256),
        )
    }
    for share in shares.values():
        np.testing.assert_allclose(share, 0.3, atol=1 / 64)


def test_settings_of_a_method_are_its_own():
    changed = dataclasses.replace(CONFIG.klora, rank=4)
    config = dataclasses.replace(CONFIG, klora=changed)
    model = METHODS["klora"].adapt(config, base())
    assert model.blocks.mlp.fc1.adapter.a.shape == (2, 2, 8, 2)
    assert METHODS["mixk"].adapt(config, base()).blocks.mlp.fc1.adapter.rule.rank == 8
    assert jnp.isfinite(model(jnp.zeros((1, 8, 8, 1)))).all()


def test_scores_are_the_gradients_of_the_training_images():
    """Against finite differences of the loss, of one kernel's entry each."""
    images = jax.random.normal(jax.random.key(3), (6, 8, 8, 1))
    labels = jnp.array([0, 1, 2, 0, 1, 2])
    with jax.enable_x64(True):
        wide = dataclasses.replace(TINY, dtype=jnp.float64, param_dtype=jnp.float64)
        model = ViT(wide, rngs=nnx.Rngs(0))
        model = locate.headed(model, jax.random.key(1))
        graphdef, kernels, rest = locate.split(model, CONFIG.targets)
        zeros = jax.tree.map(jnp.zeros_like, kernels)
        found = {}
        for rule in ("squares", "contrastive"):
            step = locate.scoring_step(graphdef, rule)
            found[rule] = step(zeros, kernels, rest, images, labels)

        def losses(shift):
            kernel = model.blocks.mlp.fc1.kernel
            before = kernel[...]
            kernel[...] = before.at[1, 2, 3].add(shift)
            logits = jax.nn.log_softmax(model(images))
            features = np.asarray(model.pooled(images))
            kernel[...] = before
            entropy = -logits[jnp.arange(6), labels].mean()
            return np.array([entropy, contrastive(features, np.asarray(labels))])

        slope = (losses(1e-5) - losses(-1e-5)) / 2e-5
        squares, signed = (
            float(found[rule]["blocks"]["mlp"]["fc1"]["kernel"][...][1, 2, 3])
            for rule in ("squares", "contrastive")
        )
    assert squares == pytest.approx(slope[0] ** 2, rel=1e-4)
    assert signed == pytest.approx(slope[1], rel=1e-4)


def contrastive(features, labels):
    """The loss by loops: an anchor at a time, the mean over its positives."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similar = np.exp(unit @ unit.T / 0.07)
    anchors = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        total = sum(similar[i, j] for j in others)
        same = [np.log(similar[i, j] / total) for j in others if labels[j] == labels[i]]
        if same:
            anchors.append(-np.mean(same))
    return np.mean(anchors)


def test_images_without_a_companion_do_not_count():
    features = np.random.default_rng(0).normal(size=(5, 4))
    labels = np.array([0, 0, 1, 2, 2])
    found = locate.contrastive(jnp.asarray(features), jnp.asarray(labels))
    assert float(found) == pytest.approx(contrastive(features, labels), rel=1e-5)
    alone = locate.contrastive(jnp.asarray(features), jnp.arange(5))
    assert float(alone) == 0


def test_gps_takes_the_largest_of_every_column():
    own = np.array([[[1, 5], [2, 4], [0, 6]], [[9, 0], [8, 7], [1, 2]]])
    assert gps.largest(own, 1).tolist() == [[2, 5], [0, 3]]
    assert sorted(gps.largest(own, 2)[1].tolist()) == [0, 2, 3, 5]
    with pytest.raises(ValueError, match=r"per_neuron=9: blocks/attn/.* has 8 inputs"):
        gps.selected(scores("contrastive"), 9)


def test_spt_takes_the_largest_of_all():
    found = spt.sensitive({"a": np.array([[1, 9]]), "b": np.array([[8, 2, 7]])}, 0.6)
    places = {path: own.tolist() for path, own in found.items()}
    assert places == {"a": [1], "b": [0, 2]}


def test_spt_structures_matrices_with_enough_sensitive_weights():
    """As many as parameters of a branch, divided by the ease; never half of each."""
    own = {path: np.zeros(v.shape) for path, v in scores("squares").items()}
    own["blocks/attn/query"][0, :4] = 1  # 32 of 64; a branch of rank 2 has 32
    own["blocks/attn/key"][1, :3] = 1  # 24
    share = 56 / WEIGHTS
    places = spt.sensitive(own, share)
    model = spt.adapt(base(), places, "lora", "head", 2, 1.0, nnx.Rngs(0))
    trains = {path for path in leaves(model, snella.Factor)}
    assert trains == {
        "blocks/0/attn/query/lora/a",
        "blocks/0/attn/query/lora/b",
        "blocks/1/attn/key/sparse/values",
    }
    assert model.blocks[1].attn.key.sparse.places[...].tolist() == list(range(24))


def test_single_weights_train_as_under_a_mask():
    """The values' gradient is the kernel's at their places; merged they are added."""
    layer = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 5))
    graphdef, state = nnx.split(layer)
    dense = jax.grad(lambda s: jnp.sum(nnx.merge(graphdef, s)(x) ** 2))(state)
    model = nnx.clone(layer)
    places = np.array([3, 17, 6])
    sparse.loosen(model, places)
    graphdef, values, rest = nnx.split(model, snella.Factor, ...)
    own = jax.grad(lambda v: jnp.sum(nnx.merge(graphdef, v, rest)(x) ** 2))(values)
    expected = dense["kernel"][...].reshape(-1)[places]
    np.testing.assert_allclose(own["sparse"]["values"][...], expected, rtol=1e-5)
    model.sparse.values[...] = jnp.array([1.0, 2.0, 3.0])
    moved = np.array(layer.kernel[...]).reshape(-1)
    moved[places] += [1, 2, 3]
    holder = nnx.List([model])
    merged = sparse.merge(holder)[0]
    np.testing.assert_allclose(merged.kernel[...].reshape(-1), moved, rtol=1e-6)
    np.testing.assert_allclose(merged(x), model(x), rtol=1e-5)


def test_prompts_take_no_part_but_in_attention():
    """They are not among the tokens, and enter where their block begins."""
    model = adapted("vpt_deep")
    images = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    assert model.features(images).shape == (2, 5, 8)
    assert [t.shape for t in model.features(images, layers=(0, 1))] == [(2, 5, 8)] * 2
    other = jnp.zeros_like(model.blocks.prompts[...])
    before = model.features(images, layers=(0, 1))
    model.blocks.prompts[...] = model.blocks.prompts[...].at[1].set(other[1])
    after = model.features(images, layers=(0, 1))
    np.testing.assert_array_equal(before[0], after[0])  # block 1's own come after it
    assert not np.allclose(before[1], after[1])


def test_deep_prompts_replace_those_of_the_block_before():
    """By hand: each block on its own tokens, with its own prompts behind them."""
    model, plain = adapted("vpt_deep"), models.unstack(base())
    images = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    tokens = plain._embed(images)
    for index, block in enumerate(plain.blocks):
        own = jnp.broadcast_to(model.blocks.prompts[...][index], (2, 2, 8))
        tokens = block(jnp.concatenate([tokens, own], 1))[:, :-2]
    np.testing.assert_allclose(model.features(images), plain.norm(tokens), atol=1e-5)


def test_queries_read_and_leave_the_tokens_alone():
    """By hand, and the head sees what each block's query found, in order."""
    model, plain = adapted("vqt"), models.unstack(base())
    images = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    tokens, found = plain._embed(images), []
    for index, block in enumerate(plain.blocks):
        x = jnp.broadcast_to(model.blocks.queries[...][index], (2, 1, 8))
        x = x + block.attn(block.norm1(x), block.norm1(tokens))
        found.append(x + block.mlp(block.norm2(x)))
        tokens = block(tokens)
    seen = [plain.norm(own)[:, 0] for own in (tokens, *found)]
    np.testing.assert_allclose(
        model.pooled(images), jnp.concatenate(seen, 1), atol=1e-5
    )
    np.testing.assert_allclose(seen[0], plain.pooled(images), atol=1e-5)


def test_attention_to_itself_is_attention_to_what_is_seen():
    attn = models.unstack(base()).blocks[0].attn
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    np.testing.assert_array_equal(attn(x), attn(x, x))
    np.testing.assert_allclose(attn(x[:, :2], x), attn(x)[:, :2], atol=1e-6)


def test_the_parts_of_an_adapter_are_equal_and_take_turns():
    model = adapted("mosa")
    bottleneck = model.blocks.mlp.bottleneck
    parts = np.asarray(bottleneck.part[...])
    assert [(parts[block] == p).sum() for block in (0, 1) for p in range(4)] == [16] * 8
    assert (parts[0] != parts[1]).any()
    bottleneck.up.kernel[...] = jnp.ones((2, 8, 8))
    images = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    whole = model(images)
    outputs = [model(images, jax.random.key(seed)) for seed in range(4)]
    assert len({out.tobytes() for out in map(np.asarray, outputs)}) > 1
    np.testing.assert_array_equal(model(images), whole)  # nothing of a draw stays
    hidden = jax.random.normal(jax.random.key(4), (1, 3, 8))
    one = nnx.merge(*_first(bottleneck))
    outputs = []
    for part in range(4):
        one.active[...] = jnp.int32(part)
        outputs.append(one(hidden, jax.nn.relu))
    one.active[...] = jnp.int32(mosa.WHOLE)
    mean = sum(outputs) / 4
    np.testing.assert_allclose(mean, one(hidden, jax.nn.relu), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="parts=1"):
        mosa.adapt(base(), "head", 8, 1, nnx.Rngs(0))


def _first(stacked):
    graphdef, state = nnx.split(stacked)
    return graphdef, jax.tree.map(lambda leaf: leaf[0], state)


def test_targets_may_name_stacked_blocks_alone():
    """Those of a list have other paths; what is counted is the same."""
    config = dataclasses.replace(CONFIG, targets=r"blocks/attn/(query|value)")
    for name in ("partial1", "spt_lora"):
        stage = METHODS[name].stage
        own = {path: s for path, s in scores("squares").items()
               if re.fullmatch(config.targets, path)}  # fmt: skip
        located = [stage.choose(config, own)] if stage else []
        model = METHODS[name].adapt(config, base(), *located)
        merged = METHODS[name].merged(model)
        assert METHODS[name].moved(config, base(), model, merged) == 0


@pytest.mark.parametrize("name", ["spt_lora", "gps", "lora"])
def test_targets_are_linear_layers(name):
    config = dataclasses.replace(CONFIG, targets=r"patch_embed|blocks/.*/fc1")
    with pytest.raises(ValueError, match="patch_embed: expected"):
        command._adapted(name, config, base())


def test_scores_that_say_nothing_are_refused():
    """Batches of one image have no companions; a pixel may be anything."""
    where = (SOURCE, TRANSFORM, mesh.make("data=1"))
    with pytest.raises(RuntimeError, match="several images of a class"):
        locate.scores(base(), CONFIG.targets, "contrastive", *where, 1, 0)
    broken = base()
    broken.blocks.mlp.fc1.kernel[...] *= np.nan
    with pytest.raises(FloatingPointError, match="first stage is not finite"):
        locate.scores(broken, CONFIG.targets, "squares", *where, 8, 0)


def test_queries_read_one_block_too():
    one = ViT(dataclasses.replace(TINY, depth=1), rngs=nnx.Rngs(0))
    for model in (one, models.unstack(one)):
        read = METHODS["vqt"].adapt(CONFIG, model)
        assert read.features(jnp.zeros((2, 8, 8, 1))).shape == (2, 6, 8)
        assert read(jnp.zeros((2, 8, 8, 1))).shape == (2, 3)


def test_attention_maps_show_a_blocks_prompts():
    """Behind the image's tokens, which attend to them, too."""
    maps = adapted("vpt_deep").attention_maps(jnp.ones((1, 8, 8, 1)), layers=(0, 1))
    assert [own.shape for own in maps] == [(1, 2, 7, 7)] * 2
    np.testing.assert_allclose(np.sum(maps, -1), 1, rtol=1e-5)
    assert (maps[1][0, :, 0, 5:] > 0).all()


@pytest.mark.parametrize("name", ["vpt_shallow", "vqt"])
def test_attention_maps_are_not_those_of_the_base(name):
    with pytest.raises(NotImplementedError):
        adapted(name).attention_maps(jnp.zeros((1, 8, 8, 1)), layers=(0,))


def test_what_was_located_is_kept_for_a_run_that_goes_on(tmp_path, monkeypatch):
    """The values of a checkpoint belong to these places, whatever scores say later."""
    task = Task("tiny", 3, SOURCE, SOURCE, SOURCE)
    config = dataclasses.replace(CONFIG, model="none", batch=8)
    quiet = Console(quiet=True)
    setting = fit.Setting(config, task, base(), mesh.make("data=1"), quiet, tmp_path)
    vars(setting)["transforms"] = (TRANSFORM, TRANSFORM)
    first = tune.adapted("gps", setting)
    monkeypatch.setattr(locate, "scores", None)
    again = tune.adapted("gps", setting)
    for path, value in leaves(first).items():
        np.testing.assert_array_equal(leaves(again)[path], value)
    assert [p.name for p in tmp_path.iterdir()] == ["located_gps.npz"]


def test_a_mask_is_that_of_its_density(tmp_path):
    """Trials of a search share what was located, but for other densities."""
    task = Task("tiny", 3, SOURCE, SOURCE, SOURCE)
    quiet, one, found = Console(quiet=True), mesh.make("data=1"), {}
    for density in (0.3, 0.1):
        own = dataclasses.replace(CONFIG.snella_masked, target_density=density)
        config = dataclasses.replace(CONFIG, model="none", batch=8, snella_masked=own)
        setting = fit.Setting(config, task, base(), one, quiet, tmp_path)
        vars(setting)["transforms"] = (TRANSFORM, TRANSFORM)
        tune.adapted("snella_masked", setting)
        places = folder.load(tmp_path / f"located_snella_masked_{density:g}.npz")
        found[density] = sum(int(np.sum(place)) for place in places.values())
    assert found[0.1] == pytest.approx(found[0.3] / 3, abs=2)
    assert len(list(tmp_path.iterdir())) == 2
