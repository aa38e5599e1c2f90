"""Every method on a decoder of texts: it trains what it says, or says why it does not.

The objective's loss is the runs' own, on batches as theirs are.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import called
from flax import nnx
from tiny import leaves

import snella_jax as snella
from experiments import commonsense
from experiments.config.language import LanguageConfig
from experiments.data.questions import AnswerBuckets
from experiments.data.tokens import Examples
from experiments.methods import sensitivity
from experiments.methods.first_stage import Staged
from experiments.methods.registry import METHODS
from experiments.methods.sensitivity import Scored
from experiments.methods.spt import SptAdapter, SptLora
from experiments.training import sharding
from experiments.training.answers import Answers
from experiments.training.session import Scope
from experiments.training.step import training_step
from experiments.training.trainer import Data
from snella_jax import models
from snella_jax.models import llama
from snella_jax.nnx.targets import select

TINY = llama.LlamaConfig(
    vocab_size=32, width=16, depth=2, heads=4, kv_heads=2, head_dim=4, mlp_dim=24
)
# Two matrices: every one more is traced again in every method.
TARGETS = r"blocks/(attn/v|mlp/down)"
SHAPES = {"v": (16, 8), "down": (24, 16)}
FACTORS = 2 * 8 * sum(n + m for n, m in SHAPES.values())  # of rank 8
OUTPUTS = 2 * sum(m for _, m in SHAPES.values())
BLOCK = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16  # q and o, k and v, MLP, norms
SETTINGS = METHODS | {  # so few that some matrices are sensitive and some are not
    "spt_lora": SptLora(share=0.1, ease=2.0, rank=1),
    "spt_adapter": SptAdapter(share=0.1, ease=2.0, rank=1),
}
SCOPE = Scope(TARGETS, LanguageConfig.trainable)
EACH = r"blocks/[01]/(attn/v|mlp/down)"
BOTTLENECKS = r"blocks/mlp/bottleneck/(down|up)/(kernel|bias)"
KERNELIZED = rf"{TARGETS}/adapter/(a|b|alpha|beta|piece_coeff)", FACTORS + 4 * 4
PIECEWISE = rf"{TARGETS}/adapter/(a|b|piece_coeff)", FACTORS + 4 * 2
TRAINS = {  # all that trains, and how many numbers; None for what places say
    "full": (r"(blocks|norm)/.*", 2 * BLOCK + 16),
    "partial1": (r"blocks/1/.*|norm/scale", BLOCK + 16),
    "adapter": (BOTTLENECKS, 2 * (2 * 16 * 8 + 8 + 16)),
    "adaptformer": (BOTTLENECKS, 2 * (2 * 16 * 8 + 8 + 16)),
    "spt_adapter": (rf"{EACH}/(bottleneck/.*|sparse/values)", None),
    "spt_lora": (rf"{EACH}/(lora/(a|b)|sparse/values)", None),
    "gps": (rf"{TARGETS}/sparse/values", OUTPUTS),
    "lora": (rf"{TARGETS}/lora/(a|b)", FACTORS),
    "dora": (rf"{TARGETS}/(magnitude|lora/(a|b))", FACTORS + OUTPUTS),
    "klora": PIECEWISE,
    "mixk": KERNELIZED,
    "snell": PIECEWISE,
    "snella": KERNELIZED,
    "snella_masked": (
        rf"{TARGETS}/update/(a|b|alpha|beta|piece_coeff)",
        FACTORS + 4 * 4,
    ),
    "snella_released": (
        rf"{TARGETS}/adapter/(a|b|alpha|beta|gamma)",
        FACTORS + 4 * 3,
    ),
    "snella_plus": (
        rf"{TARGETS}/adapter/(a|b|alpha|piece_coeff)",
        FACTORS + 4 * 3,
    ),
}
REFUSED = {
    "mlp3": "MLP-3 trains a new head over classes",
    "bias": "Bias trains biases",
    "ssf": "SSF shifts outputs of layers with biases",
    "vpt_shallow": "VPT puts tokens beside those of an image in a plain ViT",
    "vpt_deep": "VPT puts tokens beside those of an image in a plain ViT",
    "vqt": "VQT puts tokens beside those of an image in a plain ViT",
    "mosa": "MoSA draws its parts with the key of a call",
    "noah": "NOAH puts tokens beside those of an image in a plain ViT",
}
EVERYWHERE = ("full", "partial1")  # beside the targets, too
OBJECTIVE = Answers(("one",))
RNG = np.random.default_rng(0)
TEXTS = RNG.integers(1, 32, (4, 8)).astype(np.int32)
STARTS = 5, 3, 6, 2  # of what is learnt
LEARNT = np.arange(8) >= np.array(STARTS)[:, None]
BATCH = {
    "tokens": TEXTS,
    "mask": np.ones(TEXTS.shape, bool),
    "learnt": np.where(LEARNT, np.arange(8), 0).astype(np.int32),
}


@functools.cache
def base():
    model = llama.Llama(TINY, rngs=nnx.Rngs(0))
    for path, weight in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] != "scale":  # larger than at the start, so that all matters
            weight[...] = 12 * weight[...]
    return model


def data(texts, starts):
    source = Examples(list(texts), starts, range(len(texts)))
    buckets = AnswerBuckets.fitting(source, 1, 0, 4)
    return Data(source, None, buckets, dataclasses.replace(buckets, lengths=(2,)))


@functools.cache
def scores(rule):
    how = data(TEXTS, STARTS), OBJECTIVE, sharding.make("data=1"), 4, 0
    return sensitivity.scores(base(), TARGETS, rule, *how)


def adapted(name):
    method, scope = SETTINGS[name], SCOPE
    if isinstance(method, Scored):
        scope = dataclasses.replace(scope, places=method.choose(scores(method.rule)))
    return method.adapt(base(), scope), scope


def loss_of(logits):
    """The mean over learnt tokens, of logits in NumPy's float64."""
    logits = np.float64(logits)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, places = np.nonzero(LEARNT)
    return -np.mean(logs[rows, places - 1, TEXTS[rows, places]])


def steepest(gradient, _):
    """A step down that a linear loss would fall by 0.001 in."""
    scale = 0.001 / optax.tree.norm(gradient, squared=True)
    return jax.tree.map(lambda leaf: -scale * leaf, gradient)


def stepped(model):
    """The model after an update of the trainer's, and the loss before."""
    graphdef, trainable, budgets, frozen = nnx.split(
        model, nnx.Param, snella.Budget, ...
    )
    tx = optax.stateless(steepest)
    step = jax.jit(training_step(graphdef, tx, OBJECTIVE.loss))
    state = trainable, tx.init(trainable), budgets, frozen
    after, _, loss = step(*state, BATCH, jax.random.key(0))
    return nnx.merge(graphdef, after, budgets, frozen), loss


def close(got, expected):
    assert abs(got - expected).max() <= 1e-5 * abs(expected).max()


def test_every_method_is_here():
    assert {*TRAINS, *REFUSED} == METHODS.keys()


@pytest.mark.parametrize("name", TRAINS)
def test_a_method_trains_what_it_says_and_merges_to_the_same_logits(name):
    method, (regex, count) = SETTINGS[name], TRAINS[name]
    model, scope = adapted(name)
    trained = leaves(model, nnx.Param)
    assert set(trained) == {p for p in leaves(model) if re.fullmatch(regex, p)}
    if count is None:  # rank 1: a module or single weights of each matrix
        count = 0
        for path, own in scope.places.items():
            n, m = SHAPES[path.split("/")[-1]]
            module = n + m if name == "spt_lora" else 3 * m + 1
            count += module if len(own) >= module / 2 else len(own)
        assert any("sparse" in path for path in trained)
        assert any("sparse" not in path for path in trained)
    assert sum(own.size for own in trained.values()) == count

    after, loss = stepped(model)
    model.eval()
    after.eval()
    before, logits = called(model, TEXTS), called(after, TEXTS)
    if name != "snella_released":  # which drops something in training
        assert float(loss) == pytest.approx(loss_of(before), rel=1e-5)
        fall = loss_of(before) - loss_of(logits)
        # The threshold of a fixed density moves, which its gradient leaves out.
        assert fall > 0 if name == "snell" else fall == pytest.approx(0.001, rel=0.02)

    merged = method.merged(after)
    close(called(merged, TEXTS), logits)
    plain = base() if merged.config.stacked else models.unstack(base())
    if name.endswith(("adapter", "adaptformer")):
        assert method.kept(base(), merged) > 0
    else:
        assert type(merged) is llama.Llama
        assert nnx.split(merged)[0] == nnx.split(plain)[0]
    was, now = leaves(plain), leaves(merged)
    moved = {path for path, own in was.items() if not np.array_equal(own, now[path])}
    if name in EVERYWHERE:
        assert moved == trained.keys()
    else:
        assert all(re.fullmatch(rf"({TARGETS}|{EACH})/kernel", p) for p in moved)
        assert bool(moved) == (name not in ("adapter", "adaptformer"))
    assert (method.moved(base(), merged, SCOPE) > 0) == bool(moved)


@pytest.mark.parametrize("name", REFUSED)
def test_other_methods_say_why_not(name):
    method = SETTINGS[name]
    message = re.escape(REFUSED[name]) + r".* a\s+Llama (has none|is not)\. Leave"
    with pytest.raises(ValueError, match=message):
        method.adapt(base(), SCOPE)
    if isinstance(method, Staged):
        with pytest.raises(ValueError, match=message):
            method.typical(base(), SCOPE)


def test_the_usual_targets_are_the_benchmarks():
    """Those of LLM-Adapters, DoRA and the paper's Table XVIII."""
    names = "attn/q", "attn/k", "attn/v", "mlp/up", "mlp/down"
    assert {*select(base(), LanguageConfig.targets)} == {f"blocks/{n}" for n in names}


def test_a_linear_probe_is_refused_with_a_reason():
    reason = "linear fits a classifier to features, and a LLaMA answers by its own"
    with pytest.raises(ValueError, match=reason):
        LanguageConfig(methods=("linear",)).check()
    with pytest.raises(SystemExit, match=reason):
        commonsense.main(["--config", "smollm2", "--methods", "linear"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", TRAINS)
def test_the_vocabulary_trains_where_it_is_named(name, tied):
    """The embedding, which is the head, too, or the head alone; in shapes."""
    vocabulary = "embed" if tied else "head"
    config = dataclasses.replace(TINY, tied=tied)

    def trained(trainable):
        own, method = llama.Llama(config, rngs=nnx.Rngs(0)), SETTINGS[name]
        scope = Scope(TARGETS, trainable)
        if isinstance(method, Staged):
            scope = dataclasses.replace(scope, places=method.typical(own, scope))
        return method.adapt(own, scope)

    found = [
        {
            "/".join(map(str, path))
            for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))
        }
        for model in (nnx.eval_shape(lambda t=t: trained(t)) for t in ("", vocabulary))
    ]
    more = {"embed": "embed/embedding", "head": "head/kernel"}[vocabulary]
    assert found[1] == found[0] | {more} and more not in found[0]


@pytest.mark.parametrize("rule", ["squares", "contrastive"])
def test_scores_of_a_decoder_are_gradients_of_its_loss(rule):
    """Against finite differences of it, for the weight with the largest."""
    own = scores(rule)
    down = own["blocks/mlp/down"]
    place = np.unravel_index(np.argmax(down), down.shape)
    losses = []
    for shift in (0.02, -0.02):
        model = nnx.clone(base())
        kernel = model.blocks.mlp.down.kernel
        kernel[...] = kernel[...].at[place].add(shift)
        losses.append(loss_of(called(model, TEXTS)))
    slope = (losses[0] - losses[1]) / 0.04
    expected = slope**2 if rule == "squares" else abs(slope)
    assert down[place] == pytest.approx(expected, rel=2e-2)
    assert own.keys() == {"blocks/attn/v", "blocks/mlp/down"}


def test_a_first_stage_looks_at_some_texts_alone(monkeypatch):
    """Every batch is the same, so that scores count them."""
    texts, how = [TEXTS[0]] * 8, (OBJECTIVE, sharding.make("data=1"), 2, 0)
    found = []
    for most in (4, 1000):
        monkeypatch.setattr(sensitivity, "TEXTS", most)
        found.append(
            sensitivity.scores(base(), TARGETS, "squares", data(texts, [5] * 8), *how)
        )
    for path, some in found[0].items():
        np.testing.assert_allclose(2 * some, found[1][path], rtol=1e-5, atol=1e-12)


def test_16_bits_are_summed_in_32():
    config = dataclasses.replace(TINY, param_dtype=jnp.bfloat16)
    model = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
    _, kernels, _ = sensitivity.split(model, TARGETS)
    found = jax.tree.leaves(jax.eval_shape(sensitivity.zeros, kernels))
    assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.float32)}
