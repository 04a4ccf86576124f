"""From a parser's scores to trees, and to figures: what a Trainer is given, and `parse` for words of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_robustq.metrics import IGNORED, dependency_scores
from hf_robustq.parsing.decode import decode
from hf_robustq.parsing.subwords import ParserCollator, check_tokenizer, longest, specials, subwords

if TYPE_CHECKING:
    from transformers import EvalPrediction

    from hf_robustq.parsing.datasets import Labels

ANNOTATIONS = ("upos", "heads", "deprels")
"""`TrainingArguments(label_names=...)` of a parser."""


def decoded(scores: Sequence[Tensor], gold: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """upos, heads and deprels [B, W] of the best tree; -100 where no word is. A `preprocess_logits_for_metrics`.

    scores   of `DependencyParserOutput`: [B, W, tags], [B, W, W + 1], [B, W, W + 1, labels]
    gold     `ANNOTATIONS`, [B, W] each, read only for which places hold words
    """
    tags, arcs, labels = scores[:3]
    floats = arcs.float().cpu()
    counts = (gold[1] != IGNORED).sum(1, keepdim=True)
    heads = torch.full(arcs.shape[:2], IGNORED)
    for i, n in enumerate(counts.flatten().tolist()):
        heads[i, :n] = torch.from_numpy(decode(floats[i, :n, : n + 1].numpy()))
    heads = heads.to(tags.device)
    empty = torch.arange(tags.size(1), device=tags.device) >= counts
    places = heads.clamp(min=0)[:, :, None, None].expand(-1, -1, 1, labels.size(-1))
    deprels = labels.gather(2, places).squeeze(2).argmax(-1).masked_fill(empty, IGNORED)
    return tags.argmax(-1).masked_fill(empty, IGNORED), heads, deprels


def named(annotations: Sequence[np.ndarray | Tensor], names: Mapping[str, Sequence[str]]) -> list[dict[str, list[Any]]]:
    """{"upos", "heads", "deprels"} of each sentence, of ids [B, W] in the order of `ANNOTATIONS`."""
    upos, heads, deprels = (np.asarray(one) for one in annotations)
    made = []
    for i, row in enumerate(heads):
        words = row != IGNORED
        tags, labels = ([names[key][j] for j in ids[i][words]] for key, ids in (("upos", upos), ("deprels", deprels)))
        made.append({"upos": tags, "heads": row[words].tolist(), "deprels": labels})
    return made


def scorer(labels: Labels) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics`: {"upos", "uas", "las"} of what `decoded` gave, as `dependency_scores` has them."""
    names = {key: labels.names(key) for key in ("upos", "deprels")}

    def compute(predicted: EvalPrediction) -> dict[str, float]:
        ours, gold = predicted.predictions, predicted.label_ids
        return dependency_scores(named(ours, names), named(gold, names))  # type: ignore[arg-type]

    return compute


@torch.no_grad()
def parse(
    model: Any, tokenizer: Any, sentences: Sequence[Sequence[str]], batch_size: int = 32
) -> list[dict[str, list[Any]]]:
    """{"upos", "heads", "deprels"} of sentences of words; a head is the number of a word, 0 the root.

    The model is in evaluation mode afterwards. Raises `ValueError` for a sentence without words or longer than the
    encoder's positions.
    """
    check_tokenizer(tokenizer, tokenizer.name_or_path)
    model.eval()
    names = {"upos": model.config.upos, "deprels": model.config.deprels}
    limit = longest(model.encoder, tokenizer)
    around, collate = specials(tokenizer), ParserCollator(tokenizer.pad_token_id)
    made = []
    for start in range(0, len(sentences), batch_size):
        some = sentences[start : start + batch_size]
        encoded = subwords(some, tokenizer, around, limit)
        batch = collate([{key: values[i] for key, values in encoded.items()} for i in range(len(some))])
        out = model(**{key: tensor.to(model.device) for key, tensor in batch.items()})
        words = torch.nn.utils.rnn.pad_sequence([torch.zeros(len(s)) for s in some], True, IGNORED).to(model.device)
        made += named([one.cpu() for one in decoded((out.upos, out.arcs, out.labels), [words] * 3)], names)
    return made
