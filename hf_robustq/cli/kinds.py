"""The kinds of models that the commands measure: how each is loaded with its data, and what it is scored by."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_robustq.cli.parts import loaded, longest, padded, part
from hf_robustq.cli.scores import CLASSES, question_scores, tag_scores, token_scores
from hf_robustq.data.labels import output_names
from hf_robustq.recipe import ImageArguments, image_task


@dataclass(frozen=True)
class Task:
    """A model with its training set (for calibration) and evaluation set, as a Trainer takes them.

    options    what else the Trainer takes: the metrics, of which the first counts, and the collator
    training   what its `TrainingArguments` take
    samples    how many are measured, where that is not the rows of `evaluation`: then these are a subset already, as
               `subset` says
    """

    model: Any
    train: Any
    evaluation: Any
    options: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    samples: int | None = None
    subset: str = "all"


@dataclass(frozen=True)
class Kind:
    """`auto`, a class of transformers, knows the architectures of this kind; `own_metric`: only with `--metric`."""

    name: str
    auto: str
    load: Callable[[Any, str, argparse.Namespace], Task]
    own_metric: bool = False

    def has(self, config: Any) -> bool:
        """Whether the architecture that a config names is of this kind; Seq2Seq has an encoder and a decoder."""
        import transformers

        classes = getattr(transformers, self.auto)._model_mapping.get(type(config), ())
        names = [one.__name__ for one in (classes if isinstance(classes, tuple) else (classes,))]
        return config.architectures[0] in names and (config.is_encoder_decoder or "Seq2Seq" not in self.auto)


def images(auto: Any, name: str, args: argparse.Namespace) -> Task:  # noqa: ARG001
    flags = ImageArguments(
        model_name_or_path=name,
        weights=args.weights,
        dataset_name=args.data,
        image_column_name=args.image_column_name,
        label_column_name=args.label_column_name,
        train_split=args.calibration_split,
        eval_split=args.eval_split,
        image_size=args.image_size,
    )
    train, evaluation, model, _ = image_task(flags, args.seed, measured=True)
    return Task(model, train, evaluation, {**CLASSES})


def texts(auto: Any, name: str, args: argparse.Namespace) -> Task:
    from transformers import DataCollatorWithPadding

    from hf_robustq.data.texts import classified_texts

    model, tokenizer = loaded(auto, name), part("AutoTokenizer", name)
    padded(name, model, tokenizer)
    how = {"text": args.text_column_name, "label": args.label_column_name, "length": longest(model, tokenizer)}
    train, evaluation = classified_texts(args.data, tokenizer, output_names(model), **how, **splits(args))
    return Task(model, train, evaluation, {**CLASSES, "data_collator": DataCollatorWithPadding(tokenizer)})


def words(auto: Any, name: str, args: argparse.Namespace) -> Task:
    from transformers import DataCollatorForTokenClassification

    from hf_robustq.data.tags import tagged_words
    from hf_robustq.parsing.subwords import check_tokenizer

    model, tokenizer = loaded(auto, name), part("AutoTokenizer", name)
    padded(name, model, tokenizer)
    check_tokenizer(tokenizer, name)
    how = {"text": args.text_column_name, "tags": args.label_column_name, "length": longest(model, tokenizer)}
    train, evaluation, tags = tagged_words(args.data, tokenizer, output_names(model), **how, **splits(args))
    options = {**tag_scores(tags), "data_collator": DataCollatorForTokenClassification(tokenizer)}
    return Task(model, train, evaluation, options)


def running(auto: Any, name: str, args: argparse.Namespace) -> Task:
    from transformers import default_data_collator

    from hf_robustq.data.texts import running_text

    model, tokenizer = loaded(auto, name), part("AutoTokenizer", name)
    how = {"text": args.text_column_name, "length": longest(model, tokenizer, args.block_size)}
    train, evaluation = running_text(args.data, tokenizer, **how, **splits(args))
    return Task(model, train, evaluation, {**token_scores(shift=1), "data_collator": default_data_collator})


def masked(auto: Any, name: str, args: argparse.Namespace) -> Task:
    from transformers import default_data_collator

    from hf_robustq.data.texts import masked_text

    model, tokenizer = loaded(auto, name), part("AutoTokenizer", name)
    padded(name, model, tokenizer)
    how = {"text": args.text_column_name, "length": longest(model, tokenizer, args.block_size), "seed": args.seed}
    train, evaluation = masked_text(args.data, tokenizer, **how, **splits(args))
    return Task(model, train, evaluation, {**token_scores(), "data_collator": default_data_collator})


def pairs(auto: Any, name: str, args: argparse.Namespace) -> Task:
    from transformers import DataCollatorForSeq2Seq

    from hf_robustq.data.texts import text_pairs

    model, tokenizer = loaded(auto, name), part("AutoTokenizer", name)
    padded(name, model, tokenizer)
    how = {"text": args.text_column_name, "length": longest(model, tokenizer)}
    train, evaluation = text_pairs(args.data, tokenizer, **how, **splits(args))
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    return Task(model, train, evaluation, {**token_scores(), "data_collator": collator})


def questions(auto: Any, name: str, args: argparse.Namespace) -> Task:
    """`--max_samples` and `--samples` count questions, so these are chosen before they become windows."""
    from transformers import DataCollatorWithPadding

    from hf_robustq.data.questions import question_splits, windows
    from hf_robustq.parsing.subwords import check_tokenizer
    from hf_robustq.trainer.batches import some_of

    model, tokenizer = loaded(auto, name), part("AutoTokenizer", name)
    padded(name, model, tokenizer)
    check_tokenizer(tokenizer, name)
    tokenizer.padding_side = "right"
    how = {"text": args.text_column_name, "answers": args.label_column_name}
    train, evaluation = question_splits(args.data, **how, **splits(args))
    size, length = len(evaluation), longest(model, tokenizer, args.block_size)
    train = some_of(train, args.calibration_samples, args.seed)
    evaluation = some_of(evaluation, vars(args).get("max_samples") or vars(args).get("samples") or size, args.seed)
    rows = windows(evaluation, tokenizer, length)
    print(f"{name}: {len(evaluation)} questions in {len(rows)} windows of at most {length} tokens", flush=True)
    subset = "all" if len(evaluation) == size else f"{len(evaluation)} of {size}, seed {args.seed}"
    options = {**question_scores(evaluation, rows), "data_collator": DataCollatorWithPadding(tokenizer)}
    return Task(model, windows(train, tokenizer, length), rows, options, samples=len(evaluation), subset=subset)


def sounds(auto: Any, name: str, args: argparse.Namespace) -> Task:
    from hf_robustq.data.sounds import SoundCollator, sound_splits

    model, extractor = loaded(auto, name), part("AutoFeatureExtractor", name)
    how = {"audio": args.audio_column_name, "label": args.label_column_name}
    train, evaluation = sound_splits(
        args.data, extractor.sampling_rate, known=output_names(model), **how, **splits(args)
    )
    return Task(model, train, evaluation, {"data_collator": SoundCollator(extractor)}, AS_THEY_ARE)


def speech(auto: Any, name: str, args: argparse.Namespace) -> Task:
    from hf_robustq.data.sounds import SoundCollator, sound_splits

    model, processor = loaded(auto, name), part("AutoProcessor", name)
    extractor = getattr(processor, "feature_extractor", None)
    if extractor is None:
        raise ValueError(f"{name} has no feature extractor: save the processor beside the model")
    how = {"audio": args.audio_column_name, "text": args.text_column_name}
    train, evaluation = sound_splits(args.data, extractor.sampling_rate, **how, **splits(args))
    start = getattr(model.config, "decoder_start_token_id", None)
    collator = SoundCollator(extractor, processor.tokenizer, start)
    return Task(model, train, evaluation, {"data_collator": collator}, AS_THEY_ARE)


def boxes(auto: Any, name: str, args: argparse.Namespace) -> Task:
    from hf_robustq.data.boxes import BoxCollator, box_splits

    model, processor = loaded(auto, name), part("AutoImageProcessor", name)
    how = {"image": args.image_column_name, "objects": args.label_column_name}
    train, evaluation, numbers = box_splits(args.data, output_names(model), **how, **splits(args))
    collator = BoxCollator(processor, numbers, list(inspect.signature(model.forward).parameters))
    training = {**AS_THEY_ARE, "eval_do_concat_batches": False}  # each image has its own number of boxes
    return Task(model, train, evaluation, {"data_collator": collator}, training)


AS_THEY_ARE = {"remove_unused_columns": False}
"""Rows reach the collator as the dataset has them."""

KINDS = (
    Kind("image classification", "AutoModelForImageClassification", images),
    Kind("audio classification", "AutoModelForAudioClassification", sounds, own_metric=True),
    Kind("speech recognition (CTC)", "AutoModelForCTC", speech, own_metric=True),
    Kind("speech recognition (sequence to sequence)", "AutoModelForSpeechSeq2Seq", speech, own_metric=True),
    Kind("object detection", "AutoModelForObjectDetection", boxes, own_metric=True),
    Kind("sequence classification", "AutoModelForSequenceClassification", texts),
    Kind("token classification", "AutoModelForTokenClassification", words),
    Kind("question answering", "AutoModelForQuestionAnswering", questions),
    Kind("sequence to sequence", "AutoModelForSeq2SeqLM", pairs),
    Kind("masked language models", "AutoModelForMaskedLM", masked),
    Kind("causal language models", "AutoModelForCausalLM", running),
)
"""The first that has an architecture counts: BART is in two of them."""


def splits(args: argparse.Namespace) -> dict[str, Any]:
    return {"train_split": args.calibration_split, "eval_split": args.eval_split}
