"""A flow and the text encoder that is trained with it: captions to tokens, embeddings, likelihood."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import sentencepiece

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import replacing
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.models.t5 import T5Encoder
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import IndexedData, Order
from mlx_starflow.training.data.dropout import choose_caption, context_mask, context_share
from mlx_starflow.training.loop.objective import Batch, Metrics, batch_loss, batch_nll

SPECIAL_TOKENS = 3

LONGEST_TEXT = 128
"""Tokens of a caption that a model is made to read unless it is told to read more."""


class TextFlow(nn.Module):
    """A flow and its text encoder, trained as one."""

    def __init__(self, flow: STARFlow, text_encoder: T5Encoder):
        super().__init__()
        self.flow = flow
        self.text_encoder = text_encoder

    def loss(self, batch: Batch, gradient_checkpointing: bool = False) -> tuple[mx.array, Metrics]:
        """`batch_loss` of a batch of `CaptionedLatents`."""
        return batch_loss(self.flow, self.with_text(batch), gradient_checkpointing)

    def nll(self, batch: Batch) -> mx.array:
        """`batch_nll` of a batch of `CaptionedLatents`."""
        return batch_nll(self.flow, self.with_text(batch))

    def with_text(self, batch: Batch) -> Batch:
        """A batch of `CaptionedLatents` with the embeddings of its captions, `text`."""
        return {**batch, "text": self.text_encoder.encode(batch["ids"], batch["mask"])}


class CaptionedLatents(IndexedData):
    """Latents of several views of each image, with captions.

    Args:
        latents: normalized latents `[N, views, H, W, C]`, float32.
        captions: captions of each image, its usual one first.
        tokenizer: makes token ids of captions.
        text_length: tokens a caption.
        tokens: tokens of the deep block, N of `dropout.context_mask`.
        repeats: how often a pass takes each image, `[N]`; None: once.
    """

    def __init__(
        self,
        latents: np.ndarray,
        captions: Sequence[Sequence[str]],
        tokenizer: Tokenizer,
        *,
        text_length: int,
        tokens: int,
        repeats: Sequence[int] | None = None,
    ):
        self.latents, self.captions, self.tokenizer = latents, captions, tokenizer
        self.text_length, self.tokens = text_length, tokens
        self.order = Order(len(latents), repeats=repeats)

    def arrays(
        self, chosen: np.ndarray, rng: np.random.Generator, config: TrainingConfig, progress: float
    ) -> dict[str, np.ndarray]:
        """`latents`, `noise`, `context_mask`, and `ids` and `mask` of the captions."""
        count = len(chosen)
        latents = self.latents[chosen, rng.integers(self.latents.shape[1], size=count)]
        texts = [choose_caption(self.captions[index], rng, config.caption_dropout) for index in chosen]
        ids, mask, _ = self.tokenizer.batch(texts, self.text_length)
        share = context_share(config.context_full, progress)
        return {
            "latents": latents,
            "noise": rng.standard_normal(latents.shape, dtype=np.float32),
            "context_mask": context_mask(rng, count, self.tokens, share, config.context_partial),
            "ids": ids,
            "mask": mask,
        }


def train_tokenizer(captions: Sequence[str], path: Path, vocab_size: int) -> Tokenizer:
    """Write a SentencePiece model with T5's special tokens over the words of captions; one that exists is kept.

    It has at most `vocab_size` pieces, but at least one for every character that occurs. Of the kinds "unigram" and
    "bpe" (byte-pair encoding) it is the one that makes fewer pieces of the captions: with few captions unigram finds
    hardly a piece that is longer than a character.

    Raises:
        StarflowError: there are no words.
    """
    if path.exists():
        return Tokenizer(path)
    sentences = [text for text in captions if text.strip()]
    if not sentences:
        raise StarflowError('no picture has a caption: give the lines of metadata.jsonl a "text"')
    # SentencePiece also needs room for its word mark.
    characters = len(set("".join(sentences).casefold() + "".join(sentences))) + SPECIAL_TOKENS + 1
    try:
        models = [_train(kind, sentences, max(vocab_size, characters)) for kind in ("unigram", "bpe")]
    except RuntimeError as error:
        reason = one_line(error, first=True)
        raise StarflowError(f"no tokenizer can be made of these captions ({reason}); add captions") from None

    def pieces(model: bytes) -> int:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        return sum(map(len, processor.encode(sentences)))

    with replacing(path, makes_folder=True) as temporary:
        temporary.write_bytes(min(models, key=pieces))
    return Tokenizer(path)


def _train(kind: str, sentences: Sequence[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type=kind,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def fitting_length(captions: Sequence[str], tokenizer: Tokenizer, least: int) -> int:
    """Tokens that no caption is longer than, `</s>` included: at least `least`, and at most `LONGEST_TEXT`."""
    longest = max((len(tokenizer.encode(caption)) for caption in captions), default=0)
    return max(min(longest, LONGEST_TEXT), least)


def initialize_text_encoder(encoder: T5Encoder) -> None:
    """T5's initial weights (arXiv 1910.10683), drawn from MLX's generator.

    Attention does not scale its logits: the initial queries hold the factor.
    """
    config = encoder.config
    width, inner = config.d_model, config.num_heads * config.d_kv

    def draw(layer: nn.Module, std: float) -> None:
        layer.weight = std * mx.random.normal(layer.weight.shape)

    draw(encoder.shared, 1.0)
    for block in encoder.encoder.block:
        attention, mlp = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        draw(attention.q, (width * config.d_kv) ** -0.5)
        draw(attention.k, width**-0.5)
        draw(attention.v, width**-0.5)
        draw(attention.o, inner**-0.5)
        if "relative_attention_bias" in attention:
            draw(attention.relative_attention_bias, 1.0)
        for name in ("wi", "wi_0", "wi_1"):
            if name in mlp:
                draw(mlp[name], width**-0.5)
        draw(mlp.wo, config.d_ff**-0.5)
