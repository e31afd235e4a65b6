"""Prompts with images as vLLM takes them: decoded, and put through its processor of the model, which makes the placeholders long.

Imports vLLM, as `vllm_engine` does, and nothing of it before the first image.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pipelines.engine import TokenIds
from pipelines.errors import EngineStartError, RowError
from pipelines.images import Image
from pipelines.vllm_requests import one_line

#: Prompts whose images are decoded at once. vLLM's own processing takes one after the other (`renderer_num_workers`).
_DECODED = 4


class ImageRenderer:
    """Renders prompts for one engine."""

    def __init__(self) -> None:
        # Bound to the loop of its first use, which is the engine's.
        self._room = asyncio.Semaphore(_DECODED)

    async def render(self, llm: Any, token_ids: list[int], images: Sequence[Image]) -> Any:
        """vLLM's rendered form of a prompt: all of its tokens, and what the processor made of the images.

        That holds tensors of the model's own size, so the pixels of a large photograph do not wait with the request. Images
        are known to vLLM's caches by their digests. Raises RowError for images that cannot be decoded (`bad_image`), or
        that the model does not take so many of (`invalid_request`); EngineStartError where it takes none.
        """
        config = llm.vllm_config.model_config
        if not config.is_multimodal_model:
            raise EngineStartError(f"model {config.model!r} takes no images: vLLM has it for text")
        async with self._room:
            decoded = await asyncio.to_thread(_decode, images)
            prompt = {
                "prompt_token_ids": token_ids,
                "multi_modal_data": {"image": decoded},
                "multi_modal_uuids": {"image": [image.sha256.hex() for image in images]},
            }
            try:
                (rendered,) = await llm.renderer.render_cmpl_async([prompt])
            except MemoryError:
                raise
            except (
                Exception
            ) as error:  # vLLM's refusals, and whatever a processor raises of a size it was not made for
                raise RowError("invalid_request", f"images: {one_line(error)}") from error
        return rendered


def added_tokens(output: Any, token_ids: TokenIds, images: Sequence[Image]) -> int:
    """By how many tokens the images made a prompt longer than it came; 0 without images."""
    return len(output.prompt_token_ids) - len(token_ids) if images else 0


def _decode(images: Sequence[Image]) -> list[Any]:
    """The images as vLLM itself reads those of a chat: RGB, what is transparent white."""
    from vllm.multimodal.media import ImageMediaIO

    reader = ImageMediaIO()
    decoded = []
    for number, image in enumerate(images, 1):
        try:
            decoded.append(reader.load_bytes(bytes(image.data)))
        except Exception as error:  # Pillow raises anything of damaged files
            raise RowError("bad_image", f"image {number}: is no image: {one_line(error)}") from error
    return decoded
