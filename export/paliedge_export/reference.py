"""The model as transformers runs it, in float32: the reference that fp32 graphs are compared with.

The only module that imports torch and transformers, and only when it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from paliedge.prompt import PromptTokenizer
from paliedge_export.golden import NUM_NEW_TOKENS, PROMPTS, Golden, golden_images
from paliedge_export.metadata import PROCESSOR_FILES, read_tokens

if TYPE_CHECKING:
    from transformers import PaliGemmaForConditionalGeneration


def make_reference_golden(folder: Path) -> Golden:
    """Let transformers answer; the pixels are its own processor's, the prompt's ids are ours.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
    """
    import torch
    import transformers
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    if any((folder / name).is_file() for name in PROCESSOR_FILES):
        processor = SiglipImageProcessorPil.from_pretrained(folder)
    else:
        size = model.config.vision_config.image_size
        processor = SiglipImageProcessorPil(
            size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
    tokens = read_tokens(folder)
    tokenizer = PromptTokenizer(folder / "tokenizer.json", tokens)
    images = golden_images()
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        features = model.get_image_features(pixels).pooler_output.numpy()
        logits = np.stack(
            [
                reference_logits(model, image[None], prefix, tokens.image, tokens.vocab_size, NUM_NEW_TOKENS)
                for image in pixels
                for prefix in map(tokenizer.encode_prefix, PROMPTS)
            ]
        ).reshape(len(images), len(PROMPTS), NUM_NEW_TOKENS, -1)
    highest = logits.max(-1)
    return Golden(
        reference=f"transformers {transformers.__version__}",
        images=images,
        image_features=features,
        token_ids=logits.argmax(-1),
        log_probs=-np.log(np.exp(logits - highest[..., None]).sum(-1)),
    )


def reference_logits(
    model: PaliGemmaForConditionalGeneration,
    pixel_values: object,
    prefix: list[int],
    image_token: int,
    vocab_size: int,
    num_new_tokens: int,
) -> npt.NDArray[np.float32]:
    """Greedy decoding past end-of-sequence: logits [num_new_tokens, vocab_size] float32.

    Called with token_type_ids, without which transformers masks the prefix causally.
    """
    import torch

    vision = model.config.vision_config
    num_image_tokens = (vision.image_size // vision.patch_size) ** 2
    ids = torch.tensor([[image_token] * num_image_tokens + prefix])
    output = model(
        input_ids=ids,
        pixel_values=pixel_values,
        attention_mask=torch.ones_like(ids),
        token_type_ids=torch.zeros_like(ids),
        use_cache=True,
    )
    rows = [output.logits[0, -1, :vocab_size]]
    for length in range(ids.shape[1] + 1, ids.shape[1] + num_new_tokens):
        output = model(
            input_ids=rows[-1].argmax()[None, None],
            attention_mask=torch.ones((1, length), dtype=torch.long),
            token_type_ids=torch.ones((1, 1), dtype=torch.long),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        rows.append(output.logits[0, -1, :vocab_size])
    logits: npt.NDArray[np.float32] = torch.stack(rows).float().numpy()
    return logits
