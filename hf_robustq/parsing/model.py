"""Tagger and dependency parser on any encoder of transformers, with biaffine scorers (arXiv 1611.01734)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from hf_robustq.metrics import IGNORED

POOLING = ("first", "mean")


class DependencyParserConfig(PreTrainedConfig):
    """An encoder's config, and what is scored.

    encoder        the config of the encoder, or its dict
    upos, deprels  the tags and labels, in the order of the outputs
    pooling        what stands for a word: its "first" subword, or the "mean" of all
    arc_size       width of the vectors of a word as a dependent and as a head, for the arcs
    label_size     the same for the labels
    dropout        of words and of these vectors, in training
    word_dropout   share of the words whose subwords are `mask_token_id` in training: a guard for small treebanks
    """

    model_type = "robustq_dependency_parser"
    sub_configs = {"encoder": AutoConfig}  # noqa: RUF012 # type: ignore[assignment]

    def __init__(
        self,
        encoder: PreTrainedConfig | dict[str, Any] | None = None,
        upos: Sequence[str] = (),
        deprels: Sequence[str] = (),
        pooling: str = "first",
        arc_size: int = 400,
        label_size: int = 100,
        dropout: float = 0.33,
        word_dropout: float = 0.0,
        mask_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if word_dropout and mask_token_id is None:
            raise ValueError("word_dropout needs mask_token_id, which stands for the words left out")
        if pooling not in POOLING:
            raise ValueError(f"pooling must be one of {', '.join(POOLING)}, got {pooling!r}")
        self.encoder = AutoConfig.for_model(**encoder) if isinstance(encoder, dict) else encoder
        self.upos, self.deprels = list(upos), list(deprels)
        self.pooling = pooling
        self.arc_size, self.label_size, self.dropout = arc_size, label_size, dropout
        self.word_dropout, self.mask_token_id = word_dropout, mask_token_id
        super().__init__(**kwargs)


@dataclass
class DependencyParserOutput(ModelOutput):
    """Scores of B sentences of up to W words.

    loss     0-dim: the sum of the cross entropies of tags, heads and labels, each a mean over words
    upos     [B, W, tags]
    arcs     [B, W, W + 1] of each head, 0 the root; the lowest float where no word is
    labels   [B, W, W + 1, labels] for each head; in training [B, W, labels], for the right head
    """

    loss: Tensor | None = None
    upos: Tensor | None = None
    arcs: Tensor | None = None
    labels: Tensor | None = None


class Biaffine(nn.Module):
    """s(d, h) = [d, 1]^T U [h, 1] for each of `out` outputs. U is one Linear, so that it is quantized like others."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.size, self.out = size + 1, out
        self.bilinear = nn.Linear(self.size, out * self.size, bias=False)

    def forward(self, dependents: Tensor, heads: Tensor) -> Tensor:
        """[B, W, H, out] of [B, W, size] and [B, H, size]."""
        left = self.bilinear(_with_one(dependents)).unflatten(-1, (self.out, self.size))
        return torch.einsum("bwos,bhs->bwho", left, _with_one(heads).to(left.dtype))

    def paired(self, dependents: Tensor, heads: Tensor) -> Tensor:
        """[B, W, out] of [B, W, size] each: word by word."""
        left = self.bilinear(_with_one(dependents)).unflatten(-1, (self.out, self.size))
        return torch.einsum("bwos,bws->bwo", left, _with_one(heads).to(left.dtype))


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones((*x.shape[:-1], 1))], -1)


class DependencyParser(PreTrainedModel):
    """Tags and parses given words.

    forward:
        input_ids, attention_mask   [B, T] of the encoder
        word_ids                    [B, T] the word of each subword, from 0; -1 for none
        upos, heads, deprels        [B, W] what is right, for the loss: heads count words from 1, 0 is the root; -100
                                    where no word is; tags and labels beyond the known ones have no loss
    """

    config_class = DependencyParserConfig
    base_model_prefix = "encoder"
    accepts_loss_kwargs = False  # a mean over words: the Trainer divides it by the micro-batches
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: DependencyParserConfig) -> None:
        super().__init__(config)
        if config.encoder is None or not config.upos or not config.deprels:
            raise ValueError("a parser needs an encoder's config, tags (upos) and labels (deprels)")
        self.encoder = _without_pooler(AutoModel.from_config(config.encoder))
        width = config.encoder.hidden_size
        self.root = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(config.dropout)
        self.tagger = nn.Linear(width, len(config.upos))
        self.arc_dependent, self.arc_head = (nn.Linear(width, config.arc_size) for _ in range(2))
        self.label_dependent, self.label_head = (nn.Linear(width, config.label_size) for _ in range(2))
        self.arcs = Biaffine(config.arc_size, 1)
        self.labels = Biaffine(config.label_size, len(config.deprels))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, DependencyParser):
            nn.init.normal_(module.root, std=0.02)

    @classmethod
    def from_encoder(cls, name: str, upos: Sequence[str], deprels: Sequence[str], **options: Any) -> Self:
        """A parser with new scorers on a trained encoder: a folder, or an id of the Hub."""
        encoder = _without_pooler(AutoModel.from_pretrained(name))
        model = cls(DependencyParserConfig(encoder=encoder.config, upos=upos, deprels=deprels, **options))
        model.encoder.load_state_dict(encoder.state_dict())
        return model

    def words(self, hidden: Tensor, word_ids: Tensor) -> Tensor:
        """[B, W, width]: the first subword of each word, or the mean of all; 0 for a word without any."""
        count = int(word_ids.max()) + 1
        index = torch.where(word_ids < 0, count, word_ids)  # the rest goes to a place of its own
        if self.config.pooling == "first":
            before = nn.functional.pad(index[:, :-1], (1, 0), value=-1)
            index = torch.where(index == before, count, index)
        wide = index[..., None].expand_as(hidden)
        sums = hidden.new_zeros((hidden.size(0), count + 1, hidden.size(2))).scatter_add_(1, wide, hidden)
        counts = hidden.new_zeros((hidden.size(0), count + 1)).scatter_add_(1, index, torch.ones_like(hidden[..., 0]))
        return (sums / counts.clamp(min=1)[..., None])[:, :count]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        word_ids: Tensor | None = None,
        upos: Tensor | None = None,
        heads: Tensor | None = None,
        deprels: Tensor | None = None,
        **kwargs: Any,
    ) -> DependencyParserOutput:
        assert word_ids is not None and input_ids is not None
        if self.training and self.config.word_dropout:
            input_ids = self._without_some(input_ids, word_ids)
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        words = self.dropout(self.words(hidden, word_ids))
        size = words.size(1)
        upos, heads, deprels = (gold if gold is None else gold[:, :size] for gold in (upos, heads, deprels))
        root = self.root.to(words.dtype).expand(words.size(0), 1, -1)
        nodes = torch.cat([root, words], 1)
        there = torch.arange(size, device=words.device) <= word_ids.amax(1, keepdim=True)  # [B, W]
        dependents, governors = self._vectors(self.arc_dependent, words), self._vectors(self.arc_head, nodes)
        arcs = self.arcs(dependents, governors).squeeze(-1)
        itself = torch.eye(size, size + 1, dtype=torch.bool, device=arcs.device).roll(1, 1)
        missing = ~nn.functional.pad(there, (1, 0), value=True)[:, None, :]
        arcs = arcs.masked_fill(missing | itself, torch.finfo(arcs.dtype).min)
        tags = self.tagger(words)
        dependents, governors = self._vectors(self.label_dependent, words), self._vectors(self.label_head, nodes)
        if not self.training or heads is None:
            labels = self.labels(dependents, governors)
            chosen = labels if heads is None else _at(labels, heads)
        else:
            labels = chosen = self.labels.paired(dependents, _at(governors[:, None], heads))
        loss = None
        if upos is not None and heads is not None and deprels is not None:
            pairs = ((tags, upos), (arcs, heads), (chosen, deprels))
            loss = torch.stack([_mean_loss(scores, gold) for scores, gold in pairs]).sum()
        return DependencyParserOutput(loss=loss, upos=tags, arcs=arcs, labels=labels)

    def _without_some(self, input_ids: Tensor, word_ids: Tensor) -> Tensor:
        left_out = torch.rand(word_ids.shape, device=word_ids.device) < self.config.word_dropout
        left_out = left_out.gather(1, word_ids.clamp(min=0)) & (word_ids >= 0)
        return input_ids.masked_fill(left_out, self.config.mask_token_id)

    def _vectors(self, layer: nn.Linear, words: Tensor) -> Tensor:
        return self.dropout(nn.functional.leaky_relu(layer(words), 0.1))


def _without_pooler(encoder: Any) -> Any:
    """Nothing here reads a vector of the whole sentence, whose layer would be quantized and not trained."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder


def _at(scores: Tensor, heads: Tensor) -> Tensor:
    """[B, W, n] of [B, W or 1, H, n]: at each word's head; where no word is, at the root."""
    place = heads.clamp(min=0)[..., None, None].expand(-1, -1, -1, scores.size(-1))
    return scores.expand(-1, heads.size(1), -1, -1).gather(2, place).squeeze(2)


def _mean_loss(scores: Tensor, gold: Tensor) -> Tensor:
    """Cross entropy in float32, the mean over words whose right answer is known."""
    gold = torch.where(gold < scores.size(-1), gold, IGNORED).flatten()
    losses = nn.functional.cross_entropy(scores.flatten(0, 1).float(), gold, ignore_index=IGNORED, reduction="sum")
    return losses / (gold != IGNORED).sum().clamp(min=1)


AutoConfig.register(DependencyParserConfig.model_type, DependencyParserConfig)
AutoModel.register(DependencyParserConfig, DependencyParser)
