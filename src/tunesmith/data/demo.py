"""The task behind `data: demo`: sentences that hold an order, an appointment or a measurement, to be turned into JSON.

The schema is never told, so an untuned model fails and progress is one number: exact match on held-out sentences. Most
facts are copied from the sentence; plurals, number words, dates and times of day must also be brought into one form.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from tunesmith.errors import UserError

Choice = TypeVar("Choice")

SPLITS = ("train", "eval")
SYSTEM_PROMPT = "Turn the sentence into JSON."
EVAL_BYTES = 51  # of the 256 values of a hash byte: about a fifth of all sentences belong to "eval"


def _listed(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split(","))


FIRST_NAMES = _listed("""
    Maya, Omar, Elena, Lucas, Aisha, Noah, Ingrid, Mateo, Priya, Felix, Hana, Victor, Clara, Samuel, Leila, Jonas,
    Nadia, Peter, Rosa, Theo, Yuki, Daniel, Amara, Oscar, Sofia, Ivan, Grace, Hugo, Mina, Adam, Zoe, Carlos, Freya,
    Tomas, Lina, Marcus, Alice, Rafael, Judith, Karim, Emily, Stefan, Naomi, Paul, Greta, Andre, Diana, Kofi, Laura,
    Simon, Vera, Martin, Anita, Leon, Ruth, Diego, Helen, Arthur, Sara, Bruno, Irene, Malik, Eva, George, Tara,
    José, Chloé, Sven, Olga, Edward
""")
LAST_NAMES = _listed("""
    Chen, Silva, Novak, Haddad, Larsen, Okafor, Rossi, Kowalski, Patel, Weber, Tanaka, Moreau, Garcia, Lindgren,
    Brown, Petrov, Mensah, Jansen, Kim, Fischer, Dubois, Romano, Singh, Baker, Horvat, Suzuki, Lopez, Murphy,
    Nilsson, Adeyemi, Walker, Costa, Schmidt, Ortega, Nguyen, Bennett, Ivanov, Keller, Marino, Hughes, Santos, Berg,
    Rahman, Taylor, Dvorak, Müller, Young, Popescu, Reid, Khan
""")
ITEMS = _listed("""
    desk lamp, coffee mug, wool blanket, garden chair, picture frame, water bottle, notebook, backpack, kettle,
    pillow, wall clock, candle, teapot, cutting board, bread basket, rain jacket, camping stove, tent, bicycle pump,
    bike helmet, hammer, paint brush, screwdriver, ladder, toolbox, flower pot, watering can, shovel, rake,
    bird feeder, keyboard, monitor, phone case, charger, battery, printer, webcam, microphone, guitar string,
    drum stick, yoga mat, football, tennis racket, skipping rope, towel, bath mat, soap dish, mirror, curtain,
    carpet, office chair, bookcase, filing box, pencil case, fountain pen, stapler, envelope, calendar, puzzle,
    board game, teddy bear, lunch box, salad bowl, frying pan, soup spoon, wine glass, baking tray, apron, doormat,
    storage crate
""")
COLOURS = _listed("red, blue, green, black, white, grey, yellow, brown, purple, pink")
WEEKDAYS = _listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = _listed("January, February, March, April, May, June, July, August, September, October, November, December")
NUMBER_WORDS = _listed("one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")
PROFESSIONS = _listed("""
    dentist, doctor, hairdresser, optician, physiotherapist, lawyer, accountant, vet, barber, tax adviser,
    piano teacher, driving instructor, architect, notary, dermatologist, cardiologist, tutor, therapist,
    nutritionist, tattoo artist, personal trainer, estate agent, mechanic, surgeon, midwife, career coach,
    bank manager, photographer, tailor, gardener, plumber, electrician, carpenter, wedding planner,
    speech therapist, swimming coach, priest, insurance agent, pharmacist, landlord
""")
MATERIALS = _listed("""
    oak, steel, glass, pine, copper, marble, plastic, bamboo, leather, ceramic, granite, brass, walnut, concrete,
    aluminium, wooden, iron, paper, stone, rubber
""")
OBJECTS = _listed("""
    table, shelf, door, panel, pipe, box, bench, plate, beam, tile, cabinet, tray, tank, statue, post, wheel,
    drawer, board, lid, bowl, column, tube, hinge, gate, ramp, crate, sheet, frame, handle, hook, step, counter,
    basin, vase, rail, sign, chest, stool, bracket, bar
""")

ORDER_TEMPLATES = (
    "{customer} wants {goods} by {due}.",
    "Please send {goods} to {customer} before {due}.",
    "By {due}, {customer} needs {goods}.",
    "New order from {customer}: {goods}, due {due}.",
    "{goods} for {customer}, to be delivered on {due}.",
    "We promised {customer} delivery of {goods} on {due}.",
    "For {due}: {goods}, customer {customer}.",
    "{customer} called and ordered {goods}, delivery on {due}.",
    "On {due} we ship {goods} to {customer}.",
    "Put {customer} down for {goods}, needed by {due}.",
    "Can you get {goods} to {customer} by {due}?",
    "Order: {goods}. Customer: {customer}. Due: {due}.",
    "Before {due} we have to pack {goods} for {customer}.",
    "I just spoke to {customer}, who would like {goods} no later than {due}.",
    "Deliver to {customer} on {due}: {goods}.",
    "The parcel with {goods} has to leave by {due}; it goes to {customer}.",
)
APPOINTMENT_TEMPLATES = (
    "{person} sees the {profession} on {day} at {time}.",
    "On {day} at {time}, {person} has an appointment with the {profession}.",
    "The {profession} can see {person} at {time} on {day}.",
    "{person} is booked with the {profession} for {day} at {time}.",
    "Please book {person} in with the {profession}, {day} at {time}.",
    "At {time} on {day} the {profession} expects {person}.",
    "Reminder for {person}: {profession}, {day}, {time}.",
    "The appointment of {person} with the {profession} is on {day} at {time}.",
    "{day} at {time} works for {person} to meet the {profession}.",
    "The {profession} called: {person} should come on {day} at {time}.",
    "Tell {person} that the {profession} moved the visit to {day} at {time}.",
    "Is {person} free on {day}? The {profession} has a slot at {time}.",
    "Next {day} {person} goes to the {profession} at {time}.",
    "{time} on {day}: {person} meets the {profession}.",
    "With the {profession}, {person} agreed on {day} at {time}.",
    "The {profession} is waiting for {person} at {time} this {day}.",
)
# These fit every property; a third of the sentences say "82 cm wide" or "weighs 3 kg" instead.
MEASUREMENT_TEMPLATES = (
    "The {property} of the {object} is {amount}.",
    "The {object} has a {property} of {amount}.",
    "{object}: {property} {amount}.",
    "We measured a {property} of {amount} for the {object}.",
    "With a {property} of {amount}, the {object} passed the check.",
    "{amount} is the {property} of the {object}.",
    "Please note the {property} of the {object}: {amount}.",
    "For the {object}, {witness} wrote down a {property} of {amount}.",
    "{witness} says the {property} of the {object} is {amount}.",
    "According to {witness}, the {object} has a {property} of {amount}.",
    "At {amount}, the {property} of the {object} is within limits.",
    "The label gives the {property} of the {object} as {amount}.",
    "Record {amount} as the {property} of the {object}.",
    "I checked the {object} again and its {property} is {amount}.",
)
PHRASED_MEASUREMENT_TEMPLATES = (
    "The {object} {phrase}.",
    "{witness} found that the {object} {phrase}.",
    "As far as we know, the {object} {phrase}.",
    "Please write down that the {object} {phrase}.",
    "According to the label, the {object} {phrase}.",
    "It turned out that the {object} {phrase}.",
)
PROPERTY_PHRASES = {
    "length": ("is {amount} long",),
    "width": ("is {amount} wide",),
    "height": ("is {amount} high", "is {amount} tall"),
    "depth": ("is {amount} deep",),
    "thickness": ("is {amount} thick",),
    "weight": ("weighs {amount}",),
}
PROPERTY_UNITS = {"thickness": ("mm", "cm"), "weight": ("g", "kg")}
OTHER_UNITS = ("mm", "cm", "m")
UNIT_WORDS = {"mm": "millimetres", "cm": "centimetres", "m": "metres", "g": "grams", "kg": "kilograms"}
LARGE_UNITS = ("m", "kg")


def demo_records(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `count` chat records (system, user, assistant messages) of `split`, which is "train" or "eval".

    The same arguments give the same records everywhere, and a shorter list is the beginning of a longer one. No list
    holds a sentence twice, and no sentence is in both splits, whatever the seeds. The three kinds take turns.
    """
    if split not in SPLITS:
        raise UserError(f"The demo data has no split {split!r}: choose one of {', '.join(SPLITS)}.")
    if count < 0:
        raise UserError(f"Cannot make {count} demo records: choose a count of 0 or more.")
    rng = random.Random(seed)
    makers: tuple[Callable[[random.Random], tuple[str, dict[str, Any]]], ...] = (_order, _appointment, _measurement)
    seen: set[str] = set()
    records: list[dict[str, Any]] = []
    while len(records) < count:
        sentence, facts = makers[len(records) % len(makers)](rng)
        sentence = sentence[0].upper() + sentence[1:]
        if sentence in seen or _split_of(sentence) != split:
            continue
        seen.add(sentence)
        answer = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
        contents = (("system", SYSTEM_PROMPT), ("user", sentence), ("assistant", answer))
        records.append({"messages": [{"role": role, "content": content} for role, content in contents]})
    return records


def demo_answer_correct(answer: str, expected: str) -> bool:
    """Say whether `answer` is one JSON object with exactly the keys, values and types of `expected`, and nothing else.

    Key order and whitespace are free. 3 is neither "3" nor 3.0, and a key may not come twice.
    """
    try:
        given = _strict_json(answer.strip())
    except (ValueError, RecursionError):
        return False
    return _same(given, _strict_json(expected))


def _strict_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object_of_unique_keys, parse_constant=_refuse_constant)


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key comes twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _same(given: Any, expected: Any) -> bool:
    """Compare like `==`, but tell 1, 1.0 and true apart."""
    if type(given) is not type(expected):
        return False
    if isinstance(expected, dict):
        return given.keys() == expected.keys() and all(_same(given[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(given) == len(expected) and all(map(_same, given, expected))
    return bool(given == expected)


def _split_of(sentence: str) -> str:
    return "eval" if hashlib.sha256(sentence.encode()).digest()[0] < EVAL_BYTES else "train"


def _below(rng: random.Random, limit: int) -> int:
    # Python promises the same sequence in every version for random() alone, not for choice() and randrange().
    return int(rng.random() * limit)


def _pick(rng: random.Random, options: Sequence[Choice]) -> Choice:
    return options[_below(rng, len(options))]


def _full_name(rng: random.Random) -> str:
    return f"{_pick(rng, FIRST_NAMES)} {_pick(rng, LAST_NAMES)}"


def _order(rng: random.Random) -> tuple[str, dict[str, Any]]:
    customer = _full_name(rng)
    item = _pick(rng, ITEMS)
    if rng.random() < 0.4:
        item = f"{_pick(rng, COLOURS)} {item}"
    quantity, goods = _goods(rng, item)
    due, due_text = _due(rng)
    sentence = _pick(rng, ORDER_TEMPLATES).format(customer=customer, goods=goods, due=due_text)
    return sentence, {"kind": "order", "customer": customer, "item": item, "quantity": quantity, "due": due}


def _goods(rng: random.Random, item: str) -> tuple[int, str]:
    """Return a quantity and the words for that many of `item`."""
    style = rng.random()
    if style < 0.5:
        quantity = 2 + _below(rng, 59)
        return quantity, f"{quantity} {_plural(item)}"
    if style < 0.92:
        quantity = 1 + _below(rng, len(NUMBER_WORDS))
        return quantity, f"{NUMBER_WORDS[quantity - 1]} {item if quantity == 1 else _plural(item)}"
    if style < 0.96:
        return 12, f"a dozen {_plural(item)}"
    return 1, f"{'an' if item[0] in 'aeiou' else 'a'} {item}"


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def _due(rng: random.Random) -> tuple[str, str]:
    """Return a weekday or a day of a month, first as the answer wants it, then as the sentence says it."""
    if rng.random() < 0.6:
        weekday = _pick(rng, WEEKDAYS)
        return weekday, weekday
    day, month = 1 + _below(rng, 28), _pick(rng, MONTHS)
    date = f"{day} {month}"
    return date, _pick(rng, (date, f"{month} {day}"))


def _appointment(rng: random.Random) -> tuple[str, dict[str, Any]]:
    person, profession, day = _full_name(rng), _pick(rng, PROFESSIONS), _pick(rng, WEEKDAYS)
    time, time_text = _time(rng)
    sentence = _pick(rng, APPOINTMENT_TEMPLATES).format(person=person, profession=profession, day=day, time=time_text)
    return sentence, {"kind": "appointment", "person": person, "with": profession, "day": day, "time": time}


def _time(rng: random.Random) -> tuple[str, str]:
    """Return a time from 08:00 to 19:55, first as HH:MM, then as the sentence says it."""
    hour, minute = 8 + _below(rng, 12), 5 * _below(rng, 12)
    time = f"{hour:02}:{minute:02}"
    if rng.random() < 0.8:
        return time, time
    minute_text = f":{minute:02}" if minute else ""
    return time, f"{(hour - 1) % 12 + 1}{minute_text} {'am' if hour < 12 else 'pm'}"


def _measurement(rng: random.Random) -> tuple[str, dict[str, Any]]:
    thing = f"{_pick(rng, MATERIALS)} {_pick(rng, OBJECTS)}"
    measured = _pick(rng, tuple(PROPERTY_PHRASES))
    unit = _pick(rng, PROPERTY_UNITS.get(measured, OTHER_UNITS))
    limit = 20 if unit in LARGE_UNITS else 200
    value: int | float = 2 + _below(rng, limit - 2)
    if rng.random() < 0.4:
        value = float(f"{1 + _below(rng, limit // 2)}.{1 + _below(rng, 9)}")
    amount = f"{value} {_pick(rng, (unit, UNIT_WORDS[unit]))}"
    phrase = _pick(rng, PROPERTY_PHRASES[measured]).format(amount=amount)
    templates = PHRASED_MEASUREMENT_TEMPLATES if rng.random() < 1 / 3 else MEASUREMENT_TEMPLATES
    sentence = _pick(rng, templates).format(
        object=thing, property=measured, amount=amount, phrase=phrase, witness=_pick(rng, FIRST_NAMES)
    )
    facts = {"kind": "measurement", "object": thing, "property": measured, "value": value, "unit": unit}
    return sentence, facts
