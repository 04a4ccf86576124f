"""The parser: its scores against loops over words, decoding against every tree there is, saving and loading."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModel, CamembertConfig

from hf_robustq import RobustQ
from hf_robustq.parsing import DependencyParser, DependencyParserConfig, decode, find_cycle

TAGS, LABELS = ["NOUN", "VERB"], ["root", "det", "obj"]


def parser(pooling="first"):
    torch.manual_seed(0)
    encoder = CamembertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=100
    )
    config = DependencyParserConfig(encoder, TAGS, LABELS, pooling=pooling, arc_size=8, label_size=6)
    return DependencyParser(config).eval()


def batch():
    """Two sentences, of 4 and 2 words; the third word of the first has no subword."""
    words = torch.tensor([[-1, 0, 0, 1, 3, 3, -1], [-1, 0, 1, 1, -1, -1, -1]])
    return {
        "input_ids": torch.randint(5, 99, (2, 7), generator=torch.Generator().manual_seed(1)),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "word_ids": words,
        "upos": torch.tensor([[0, 1, 0, 1], [1, 0, -100, -100]]),
        "heads": torch.tensor([[2, 0, 2, 3], [0, 1, -100, -100]]),
        "deprels": torch.tensor([[1, 0, 2, 7], [0, 1, -100, -100]]),  # 7: a label that is not known
    }


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_word_is_its_subwords(pooling):
    model, given = parser(pooling), batch()
    hidden = torch.randn(2, 7, 32)
    words = model.words(hidden, given["word_ids"])
    assert words.shape == (2, 4, 32)
    for b, w in itertools.product(range(2), range(4)):
        own = [hidden[b, t] for t in range(7) if given["word_ids"][b, t] == w]
        expected = torch.zeros(32) if not own else own[0] if pooling == "first" else torch.stack(own).mean(0)
        torch.testing.assert_close(words[b, w], expected)


def test_scores_and_loss_are_the_biaffine_forms():
    model, given = parser(), batch()
    with torch.no_grad():
        out = model(**given)
        hidden = model.encoder(given["input_ids"], given["attention_mask"]).last_hidden_state
        words = model.words(hidden, given["word_ids"])

    def vector(layer, x):
        return torch.cat([torch.nn.functional.leaky_relu(layer(x), 0.1), torch.ones(1)])

    arc = model.arcs.bilinear.weight.detach().view(9, 9).T  # of [d, 1]^T U [h, 1]
    label = model.labels.bilinear.weight.detach().view(3, 7, 7).mT
    losses = {"tag": [], "arc": [], "label": []}
    with torch.no_grad():
        for b, n in ((0, 4), (1, 2)):
            nodes = [model.root, *words[b, :n]]
            for d in range(1, n + 1):
                scores = torch.full((5,), -torch.inf)
                for h in range(n + 1):
                    left, right = vector(model.arc_dependent, nodes[d]), vector(model.arc_head, nodes[h])
                    if h != d:
                        scores[h] = left @ arc @ right
                        torch.testing.assert_close(out.arcs[b, d - 1, h], scores[h])
                    left, right = vector(model.label_dependent, nodes[d]), vector(model.label_head, nodes[h])
                    expected = torch.einsum("i,oij,j->o", left, label, right)
                    torch.testing.assert_close(out.labels[b, d - 1, h], expected)
                head, gold = int(given["heads"][b, d - 1]), int(given["deprels"][b, d - 1])
                losses["tag"].append(-model.tagger(nodes[d]).log_softmax(0)[given["upos"][b, d - 1]])
                losses["arc"].append(-scores.log_softmax(0)[head])
                if gold < 3:
                    losses["label"].append(-out.labels[b, d - 1, head].log_softmax(0)[gold])
    assert len(losses["label"]) == 5
    torch.testing.assert_close(out.loss, sum(torch.stack(one).mean() for one in losses.values()))
    lowest = torch.finfo(torch.float32).min
    assert bool((out.arcs[1, :, 3:] == lowest).all()) and bool((out.arcs[0, range(4), range(1, 5)] == lowest).all())


def test_in_training_labels_are_scored_for_the_right_head_only():
    model, given = parser(), batch()
    whole = model(**given)
    model.train()
    model.encoder.eval()
    model.dropout.p = 0.0
    paired = model(**given)
    assert paired.labels.shape == (2, 4, 3)
    torch.testing.assert_close(paired.loss, whole.loss)
    assert float((paired.labels[0, 0] - whole.labels[0, 0, 2]).detach().abs().max()) < 1e-5


def test_annotations_may_be_padded_beyond_the_words_of_a_batch():
    model, given = parser(), batch()
    padded = {name: torch.nn.functional.pad(given[name], (0, 2), value=-100) for name in ("upos", "heads", "deprels")}
    torch.testing.assert_close(model(**{**given, **padded}).loss, model(**given).loss)


def test_decoding_against_every_tree():
    generator = np.random.default_rng(0)
    for _ in range(200):
        n = int(generator.integers(1, 6))
        scores = generator.normal(size=(n, n + 1)) * generator.choice([0.1, 1.0, 100.0])
        heads = decode(scores)
        masked = scores.copy()
        masked[range(n), range(1, n + 1)] = np.finfo(np.float32).min  # as a parser gives them
        assert decode(masked).tolist() == heads.tolist()
        trees = [
            tree
            for tree in itertools.product(range(n + 1), repeat=n)
            if tree.count(0) == 1 and not any(h == i for i, h in enumerate(tree, 1)) and not find_cycle(tree)
        ]
        assert tuple(heads) in trees
        values = [sum(scores[i, h] for i, h in enumerate(tree)) for tree in trees]
        assert sum(scores[i, h] for i, h in enumerate(heads)) == pytest.approx(max(values))
    for wrong in (np.zeros((0, 1)), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="scores are"):
            decode(wrong)
    with pytest.raises(ValueError, match="not finite"):
        decode(np.full((2, 3), np.nan))


def test_scores_of_the_model_are_decoded_as_they_are():
    """The lowest float stands where no head can be."""
    out = parser()(**batch())
    for scores, n in zip(out.arcs.detach().numpy(), (4, 2), strict=True):
        heads = decode(scores[:n, : n + 1])
        assert list(heads).count(0) == 1 and not find_cycle(list(heads))


def test_saved_it_comes_back_as_itself_and_quantized(tmp_path):
    model, given = parser(), batch()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is DependencyParser and again.config.upos == TAGS and again.config.encoder.hidden_size == 32
    assert torch.equal(again(**given).arcs, model(**given).arcs)
    model.encoder.save_pretrained(tmp_path / "encoder")
    other = DependencyParser.from_encoder(str(tmp_path / "encoder"), TAGS, LABELS, pooling="mean")
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(other.encoder.state_dict()[name], value), name
    plugin = RobustQ(model, {"weights": {"bits": 8}, "activations": {"bits": 8}, "first_last": "same"})
    names = {site.name for site in plugin.sites}
    heads = ("tagger", "arc_dependent", "arc_head", "label_dependent", "label_head", "arcs.bilinear", "labels.bilinear")
    assert {f"{name}.weight" for name in heads} <= names
    plugin.calibrate([given], lambda model, x: model(**x))
    assert float((model(**given).loss - again(**given).loss).detach().abs()) < 0.1


def test_what_makes_no_parser_is_refused():
    with pytest.raises(ValueError, match="pooling must be one of first, mean, got 'last'"):
        parser("last")
    with pytest.raises(ValueError, match="needs an encoder's config"):
        DependencyParser(DependencyParserConfig())
