"""Words as subwords: tokenizers that say which word each subword is of, one trained on a treebank, batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_robustq.metrics import IGNORED

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}

POSITIONS = (
    "max_position_embeddings",
    "max_seq_len",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
)
"""What configs call the number of their positions, all of which a row must keep to."""


def train_tokenizer(sentences: Iterable[Sequence[str]], vocab_size: int = 4000) -> Any:
    """A tokenizer of `tokenizers` (byte-pair encoding, arXiv 1508.07909) trained on words, with RoBERTa's frame."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    made.normalizer = normalizers.NFC()  # type: ignore[assignment]
    made.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    made.decoder = decoders.Metaspace()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*SPECIAL.values()], show_progress=False)
    made.train_from_iterator((" ".join(words) for words in sentences), trainer)
    frame = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=frame)  # type: ignore
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raise `ValueError` for a tokenizer that does not say which word a subword is of."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{name} has no fast tokenizer, and only that tells which word a subword is of: choose an encoder with a "
            "tokenizer.json, or convert its tokenizer"
        )
    if tokenizer.unk_token_id is None or tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {name} needs an unknown and a padding token: set unk_token and pad_token")
    plain = tokenizer("a a", add_special_tokens=False)["input_ids"]
    if tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"] != plain:
        raise ValueError(f"the tokenizer of {name} joins words without a space: load it with add_prefix_space=True")


def longest(encoder: nn.Module, tokenizer: Any) -> int | None:
    """How many subwords, with the special ones, an encoder takes; None where nothing limits it."""
    config: Any = encoder.config
    configs = [config, *(getattr(config, part, None) for part in ("text_config", "encoder", "decoder"))]
    limits = [getattr(one, name, None) for one in configs for name in POSITIONS]
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if isinstance(table, nn.Embedding) and table.padding_idx is not None:
        limits.append(table.num_embeddings - table.padding_idx - 1)  # the family of RoBERTa counts from there
    limits = [n for n in (*limits, tokenizer.model_max_length) if isinstance(n, int) and 0 < n < 10**9]
    return min(limits, default=None)


def specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids before and after a sentence."""
    made = tokenizer([tokenizer.unk_token], is_split_into_words=True)
    inside = [i for i, word in enumerate(made.word_ids()) if word is not None]
    ids = list(made["input_ids"])
    return ids[: inside[0]], ids[inside[-1] + 1 :]


def subwords(
    sentences: Sequence[Sequence[str]], tokenizer: Any, around: tuple[list[int], list[int]], limit: int | None = None
) -> dict[str, list[list[int]]]:
    """input_ids, attention_mask and word_ids (-1: none) of each sentence; a word without subwords becomes unknown.

    Raises `ValueError` for a sentence of more than `limit` subwords, and for one without words.
    """
    before, after = around
    made = tokenizer([list(words) for words in sentences], is_split_into_words=True, add_special_tokens=False)
    result: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "word_ids": []}
    for i, words in enumerate(sentences):
        pieces: list[list[int]] = [[] for _ in words]
        for piece, word in zip(made["input_ids"][i], made.word_ids(i), strict=True):
            pieces[word].append(piece)
        pieces = [piece or [tokenizer.unk_token_id] for piece in pieces]
        inside = [word for word, own in enumerate(pieces) for _ in own]
        ids = [*before, *(piece for own in pieces for piece in own), *after]
        if not words:
            raise ValueError(f"sentence {i + 1} has no words: leave it out")
        if limit is not None and len(ids) > limit:
            raise ValueError(
                f"a sentence of {len(words)} words has {len(ids)} subwords, and the encoder takes {limit}: choose an "
                f"encoder with more positions, or split the sentence in the treebank: {' '.join(words[:8])} ..."
            )
        result["input_ids"].append(ids)
        result["attention_mask"].append([1] * len(ids))
        result["word_ids"].append([-1] * len(before) + inside + [-1] * len(after))
    return result


@dataclass(frozen=True)
class ParserCollator:
    """Batches of encoded sentences, padded on the right to the longest."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        padding = {"input_ids": self.pad_token_id, "attention_mask": 0, "word_ids": -1}
        return {
            key: nn.utils.rnn.pad_sequence(
                [torch.as_tensor(row[key]) for row in rows], batch_first=True, padding_value=padding.get(key, IGNORED)
            )
            for key in rows[0]
        }
