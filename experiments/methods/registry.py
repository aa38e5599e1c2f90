"""All methods by name. A new one is a file and a line here."""

from experiments.methods.adapter import Adapter, AdaptFormer
from experiments.methods.dora import Dora
from experiments.methods.gps import Gps
from experiments.methods.linear_probe import Linear
from experiments.methods.lora import Lora
from experiments.methods.mask_decoder import MaskDecoder
from experiments.methods.masked import MaskedSnella
from experiments.methods.method import Method
from experiments.methods.mlp_head import MlpHead
from experiments.methods.mosa import Mosa
from experiments.methods.noah import Noah
from experiments.methods.own_parameters import Bias, Full, FullFloat32, Partial
from experiments.methods.prompts import VptDeep, VptShallow
from experiments.methods.snella import (
    Klora,
    LinearSnella,
    MixK,
    PlusSnella,
    ReleasedSnella,
    Snell,
    Snella,
)
from experiments.methods.spt import SptAdapter, SptLora
from experiments.methods.ssf import Ssf
from experiments.methods.untuned import TrueBox, Untuned
from experiments.methods.vqt import Vqt

LINEAR = "linear"  # the method that is fitted on features, not trained by steps
UNTUNED = "untuned"  # the model as it is
BOX = "box"  # a SAM as it is, with the true box
DECODER = "decoder"  # the method that trains a SAM's decoder alone
STEPLESS = {LINEAR: Linear, UNTUNED: Untuned, BOX: TrueBox}  # of some kinds of runs
METHODS: dict[str, Method] = {  # that are trained by steps, with their usual settings
    "full": Full(),
    "partial1": Partial(),
    "mlp3": MlpHead(),
    "bias": Bias(),
    "ssf": Ssf(),
    "vpt_shallow": VptShallow(),
    "vpt_deep": VptDeep(),
    "vqt": Vqt(),
    "adapter": Adapter(),
    "adaptformer": AdaptFormer(),
    "mosa": Mosa(),
    "spt_adapter": SptAdapter(),
    "spt_lora": SptLora(),
    "gps": Gps(),
    "noah": Noah(),
    "lora": Lora(),
    "dora": Dora(),
    "klora": Klora(),
    "mixk": MixK(),
    "snell": Snell(),
    "snella": Snella(),
    "snella_masked": MaskedSnella(),
    "snella_released": ReleasedSnella(),
    "snella_plus": PlusSnella(),
}
OF_MMDIT: dict[str, Method] = {  # of runs that learn to draw a concept
    "full": FullFloat32(),
    **{name: METHODS[name] for name in ("lora", "dora", "snell", "snella")},
    "snella_linear": LinearSnella(),
}
OF_SAM: dict[str, Method] = {DECODER: MaskDecoder(), **METHODS}  # of runs on masks


# Reasons for which the others do not train an MMDiT.
_HEADS = "trains a head of classes, and an MMDiT has none"
_BLOCKS = (
    "adds to the blocks of one stream, and an MMDiT's have two, joined in attention"
)
_TOKENS = "adds tokens to a ViT's, and an MMDiT's attention joins pictures and texts"
_STAGES = "has a first stage, which needs a loss without noise"
_NOT_OF_MMDIT = {
    **dict.fromkeys((LINEAR, "mlp3", "partial1"), _HEADS),
    **dict.fromkeys(("ssf", "adapter", "adaptformer", "mosa"), _BLOCKS),
    **dict.fromkeys(("vpt_shallow", "vpt_deep", "vqt"), _TOKENS),
    **dict.fromkeys(("spt_adapter", "spt_lora", "gps", "snella_masked"), _STAGES),
    "noah": "chooses among adapters and prompts of a plain ViT",
    DECODER: "trains a SAM's decoder",
    BOX: "is a SAM with the true box",
    "bias": "trains biases, which full does, too",
    "klora": "is snell with --snell.gate none and --snell.target_density 1",
    "mixk": "is snella with --snella.gate none and --snella.target_density 1",
    "snella_released": "is snella with other settings, of a ViT's released code",
    "snella_plus": "is snella with --snella.centred both --snella.start zero "
    "--snella.gate hard",
}


def not_of_mmdit(name: str) -> str | None:
    """Returns why a method does not train an MMDiT; None for one that does, or none."""
    reason = _NOT_OF_MMDIT.get(name)
    if reason is None:
        return None
    return f"{name} {reason}. Leave the method out; there are {', '.join(OF_MMDIT)}."


def title(name: str) -> str:
    """Returns how tables call a method, without its rank."""
    return {**STEPLESS, **OF_SAM, **OF_MMDIT, **METHODS}[name].title
