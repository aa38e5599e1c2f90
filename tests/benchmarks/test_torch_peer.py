"""The peer in PyTorch: it trains what our LoRA trains, and says what it is not."""

import pytest

from experiments.benchmarks import torch_peer
from experiments.benchmarks.workload import CLASSES, Setting

FLOAT32 = Setting("lora", "vit_ti16", 2, dtype="float32", frozen_dtype="float32")


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft
def test_peft_trains_as_many_parameters_as_lora():
    row, take = torch_peer.lora(FLOAT32)
    width, depth, rank = 192, 12, FLOAT32.rank
    block = 4 * (width + width) + 2 * (width + 4 * width)
    assert row["trainable"] == depth * block * rank + (width + 1) * CLASSES
    take()


@pytest.mark.reference
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (Setting("lora", "vit_ti16", dtype="float32"), "cannot mix float32"),
        (Setting("lora", "dinov2_s14"), "without LayerScale: no dinov2_s14"),
        (Setting("lora", "swin_b"), "without LayerScale: no swin_b"),
    ],
)
def test_peers_there_are_not(setting, said):
    with pytest.raises(ValueError, match=said):
        torch_peer.lora(setting)
