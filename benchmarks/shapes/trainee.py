"""What is trained: the model with its helping heads, and the losses.

Five helps that training has and the model does not keep: location targets are spread over the neighbouring bins; the
codes that the model sees of its own answer are random, so that it looks at the picture and not at them; a dense
head on the vision encoder's output names each patch's object, its box, the codes of its mask and its characters; heads
in the middle of the decoder mark the patches that answer the prompt, by rank, and point at the patch of the character
that is to be read next. Masks are compared as masks: many codes say nearly the same.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import PaliGemmaForConditionalGeneration

from benchmarks.shapes.batches import IGNORE, Batch
from benchmarks.shapes.codebook import CODES, NUM_CODES, Codebook, overlap_loss
from benchmarks.shapes.codebook import GRID as CODE_GRID
from benchmarks.shapes.network import NUM_PATCHES
from benchmarks.shapes.pool import CHARS_PER_PATCH
from benchmarks.shapes.scenes import CHARACTERS, CLASSES, IMAGE_SIZE, MAX_OBJECTS
from benchmarks.shapes.vocabulary import LOCATIONS, SEGMENTATIONS

ANSWER_LOSSES = ("location", "code", "mask", "text")
_MARK_LAYER = 4
_LENGTH_GROUPS = 3
_LABEL_WEIGHT = 4
"""Of the token behind a mask: one label to sixteen codes."""
_CODE_WEIGHT = 0.03
"""The true codes are those of the true box, not of the one that was said; the mask loss asks for the right ones."""
_SOFT_BINS = 512 / IMAGE_SIZE
"""Standard deviation of a location target, in bins: half a pixel."""


class DenseHeads(nn.Module):
    """What training asks of every patch, dropped afterwards."""

    sizes = (len(CLASSES) + 1, 4, CHARS_PER_PATCH * (len(CHARACTERS) + 1), 7)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, sum(self.sizes))
        self.codes = nn.Linear(width, CODES * NUM_CODES)
        self.mark = nn.Linear(width, MAX_OBJECTS + 1)
        self.point = nn.Linear(width, NUM_PATCHES)

    def patch_losses(self, features: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """`features` [I, 64, D] of the vision encoder."""
        classes, box, chars, order = self.patch(features).split(self.sizes, -1)
        inside = targets["patch_class"] >= 0
        char_targets = targets["patch_chars"].flatten() % (len(CHARACTERS) + 1)
        char_losses = functional.cross_entropy(chars.reshape(-1, len(CHARACTERS) + 1), char_targets, reduction="none")
        has_char = char_targets != len(CHARACTERS)
        kinds = targets["patch_class"].flatten() % (len(CLASSES) + 1)
        codes = self.codes(features[inside]).unflatten(-1, (CODES, NUM_CODES))
        return {
            "class": functional.cross_entropy(classes.flatten(0, 1), kinds),
            "box": 12 * functional.smooth_l1_loss(box[inside], targets["patch_box"][inside], beta=0.03),
            "patch_code": 0.3 * functional.cross_entropy(codes.flatten(0, 1), targets["patch_codes"][inside].flatten()),
            "char": char_losses.mean() + char_losses[has_char].sum() / (has_char.sum() + 1),
            "order": functional.cross_entropy(order.flatten(0, 1), targets["patch_order"].flatten() % 7),
        }

    def mark_loss(self, hidden: Tensor, ranks: Tensor) -> Tensor:
        """`hidden` [B, 64, D] in the middle of the decoder; `ranks` [B, 64], or IGNORE."""
        hidden = functional.rms_norm(hidden, hidden.shape[-1:])
        return functional.cross_entropy(self.mark(hidden).flatten(0, 1), ranks.flatten(), ignore_index=IGNORE)

    def point_loss(self, hidden: Tensor, points: Tensor) -> Tensor:
        """`hidden` [N, D] where an answer is about to say a character; `points` [N] of its patch."""
        hidden = functional.rms_norm(hidden, hidden.shape[-1:])
        return functional.cross_entropy(self.point(hidden), points, reduction="sum") / (len(points) + 1)


def prefix_lm_mask(prefix_length: Tensor, length: Tensor, width: int) -> Tensor:
    """[B, 1, width, width] bool: everyone sees the prefix, the suffix sees itself causally, nobody the padding."""
    place = torch.arange(width, device=length.device)
    visible = (place[None, None, :] <= place[None, :, None]) | (place[None, None, :] < prefix_length[:, None, None])
    visible = visible & (place[None, None, :] < length[:, None, None])
    return (visible | torch.eye(width, dtype=torch.bool, device=length.device))[:, None]


class Trainee(nn.Module):
    """Model and heads with the loss as forward."""

    def __init__(self, model: PaliGemmaForConditionalGeneration, tokenizer: Tokenizer, mask_decoder: Codebook) -> None:
        super().__init__()
        self.model = model
        self.mask_decoder = mask_decoder.requires_grad_(False)
        self.heads = DenseHeads(model.config.text_config.hidden_size)
        vocabulary = tokenizer.get_vocab()
        self.first_location, self.first_code = vocabulary[LOCATIONS[0]], vocabulary[SEGMENTATIONS[0]]
        bins = torch.arange(len(LOCATIONS))
        spread = torch.exp(-((bins[:, None] - bins[None, :]) ** 2) / (2 * _SOFT_BINS**2))
        self.register_buffer("spread", spread / spread.sum(1, keepdim=True), persistent=False)

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.model.vision_tower(pixel_values).last_hidden_state
        return features, self.model.model.multi_modal_projector(features)

    def decode(self, images: Tensor, input_ids: Tensor, prefix_length: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, 64 + T, D]: after layer `_MARK_LAYER`, and the last."""
        language = self.model.model.language_model
        embeds = torch.cat([images, language.embed_tokens(input_ids)], 1)
        mask = prefix_lm_mask(prefix_length + NUM_PATCHES, length + NUM_PATCHES, embeds.shape[1])
        positions = torch.arange(1, embeds.shape[1] + 1, device=embeds.device)[None]
        hidden = embeds
        middle = hidden
        rotary = language.rotary_emb(hidden, positions)
        for index, layer in enumerate(language.layers):
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            if index + 1 == _MARK_LAYER:
                middle = hidden
        return middle, language.norm(hidden)

    def vision_loss(self, batch: Batch) -> dict[str, Tensor]:
        """The dense losses alone: what the vision encoder learns before the decoder joins."""
        features, _ = self.encode_images(batch.pixel_values)
        return self.heads.patch_losses(features.float(), batch.dense)

    def _hide_codes(self, input_ids: Tensor) -> Tensor:
        """`input_ids` with a random code in place of each.

        Codes said so far are never those of the true answer; a model that trusts them goes wrong with its own.
        """
        codes = input_ids - self.first_code
        is_code = (codes >= 0) & (codes < NUM_CODES)
        hidden = input_ids.clone()
        hidden[is_code] = torch.randint(NUM_CODES, (int(is_code.sum()),), device=codes.device) + self.first_code
        return hidden

    def mask_loss(self, log_probs: Tensor, masks: Tensor) -> Tensor:
        """How far the masks that the likeliest codes say, [16 M, 128], are from `masks` [M, 1, 64, 64].

        The gradient goes through the expected codeword, as if it had been decoded.
        """
        if not len(masks):
            return log_probs.sum() * 0
        probs = log_probs.exp()
        chosen = functional.one_hot(log_probs.argmax(-1), NUM_CODES).to(probs)
        words = (chosen + probs - probs.detach()) @ self.mask_decoder.embedding
        words = words.unflatten(0, (-1, CODES)).transpose(1, 2).unflatten(2, (CODE_GRID, CODE_GRID))
        return overlap_loss(self.mask_decoder.decoder(words), masks)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        input_ids = self._hide_codes(batch.input_ids)
        features, images = self.encode_images(batch.pixel_values)
        chosen, marks, pointing, points = [], [], [], []
        order = batch.length.argsort()
        for rows in order.chunk(_LENGTH_GROUPS):  # short texts apart from long ones: less padding
            width = int(batch.length[rows].max())
            lengths = batch.prefix_length[rows], batch.length[rows]
            middle, hidden = self.decode(images[batch.image_index[rows]], input_ids[rows, :width], *lengths)
            chosen.append(hidden[:, NUM_PATCHES:][batch.labels[rows, :width] != IGNORE])
            marks.append(middle[:, :NUM_PATCHES])
            points.append(batch.points[rows, :width])
            pointing.append(middle[:, NUM_PATCHES:][points[-1] != IGNORE])
        log_probs = self.model.lm_head(torch.cat(chosen)).float().log_softmax(-1)
        labels = batch.labels[order]
        labels = labels[labels != IGNORE]
        bins, codes = labels - self.first_location, labels - self.first_code
        is_location, is_code = (bins >= 0) & (bins < len(LOCATIONS)), (codes >= 0) & (codes < NUM_CODES)
        location_probs = log_probs[is_location][:, self.first_location : self.first_location + len(LOCATIONS)]
        location = -(self.spread[bins[is_location]] * location_probs).sum()
        code_probs = log_probs[is_code]
        code = functional.nll_loss(code_probs, labels[is_code], reduction="sum")
        among_codes = code_probs[:, self.first_code : self.first_code + NUM_CODES].log_softmax(-1)
        is_text = ~(is_location | is_code)
        weights = torch.ones_like(log_probs[:, 0])
        weights[1:][is_code[:-1]] = _LABEL_WEIGHT
        text = (weights * functional.nll_loss(log_probs, labels, reduction="none"))[is_text].sum()
        return {
            "location": location / (is_location.sum() + 1),
            "code": _CODE_WEIGHT * code / (is_code.sum() + 1),
            "mask": 3 * self.mask_loss(among_codes, batch.masks_of(order)),
            "text": text / (weights[is_text].sum() + 1),
            **self.heads.patch_losses(features.float(), batch.dense),
            "mark": self.heads.mark_loss(torch.cat(marks).float(), batch.ranks[order]),
            "point": self.heads.point_loss(
                torch.cat(pointing).float(), torch.cat([part[part != IGNORE] for part in points])
            ),
        }
