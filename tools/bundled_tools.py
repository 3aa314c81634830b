"""Tools for the bundled model's training: a dozen families with many names each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bundled_words import ANIMALS, CITIES, COLORS, FOODS, NAMES, TITLES, WEATHER, held_out

if TYPE_CHECKING:
    from bundled_data import Maker


@dataclass(frozen=True)
class Family:
    """Tools with the same purpose and varying names. `slots` are (argument names, value generator, JSON type)."""

    verbs: tuple[str, ...]
    nouns: tuple[str, ...]
    description: tuple[str, ...]
    slots: tuple[tuple[tuple[str, ...], Callable[[Maker], Any], str], ...]
    questions: tuple[str, ...]


class Tool:
    """A tool of a family, with random names for one conversation."""

    def __init__(self, family: Family, maker: Maker) -> None:
        rng = maker.rng
        while True:
            self.name = f"{rng.choice(family.verbs)}_{rng.choice(family.nouns)}"
            self.keys = [rng.choice(names) for names, _, _ in family.slots]
            if maker.wild:
                self.rename(maker)
            if held_out(self.name, *self.keys) == maker.measuring:
                break
        self.family = family
        properties = {key: {"type": kind} for key, (_, _, kind) in zip(self.keys, family.slots, strict=True)}
        self.schema = {
            "type": "function",
            "function": {
                "name": self.name,
                "description": rng.choice(family.description),
                "parameters": {"type": "object", "properties": properties, "required": self.keys},
            },
        }

    def rename(self, maker: Maker) -> None:
        """Gives half of the verbs and a third of the arguments random names, so that the model learns to copy names."""
        rng = maker.rng
        if rng.random() < 0.5:
            self.name = f"{maker.any_word()}_{self.name.rpartition('_')[2]}"
        keys = [maker.any_word() if rng.random() < 0.3 else key for key in self.keys]
        if len(set(keys)) == len(keys):
            self.keys = keys

    def fill(self, maker: Maker) -> tuple[dict[str, Any], str]:
        """Random arguments, and a question that states them."""
        values = [make(maker) for _, make, _ in self.family.slots]
        question = maker.rng.choice(self.family.questions).format(*values)
        return dict(zip(self.keys, values, strict=True)), question


def _name(maker: Maker) -> str:
    return maker.pick(NAMES)


def _city(maker: Maker) -> str:
    return maker.pick(CITIES)


def _number(maker: Maker) -> int:
    return maker.rng.randint(1, 99)


def _word(words: list[str]) -> Callable[[Maker], str]:
    return lambda maker: maker.pick(words)


_GET = ("get", "find", "look_up", "fetch", "read", "check", "query", "ask")
_DO = ("set", "make", "create", "add", "start", "new", "put", "do")
_PLACE = ("city", "place", "location", "town", "where")
_WHO = ("name", "person", "who", "contact", "to")
_MUCH = ("count", "number", "amount", "n", "quantity")
FAMILIES = (
    Family(_GET, ("weather", "forecast", "temperature", "sky"), ("Weather of a city", "How the weather is"),
           ((_PLACE, _city, "string"),), ("What is the weather in {0}?", "How is the weather in {0}?", "Is it warm in {0}?")),
    Family(_GET, ("time", "clock", "hour"), ("Time in a city", "What time it is"),
           ((_PLACE, _city, "string"),), ("What time is it in {0}?", "Tell me the time in {0}.")),
    Family(_DO, ("timer", "alarm", "countdown"), ("Sets a timer", "Rings after some minutes"),
           ((("minutes", "time", "mins", "duration"), _number, "integer"),), ("Set a timer for {0} minutes.", "Wake me in {0} minutes.")),
    Family(("send", "write", "post", "mail"), ("message", "note", "text", "mail"), ("Sends a message", "Writes to somebody"),
           ((_WHO, _name, "string"), (("text", "body", "content", "message"), _word(TITLES), "string")),
           ("Send {0} the message {1}.", "Write to {0}: {1}.")),
    Family(("call", "phone", "ring", "dial"), ("person", "contact", "number", "friend"), ("Calls somebody", "Makes a phone call"),
           ((_WHO, _name, "string"),), ("Call {0}.", "Please phone {0}.")),
    Family(("order", "buy", "get", "shop"), ("food", "groceries", "item", "goods"), ("Buys food", "Orders from the shop"),
           ((("item", "food", "product", "what"), _word(FOODS), "string"), (_MUCH, _number, "integer")),
           ("Buy {1} {0}.", "Order {1} {0} for me.")),
    Family(("book", "find", "plan", "reserve"), ("train", "trip", "ticket", "journey"), ("Books a train", "Plans a trip"),
           ((("from", "start", "origin"), _city, "string"), (("to", "end", "destination"), _city, "string")),
           ("Book a train from {0} to {1}.", "I want to go from {0} to {1}.")),
    Family(("play", "start", "stream"), ("song", "music", "track"), ("Plays a song", "Starts music"),
           ((("title", "song", "track", "what"), _word(TITLES), "string"),), ("Play {0}.", "Put on the song {0}.")),
    Family(_DO, ("light", "lamp", "color"), ("Sets the color of a lamp", "Changes a light"),
           ((("color", "shade", "value"), _word(COLORS), "string"), (("level", "percent", "brightness"), _number, "integer")),
           ("Make the light {0} at {1} percent.", "Set the lamp to {0}, {1} percent.")),
    Family(_DO, ("meeting", "event", "date"), ("Puts a meeting into the calendar", "Plans a meeting"),
           ((_WHO, _name, "string"), (_PLACE, _city, "string"), (("hour", "time", "when"), _number, "integer")),
           ("Plan a meeting with {0} in {1} at {2}.", "Meet {0} in {1} at {2}.")),
    Family(_GET, ("animal", "pet", "species"), ("Facts about an animal", "Tells about animals"),
           ((("animal", "kind", "species", "what"), _word(ANIMALS), "string"),), ("Look up the {0}.", "Give me facts about the {0}.")),
    Family(_GET, ("price", "cost", "value"), ("Price of a food", "What something costs"),
           ((("item", "food", "product", "what"), _word(FOODS), "string"),), ("What is the price of {0}?", "How much do I pay for {0}?")),
)  # fmt: skip


def _done(maker: Maker) -> tuple[str, str]:
    return '{"status": "ok"}', "Done."


def _weather(maker: Maker) -> tuple[str, str]:
    sky, degrees = maker.pick(WEATHER), maker.rng.randint(-9, 39)
    return json.dumps({"weather": sky, "degrees": degrees}), f"It is {sky} with {degrees} degrees."


def _price(maker: Maker) -> tuple[str, str]:
    price = maker.rng.randint(1, 99)
    return json.dumps({"price": price}), f"It costs {price}."


def _clock(maker: Maker) -> tuple[str, str]:
    hour = f"{maker.rng.randint(0, 23)}:{maker.rng.randint(10, 59)}"
    return json.dumps({"time": hour}), f"It is {hour}."


RESULTS = {"weather": _weather, "forecast": _weather, "temperature": _weather, "sky": _weather}
RESULTS |= {"time": _clock, "clock": _clock, "hour": _clock, "price": _price, "cost": _price, "value": _price}


def tool_result(maker: Maker, name: str) -> tuple[str, str]:
    """A possible result of the tool `name`, and the answer that reports it."""
    if maker.rng.random() < 0.15:
        return '{"error": "not found"}', "The tool found nothing."
    return RESULTS.get(name.partition("_")[2], _done)(maker)
