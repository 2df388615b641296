"""Eleven controls of a study of depth by topic: what else could have drawn the same picture."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import sentencepiece
import torch

from golf.depth import LENGTH, Looped, measure, rows_of, stopped, threshold_for
from golf.errors import UsageError
from golf.exits import Assigned, Rule
from golf.formulaic import known_difficulty
from golf.sources import Document
from golf.texts import Tokens
from golf.topics import id_means, interval

SWEEP = (0.3, 0.5, 0.7, 0.9)
CHANCES = 5  # permutations that random depths are the mean of


def assigned(looped: Looped, texts: list[Document], tokens: Tokens, depth: np.ndarray) -> Tokens:
    """The same tokens, their depths given one by one: what the model loses then, keys and values frozen."""
    losses, at = [], 0
    for rows in rows_of(looped, texts):
        inside = rows.inside()
        count = int(inside.sum())
        given = np.full(inside.shape, looped.loops, dtype=np.int64)
        given[inside] = depth[at : at + count]
        losses.append(stopped(looped, rows, Assigned(torch.from_numpy(given)))[1][inside])
        at += count
    return tokens.with_depths(depth.astype(np.int8), np.concatenate(losses))


def following(looped: Looped, texts: list[Document], tokens: Tokens, rule: Rule) -> Tokens:
    """The same tokens under another rule."""
    depths, losses = [], []
    for rows in rows_of(looped, texts):
        depth, loss = stopped(looped, rows, rule)
        depths.append(depth[rows.inside()])
        losses.append(loss[rows.inside()])
    return tokens.with_depths(np.concatenate(depths).astype(np.int8), np.concatenate(losses))


def as_histogram(score: np.ndarray, depth: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Depths of the same histogram as `depth`, the deepest where `score` is highest; ties fall by chance."""
    order = np.lexsort((generator.random(score.size), score))
    found = np.empty_like(depth)
    found[order] = np.sort(depth)
    return found


def shuffled_within(depth: np.ndarray, group: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Depths permuted among the tokens of each group."""
    by_group = np.lexsort((generator.random(depth.size), group))
    found = np.empty_like(depth)
    found[np.argsort(group, kind="stable")] = depth[by_group]
    return found


def lookup_scores(tokens: Tokens, train: np.ndarray) -> np.ndarray:
    """Mean depth of the pair of tokens that ends at a position where it was seen 5 times, else of the token."""
    before = np.where(tokens.position > 0, np.roll(tokens.here, 1), 0)
    pair = before.astype(np.int64) * (int(tokens.here.max()) + 1) + tokens.here
    _, number = np.unique(pair, return_inverse=True)
    count = np.bincount(number[train], minlength=number.max() + 1)
    total = np.bincount(number[train], tokens.depth[train], number.max() + 1)
    single = id_means(tokens, train)
    return np.where(count[number] >= 5, total[number] / np.maximum(count[number], 1), single)


def gates(looped: Looped, texts: list[Document], tokens: Tokens, name: str, seed: int = 1) -> dict:
    """Controls 1 to 4 on the half of the documents that the lookup was not made from, at the mean depths of SWEEP: bits
    a byte under the rule, and under depths of the same histogram given by chance, by chance within each token's
    identity, by a gate that was never trained, and by a table of tokens; and the share of the rule's gain over chance,
    summed over the frontier's points, that the table reaches. Chance is the mean of CHANCES permutations; intervals are
    over documents."""
    generator = np.random.default_rng(seed)
    train = tokens.document % 2 == 0
    kept = np.flatnonzero(np.arange(len(texts)) % 2 == 1)
    half, mine = [texts[n] for n in kept], tokens.where(~train)
    number = np.unique(mine.document, return_inverse=True)[1]
    size = np.bincount(number, mine.bytes)
    by_nothing = untrained(looped, half, seed)
    drawn = generator.multinomial(size.size, np.full(size.size, 1 / size.size), 1000)
    one, points = np.ones((1, size.size)), []
    gain, table = np.zeros(size.size), np.zeros(size.size)
    over = lambda w, sums: (w @ sums) / (w @ size)  # noqa: E731
    for q in SWEEP:
        rule = looped.rule(name, threshold_for(looped, texts[:: max(1, len(texts) // 60)], name,
                                               1 + q * (looped.loops - 1)))  # fmt: skip
        whole = following(looped, texts, tokens, rule)
        there = whole.where(~train)
        score = lookup_scores(whole, train)[~train]
        by_hand = {f"random {n}": generator.permutation(there.depth) for n in range(CHANCES)} | {
            "random within a token": shuffled_within(there.depth, there.here, generator),
            "untrained gate": as_histogram(by_nothing, there.depth, generator),
            "token lookup": as_histogram(score, there.depth, generator),
        }
        lost = {"rule": there.loss} | {n: assigned(looped, half, mine, d).loss for n, d in by_hand.items()}
        chance = [lost.pop(f"random {n}") for n in range(CHANCES)]
        lost["random"] = np.mean(chance, axis=0)
        sums = {n: np.bincount(number, values.astype(np.float64)) / np.log(2) for n, values in lost.items()}
        gain += sums["random"] - sums["rule"]
        table += sums["random"] - sums["token lookup"]
        points.append({
            "mean_depth": round(float(there.depth.mean()), 3),
            "bits_a_byte": {n: float(values.sum() / size.sum()) for n, values in sums.items()},
            "deviation_of_chance": float(np.std([c.sum() / np.log(2) / size.sum() for c in chance], ddof=1)),
            "gain_over_random": interval(
                over(one, sums["random"] - sums["rule"])[0], over(drawn, sums["random"] - sums["rule"])
            ).row(6),
        })  # fmt: skip
    share = lambda w: (w @ table) / np.where(w @ gain > 0, w @ gain, np.nan)  # noqa: E731
    return {
        "frontier": points,
        "gain_over_random": interval(over(one, gain)[0] / len(SWEEP), over(drawn, gain) / len(SWEEP)).row(6),
        "lookup_share": interval(share(one)[0], share(drawn)).row(),
    }


def untrained(looped: Looped, texts: list[Document], seed: int) -> np.ndarray:
    """What a linear gate of random weights reads in the state after the first pass, at each token."""
    weight = torch.randn(looped.model.shape.width, generator=torch.Generator().manual_seed(seed))
    parts = []
    for rows in rows_of(looped, texts):
        with torch.no_grad():
            state = looped.model.each(torch.from_numpy(rows.inputs), loops=1)[0][0]
            read = torch.nn.functional.rms_norm(state, (state.size(-1),)) @ weight
        parts.append(read.numpy()[rows.inside()])
    return np.concatenate(parts)


def shuffled(looped: Looped, texts: list[Document], unit: str, seed: int = 1) -> list[Document]:
    """What is measured of documents, with its words or sentences in another order, or (nothing) in its own."""
    generator, found, length = np.random.default_rng(seed), [], min(LENGTH, looped.context)
    for text in texts:
        head = looped.table.encode(text.text[: 16 * length])[:length]
        cut = looped.table.decode(np.array(head)).decode(errors="ignore")
        parts = re.findall({"words": r"\S+\s*", "sentences": r".+?(?:[.!?\n]\s*|$)"}.get(unit, r"(?s).+"), cut)
        if len(parts) > 1 and not parts[-1][-1].isspace():
            parts[-1] += " "  # so that it stays apart wherever it goes
        generator.shuffle(parts)
        found.append(replace(text, text="".join(parts) or text.text))
    return found


def topic_means(tokens: Tokens) -> dict[str, float]:
    return {
        topic: round(float(tokens.depth[tokens.topic == n].mean()), 4)
        for n, topic in enumerate(tokens.topics) if (tokens.topic == n).any()
    }  # fmt: skip


def split_half(tokens: Tokens) -> float:
    """How far the two halves of a document agree on its mean depth beyond its topic's (Spearman-Brown of the halves'
    correlation, each less its topic's mean)."""
    middle = np.bincount(tokens.document) // 2
    late = tokens.position >= middle[tokens.document]
    topic = np.zeros(middle.size, dtype=np.int64)
    topic[tokens.document] = tokens.topic
    used, halves = middle >= 8, []
    for keep in (~late, late):
        count = np.maximum(np.bincount(tokens.document[keep], minlength=middle.size), 1)
        means = (np.bincount(tokens.document[keep], tokens.depth[keep], middle.size) / count)[used]
        of_topic = np.bincount(topic[used], means) / np.maximum(np.bincount(topic[used]), 1)
        halves.append(means - of_topic[topic[used]])
    if used.sum() < 3 or np.ptp(halves[0]) == 0 or np.ptp(halves[1]) == 0:
        return 0.0
    r = float(np.corrcoef(*halves)[0, 1])
    return 2 * r / (1 + r) if r > 0 else r  # the formula is of halves that agree


def sweep(looped: Looped, texts: list[Document], rule: str) -> list[dict]:
    """Topic means at shallow to deep thresholds: whether the order of topics is one threshold's accident."""
    rows = []
    for q in SWEEP:
        threshold = q if rule == "gate" else threshold_for(looped, texts, rule, 1 + q * (looped.loops - 1))
        found = measure(looped, texts, looped.rule(rule, threshold))
        means = topic_means(found)
        rows.append({
            "q": q, "threshold": round(threshold, 5), "mean_depth": round(float(found.depth.mean()), 3), **means,
            "order": sorted(means, key=means.get, reverse=True),
        })  # fmt: skip
    return rows


def matched(tokens: Tokens, bins: int = 20) -> dict[str, float]:
    """Each topic's mean depth where all topics have the same distribution of loss after the first pass."""
    edges = np.quantile(tokens.losses[:, 0], np.linspace(0, 1, bins + 1)[1:-1])
    place = np.searchsorted(edges, tokens.losses[:, 0])
    weight = np.bincount(place, minlength=bins) / place.size
    found = {}
    for number, topic in enumerate(tokens.topics):
        mine = tokens.topic == number
        count = np.bincount(place[mine], minlength=bins)
        mean = np.bincount(place[mine], tokens.depth[mine], bins) / np.maximum(count, 1)
        used = count > 0
        found[topic] = round(float((mean * weight)[used].sum() / weight[used].sum()), 4)
    return found


def retokenised(looped: Looped, texts: list[Document], rule: Rule, drop: float = 0.1) -> dict[str, float]:
    """Each topic's loops a byte when a tenth of the tokenizer's merges is left out by chance (BPE dropout)."""
    sentencepiece.set_random_generator_seed(1)
    processor = looped.table.processor
    encode = lambda text: processor.encode(text, enable_sampling=True, alpha=drop, nbest_size=-1)  # noqa: E731
    tokens = measure(looped, texts, rule, encode)
    return {
        topic: round(float(tokens.depth[tokens.topic == n].sum() / tokens.bytes[tokens.topic == n].sum()), 4)
        for n, topic in enumerate(tokens.topics)
    }  # fmt: skip


# What is to be worked out in a document of known difficulty.
ANSWERS = {"copy": r"Again: ([^.]*)\.", "modular arithmetic": r"= (\d)", "hop": r"before \w+ is (\w+)"}


def answers(texts: list[Document], tokens: Tokens) -> np.ndarray:
    """(N,) bool: whether a predicted token is part of an answer in documents of known difficulty."""
    found = np.zeros(tokens.depth.size, dtype=bool)
    for number, text in enumerate(texts):
        mine = np.flatnonzero(tokens.document == number)
        ends = np.cumsum(tokens.bytes[mine])
        starts = ends - tokens.bytes[mine]
        pattern = ANSWERS["hop" if text.topic.endswith("hop") else text.topic]
        for match in re.finditer(pattern.encode(), text.text.encode()):
            found[mine[(ends > match.start(1)) & (starts < match.end(1))]] = True
    return found


def positive_control(looped: Looped, rule: Rule) -> dict:
    """Control 10, of a model whose training text held such tasks (`depth_map.py split --known-difficulty`): depth at
    the answers, what passes gain there, and whether depth rises with the number of hops."""
    from scipy.stats import spearmanr

    texts = known_difficulty()
    tokens = measure(looped, texts, rule)
    asked = tokens.where(answers(texts, tokens))
    gain = asked.losses[:, 0] - asked.losses[:, -1]
    hops = np.array([int(t[0]) if t.endswith("hop") else 0 for t in asked.topics])[asked.topic]
    some = hops > 0
    varied = some.any() and np.ptp(asked.depth[some]) > 0
    rises = float(spearmanr(hops[some], asked.depth[some]).statistic) if varied else 0.0
    told = {t: asked.topic == n for n, t in enumerate(asked.topics) if (asked.topic == n).any()}
    by_task = lambda v: {t: round(float(v[mine].mean()), 4) for t, mine in told.items()}  # noqa: E731
    return {"depth": by_task(asked.depth), "gain": by_task(gain), "nats": by_task(asked.losses[:, -1]),
            "depth_with_hops": round(rises, 4)}  # fmt: skip


def clamped(looped: Looped, texts: list[Document], tokens: Tokens) -> dict[str, dict]:
    """Nats a token of each topic when only its own tokens stop after one pass: the causal statement."""
    found = {}
    for number, topic in enumerate(tokens.topics):
        mine = tokens.topic == number
        own = [t for t in texts if t.topic == topic]
        kept = tokens.where(mine)
        one = assigned(looped, own, kept, np.ones(kept.depth.size, dtype=np.int64))
        found[topic] = {
            "usual": round(float(kept.loss.mean()), 4), "one_pass": round(float(one.loss.mean()), 4),
            "costs": round(float(one.loss.mean() - kept.loss.mean()), 4),
        }  # fmt: skip
    return found


def tracks_benefit(tokens: Tokens) -> float:
    """Rank correlation of depth with what passes beyond the first gain at the token: a useful rule's is positive."""
    from scipy.stats import spearmanr

    gain = tokens.losses[:, 0] - tokens.losses[:, -1]
    return 0.0 if np.ptp(tokens.depth) == 0 else float(spearmanr(tokens.depth, gain).statistic)


def all_of_them(looped: Looped, texts: list[Document], tokens: Tokens, name: str, rule: Rule) -> dict:
    """The controls of one run from the fifth on; agreement between runs (the sixth) is the caller's, who has them
    all."""
    if len(texts) < 8:
        raise UsageError("--controls: give eight documents or more.")
    return {
        "5 shuffled": {
            unit: topic_means(measure(looped, shuffled(looped, texts, unit), rule))
            for unit in ("nothing", "words", "sentences")
        },
        "6 split half": round(split_half(tokens), 4),
        "7 thresholds": sweep(looped, texts, name),
        "8 equal loss": matched(tokens),
        "9 loops a byte, retokenised": retokenised(looped, texts, rule),
        "10 known difficulty": positive_control(looped, rule),
        "11 clamped to one pass": clamped(looped, texts, tokens),
        "depth and gain": round(tracks_benefit(tokens), 4),
    }  # fmt: skip
