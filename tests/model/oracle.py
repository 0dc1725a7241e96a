"""Routers, mixtures and losses written from their papers: loops over tokens and experts in float64, without the package.

Gates are rows of scalars, one for each expert, zero where an expert was not chosen.
"""

import math

import torch
from torch import Tensor

Gates = list[list[Tensor]]


def scalars(count: int) -> list[Tensor]:
    return [torch.zeros((), dtype=torch.float64) for _ in range(count)]


def largest(values: list[Tensor], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i].item(), i))[:k]


def softmax(values: list[Tensor]) -> list[Tensor]:
    top = max(value.item() for value in values)
    powers = [(value - top).exp() for value in values]
    return [power / sum(powers) for power in powers]


def keep_top_k(values: list[Tensor], k: int) -> list[Tensor]:
    """Softmax(KeepTopK(v, k)): everything else is minus infinity."""
    chosen = largest(values, k)
    gates = scalars(len(values))
    for i, gate in zip(chosen, softmax([values[i] for i in chosen]), strict=True):
        gates[i] = gate
    return gates


def topk(x: Tensor, w: Tensor, k: int, normalize: bool) -> Gates:
    rows = []
    for token in x:
        logits = [token @ row for row in w]
        if normalize:
            rows.append(keep_top_k(logits, k))
        else:
            probs, chosen = softmax(logits), largest(logits, k)
            rows.append([probs[i] if i in chosen else torch.zeros((), dtype=x.dtype) for i in range(len(w))])
    return rows


def biased_topk(x: Tensor, w: Tensor, bias: Tensor, k: int, normalize: bool) -> Gates:
    """The k largest of probability plus bias; the bias is not part of the gates."""
    rows = []
    for token in x:
        probs = softmax([token @ row for row in w])
        chosen = largest([prob + b for prob, b in zip(probs, bias, strict=True)], k)
        norm = sum(probs[i] for i in chosen) if normalize else 1.0
        gates = scalars(len(w))
        for i in chosen:
            gates[i] = probs[i] / norm
        rows.append(gates)
    return rows


def sigmoid(x: Tensor, w: Tensor, bias: Tensor, k: int, normalize: bool, scale: float) -> Gates:
    rows = []
    for token in x:
        scores = [1 / (1 + (-(token @ row)).exp()) for row in w]
        chosen = largest([score + b for score, b in zip(scores, bias, strict=True)], k)
        norm = sum(scores[i] for i in chosen) if normalize else 1.0
        gates = scalars(len(w))
        for i in chosen:
            gates[i] = scale * scores[i] / norm
        rows.append(gates)
    return rows


def softplus(value: Tensor) -> Tensor:
    return (1 + value.exp()).log()


def normal_cdf(value: Tensor) -> Tensor:
    return (1 + torch.erf(value / math.sqrt(2))) / 2


def selection_probability(clean: list[Tensor], noisy: list[Tensor], std: list[Tensor], i: int, k: int) -> Tensor:
    """P(x, i), eq. 9: i is chosen if it exceeds the k-th largest noisy logit of the others."""
    others = sorted((noisy[j] for j in range(len(noisy)) if j != i), key=lambda value: -value.item())
    if len(others) < k:
        return torch.ones((), dtype=torch.float64)
    return normal_cdf((clean[i] - others[k - 1]) / std[i])


def noisy_gate(token: Tensor, w: Tensor, w_noise: Tensor, noise: Tensor, k: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gates of eqs 3-5 and probabilities of eq. 9 of one token."""
    clean = [token @ row for row in w]
    std = [softplus(token @ row) for row in w_noise]
    noisy = [c + n * s for c, n, s in zip(clean, noise, std, strict=True)]
    return keep_top_k(noisy, k), [selection_probability(clean, noisy, std, i, k) for i in range(len(w))]


def noisy_topk(x: Tensor, w: Tensor, w_noise: Tensor, noise: Tensor, k: int) -> tuple[Gates, list[Tensor]]:
    """Gates, and Load(X) of eq. 10."""
    rows, load = [], scalars(len(w))
    for token, own_noise in zip(x, noise, strict=True):
        gates, probabilities = noisy_gate(token, w, w_noise, own_noise, k)
        rows.append(gates)
        load = [total + p for total, p in zip(load, probabilities, strict=True)]
    return rows, load


def hierarchical(
    x: Tensor,
    primary: tuple[Tensor, Tensor, Tensor],
    inner: tuple[Tensor, Tensor, Tensor],
    group_k: int,
    inner_k: int,
) -> tuple[Gates, list[Tensor]]:
    """Gates of eq. 12 and Load_H of eq. 14; each level is (weights, noise weights, noise)."""
    groups, experts = len(primary[0]), len(inner[0])
    size = experts // groups
    rows, load_primary, members = [], scalars(groups), [0] * groups
    inside = [scalars(size) for _ in range(groups)]
    for n, token in enumerate(x):
        outer_gates, probabilities = noisy_gate(token, primary[0], primary[1], primary[2][n], group_k)
        load_primary = [total + p for total, p in zip(load_primary, probabilities, strict=True)]
        gates = []
        for i in range(groups):
            own = slice(i * size, (i + 1) * size)
            inner_gates, inner_probabilities = noisy_gate(token, inner[0][own], inner[1][own], inner[2][n][own], inner_k)
            gates += [outer_gates[i] * gate for gate in inner_gates]
            if outer_gates[i] > 0:
                members[i] += 1
                inside[i] = [total + p for total, p in zip(inside[i], inner_probabilities, strict=True)]
        rows.append(gates)
    load = [load_primary[i] * value / max(members[i], 1) for i in range(groups) for value in inside[i]]
    return rows, load


def expert_choice(x: Tensor, w: Tensor, capacity: int) -> Gates:
    """S = Softmax(X W_g) over experts; each expert takes the tokens with its largest scores."""
    scores = [softmax([token @ row for row in w]) for token in x]
    rows = [scalars(len(w)) for _ in x]
    for e in range(len(w)):
        for n in largest([row[e] for row in scores], capacity):
            rows[n][e] = scores[n][e]
    return rows


def mixture(x: Tensor, gates: Gates, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """y = sum_i G_i(x) w2_i (silu(w1_i x) * w3_i x)."""
    rows = []
    for token, weights in zip(x, gates, strict=True):
        total = torch.zeros_like(token)
        for e, weight in enumerate(weights):
            if weight.item() != 0:
                gate = w1[e] @ token
                total = total + weight * (w2[e] @ (gate / (1 + (-gate).exp()) * (w3[e] @ token)))
        rows.append(total)
    return torch.stack(rows)


def importance(gates: Gates) -> list[Tensor]:
    return [sum((row[e] for row in gates), torch.zeros((), dtype=torch.float64)) for e in range(len(gates[0]))]


def squared_variation(values: list[Tensor]) -> Tensor:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def switch_loss(logits: Tensor, k: int) -> Tensor:
    """E sum_i f_i P_i over these tokens."""
    experts = logits.shape[1]
    share, prob = [0.0] * experts, scalars(experts)
    for row in logits:
        for e in largest(list(row), k):
            share[e] += 1 / (k * len(logits))
        for e, p in enumerate(softmax(list(row))):
            prob[e] = prob[e] + p / len(logits)
    return experts * sum(f * p for f, p in zip(share, prob, strict=True))
