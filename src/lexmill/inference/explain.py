"""What attention does, as numbers: where each token or word looks, by layer, by head and together. NumPy only.

Layers and heads are counted from 1 wherever a person names them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from lexmill.errors import ConfigError, ModelError
from lexmill.inference.pieces import Piece, find_word, grouped, labels, pieces, word_missing
from lexmill.tokenizer.tokenizer import Tokenizer

Kind = Literal["encoder", "decoder", "cross"]
ViewName = Literal["mean", "head", "rollout", "strongest"]
KINDS: tuple[str, ...] = get_args(Kind)
VIEWS: tuple[str, ...] = get_args(ViewName)
SMALLEST = 1e-9  # of a row that can be scaled to sum to 1


@dataclass(frozen=True, kw_only=True)
class Look:
    """One place where a word looks: which of the view's keys, and the share of its attention."""

    index: int
    text: str
    weight: float


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionView:
    """One picture of a map.

    Attributes:
        queries, keys: what looks, and what is looked at.
        weights: (queries, keys) float32. Rows sum to 1, except in the view "strongest", and except
            for a query that looks at nothing but hidden special tokens: its row is 0.
        hidden: (queries,) the share of each query's attention that special tokens took, where they
            are hidden; else 0.
        title: what is shown, for a person.
    """

    queries: tuple[Piece, ...]
    keys: tuple[Piece, ...]
    weights: np.ndarray
    hidden: np.ndarray
    title: str

    @functools.cached_property
    def query_labels(self) -> list[str]:
        return labels(self.queries)

    @functools.cached_property
    def key_labels(self) -> list[str]:
        return labels(self.keys)

    def looks(self, query: int) -> list[Look]:
        """Where one query looks, the most first; equal weights in the order of the text."""
        row = self.weights[query]
        return [
            Look(index=int(key), text=self.key_labels[key], weight=float(row[key]))
            for key in np.argsort(-row, kind="stable")
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionMap:
    """Where each token looks.

    Attributes:
        text, key_text: the texts of the queries and of the keys.
        queries: the tokens that look.
        keys: the tokens that are looked at; the same as `queries` for self-attention.
        weights: (layers, heads, queries, keys) float32; rows sum to 1.
        kind: "encoder" and "decoder" for self-attention, "cross" for a decoder that looks at its encoder.
        more: further maps of the same pass, such as decoder and cross beside the encoder's.
        rolled: the rollout, where it was computed from a finer map than this one.
    """

    text: str
    key_text: str
    queries: tuple[Piece, ...]
    keys: tuple[Piece, ...]
    weights: np.ndarray
    kind: Kind
    more: tuple[AttentionMap, ...] = ()
    rolled: np.ndarray | None = field(default=None, repr=False)

    @property
    def layers(self) -> int:
        return self.weights.shape[0]

    @property
    def heads(self) -> int:
        return self.weights.shape[1]

    @property
    def maps(self) -> tuple[AttentionMap, ...]:
        """This map and its further ones."""
        return (self, *self.more)

    def part(self, kind: str) -> AttentionMap:
        """The map of one kind.

        Raises:
            ModelError: the model has no such attention, or was not asked for it.
        """
        for one in self.maps:
            if one.kind == kind:
                return one
        raise ModelError(
            f"There is no {kind} attention here, only: {', '.join(one.kind for one in self.maps)}.",
            "Decoder and cross attention of an encoder-decoder need a second text: --target TEXT.",
        )

    def mean(self, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """Attention averaged over what is not named: (queries, keys) float32, rows sum to 1.

        Args:
            layer: 1 to `layers`; None for all.
            head: 1 to `heads`; None for all.

        Raises:
            ConfigError: a number that the model does not have.
        """
        _check_number("layer", layer, self.layers)
        _check_number("head", head, self.heads)
        chosen = self.weights if layer is None else self.weights[layer - 1 : layer]
        chosen = chosen if head is None else chosen[:, head - 1 : head]
        return chosen.mean((0, 1))

    def strongest(self, layer: int | None = None) -> np.ndarray:
        """For each pair the most that any one head gives it: (queries, keys). Rows do not sum to 1.

        Raises:
            ConfigError: a layer that the model does not have.
        """
        _check_number("layer", layer, self.layers)
        chosen = self.weights if layer is None else self.weights[layer - 1 : layer]
        return chosen.max((0, 1))

    def strongest_head(self, query: int, key: int) -> tuple[int, int, float]:
        """The head by which `query` looks most at `key`: layer and head, from 1, and the weight.

        The indices are those of `queries` and `keys`; special tokens keep their share.
        """
        pair = self.weights[:, :, query, key]
        layer, head = divmod(int(pair.argmax()), self.heads)
        return layer + 1, head + 1, float(pair[layer, head])

    def rollout(self) -> np.ndarray:
        """How much of each input reaches each output through all layers: (queries, keys), rows sum to 1.

        Each layer's heads are averaged, half of each token is taken to pass by in the residual
        stream, and the layers are multiplied: R = A'(L) … A'(1), A' = (A + I) / 2. After Abnar and
        Zuidema 2020, "Quantifying Attention Flow in Transformers". Causal maps keep their zeros.

        Raises:
            ModelError: cross-attention, whose queries and keys are different texts.
        """
        if self.rolled is not None:
            return self.rolled
        if self.kind == "cross":
            raise ModelError(
                "A rollout follows one text through its layers; cross-attention joins two.",
                "Use --view mean, or the rollout of the encoder or the decoder.",
            )
        flow = np.eye(len(self.queries))
        for layer in self.weights.astype(np.float64):
            flow = (layer.mean(0) @ flow + flow) / 2
        return flow.astype(np.float32)

    def words(self) -> AttentionMap:
        """The same for words instead of tokens, rows still summing to 1.

        What a word's tokens receive is added up; where they look is averaged. The rollout is that
        of the tokens, grouped in the same way.
        """
        queries, query_members = grouped(self.queries, self.text)
        keys, key_members = grouped(self.keys, self.key_text)

        def group(weights: np.ndarray) -> np.ndarray:
            weights = np.add.reduceat(weights, [member[0] for member in key_members], axis=-1)
            weights = np.add.reduceat(weights, [member[0] for member in query_members], axis=-2)
            sizes = np.array([len(member) for member in query_members], weights.dtype)
            return weights / sizes[:, None]

        return AttentionMap(
            text=self.text,
            key_text=self.key_text,
            queries=queries,
            keys=keys,
            weights=group(self.weights),
            kind=self.kind,
            more=tuple(one.words() for one in self.more),
            rolled=None if self.kind == "cross" else group(self.rollout()),
        )

    def view(
        self, name: str = "mean", *, layer: int | None = None, head: int | None = None, special: bool = False
    ) -> AttentionView:
        """One picture: a view with its title, special tokens hidden unless asked for.

        Special tokens often take most of the attention and mean "nothing in particular" (Clark et
        al. 2019, "What Does BERT Look At?"). They are hidden after heads are averaged, and what is
        left of each row is scaled to sum to 1: a head that looks at them counts for little.

        Args:
            name: "mean" (of what `layer` and `head` leave open), "head" (one head), "rollout" (all
                layers), "strongest" (each pair's strongest head, of one layer or of all).
            layer, head: from 1.
            special: show special tokens too, with the weights as they are.

        Raises:
            ConfigError: no such view, layer or head, or options that do not go together.
            ModelError: the rollout of cross-attention.
        """
        weights = self._chosen(name, layer, head)
        queries, keys = self.queries, self.keys
        hidden = np.zeros(len(queries), np.float32)
        if not special:
            rows, columns = _shown(queries), _shown(keys)
            weights = weights[np.ix_(rows, columns)]
            hidden = np.zeros(len(rows), np.float32)
            if name != "strongest":
                hidden = 1 - weights.sum(-1)
            if name != "strongest":
                weights = _scaled(weights)
            queries, keys = tuple(queries[i] for i in rows), tuple(keys[i] for i in columns)
        return AttentionView(
            queries=queries,
            keys=keys,
            weights=weights.astype(np.float32),
            hidden=np.clip(hidden, 0, 1).astype(np.float32),
            title=_title(name, layer, head),
        )

    def _chosen(self, name: str, layer: int | None, head: int | None) -> np.ndarray:
        if name not in VIEWS:
            raise ConfigError(f"There is no view {name!r}.", f"Choose one of: {', '.join(VIEWS)}.")
        if name == "rollout":
            if layer is not None or head is not None:
                raise ConfigError("A rollout goes through all layers and heads; it has no --layer or --head.")
            return self.rollout()
        if name == "strongest":
            if head is not None:
                raise ConfigError("The view 'strongest' looks for the head itself; leave out --head.")
            return self.strongest(layer)
        if name == "head" and (layer is None or head is None):
            raise ConfigError(
                "One head needs --layer and --head.",
                f"Layers are 1 to {self.layers}, heads 1 to {self.heads}.",
            )
        return self.mean(layer, head)

    def find(self, word: str) -> list[int]:
        """The queries that are `word`, or whose tokens make it up; case does not matter.

        Raises:
            DataError: the text has no such word.
        """
        places = find_word(self.queries, word)
        if not places:
            raise word_missing(word, self.text, self.queries)
        return sorted({index for place in places for index in place})

    def looks(self, word: str, name: str = "mean", **options: Any) -> list[Look]:
        """Where a word looks, the most first. Of a word that occurs more than once, the first.

        Args:
            word: as in the text.
            name, options: see `view`.

        Raises:
            DataError, ConfigError: see `rows_of` and `view`.
        """
        view = self.view(name, **options)
        return view.looks(self.rows_of(word, view)[0])

    def rows_of(self, word: str, view: AttentionView) -> list[int]:
        """The rows of a view of this map that are `word`.

        Raises:
            DataError: the text has no such word.
            ConfigError: it is a special token, which the view hides.
        """
        wanted = {self.queries[index] for index in self.find(word)}
        rows = [row for row, query in enumerate(view.queries) if query in wanted]
        if not rows:
            raise ConfigError(f"{word!r} is a special token, which this view hides.", "Add --special.")
        return rows

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; `from_json` reads it. Weights are rounded to 6 decimals."""
        value: dict[str, Any] = {
            "kind": self.kind,
            "text": self.text,
            "key_text": self.key_text,
            "layers": self.layers,
            "heads": self.heads,
            "queries": [_piece_json(piece) for piece in self.queries],
            "keys": [_piece_json(piece) for piece in self.keys],
            "weights": rounded(self.weights),
        }
        if self.kind != "cross":
            value["rollout"] = rounded(self.rollout())
        if self.more:
            value["more"] = [one.to_json() for one in self.more]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> AttentionMap:
        """The map that `to_json` wrote."""
        return cls(
            text=value["text"],
            key_text=value["key_text"],
            queries=tuple(Piece(**{**piece, "ids": tuple(piece["ids"])}) for piece in value["queries"]),
            keys=tuple(Piece(**{**piece, "ids": tuple(piece["ids"])}) for piece in value["keys"]),
            weights=np.asarray(value["weights"], np.float32),
            kind=value["kind"],
            more=tuple(cls.from_json(one) for one in value.get("more", ())),
            rolled=np.asarray(value["rollout"], np.float32) if "rollout" in value else None,
        )


def attention_map(
    tokenizer: Tokenizer,
    text: str,
    ids: Sequence[int],
    weights: Any,
    kind: Kind = "encoder",
    *,
    key_text: str | None = None,
    key_ids: Sequence[int] | None = None,
    more: Sequence[AttentionMap] = (),
) -> AttentionMap:
    """A map from what a model computed.

    Args:
        tokenizer: the model's.
        text: what was read, or for a decoder with an encoder: its target.
        ids: the tokens of `text` that the model saw; see `lexmill.inference.pieces.pieces`.
        weights: (layers, heads, queries, keys), softmax done.
        kind: whose attention it is.
        key_text, key_ids: what is looked at, for cross-attention.
        more: further maps of the same pass.

    Raises:
        DataError: `ids` are not those of `text`.
        ValueError: weights of another shape, not finite, or rows that do not sum to 1.
    """
    queries = pieces(tokenizer, text, ids)
    other = text if key_text is None else key_text
    keys = queries if key_text is None else pieces(tokenizer, other, key_ids)
    weights = np.asarray(weights, np.float32)
    if weights.ndim != 4 or weights.shape[2:] != (len(queries), len(keys)):
        raise ValueError(
            f"weights have shape {weights.shape}, not (layers, heads, {len(queries)}, {len(keys)})"
        )
    if not np.isfinite(weights).all() or np.abs(weights.sum(-1) - 1).max(initial=0) > 0.02:
        raise ValueError("attention weights are not finite, or their rows do not sum to 1")
    return AttentionMap(
        text=text,
        key_text=other,
        queries=queries,
        keys=keys,
        weights=weights,
        kind=kind,
        more=tuple(more),
    )


def rounded(weights: np.ndarray) -> Any:
    """Nested lists with six decimals."""
    return np.round(weights.astype(np.float64), 6).tolist()


def _piece_json(piece: Piece) -> dict[str, Any]:
    return {**asdict(piece), "ids": list(piece.ids)}


def _check_number(what: str, number: int | None, count: int) -> None:
    if number is not None and not 1 <= number <= count:
        raise ConfigError(
            f"There is no {what} {number}: this model has {count} {what}{'s' if count > 1 else ''}.",
            f"Count from 1 to {count}." if count > 1 else "Only 1 can be asked for.",
        )


def _shown(parts: Sequence[Piece]) -> list[int]:
    """What is not special; everything, if nothing else is there."""
    return [index for index, piece in enumerate(parts) if not piece.special] or list(range(len(parts)))


def _scaled(weights: np.ndarray) -> np.ndarray:
    """Rows that sum to 1; a row of nothing stays so."""
    sums = weights.sum(-1, keepdims=True)
    return np.where(sums > SMALLEST, weights / np.maximum(sums, SMALLEST), 0)


def _title(name: str, layer: int | None, head: int | None) -> str:
    where = "all layers" if layer is None else f"layer {layer}"
    if name == "rollout":
        return "rollout through all layers"
    if name == "strongest":
        return f"strongest head of {where}"
    return f"{where}, mean of all heads" if head is None else f"{where}, head {head}"
