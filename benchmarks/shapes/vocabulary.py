"""The shapes model's tokenizer: a byte-fallback BPE of Gemma's form, trained on the scenes' own prompts.

Same normalizer, decoder and added tokens as PaliGemma's tokenizer.json, only smaller. Letters and
digits of rendered text stay single tokens: their words are kept out of the training text.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from benchmarks.shapes.scenes import CHARACTERS, CLASSES, make_examples, make_scene

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
NEWLINE = "\n"
LOCATIONS = tuple(f"<loc{index:04d}>" for index in range(1024))
SEGMENTATIONS = tuple(f"<seg{index:03d}>" for index in range(128))
IMAGE = "<image>"


def _corpus(num_scenes: int) -> list[str]:
    rng = np.random.default_rng(0)
    examples = itertools.chain.from_iterable(make_examples(make_scene(seed), rng, 6) for seed in range(num_scenes))
    lines = [" ".join(f"a {label}" for label in CLASSES)]
    for example in examples:
        lines.append(example.prompt)
        if example.task in ("caption", "colour"):
            lines.append(example.answer)
    return lines


def build_tokenizer(num_scenes: int = 2_000) -> Tokenizer:
    """Train the BPE and append PaliGemma's location, segmentation and image tokens."""
    trainee = Tokenizer(models.BPE())
    trainee.normalizer = normalizers.Replace(" ", "▁")
    trainee.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    alphabet = [*CHARACTERS, *"abcdefghijklmnopqrstuvwxyz", *"▁.,;:?!'\"-+/()&%"]
    trainer = trainers.BpeTrainer(vocab_size=10_000, initial_alphabet=alphabet, min_frequency=20, show_progress=False)
    trainee.train_from_iterator(_corpus(num_scenes), trainer)
    learned = json.loads(trainee.to_str())["model"]

    head = [*SPECIAL, NEWLINE, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocab = {piece: index for index, piece in enumerate([*head, *pieces])}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = vocab["<bos>"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", bos)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (*LOCATIONS, *SEGMENTATIONS)])
    tokenizer.add_special_tokens([AddedToken(IMAGE, normalized=False, special=True)])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and what transformers wants beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "extra_special_tokens": {"image_token": IMAGE},
        "image_token": IMAGE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
