"""A vision-language model made on the spot, and images for it: an Idefics3, which vLLM runs without torchvision.

An image of 56 pixels is cut into up to four tiles of 28 and shown whole besides, each of 4 tokens: how many tokens become of
one placeholder depends on the image's shape, as with the large models.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from tests.tiny_models import byte_level, small_llama

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}<|assistant|>"
)


def image(color: str | tuple[int, ...], size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    """A PNG of one colour."""
    from PIL import Image

    file = io.BytesIO()
    Image.new(mode, size, color).save(file, "PNG")
    return file.getvalue()


def vision_tokenizer(folder: Path) -> Path:
    """Tokenizer, processor and configuration of `vision_model`: all but its weights."""
    from transformers import AutoTokenizer, Idefics3Config, Idefics3Processor
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(byte_level(folder))
    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer.add_tokens(["<global-img>", *tiles])
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=TEMPLATE).save_pretrained(folder)
    text = small_llama(tokenizer, max_position_embeddings=2048, pad_token_id=tokenizer.pad_token_id)
    vision = Idefics3VisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        initializer_range=0.2,
    )
    Idefics3Config(
        architectures=["Idefics3ForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        dtype="float32",
    ).save_pretrained(folder)
    return folder


def vision_model(folder: Path) -> Path:
    """The whole, with random weights (float32, 2,048 positions)."""
    import torch
    from transformers import AutoConfig, Idefics3ForConditionalGeneration

    config = AutoConfig.from_pretrained(vision_tokenizer(folder))
    torch.manual_seed(0)
    Idefics3ForConditionalGeneration(config).float().save_pretrained(folder)
    return folder


def vision_classifier(folder: Path, labels: Sequence[str]) -> Path:
    """The same with a head for these classes, as vLLM's `convert: classify` looks for one: a matrix `score.weight`."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(vision_model(folder) / "model.safetensors")
    hidden = weights["lm_head.weight"].shape[1]
    weights["score.weight"] = torch.randn(len(labels), hidden, generator=torch.Generator().manual_seed(0))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    (folder / "config.json").write_text(json.dumps(config | named))
    return folder
