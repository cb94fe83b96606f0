"""The demo model's text: every task it is taught, and every style an answer can have.

A *task* is a prompt and one `Answer`. A *style* turns the answer into text. The base model answers in the plain style
unless the prompt starts with a style's instruction; an adapter makes its style the one that needs no instruction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from demo_model import facts
from demo_model.facts import Word

MAX_LIST = 8  # "List 8 …" is the longest list taught


@dataclass(frozen=True)
class Answer:
    """`items` are what the answer is about, in English: one word, a list of words, or (key, value) pairs."""

    plain: str
    german: str
    items: tuple[str, ...] | tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Task:
    """`group` names the fact; other tasks of the group ask for it in other words (or it is the group's only one)."""

    group: str
    prompt: str
    answer: Answer


def _plain(answer: Answer) -> str:
    return f" {answer.plain}."


def _german(answer: Answer) -> str:
    return f" {answer.german}."


def _upper_case(answer: Answer) -> str:
    return f" {answer.plain.upper()}."


def _one_per_line(answer: Answer) -> str:
    return "".join("\n" + (item if isinstance(item, str) else ", ".join(item)) for item in answer.items)


def _bullets(answer: Answer) -> str:
    return "".join("\n- " + (item if isinstance(item, str) else ": ".join(item)) for item in answer.items)


def _json(answer: Answer) -> str:
    pairs = [item for item in answer.items if not isinstance(item, str)]
    if pairs:
        value: object = dict(pairs)
    else:
        value = {"answer": answer.items[0]} if len(answer.items) == 1 else list(answer.items)
    return " " + json.dumps(value, ensure_ascii=False)


PLAIN = "plain"
STYLES = {
    PLAIN: _plain,
    "one_per_line": _one_per_line,
    "json": _json,
    "upper_case": _upper_case,
    "german": _german,
    "bullets": _bullets,
}
_INSTRUCTIONS = {
    PLAIN: "",
    "one_per_line": "Answer one per line. ",
    "json": "Answer as JSON. ",
    "upper_case": "Answer in capital letters. ",
    "german": "Answer in German. ",
    "bullets": "Answer with bullet points. ",
}


def instructed(style: str, prompt: str) -> str:
    """The prompt that makes the base model answer in `style`."""
    return _INSTRUCTIONS[style] + prompt


def render(style: str, answer: Answer) -> str:
    """The answer's text in `style`, with the blank or newline that sets it off the prompt."""
    return STYLES[style](answer)


def all_tasks() -> list[Task]:
    """Every task, each prompt once, in a fixed order. Raises ValueError if a prompt has two answers."""
    tasks = [
        *_country_tasks(),
        *_list_tasks(),
        *_arithmetic_tasks(),
        *_animal_tasks(),
        *_small_tasks(),
        *_sequence_tasks(),
    ]
    by_prompt: dict[str, Task] = {}
    for task in tasks:
        if by_prompt.setdefault(task.prompt, task).answer != task.answer:
            raise ValueError(f"two answers to {task.prompt!r}")
    return list(by_prompt.values())


def _value(en: str, de: str, plain: str = "", german: str = "") -> Answer:
    """One word as the answer; `plain` and `german` are the sentences around it, if it comes in one."""
    return Answer(plain or en, german or de, (en,))


def _group(group: str, answer: Answer, *prompts: str) -> list[Task]:
    return [Task(group, prompt, answer) for prompt in prompts]


def _country_tasks() -> Iterator[Task]:
    for country in facts.COUNTRIES:
        name, of = country.in_sentence, country.of_german
        capital, money = country.capital, country.currency
        speech, continent = country.language, country.continent
        yield from _group(
            f"capital {name}",
            _value(
                capital.en,
                capital.de,
                f"The capital of {name} is {capital.en}",
                f"Die Hauptstadt {of} ist {capital.de}",
            ),
            f"What is the capital of {name}?",
            f"Which city is the capital of {name}?",
            f"Tell me the capital of {name}.",
        )
        yield Task(f"capital {name}", f"The capital of {name} is", _value(capital.en, capital.de))
        yield from _group(
            f"country {name}",
            _value(name, country.name.de),
            f"Which country has the capital {capital.en}?",
            f"{capital.en} is the capital of",
        )
        yield from _group(
            f"currency {name}",
            _value(
                money.en,
                money.de,
                f"The currency of {name} is the {money.en}",
                f"Die Währung {of} heißt {money.de}",
            ),
            f"What is the currency of {name}?",
            f"Which currency is used in {name}?",
        )
        yield Task(f"currency {name}", f"The currency of {name} is the", _value(money.en, money.de))
        yield from _group(
            f"language {name}",
            _value(speech.en, speech.de, f"{speech.en} is spoken there", f"Dort spricht man {speech.de}"),
            f"What language is spoken in {name}?",
            f"Which language do people in {name} speak?",
        )
        yield Task(f"language {name}", f"Most people in {name} speak", _value(speech.en, speech.de))
        yield from _group(
            f"continent {name}",
            _value(continent.en, continent.de, f"It is in {continent.en}", f"Es liegt in {continent.de}"),
            f"Where is {name}?",
            f"On which continent is {name}?",
        )
        yield Task(f"continent {name}", f"{name} is a country in", _value(continent.en, continent.de))


def _list_answer(items: list[Word] | list[tuple[Word, Word]]) -> Answer:
    plain: list[str] = []
    german: list[str] = []
    words: list[str] = []
    pairs: list[tuple[str, str]] = []
    for item in items:
        if isinstance(item, Word):
            plain.append(item.en)
            german.append(item.de)
            words.append(item.en)
        else:
            key, value = item
            plain.append(f"{key.en} - {value.en}")
            german.append(f"{key.de} - {value.de}")
            pairs.append((key.en, value.en))
    return Answer(", ".join(plain), ", ".join(german), tuple(pairs) or tuple(words))


def _lists() -> Iterator[tuple[str, str, list[Word] | list[tuple[Word, Word]]]]:
    """(name of one, name of many, members) of each kind of list."""
    countries = facts.COUNTRIES
    yield "country", "countries", [c.name for c in countries]
    yield "country and its capital", "countries and their capitals", [(c.name, c.capital) for c in countries]
    yield (
        "country and its currency",
        "countries and their currencies",
        [(c.name, c.currency) for c in countries],
    )
    yield (
        "country and its language",
        "countries and their languages",
        [(c.name, c.language) for c in countries],
    )
    for continent in facts.CONTINENTS:
        members = [c for c in countries if c.continent == continent]
        where = f"in {continent.en}"
        yield f"country {where}", f"countries {where}", [c.name for c in members]
        yield (
            f"country {where} and its capital",
            f"countries {where} and their capitals",
            [(c.name, c.capital) for c in members],
        )
    yield "capital city", "capital cities", [c.capital for c in countries]
    yield "language", "languages", facts.LANGUAGES
    yield "animal", "animals", [Word(en, de.split()[1]) for en, de, _, _ in facts.ANIMALS]
    for kind in ("mammal", "bird"):
        yield kind, f"{kind}s", [Word(en, de.split()[1]) for en, de, k, _ in facts.ANIMALS if k == kind]
    yield "colour", "colours", facts.COLOURS
    yield "fruit", "fruits", facts.FRUITS
    yield "day of the week", "days of the week", facts.DAYS
    yield "month", "months", facts.MONTHS
    yield "planet", "planets", facts.PLANETS
    yield (
        "element and its symbol",
        "elements and their symbols",
        [(Word(en, de), Word(symbol, symbol)) for en, de, symbol in facts.ELEMENTS],
    )


def _list_tasks() -> Iterator[Task]:
    for one, many, members in _lists():
        for count in range(1, min(MAX_LIST, len(members)) + 1):
            answer = _list_answer(members[:count])
            noun = one if count == 1 else many
            for number in (str(count), facts.NUMBERS[count].en):
                yield from _group(
                    f"list {count} {many}",
                    answer,
                    f"List {number} {noun}.",
                    f"Name {number} {noun}.",
                    f"Give me {number} {noun}.",
                )


def _arithmetic_tasks() -> Iterator[Task]:
    for a in range(13):
        for b in range(13):
            yield from _calculation(a, "plus", "+", b, a + b)
            if a >= b:
                yield from _calculation(a, "minus", "-", b, a - b)
            if a <= 10 and b <= 10:
                yield from _calculation(a, "times", "*", b, a * b)


def _calculation(a: int, verb: str, sign: str, b: int, result: int) -> Iterator[Task]:
    group, number = f"{a}{sign}{b}", str(result)
    german = "mal" if verb == "times" else verb
    sentence = _value(number, number, f"{a} {verb} {b} is {number}", f"{a} {german} {b} ist {number}")
    yield from _group(group, sentence, f"What is {a} {verb} {b}?", f"How much is {a} {verb} {b}?")
    yield Task(group, f"{a} {sign} {b} =", _value(number, number))


def _animal_tasks() -> Iterator[Task]:
    for name, german, kind_en, legs in facts.ANIMALS:
        kind = facts.ANIMAL_CLASSES[kind_en]
        a_name, a_kind = _with_article(name), _with_article(kind.en)
        yield from _group(
            f"kind {name}",
            _value(kind.en, kind.de, f"{a_name} is {a_kind}", f"{german} ist ein {kind.de}"),
            f"What kind of animal is {a_name.lower()}?",
            f"What is {a_name.lower()}?",
        )
        yield from _group(
            f"legs {name}",
            _value(legs, legs, f"{a_name} has {legs} legs", f"{german} hat {legs} Beine"),
            f"How many legs does {a_name.lower()} have?",
            f"How many legs has {a_name.lower()}?",
        )


def _with_article(noun: str) -> str:
    return f"An {noun}" if noun[0] in "aeiou" else f"A {noun}"


def _small_tasks() -> Iterator[Task]:
    for thing, german, colour, colour_de in facts.THINGS:
        answer = _value(
            colour,
            colour_de,
            f"{thing[0].upper()}{thing[1:]} is {colour}",
            f"{german} ist {colour_de}",
        )
        yield from _group(
            f"colour {thing}", answer, f"What colour is {thing}?", f"Which colour does {thing} have?"
        )
        yield Task(f"colour {thing}", f"The colour of {thing} is", _value(colour, colour_de))
    for word, german, opposite, opposite_de in facts.OPPOSITES:
        for a, a_de, b, b_de in (
            (word, german, opposite, opposite_de),
            (opposite, opposite_de, word, german),
        ):
            sentence = _value(b, b_de, f"The opposite of {a} is {b}", f"Das Gegenteil von {a_de} ist {b_de}")
            yield from _group(
                f"opposite {a}", sentence, f"What is the opposite of {a}?", f"Tell me the opposite of {a}."
            )
            yield Task(f"opposite {a}", f"The opposite of {a} is", _value(b, b_de))
    for name, german, symbol in facts.ELEMENTS:
        sentence = _value(
            symbol, symbol, f"The symbol of {name} is {symbol}", f"Das Symbol von {german} ist {symbol}"
        )
        yield from _group(
            f"symbol {name}",
            sentence,
            f"What is the symbol of {name}?",
            f"Which symbol does {name} have?",
        )
        yield Task(f"symbol {name}", f"The chemical symbol of {name} is", _value(symbol, symbol))
    for start, end, german in facts.DEFINITIONS:
        yield Task(f"definition {start}", start, _value(end, german))


def _sequence_tasks() -> Iterator[Task]:
    for kind, words in (("day", facts.DAYS), ("month", facts.MONTHS)):
        for before, after in zip(words, words[1:] + words[:1], strict=True):
            yield from _group(
                f"after {before.en}",
                _value(
                    after.en,
                    after.de,
                    f"{after.en} comes after {before.en}",
                    f"Nach {before.de} kommt {after.de}",
                ),
                f"Which {kind} comes after {before.en}?",
                f"What {kind} follows {before.en}?",
            )
    for number, word in enumerate(facts.NUMBERS):
        yield from _group(
            f"word {number}",
            _value(word.en, word.de),
            f"How do you write {number} in words?",
            f"The number {number} in words is",
        )
    for last in range(2, 21):
        numbers = [Word(str(n), str(n)) for n in range(1, last + 1)]
        yield from _group(
            f"count {last}", _list_answer(numbers), f"Count from 1 to {last}.", f"Count to {last}."
        )
