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
from experiments.methods.own_parameters import Bias, Full, Partial
from experiments.methods.prompts import VptDeep, VptShallow
from experiments.methods.snella import Klora, MixK, ReleasedSnella, Snell, Snella
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
}
OF_SAM: dict[str, Method] = {DECODER: MaskDecoder(), **METHODS}  # of runs on masks


def title(name: str) -> str:
    """Returns how tables call a method, without its rank."""
    return {**STEPLESS, **OF_SAM, **METHODS}[name].title
