"""A mapping from a YAML or JSON file: whatever else is in it is one line with the file's name."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from hf_robustq.options import shown

MOST = 100_000
"""Values of a YAML file, those behind an alias counted wherever it stands."""

BROKEN = (ValueError, LookupError, AttributeError, TypeError, RecursionError)
"""What the parsers raise for values that contradict their tags, for numbers too long and for nesting too deep."""


def read_file(path: str | Path) -> dict[str, Any]:
    """What a `.json` file holds, or any other as YAML; of an empty one nothing. Raises `ValueError`, in one line."""
    path = Path(path)
    kind = "JSON" if path.suffix == ".json" else "YAML"
    if not path.exists():
        raise ValueError(f"{path} is not there: name a {kind} file")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a {kind} file in it")
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=_once) if kind == "JSON" else yaml.load(text, _Loader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8, at byte {error.start}: save it as UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error.msg}, in line {error.lineno}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        parts = [getattr(error, name, None) for name in ("context", "problem")]
        problem = ", ".join(part for part in parts if part) or str(error)
        where = "" if mark is None else f", in line {mark.line + 1}"
        raise ValueError(f"{path} is no YAML: {_line(problem)}{where}") from None
    except BROKEN as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else _line(str(error))
        raise ValueError(f"{path} is no {kind}: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys: expected a mapping, `learning_rate: 0.01` say, got {shown(values)}")
    return values


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {shown(key)} is there twice: remove one")
        found[key] = value
    return found


class _Loader(yaml.SafeLoader):
    """Of plain values. Numbers may be 1e-5; no key twice; aliases within reason."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _count(node, {}) > MOST:
            raise yaml.MarkedYAMLError(problem=f"its aliases stand for more than {MOST} values")
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for. Raises `yaml.YAMLError` for a key twice, and for an alias within itself."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.MarkedYAMLError(problem="an alias stands for what it is in", problem_mark=node.start_mark)
        return known[id(node)]
    known[id(node)] = 0
    inner: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [b for a, b in itertools.pairwise(sorted(keys, key=_name)) if _name(a) == _name(b)]
        if twice:
            problem = f"key {shown(twice[0].value)} is there twice: remove one"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=twice[0].start_mark)
        inner = [one for pair in node.value for one in pair]
    known[id(node)] = 1 + sum(_count(one, known) for one in inner)
    return known[id(node)]


def _name(key: yaml.ScalarNode) -> tuple[str, str]:
    return key.tag, key.value
