"""Tagging and dependency parsing: treebanks in CoNLL-U, a parser on any encoder, decoding."""

from hf_robustq.parsing.datasets import Labels, encode, load_treebank
from hf_robustq.parsing.decode import decode
from hf_robustq.parsing.model import DependencyParser, DependencyParserConfig, DependencyParserOutput
from hf_robustq.parsing.subwords import ParserCollator, check_tokenizer, longest, train_tokenizer
from hf_robustq.parsing.treebanks import find_cycle, read_conllu, rows_of, words_of, write_conllu
from hf_robustq.parsing.trees import ANNOTATIONS, decoded, parse, scorer

__all__ = [
    "ANNOTATIONS",
    "DependencyParser",
    "DependencyParserConfig",
    "DependencyParserOutput",
    "Labels",
    "ParserCollator",
    "check_tokenizer",
    "decode",
    "decoded",
    "encode",
    "find_cycle",
    "load_treebank",
    "longest",
    "parse",
    "read_conllu",
    "rows_of",
    "scorer",
    "train_tokenizer",
    "words_of",
    "write_conllu",
]
