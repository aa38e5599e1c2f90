"""Made the pipeline beside this file, with diffusers 0.42.1.

`python tests/assets/sd3/make.py FOLDER`: a tiny Stable Diffusion 3 whose every number
is random, in float16; noise, and the latents and the picture that diffusers makes of
it, in float32.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

PROMPT, NEGATIVE = "a photo of sks dog, 2 hats", "grey"
STEPS, GUIDANCE, SIZE, T5_LENGTH = 4, 5.0, (16, 24), 24


def main(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    random = made()
    with torch.no_grad():
        for model in components(random):
            for tensor in model.parameters():
                scale = 0.2 if tensor.ndim > 1 else 0.1
                tensor.copy_(
                    scale * torch.randn(tensor.shape) + (tensor.ndim == 1) * tensor
                )
            model.half()
        random.text_encoder.text_projection.weight.copy_(torch.eye(8))  # as published
    random.save_pretrained(folder / "pipeline")
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder / "pipeline", dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, SIZE[0] // 2, SIZE[1] // 2)
    with torch.no_grad():
        latents, pictures = (drawn(pipeline, noise, kind) for kind in ("latent", "pil"))
    np.savez(
        folder / "expected.npz",
        noise=noise.permute(0, 2, 3, 1).numpy(),
        latents=latents.permute(0, 2, 3, 1).numpy(),
        pictures=np.stack(pictures),
    )


def components(pipeline: StableDiffusion3Pipeline) -> list[torch.nn.Module]:
    """Lists the models of a pipeline."""
    return [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]


def drawn(pipeline: StableDiffusion3Pipeline, noise: torch.Tensor, kind: str):
    """Draws two pictures from noise."""
    return pipeline(
        [PROMPT, "two dogs"],
        negative_prompt=[NEGATIVE, NEGATIVE],
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise,
        max_sequence_length=T5_LENGTH,
        output_type=kind,
    ).images


def made() -> StableDiffusion3Pipeline:
    """Makes a pipeline of every component that the published one has."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=20,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=12,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.25,
    )
    t5 = T5Config(
        vocab_size=140, d_model=20, d_kv=4, num_heads=2, d_ff=12, num_layers=2,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
    )  # fmt: skip
    tokenizer = clip_tokenizer("<|endoftext|>")
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip("quick_gelu", 8, 8),
        tokenizer=tokenizer,
        text_encoder_2=clip("gelu", 12, 8),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=t5_tokenizer(),
    )


def clip(act: str, width: int, projection: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=522, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=3, num_attention_heads=2, hidden_act=act,
        projection_dim=projection, bos_token_id=520, eos_token_id=521, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def clip_tokenizer(pad: str) -> CLIPTokenizer:
    """Makes a tokenizer of bytes and eight merges, in the order of CLIP's ids."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(n) for n in [*plain, *range(256, 256 + 256 - len(plain))]]
    merges = [
        *(("d", "o"), ("do", "g</w>"), ("p", "h"), ("o", "t"), ("ot", "o</w>")),
        *(("s", "k"), ("sk", "s</w>"), ("ph", "oto</w>")),
    ]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [*map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=merges, pad_token=pad, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Makes a tokenizer of letters and a few words."""
    pieces = ["▁", "▁a", "▁photo", "▁dog", "og", *"abcdefghijklmnopqrstuvwxyz,!2"]
    scores = [(piece, -1.0 - 0.1 * rank) for rank, piece in enumerate(pieces)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *scores], extra_ids=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
