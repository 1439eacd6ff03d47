"""Random-weight models in the real Hugging Face format, named as such."""

import json
from pathlib import Path

import torch

_PART = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_clip(folder: Path) -> Path:
    """A random-weight CLIP with its processor, as `save_pretrained` writes it."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=48)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    text = {
        **_PART,
        "vocab_size": len(tokens),
        "max_position_embeddings": 48,
        "eos_token_id": len(tokens) - 1,
        "bos_token_id": len(tokens) - 2,
        "pad_token_id": len(tokens) - 1,
    }
    config = CLIPConfig(
        text_config=text, vision_config={**_PART, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    return folder


def save_vit(folder: Path) -> Path:
    """A random-weight ViT with its image processor; BiomedCLIP's vision part has this form."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        ViTModel(ViTConfig(**_PART, image_size=32, patch_size=8)).save_pretrained(folder)
    return folder
