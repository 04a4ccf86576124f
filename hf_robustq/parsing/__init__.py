"""Tagging and dependency parsing: treebanks in CoNLL-U, a parser on any encoder, decoding."""

from hf_robustq.parsing.decode import decode
from hf_robustq.parsing.model import DependencyParser, DependencyParserConfig, DependencyParserOutput
from hf_robustq.parsing.treebanks import find_cycle, read_conllu, rows_of, words_of, write_conllu

__all__ = [
    "DependencyParser",
    "DependencyParserConfig",
    "DependencyParserOutput",
    "decode",
    "find_cycle",
    "read_conllu",
    "rows_of",
    "words_of",
    "write_conllu",
]
