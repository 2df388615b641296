"""Whether depth goes with topic: means with intervals, adjusted means, contrasts, and what explains depth. No torch.

Tokens of a document are not independent, and neither are runs of one recipe: intervals resample documents within their
topic and, where several runs are given, runs. All runs are measured on the same documents.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from golf.errors import UsageError
from golf.sources import Document
from golf.texts import Tokens
from golf.token_classes import CLASSES

DRAWS = 1000
KNOTS = (0.2, 0.4, 0.6, 0.8)  # quantiles at which splines bend
LEAST_DOCUMENTS = 20
# Kinds of programs alone would tell the topic itself: they are adjusted for as what they are like in prose.
PROSE = {"identifier": "content word", "keyword": "function word", "assignment": "punctuation", "verb": "content word"}
MERGED = np.array([CLASSES.index(PROSE.get(name, name)) for name in CLASSES] + [-1], dtype=np.int8)  # -1 is itself


@dataclass(frozen=True)
class Interval:
    """An estimate, its 95 % interval, and what that is made from: bootstrap draws of documents and models, and of
    documents alone."""

    mean: float
    low: float
    high: float
    draws: np.ndarray
    steady: np.ndarray
    models: int = 1

    def row(self, digits: int = 4) -> dict:
        """For JSON; a share of nothing, and an interval of too few documents, is none."""
        values = {"mean": self.mean, "low": self.low, "high": self.high}
        return {name: None if np.isnan(value) else round(value, digits) for name, value in values.items()}


def interval(mean: float, draws: np.ndarray, steady: np.ndarray | None = None, models: int = 1) -> Interval:
    """An estimate with its draws; no interval where more than a twentieth of them drew nothing that it is made of.

    The middle 95 % of the draws, wider by Student's t over the normal's quantile: a few models tell little of how much
    models differ.
    """
    from scipy.stats import norm, t

    steady, known = draws if steady is None else steady, draws[np.isfinite(draws)]
    if known.size < 0.95 * draws.size:
        return Interval(float(mean), np.nan, np.nan, draws, steady, models)
    wider = t.ppf(0.975, freedom(draws, steady, models)) / norm.ppf(0.975)
    low, high = mean + wider * (np.quantile(known, (0.025, 0.975)) - mean)
    return Interval(float(mean), float(low), float(high), draws, steady, models)


def freedom(draws: np.ndarray, steady: np.ndarray, models: int) -> float:
    """Degrees of freedom of the draws' variance (Satterthwaite 1946): that part of it which models add to documents has
    one less than there are models, documents have many."""
    whole, documents = np.nanvar(draws), np.nanvar(steady)
    if models < 2 or whole <= documents:
        return float("inf")
    return float((models - 1) * (whole / (whole - documents)) ** 2)


def combined(parts: list[tuple[float, Interval]]) -> Interval:
    """The sum of estimates times their weights, from the same draws."""
    mean, draws, steady = (
        sum(weight * getattr(each, name) for weight, each in parts) for name in ("mean", "draws", "steady")
    )
    return interval(mean, draws, steady, max(each.models for _, each in parts))


def check_topics(documents: list[Document]) -> None:
    """Raise UsageError for a topic with too few documents to resample."""
    for topic, count in sorted(Counter(d.topic for d in documents).items()):
        if count < LEAST_DOCUMENTS:
            raise UsageError(f"--docs: topic {topic!r:.60} has {count} documents, give {LEAST_DOCUMENTS} or more.")


class Resampling:
    """Weights of documents and runs in each bootstrap draw, the same for all that is estimated from them."""

    def __init__(
        self, tokens: Tokens, runs: int, draws: int = DRAWS, seed: int = 1, models: list[int] | None = None
    ):  # fmt: skip
        """`models` numbers the model that each run is of, where several gates were trained for one: models are drawn,
        and gates within them. A few models differ more than draws of them do, by the usual m / (m - 1)."""
        generator = np.random.default_rng(seed)
        self.models = np.arange(runs) if models is None else np.asarray(models)
        self.count = int(tokens.document.max()) + 1
        self.topic_of = np.zeros(self.count, dtype=np.int64)
        self.topic_of[tokens.document] = tokens.topic
        self.documents = np.zeros((draws, self.count))
        for topic in range(len(tokens.topics)):
            mine = np.unique(tokens.document[tokens.topic == topic])
            self.documents[:, mine] = generator.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), draws)
        self.count_models = count = int(self.models.max()) + 1
        size = np.bincount(self.models, minlength=count)
        self.base = 1 / (count * size[self.models])  # what each run weighs
        drawn = generator.multinomial(count, np.full(count, 1 / count), draws)[:, self.models] / count
        for model in range(count):
            mine = np.flatnonzero(self.models == model)
            drawn[:, mine] *= generator.multinomial(mine.size, np.full(mine.size, 1 / mine.size), draws) / mine.size
        self.runs = self.base + (drawn - self.base) * (count / max(1, count - 1)) ** 0.5

    def sums(self, runs: list[Tokens], values: list[np.ndarray], keep: list[np.ndarray]) -> np.ndarray:
        """(runs, documents): sums of values over the tokens that are kept."""
        parts = [
            np.bincount(t.document[k], v[k].astype(np.float64), self.count)
            for t, v, k in zip(runs, values, keep, strict=True)
        ]
        return np.stack(parts)

    def ratio(self, over: np.ndarray, under: np.ndarray) -> Interval:
        """The mean over models of the ratio of two sums (runs, documents), with its interval."""
        whole = float((over.sum(axis=1) / np.maximum(under.sum(axis=1), 1e-12)) @ self.base)
        count = self.documents @ under.T
        drawn = (self.documents @ over.T) / np.where(count > 0, count, np.nan)
        return interval(whole, (drawn * self.runs).sum(axis=1), drawn @ self.base, self.count_models)


def by_topic(runs: list[Tokens], resampling: Resampling) -> list[dict]:
    """For each topic mean loops a token and a byte, nats after the first and the last pass, and what passes gain."""
    rows, first = [], runs[0]
    for number, topic in enumerate(first.topics):
        keep = [t.topic == number for t in runs]
        depth = resampling.sums(runs, [t.depth for t in runs], keep)
        tokens = resampling.sums(runs, [np.ones(t.depth.size) for t in runs], keep)
        length = resampling.sums(runs, [t.bytes for t in runs], keep)
        gain = resampling.sums(runs, [t.losses[:, 0] - t.losses[:, -1] for t in runs], keep)
        rows.append({
            "topic": topic, "documents": int((resampling.topic_of == number).sum()), "tokens": int(tokens[0].sum()),
            "loops": resampling.ratio(depth, tokens), "loops_a_byte": resampling.ratio(depth, length),
            "gain": resampling.ratio(gain, tokens),
            "bpb": round(float(np.mean([t.where(k).bits_a_byte for t, k in zip(runs, keep, strict=True)])), 4),
        })  # fmt: skip
    return rows


def by_source(runs: list[Tokens], resampling: Resampling) -> list[dict]:
    """Mean loops of each source of each topic, raw and for tokens of equal difficulty and kind."""
    rows, first = [], runs[0]
    for number, topic in enumerate(first.topics):
        for place, source in enumerate(first.sources):
            keep = [(t.topic == number) & (t.source == place) for t in runs]
            if keep[0].any():
                depth = resampling.sums(runs, [t.depth for t in runs], keep)
                tokens = resampling.sums(runs, [np.ones(t.depth.size) for t in runs], keep)
                documents = len(np.unique(first.document[keep[0]]))
                rows.append({"topic": topic, "source": source, "documents": documents,
                             "loops": resampling.ratio(depth, tokens)})  # fmt: skip
    groups = [t.topic.astype(np.int64) * len(first.sources) + t.source for t in runs]
    equal = adjusted(runs, resampling, groups)
    return [row | {"adjusted": e} for row, e in zip(rows, equal, strict=True)]


def by_class(runs: list[Tokens], resampling: Resampling) -> list[dict]:
    """Mean loops by kind of token: at the token, and spent to predict it, and how much more that is than the mean token
    of the same mix of topics takes; sentence starts are a row of their own."""
    rows = []
    usual = [row["loops"] for row in by_topic(runs, resampling)]
    picks = [(name, number) for number, name in enumerate(CLASSES)]
    for name, number in [*picks, ("sentence start", -1)]:
        row: dict = {"class": name}
        for column, at in (("at", "kind_here"), ("predicting", "kind")):
            if number >= 0:
                keep = [getattr(t, at) == number for t in runs]
            else:
                opens = [t.opens for t in runs]
                keep = opens if at == "kind" else [after(o, t.document) for o, t in zip(opens, runs, strict=True)]
            if not keep[0].any():
                continue
            depth = resampling.sums(runs, [t.depth for t in runs], keep)
            tokens = resampling.sums(runs, [np.ones(t.depth.size) for t in runs], keep)
            row[column], row["tokens"] = resampling.ratio(depth, tokens), int(tokens[0].sum())
            mix = np.bincount(runs[0].topic[keep[0]], minlength=len(usual)) / keep[0].sum()
            row[f"{column}_more"] = combined(
                [(1.0, row[column]), *((-m, u) for m, u in zip(mix, usual, strict=True) if m)]
            )
        if len(row) > 1:
            rows.append(row)
    return rows


def after(flags: np.ndarray, document: np.ndarray) -> np.ndarray:
    """What was true of the predicted token, at the position where it stands."""
    moved = np.roll(flags, 1)
    moved[np.r_[True, document[1:] != document[:-1]]] = False
    return moved


# -- adjusted for what depth is known to go with ---------------------------------------------------------------


def hinges(x: np.ndarray) -> np.ndarray:
    """A piecewise linear spline's columns: (N, 1 + knots)."""
    knots = np.unique(np.quantile(x, KNOTS))
    return np.column_stack([x, *(np.maximum(x - k, 0) for k in knots)])


def covariates(tokens: Tokens) -> np.ndarray:
    """What is adjusted for: loss and entropy after the first pass (never the final loss, which depth itself moves), the
    token's frequency, position, place in its word, and class."""
    frequency = np.log(np.bincount(tokens.here, minlength=int(tokens.here.max()) + 1)[tokens.here])
    kind = MERGED[tokens.kind_here]
    kinds = [kind == k for k in np.unique(kind)[1:]]
    columns = [hinges(tokens.losses[:, 0]), hinges(tokens.entropy), frequency, hinges(np.log1p(tokens.position)),
               np.minimum(tokens.fragment, 1), np.minimum(tokens.fragment, 3), *kinds]  # fmt: skip
    return np.column_stack(columns).astype(np.float64)


def adjusted(
    runs: list[Tokens], resampling: Resampling, groups: list[np.ndarray] | None = None, a_byte: bool = False
) -> list[Interval]:  # fmt: skip
    """Each group's mean loops a token, or a byte, for tokens of equal difficulty and kind: least squares on groups and
    covariates. Groups are topics, or (N,) numbers in each run, those that occur in order.

    Runs share the coefficients; each draw weighs the documents' normal equations. Loops a byte are the mean of depth
    over bytes in which a token weighs its bytes.
    """
    groups = [t.topic for t in runs] if groups is None else groups
    present = np.unique(groups[0])
    squares, products = [], []
    for tokens, group in zip(runs, groups, strict=True):
        weight = tokens.bytes.astype(np.float64) if a_byte else np.ones(tokens.depth.size)
        x = covariates(tokens)
        center = weight @ x / weight.sum()
        x = np.column_stack([group[:, None] == present, x - center])
        order = np.argsort(tokens.document, kind="stable")
        starts = np.searchsorted(tokens.document[order], np.arange(resampling.count + 1))
        y = tokens.depth.astype(np.float64)  # of depth over bytes times bytes, where bytes weigh
        parts = [order[a:b] for a, b in itertools.pairwise(starts)]
        squares.append(np.stack([(x[p] * weight[p, None]).T @ x[p] for p in parts]))
        products.append(np.stack([x[p].T @ y[p] for p in parts]))
    width = {s.shape[1] for s in squares}
    if len(width) > 1:
        raise UsageError("The runs' tokens differ in their covariates; give runs of one tokenizer.")
    square, product = np.stack(squares), np.stack(products)  # (runs, documents, P, P), (runs, documents, P)

    def solve(weights: np.ndarray, square: np.ndarray = square, product: np.ndarray = product) -> np.ndarray:
        """weights (runs, documents) -> (groups,); a group none of whose documents was drawn has no mean."""
        a = np.tensordot(weights, square, axes=weights.ndim)
        b = np.tensordot(weights, product, axes=weights.ndim)
        ridge = 1e-8 * np.trace(a) / len(a)
        found = np.linalg.solve(a + ridge * np.eye(len(a)), b)
        return np.where(np.diagonal(a) > 0, found, np.nan)[: present.size]

    whole = solve(np.broadcast_to(resampling.base[:, None], square.shape[:2]))
    draws = np.stack([
        solve(run[:, None] * documents[None])
        for run, documents in zip(resampling.runs, resampling.documents, strict=True)
    ])  # fmt: skip
    mean_square, mean_product = (np.tensordot(resampling.base, sums, axes=1) for sums in (square, product))
    steady = np.stack([solve(documents, mean_square, mean_product) for documents in resampling.documents])
    return [
        interval(mean, drawn, alone, resampling.count_models)
        for mean, drawn, alone in zip(whole, draws.T, steady.T, strict=True)
    ]


# -- what explains depth ---------------------------------------------------------------------------------------


def id_means(tokens: Tokens, train: np.ndarray, shrink: float = 5.0) -> np.ndarray:
    """Each token's mean depth by its identity, from the tokens in `train` (N,) bool, drawn towards the overall mean."""
    size = int(tokens.here.max()) + 1
    count = np.bincount(tokens.here[train], minlength=size)
    total = np.bincount(tokens.here[train], tokens.depth[train], size)
    overall = tokens.depth[train].mean()
    return ((total + shrink * overall) / (count + shrink))[tokens.here]


def shares(tokens: Tokens) -> dict[str, float]:
    """Share of depth's variance that is explained on documents not fitted on (each fourth in turn): by token identity
    alone, and with loss after the first pass, position, and topic added in turn. A token's own effect is fitted
    together with the others, so that topic is not credited with what its tokens bring."""
    fold = tokens.document % 4
    parts = {
        "token": np.ones((tokens.depth.size, 1)), "loss": hinges(tokens.losses[:, 0]),
        "position": hinges(np.log1p(tokens.position)),
        "topic": (tokens.topic[:, None] == np.arange(1, len(tokens.topics))).astype(np.float64),
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in parts}
    y = tokens.depth.astype(np.float64)
    for turn in range(4):
        test = fold == turn
        if not test.any() or test.all():
            raise UsageError("--docs: give documents for at least four folds.")
        variance = ((y[test] - y[test].mean()) ** 2).sum()
        columns = np.empty((y.size, 0))
        for name, more in parts.items():
            columns = np.column_stack([columns, more])
            left = ((y[test] - with_token_effects(tokens.here, columns, y, ~test)[test]) ** 2).sum()
            found[name].append(1 - left / max(variance, 1e-12))
    explained = {name: float(np.mean(values)) for name, values in found.items()}
    return {
        "token": explained["token"], "token_loss": explained["loss"], "token_loss_position": explained["position"],
        "with_topic": explained["topic"], "topic_adds": explained["topic"] - explained["position"],
    }  # fmt: skip


def with_token_effects(
    here: np.ndarray, columns: np.ndarray, y: np.ndarray, fit: np.ndarray, shrink: float = 5.0
) -> np.ndarray:  # fmt: skip
    """Predictions (N,) of least squares on columns (N, P) and an effect of each token, drawn towards 0 as if by
    `shrink` more occurrences, fitted together on `fit` (N,) bool. The effects are eliminated first."""
    size = int(here.max()) + 1
    weight = 1 / (np.bincount(here[fit], minlength=size) + shrink)

    def effects(values: np.ndarray) -> np.ndarray:
        return weight * np.bincount(here[fit], values, size)

    cleared = np.column_stack([c - effects(c)[here[fit]] for c in columns[fit].T])
    square, product = columns[fit].T @ cleared, cleared.T @ y[fit]
    beta = np.linalg.lstsq(square, product, rcond=1e-10)[0]
    return columns @ beta + effects(y[fit] - columns[fit] @ beta)[here]


def agreement(runs: list[Tokens], models: list[int] | None = None) -> dict[str, float]:
    """Mean Spearman correlation of depth, token by token, between each two runs of different models; and of documents'
    mean depths."""
    from scipy.stats import spearmanr

    models = list(range(len(runs))) if models is None else models
    pairs = [(runs[a], runs[b]) for a, b in itertools.combinations(range(len(runs)), 2) if models[a] != models[b]]
    if not pairs:
        raise UsageError("Agreement between runs needs two runs or more of different models, name another folder.")
    tokens, documents = [], []
    for a, b in pairs:
        if a.here.shape != b.here.shape or (a.here != b.here).any():
            raise UsageError("The runs cut the documents into different tokens; give runs of one tokenizer.")
        tokens.append(correlation(spearmanr, a.depth, b.depth))
        sums = [np.bincount(t.document, t.depth) / np.maximum(np.bincount(t.document), 1) for t in (a, b)]
        documents.append(correlation(spearmanr, *sums))
    return {"tokens": float(np.mean(tokens)), "documents": float(np.mean(documents))}


def correlation(measure, a: np.ndarray, b: np.ndarray) -> float:
    """A correlation, 0 where one side never changes."""
    return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(measure(a, b).statistic)


# -- the rule by which the study calls itself negative ---------------------------------------------------------

LOOKUP_SHARE, TOPIC_SHARE, LEAST_AGREEMENT = 0.9, 0.01, 0.5


def verdict(gates: list[dict] | None, topic_adds: float, agreement: float | None) -> tuple[str, list[str]]:
    """positive, negative, or undecided where a part was not measured; and a sentence for each of the three. `gates` is
    what controls.gates() found of each model."""
    said, failed = [], False
    if gates is None:
        said.append("The token lookup was not measured (--controls).")
    elif min(g["gain_over_random"]["low"] for g in gates) <= 0:
        failed = True
        said.append("The rule's gain over random depths of the same histograms is not above 0 beyond what documents "
                    "vary by: fails.")  # fmt: skip
    else:
        share = float(np.mean([g["lookup_share"]["mean"] for g in gates]))
        bad = share >= LOOKUP_SHARE
        failed |= bad
        said.append(f"A table of token identities reaches {share:.0%} of the rule's gain over random depths "
                    f"(negative from {LOOKUP_SHARE:.0%} on): {'fails' if bad else 'holds'}.")  # fmt: skip
    bad = topic_adds < TOPIC_SHARE
    failed |= bad
    said.append(f"Topic adds {topic_adds:.2%} of depth's variance beyond token, loss after the first pass and position "
                f"(negative below {TOPIC_SHARE:.0%}): {'fails' if bad else 'holds'}.")  # fmt: skip
    if agreement is None:
        said.append("Agreement between runs was not measured (give two folders or more).")
    else:
        bad = agreement < LEAST_AGREEMENT
        failed |= bad
        said.append(f"Runs agree on a token's depth with a rank correlation of {agreement:.2f} "
                    f"(negative below {LEAST_AGREEMENT}): {'fails' if bad else 'holds'}.")  # fmt: skip
    unknown = gates is None or agreement is None
    return ("negative" if failed else "undecided" if unknown else "positive"), said
