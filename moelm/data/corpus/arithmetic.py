"""Generated arithmetic worksheets at four levels: questions, solution steps and answers.

Every `a = b` between plain numbers is true, including those in the steps.
"""

import itertools
import math
from collections.abc import Callable
from random import Random
from typing import NamedTuple


class _Problem(NamedTuple):
    question: str
    steps: list[str]
    answer: str


def _random_number(rng: Random, level: int) -> int:
    return rng.randint(10 ** (level - 1) + 1, 10**level * 2)


def _addition(rng: Random, level: int) -> _Problem:
    a, b, carry, steps = _random_number(rng, level), _random_number(rng, level), 0, []
    for place in range(len(str(max(a, b)))):
        digits = [a // 10**place % 10, b // 10**place % 10] + [carry] * (carry > 0)
        column = sum(digits)
        carry = column // 10
        note = f", write {column % 10}, carry {carry}" if carry else f", write {column}"
        steps.append(f"10^{place}: {' + '.join(map(str, digits))} = {column}{note}")
    return _Problem(f"What is {a} + {b}?", steps, str(a + b))


def _subtraction(rng: Random, level: int) -> _Problem:
    a, b, steps = _random_number(rng, level), _random_number(rng, level), []
    rest = a
    for place in reversed(range(len(str(b)))):
        part = b // 10**place % 10 * 10**place
        if part:
            steps.append(f"{rest} - {part} = {rest - part}")
            rest -= part
    return _Problem(f"What is {a} - {b}?", steps, str(a - b))


def _multiplication(rng: Random, level: int) -> _Problem:
    a, b = _random_number(rng, level), _random_number(rng, min(level, 3))
    parts = [b // 10**p % 10 * 10**p for p in reversed(range(len(str(b)))) if b // 10**p % 10]
    steps = [f"{a} * {part} = {a * part}" for part in parts]
    steps.append(f"{' + '.join(str(a * part) for part in parts)} = {a * b}")
    return _Problem(f"What is {a} * {b}?", steps, str(a * b))


def _division(rng: Random, level: int) -> _Problem:
    a, b, rest, steps = _random_number(rng, level + 1), rng.randint(2, 6 * level + 3), 0, []
    for digit in str(a):
        now = 10 * rest + int(digit)
        if now >= b:
            steps.append(f"{b} goes into {now} {now // b} times: {now} - {now // b * b} = {now % b}")
        rest = now % b
    steps.append(f"Check: {a // b} * {b} + {rest} = {a}")
    return _Problem(f"Divide {a} by {b}.", steps, f"{a // b} remainder {rest}")


_Tree = int | tuple[str, "_Tree", "_Tree"]
_RANK = {"+": 1, "-": 1, "*": 2}


def _random_tree(rng: Random, leaves: int, level: int) -> _Tree:
    if leaves == 1:
        return rng.randint(2, 5 * 3**level)
    left = rng.randint(1, leaves - 1)
    return rng.choice("++--*"), _random_tree(rng, left, level), _random_tree(rng, leaves - left, level)


def _format_tree(tree: _Tree, outer: int = 0) -> str:
    if isinstance(tree, int):
        return str(tree) if tree >= 0 or not outer else f"({tree})"
    op, left, right = tree
    rank = _RANK[op]
    text = f"{_format_tree(left, rank)} {op} {_format_tree(right, rank + 1)}"
    return f"({text})" if rank < outer else text


def _evaluate_leftmost(tree: _Tree) -> _Tree:
    if isinstance(tree, int):
        return tree
    op, left, right = tree
    if isinstance(left, int) and isinstance(right, int):
        return {"+": left + right, "-": left - right, "*": left * right}[op]
    return (op, _evaluate_leftmost(left), right) if not isinstance(left, int) else (op, left, _evaluate_leftmost(right))


def _expression(rng: Random, level: int) -> _Problem:
    tree = _random_tree(rng, rng.randint(3, 3 + level), level)
    question, steps = f"Compute {_format_tree(tree)}.", []
    while not isinstance(tree, int):
        smaller = _evaluate_leftmost(tree)
        steps.append(f"{_format_tree(tree)} = {_format_tree(smaller)}")
        tree = smaller
    return _Problem(question, steps, str(tree))


def _equation(rng: Random, level: int) -> _Problem:
    x, a, b = rng.randint(-3 * level, 9 * level), rng.randint(2, 4 + 3 * level), _random_number(rng, level)
    c = a * x + b
    steps = [f"{a}x = {c} - {b} = {c - b}", f"x = {c - b} / {a} = {x}"]
    return _Problem(f"Solve {a}x + {b} = {c} for x.", steps, str(x))


def _fractions(rng: Random, level: int) -> _Problem:
    b, d = rng.randint(2, 4 + 3 * level), rng.randint(2, 4 + 3 * level)
    a, c, common = rng.randint(1, b), rng.randint(1, d), math.lcm(b, d)
    e, f = a * common // b, c * common // d
    divisor = math.gcd(e + f, common)
    top, bottom = (e + f) // divisor, common // divisor
    steps = [f"Common denominator: {common}", f"{a}/{b} = {e}/{common}, {c}/{d} = {f}/{common}"]
    steps.append(f"{e}/{common} + {f}/{common} = {e + f}/{common} = {top}/{bottom}")
    return _Problem(f"What is {a}/{b} + {c}/{d}?", steps, f"{top}/{bottom}" if bottom > 1 else str(top))


def _percentage(rng: Random, level: int) -> _Problem:
    percent, base = 5 * rng.randint(1, 19), 20 * rng.randint(1, 10**level)
    result = percent * base // 100
    steps = [f"1 percent: {base} / 100 = {base / 100:g}", f"{percent} * {base} / 100 = {result}"]
    return _Problem(f"What is {percent}% of {base}?", steps, str(result))


def _divisor(rng: Random, level: int) -> _Problem:
    factor = rng.randint(1, 6 * level)
    a, b = factor * _random_number(rng, level), factor * _random_number(rng, level)
    steps, big, small = [], max(a, b), min(a, b)
    while small:
        steps.append(f"{big} = {big // small} * {small} + {big % small}")
        big, small = small, big % small
    return _Problem(f"Find the greatest common divisor of {a} and {b}.", steps, str(big))


def _binary(rng: Random, level: int) -> _Problem:
    n = rest = _random_number(rng, min(level, 3) + 1)
    steps = []
    while rest:
        steps.append(f"{rest} = 2 * {rest // 2} + {rest % 2}")
        rest //= 2
    return _Problem(f"Write {n} in binary.", [*steps, "Read the remainders upwards."], f"{n:b}")


def _sequence(rng: Random, level: int) -> _Problem:
    start, step = rng.randint(1, 10**level), rng.randint(2, 10**level)
    terms = [start + i * step for i in range(rng.randint(3, 5))]
    steps = [f"{later} - {earlier} = {step}" for earlier, later in itertools.pairwise(terms)]
    steps.append(f"{terms[-1]} + {step} = {terms[-1] + step}")
    return _Problem(f"Continue: {', '.join(map(str, terms))}, ...", steps, str(terms[-1] + step))


_BUYERS = ("Ada", "Boris", "Carla", "Dev", "Edith", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Mina", "Nils")
_GOODS = ("notebook", "pencil", "ticket", "lemon", "candle", "postcard", "lamp", "spoon", "balloon", "tile")
_SHOPPING = (
    "{who} buys {n} {thing}s at {price} coins each and pays with {paid} coins. How much change is there?",
    "A {thing} costs {price} coins. {who} takes {n} and hands over {paid} coins. How many coins come back?",
    "{who} had {paid} coins and spent {price} coins on each of {n} {thing}s. How many coins are left?",
)


def _shopping(rng: Random, level: int) -> _Problem:
    n, price = rng.randint(2, 9 * level), rng.randint(2, 12 * level)
    paid = n * price + rng.randint(0, 20 * level)
    who, thing, change = rng.choice(_BUYERS), rng.choice(_GOODS), paid - n * price
    question = rng.choice(_SHOPPING).format(who=who, n=n, thing=thing, price=price, paid=paid)
    steps = [f"{n} * {price} = {n * price}", f"{paid} - {n * price} = {change}"]
    return _Problem(question, steps, str(change))


_PROBLEMS: tuple[Callable[[Random, int], _Problem], ...] = (
    _addition, _subtraction, _multiplication, _division, _expression, _equation,
    _fractions, _percentage, _divisor, _binary, _sequence, _shopping,
)  # fmt: skip


def write_worksheet(rng: Random) -> str:
    """A worksheet with problems of one level, of one or several kinds."""
    level = rng.randint(1, 4)
    kinds = rng.sample(_PROBLEMS, rng.choice((1, 3, 6)))
    question_format = rng.choice(("{n}. {q}", "Problem {n}: {q}", "Q{n}) {q}", "Exercise {n}. {q}"))
    bullet = rng.choice(("  ", "- ", "    ", ""))
    blocks = [f"Worksheet, level {level}"]
    for n in range(1, rng.randint(5, 10)):
        problem = rng.choice(kinds)(rng, level)
        steps = [bullet + step for step in problem.steps]
        blocks.append("\n".join([question_format.format(n=n, q=problem.question), *steps, f"Answer: {problem.answer}"]))
    return "\n\n".join(blocks) + "\n"
