"""Every method on a SAM: what it trains, and what it is merged into.

All train the mask decoder and `no_mask_embed` beside what they add to the encoder.
"""

import dataclasses
import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sams
from compiled import called
from flax import nnx
from tiny import base as classifier
from tiny import leaves

from experiments.config.polyp import PolypConfig
from experiments.methods import kinds
from experiments.methods.first_stage import Staged
from experiments.methods.registry import OF_SAM
from experiments.methods.spt import SptAdapter, SptLora
from snella_jax.models import sam, unstack

SCOPE = PolypConfig().scope()
OWN = r"decoder/.*|prompts/no_mask_embed"
BLOCKS = {
    "tiny_vit": r"encoder/blocks/[123]",
    "vit": r"encoder/blocks/(windowed|whole)",
}
EACH = {name: rf"{blocks}/\d" for name, blocks in BLOCKS.items()}
ATTENDED = "{}/(attn/(q|k|v|proj)|mlp/(fc1|fc2))"
BOTTLENECKS = "{}/mlp/bottleneck/(down|up)/(kernel|bias)"
FACTORS = f"{ATTENDED}/adapter/(a|b|alpha|beta|piece_coeff)"
PIECEWISE = f"{ATTENDED}/adapter/(a|b|piece_coeff)"
TRAINS = {  # besides OWN; {} for the stacks of blocks
    "decoder": OWN,
    "full": "encoder/.*",
    "bias": "encoder/.*/bias",
    "ssf": r"encoder/.*/ssf/(scale|shift)",
    "adapter": BOTTLENECKS,
    "adaptformer": BOTTLENECKS,
    "spt_adapter": f"{ATTENDED}/(bottleneck/.*|sparse/values)",
    "spt_lora": f"{ATTENDED}/(lora/(a|b)|sparse/values)",
    "gps": f"{ATTENDED}/sparse/values",
    "lora": f"{ATTENDED}/lora/(a|b)",
    "dora": f"{ATTENDED}/(magnitude|lora/(a|b))",
    "klora": PIECEWISE,
    "mixk": FACTORS,
    "snell": PIECEWISE,
    "snella": FACTORS,
    "snella_masked": f"{ATTENDED}/update/(a|b|alpha|beta|piece_coeff)",
    "snella_released": f"{ATTENDED}/adapter/(a|b|alpha|beta|gamma)",
    "snella_plus": f"{ATTENDED}/adapter/(a|b|alpha|piece_coeff)",
}
REFUSED = {
    "partial1": "Partial-1 trains the block before a head or a vocabulary",
    "mlp3": "MLP-3 trains a new head over classes",
    "vpt_shallow": "VPT puts tokens beside those of an image in a plain ViT",
    "vpt_deep": "VPT puts tokens beside those of an image in a plain ViT",
    "vqt": "VQT puts tokens beside those of an image in a plain ViT",
    "mosa": "MoSA draws its parts with the key of a call",
    "noah": "NOAH puts tokens beside those of an image in a plain ViT",
}
SETTINGS = OF_SAM | {  # so few that some matrices are sensitive and some are not
    "spt_lora": SptLora(share=0.2, ease=2.0, rank=1),
    "spt_adapter": SptAdapter(share=0.2, ease=2.0, rank=1),
}
MERGED = "ssf", "adapter", "spt_lora", "snella"
# One that adds to all layers, and one that adds to targets.
WITH_A_VIT = "ssf", "snella"


@functools.cache
def base(encoder):
    return tiny_sams.load(encoder)


def adapted(name, model):
    method, scope = SETTINGS[name], SCOPE
    if isinstance(method, Staged):
        scope = dataclasses.replace(scope, places=method.typical(model, scope))
    return method.adapt(model, scope)


def paths(model, kind):
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {"/".join(map(str, path)) for path, _ in flat}


def test_every_method_is_here():
    assert {*TRAINS, *REFUSED} == OF_SAM.keys()


@pytest.mark.parametrize(
    ("name", "encoder"),
    [*((name, "tiny_vit") for name in TRAINS), *((n, "vit") for n in WITH_A_VIT)],
)
def test_a_method_trains_the_decoder_and_what_it_adds(name, encoder):
    """In shapes."""
    plain = base(encoder)
    model = nnx.eval_shape(lambda: adapted(name, plain))
    every, trains = paths(model, nnx.Variable), paths(model, nnx.Param)
    blocks = (EACH if name.startswith("spt") else BLOCKS)[encoder]
    added = TRAINS[name].replace("{}", blocks)
    assert trains == {p for p in every if re.fullmatch(f"{OWN}|{added}", p)}
    assert any(re.fullmatch(added, path) for path in trains)
    assert any(path.startswith("decoder/iou/") for path in trains)
    assert "prompts/not_a_point" in every - trains


@pytest.mark.parametrize("name", MERGED)
def test_what_is_tested_computes_what_was_trained(name):
    """Of factors that are redrawn, so that all of them matter."""
    method, plain = SETTINGS[name], base("tiny_vit")
    model = adapted(name, plain)
    rng = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[0] == "encoder":
            drawn = rng.normal(0, 0.1, leaf.shape).astype(np.float32)
            leaf[...] = leaf[...] + drawn
    model.eval()
    merged = method.merged(model)
    images = jnp.asarray(rng.normal(0, 1, (2, 32, 32, 3)).astype(np.float32))
    expected, got = (called(m, images)[0] for m in (model, merged))
    assert abs(got - expected).max() <= 1e-4 * abs(expected).max()
    assert abs(got - called(plain, images)[0]).max() > 1e-2 * abs(expected).max()
    assert type(merged) is sam.Sam
    if name != "adapter":
        like = plain if merged.config.stacked else unstack(plain)
        assert leaves(merged).keys() == leaves(like).keys()
    moved = method.moved(plain, merged, SCOPE)
    assert (moved > 0) == (name != "adapter")
    assert (method.kept(plain, merged) > 0) == (name == "adapter")


@pytest.mark.parametrize("name", REFUSED)
def test_other_methods_say_why_not(name):
    method = SETTINGS[name]
    message = re.escape(REFUSED[name]) + r".* Sam (.*)Leave the method out"
    with pytest.raises(ValueError, match=message):
        method.adapt(base("tiny_vit"), SCOPE)
    if isinstance(method, Staged):
        with pytest.raises(ValueError, match=message):
            method.typical(base("tiny_vit"), SCOPE)


def test_the_decoder_alone_is_a_sams():
    assert kinds.has_classes(classifier())
    with pytest.raises(ValueError, match="mask decoder of a Sam, which a ViT has none"):
        OF_SAM["decoder"].adapt(classifier(), SCOPE)
