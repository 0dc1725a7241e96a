"""Generated documents of the synthetic domains: stories, structured records and worksheets.

The text is deterministic and needs no files. Worksheets are in `moelm.data.corpus.arithmetic`.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any

from moelm.data.corpus.arithmetic import write_worksheet
from moelm.data.document import Document

GENERATOR_VERSION = 1
"""Incremented whenever the text of a seed changes."""

_WORDS: dict[str, tuple[str, ...]] = {
    kind: tuple(words.split("|"))
    for kind, words in {
        "woman": (
            "Ada|Bea|Carla|Dina|Edith|Farah|Greta|Hana|Ines|Jana|Kira|Lena|Mina|Nora|Olga|Petra|Rosa|Sonja|Tara|Vera"
        ),
        "man": (
            "Abel|Boris|Carl|Dev|Emil|Felix|Goran|Hugo|Ivan|Jonas|Karim|Leo|Milan|Nils|Otto|Paul|Ravi|Stefan|Theo|Yusuf"
        ),
        "surname": "Baker|Cooper|Fisher|Fletcher|Mason|Miller|Potter|Sawyer|Smith|Tanner|Weaver|Wright",
        "trait": (
            "patient|curious|stubborn|cheerful|careful|restless|generous|shy|proud|clever|dreamy|kind|brave|forgetful"
        ),
        "job": (
            "baker|carpenter|gardener|sailor|teacher|weaver|clockmaker|potter|shepherd|painter|doctor|beekeeper|glazier"
        ),
        "color": "red|blue|green|yellow|silver|brown|white|purple|golden|grey|black|striped",
        "noun": (
            "kite|lantern|key|map|drum|basket|whistle|coin|ribbon|compass|scarf|flute|bell|hat|notebook|"
            "mirror|rope|teapot|feather|button|paintbrush|spoon|ladder|blanket|marble|bucket"
        ),
        "weather": (
            "rain had fallen all night|the sun stood high|a thin fog lay on the ground|"
            "the wind would not rest|snow covered the roofs|the air smelled of apples|"
            "clouds raced over the hills|it was warm for the season|thunder rolled far away|"
            "the first stars were out"
        ),
        "when": (
            "In the morning|Before noon|Soon afterwards|Towards evening|An hour later|After a short rest|"
            "When the bells rang|Just then|By and by|Without warning|A little later|At last"
        ),
        "look": (
            "a fox crossing the path|two swallows under the roof|smoke above the trees|"
            "a cart without a driver|an unlocked gate|footprints in the mud|a boat with torn sails|"
            "a light in the window|an empty nest|a goat on a wall|seven geese in a row|a broken fence"
        ),
        "feel": ("glad|uneasy|proud|tired but content|surprised|a little ashamed|relieved|puzzled|hopeful|wide awake"),
        "wish": (
            "to see the sea|to learn an old song|to win the summer race|to find a lost brother|"
            "to bake for the feast|to repair the roof|to write a letter home|to cross the mountains|"
            "to make the old clock run again"
        ),
        "trouble": (
            "the bridge was broken|a dog blocked the way|the lamp went out|the door would not open|"
            "a wheel came off the cart|the path ended in thorns|the bread had burned|"
            "somebody had moved the signpost|the map was upside down|nobody remembered the way"
        ),
        "remedy": (
            "a long branch|a quiet word|a borrowed rope|patience and a pinch of salt|three dry matches|"
            "a trick learned from a grandmother|a flat stone|a simple tune|a second look|a good laugh"
        ),
        "advice": (
            "Look twice before you jump|A small step is still a step|Ask first and wonder later|"
            "What you share comes back to you|Never trust a quiet river|Slow hands make straight walls|"
            "The longest way is often the safest|Even a borrowed candle gives light|"
            "A closed mouth hears more|No bread rises in a hurry"
        ),
        "said": "said|whispered|answered|shouted|murmured|explained|called",
    }.items()
}

_PLACES: dict[str, tuple[str, ...]] = {
    "harbour": ("the crane", "a heap of nets", "the last pier"),
    "market": ("the spice stall", "a crooked table", "the fountain"),
    "river": ("a hollow oak", "the mossy stones", "a fallen birch"),
    "mill": ("the turning wheel", "the flour sacks", "a dusty stair"),
    "school": ("the blackboard", "a row of coats", "the bench by the stove"),
    "library": ("the tallest shelf", "a reading lamp", "the card index"),
    "orchard": ("the oldest pear tree", "a stone wall", "the wooden ladder"),
    "station": ("the clock", "a stack of suitcases", "the ticket window"),
    "bakery": ("the warm oven", "a tray of buns", "the flour bin"),
    "lighthouse": ("the winding stairs", "the great lamp", "a narrow window"),
    "workshop": ("the vice", "a box of screws", "the sawdust in the corner"),
    "farm": ("the bean poles", "a rain barrel", "the beehives"),
}


class _Slots(dict[str, str]):
    """Values for `str.format_map`; a slot without a given value gets a random word of its kind."""

    def __init__(self, rng: Random, given: Mapping[str, str]):
        super().__init__(given)
        self._rng = rng

    def __missing__(self, kind: str) -> str:
        return self._rng.choice(_WORDS[kind])


def _fill_template(rng: Random, templates: tuple[str, ...], **given: str) -> str:
    return rng.choice(templates).format_map(_Slots(rng, given))


# --- stories: the holder of each item is tracked, so that every question at the end has one answer ---

_TITLES = (
    "{hero} at the {place}",
    "{hero} and {friend}",
    "{hero}, {friend} and {other}",
    "The {trait} {job}",
)
_OPENINGS = (
    "{hero} was a {trait} {job} who lived near the {place}. For years {they} had wanted {wish}.",
    "Once, near the {place}, there lived a {trait} {job} named {hero}, whose only wish was {wish}.",
    "That day {weather}, and {hero}, the {job}, could not sleep. All {they} wanted was {wish}.",
    "Everybody at the {place} knew {hero}. No {job} was as {trait}, and nobody else hoped so much {wish}.",
)
_COMPANIONS = (
    "{friend} and {other} came along, the one {trait}, the other {trait}.",
    "{hero} never went alone: {friend} was {trait}, {other} was {trait}, and together they got on well.",
    "With {their} friends {friend} and {other}, {hero} set out before breakfast.",
)
_FINDS = (
    "{when} {who} found a {item} behind {spot}.",
    "{when} {who} picked up a {item} that lay beside {spot}.",
    "Near {spot}, {who} discovered a {item} and felt {feel}.",
)
_TRANSFERS = (
    "{when} {who} gave the {item} to {whom}.",
    '"Take it," {said} {who}, and handed the {item} to {whom}.',
    "{who} could not use it, so {who} passed the {item} to {whom}.",
    "Because {whom} had asked so kindly, {who} lent the {item} to {whom}.",
)
_MOVES = (
    "{when} they walked from the {old} to the {place}.",
    "They left the {old} and went on to the {place}, where {weather}.",
    "The road led them from the {old} to the {place}, and {who} felt {feel}.",
)
_MOMENTS = (
    "{when} they saw {look}, and {who} was {feel} about it.",
    '"{advice}," {said} {who}. {whom} thought about that for a while.',
    "But {trouble}. {who} was {feel}, until {whom} tried {remedy}, and that helped.",
    "{when} {trouble}. Only {remedy} could help now, and {whom} knew it.",
    '"Did you notice {look}?" {said} {whom}. "{advice}," {said} {who}.',
    "{who} sat down by {spot}, {feel}, and told {whom} about {look}.",
)
_CLOSINGS = (
    "When night came, {hero} was {feel}. {advice}, as the old people say.",
    "So the day ended at the {place}, and all three were {feel}.",
    '"{advice}," {said} {friend} on the way home, and {hero} had to laugh.',
    "{hero} had not managed {wish}, but {they} went to bed {feel}.",
)


class _Story:
    """The state of one story: the characters, their place, and who holds which item."""

    def __init__(self, rng: Random):
        names = rng.sample(_WORDS["woman"] + _WORDS["man"], 3)
        self.rng, self.names = rng, names
        self.place = rng.choice(tuple(_PLACES))
        self.holder: dict[str, str] = {}
        they, their = ("she", "her") if names[0] in _WORDS["woman"] else ("he", "his")
        self.characters = {"hero": names[0], "friend": names[1], "other": names[2], "they": they, "their": their}
        self.characters["job"] = rng.choice(_WORDS["job"])

    def sentence(self, templates: tuple[str, ...], **given: str) -> str:
        who, whom = self.rng.sample(self.names, 2)
        spot = self.rng.choice(_PLACES[self.place])
        slots = {"who": who, "whom": whom, "spot": spot, "place": self.place, **self.characters, **given}
        return _fill_template(self.rng, templates, **slots)

    def event(self) -> str:
        kind = self.rng.choices(("find", "transfer", "move", "moment"), (2, 3, 1, 4))[0]
        if kind == "find" and len(self.holder) < 3:
            return self._find()
        if kind == "transfer" and self.holder:
            item = self.rng.choice(list(self.holder))
            who = self.holder[item]
            self.holder[item] = whom = self.rng.choice([name for name in self.names if name != who])
            return self.sentence(_TRANSFERS, who=who, whom=whom, item=item)
        if kind == "move":
            old = self.place
            self.place = self.rng.choice([place for place in _PLACES if place != old])
            return self.sentence(_MOVES, old=old)
        return self.sentence(_MOMENTS)

    def _find(self) -> str:
        item = _fill_template(self.rng, ("{color} {noun}",))
        if item in self.holder:
            return self.sentence(_MOMENTS)
        self.holder[item] = who = self.rng.choice(self.names)
        return self.sentence(_FINDS, who=who, item=item)

    def questions(self) -> list[str]:
        questions = [f"Who has the {item} at the end? {name}." for item, name in self.holder.items()]
        questions.append(f"Where does the story end? At the {self.place}.")
        for name in self.names:
            items = [f"the {item}" for item, holder in self.holder.items() if holder == name]
            answer = " and ".join(items).capitalize() or "Nothing"
            questions.append(f"What does {name} hold at the end? {answer}.")
        return self.rng.sample(questions, self.rng.randint(2, len(questions)))


def _write_story(rng: Random) -> str:
    story = _Story(rng)
    paragraphs = [story.sentence(_TITLES), f"{story.sentence(_OPENINGS)} {story.sentence(_COMPANIONS)}"]
    for _ in range(rng.randint(3, 6)):
        paragraphs.append(" ".join(story.event() for _ in range(rng.randint(2, 5))))
    paragraphs.append(story.sentence(_CLOSINGS))
    paragraphs.append("\n".join(story.questions()))
    return "\n\n".join(paragraphs) + "\n"


# --- records: one table in one notation, and questions that it answers ---

_Row = dict[str, Any]


def _key(rng: Random, prefix: str) -> str:
    return f"{prefix}-{rng.randint(1000, 99999)}"


def _date(rng: Random) -> str:
    return f"20{rng.randint(10, 29)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


_Cell = Callable[[Random], Any]


def _choice_of(words: str) -> _Cell:
    return lambda rng: rng.choice(words.split())


# The first column of a table is its key, the second the category, the third the number in the questions.
_TABLES: dict[str, dict[str, _Cell]] = {
    "orders": {
        "order": lambda rng: _key(rng, "A"),
        "status": _choice_of("open paid shipped returned cancelled"),
        "quantity": lambda rng: rng.randint(1, 60),
        "customer": lambda rng: rng.choice(_WORDS["woman"] + _WORDS["man"]),
        "price": lambda rng: rng.randint(100, 90000) / 100,
        "date": _date,
    },
    "sensors": {
        "sensor": lambda rng: _key(rng, "node"),
        "kind": _choice_of("temperature humidity pressure light vibration"),
        "reading": lambda rng: rng.randint(0, 1200),
        "battery": lambda rng: rng.randint(5, 100) / 100,
        "online": lambda rng: rng.random() < 0.8,
    },
    "staff": {
        "employee": lambda rng: _key(rng, "E"),
        "team": _choice_of("sales research support finance logistics design"),
        "salary": lambda rng: rng.randint(240, 980) * 100,
        "name": lambda rng: rng.choice(_WORDS["woman"] + _WORDS["man"]),
        "city": _choice_of("Lisbon Oslo Vienna Turin Gdansk Lyon Ghent Porto"),
        "since": _date,
    },
    "books": {
        "shelfmark": lambda rng: _key(rng, rng.choice("BCDHPQ")),
        "genre": _choice_of("poetry history novel travel science drama"),
        "pages": lambda rng: rng.randint(48, 950),
        "author": lambda rng: f"{rng.choice(_WORDS['surname'])}, {rng.choice(_WORDS['woman'])[0]}.",
        "lent": lambda rng: rng.random() < 0.3,
    },
    "requests": {
        "request": lambda rng: f"{rng.getrandbits(32):08x}",
        "level": _choice_of("debug info warning error"),
        "millis": lambda rng: rng.randint(1, 5000),
        "method": _choice_of("GET GET GET POST PUT DELETE"),
        "path": lambda rng: f"/{rng.choice(_WORDS['noun'])}/{rng.randint(1, 999)}",
        "code": lambda rng: rng.choice((200, 200, 200, 201, 204, 301, 403, 404, 500)),
    },
}


def _as_csv(name: str, rows: list[_Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip()


def _as_yaml(name: str, rows: list[_Row]) -> str:
    items = ["\n    ".join(f"{key}: {json.dumps(value)}" for key, value in row.items()) for row in rows]
    return f"{name}:\n" + "\n".join(f"  - {item}" for item in items)


def _as_table(name: str, rows: list[_Row]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _as_log(name: str, rows: list[_Row]) -> str:
    return "\n".join(f"{name}: " + " ".join(f"{k}={json.dumps(v)}" for k, v in row.items()) for row in rows)


def _as_ini(name: str, rows: list[_Row]) -> str:
    sections = []
    for row in rows:
        (_, first), *rest = row.items()
        sections.append("\n".join([f"[{first}]", *(f"{key} = {value}" for key, value in rest)]))
    return "\n\n".join(sections)


_NOTATIONS: tuple[Callable[[str, list[_Row]], str], ...] = (
    lambda name, rows: json.dumps({name: rows}, indent=2),
    lambda name, rows: "\n".join(json.dumps(row) for row in rows),
    _as_csv, _as_yaml, _as_table, _as_log, _as_ini,
)  # fmt: skip


def _questions(rng: Random, rows: list[_Row]) -> list[str]:
    key, category, number, other = list(rows[0])[:4]
    group = rng.choice(rows)[category]
    members = [row for row in rows if row[category] == group]
    row, limit = rng.choice(rows), rng.choice(rows)[number]
    top = max(rows, key=lambda row: row[number])
    questions = [
        f"How many rows have {category} {group}? {len(members)}",
        f"What is the total {number}? {sum(row[number] for row in rows)}",
        f"What is the total {number} where {category} is {group}? {sum(row[number] for row in members)}",
        f"What is the largest {number}? {top[number]}",
        f"Which {key} has the largest {number}? {top[key]}",
        f"What is the {number} of {row[key]}? {row[number]}",
        f"What is the {other} of {row[key]}? {row[other]}",
        f"How many rows have {number} above {limit}? {sum(row[number] > limit for row in rows)}",
        f"Which {category} values occur? {', '.join(sorted({row[category] for row in rows}))}",
    ]
    return rng.sample(questions, rng.randint(3, 6))


def _write_records(rng: Random) -> str:
    name = rng.choice(tuple(_TABLES))
    columns = list(_TABLES[name].items())
    # The key, the category and the number are always included, the other columns at random.
    chosen = columns[:3] + sorted(rng.sample(columns[3:], rng.randint(1, len(columns) - 3)), key=columns.index)
    rows = [{column: cell(rng) for column, cell in chosen} for _ in range(rng.randint(3, 16))]
    table = rng.choice(_NOTATIONS)(name, rows)
    return "\n\n".join([f"# {name}", table, "Questions", "\n".join(_questions(rng, rows))]) + "\n"


_WRITERS: dict[str, Callable[[Random], str]] = {
    "synthetic-arithmetic": write_worksheet,
    "synthetic-stories": _write_story,
    "synthetic-data": _write_records,
}
SYNTHETIC_DOMAINS = tuple(_WRITERS)


def synthetic_documents(domain: str, size_bytes: int, seed: int = 0) -> Iterator[Document]:
    """Generate documents of one synthetic domain up to a total size.

    Args:
        domain: one of `SYNTHETIC_DOMAINS`.
        size_bytes: UTF-8 bytes to reach; the last document may exceed it.
        seed: the same seed gives the same documents, and a larger size only adds to them.
    """
    rng, written, number = Random(f"{domain}/{seed}"), 0, 0
    while written < size_bytes:
        text = _WRITERS[domain](rng)
        yield Document(text, domain, f"{domain}, document {number}")
        written, number = written + len(text.encode()), number + 1
