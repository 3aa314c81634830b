"""Generates the bundled model's training conversations from a seed.

Each `Example` is a conversation with its next answer, in Qwen3's chat format. Names, cities, pairs of numbers and tool
signatures are held out of training by hash (`held_out`), so that evaluation uses unseen ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bundled_tools import FAMILIES, Tool, tool_result
from bundled_words import (
    ANIMALS,
    CITIES,
    CODAS,
    COLORS,
    FOODS,
    NAMES,
    ONSETS,
    PLACES,
    SYLLABLES,
    THINGS,
    TOPIC_WORDS,
    VOWELS,
    held_out,
)

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A conversation. `answer` is the text after the template's generation prompt, without `<|im_end|>`."""

    kind: str
    messages: list[Message]
    answer: str
    thinking: bool
    tools: list[dict[str, Any]] | None = None
    expected: Any = None  # expected value in evaluation: a number, a call, an object


class Maker:
    """Generates examples from a seed: training ones, or held-out ones if `measuring`.

    `invented` is the share of invented names and cities. With `wild` these have arbitrary spellings, and tools have
    arbitrary names.
    """

    def __init__(self, seed: int, measuring: bool = False, invented: float = 0.0, wild: bool = False) -> None:
        self.rng = random.Random(seed)
        self.measuring = measuring
        self.invented = invented
        self.wild = wild

    def example(self, with_tools: bool) -> Example:
        """A random example: with tools (long), or without (short)."""
        kinds: dict[Callable[[], Example], float]
        if with_tools:
            kinds = {self.tool_call: 0.66, self.tool_answer: 0.17, self.tool_unfit: 0.17}
        else:
            kinds = {
                self.sum: 0.78,
                self.json_object: 0.07,
                self.talk: 0.07,
                self.story: 0.05,
                self.about_itself: 0.03,
            }
        return self.rng.choices(list(kinds), list(kinds.values()))[0]()

    def pick(self, words: list[str]) -> str:
        """A random word. Names and cities respect the split; other lists are too short to be split."""
        if self.invented and words in (NAMES, CITIES) and self.rng.random() < self.invented:
            return self.invent().capitalize()
        while True:
            word = self.rng.choice(words)
            if words not in (NAMES, CITIES) or held_out(word) == self.measuring:
                return word

    def invent(self) -> str:
        """An invented word, which takes several tokens."""
        if not self.wild:
            return "".join(self.rng.choice(SYLLABLES) for _ in range(self.rng.randint(2, 3)))
        parts = (ONSETS, VOWELS, CODAS) * self.rng.randint(1, 3)
        return "".join(map(self.rng.choice, parts))

    def any_word(self) -> str:
        """A random word from the conversations, from Python's documentation, or invented."""
        kind = self.rng.random()
        if kind < 0.3:
            return self.pick(self.rng.choice((NAMES, CITIES, FOODS)))
        if kind < 0.8:
            while True:
                word = self.rng.choice(TOPIC_WORDS)
                if not held_out(word):
                    return word
        word = self.invent()
        return word.capitalize() if self.coin() else word

    def answer(self, thought: str, text: str, thinking: bool) -> str:
        return f"<think>\n{thought}\n</think>\n\n{text}" if thinking else text

    def coin(self) -> bool:
        return self.rng.random() < 0.5

    def sum(self, digits: int | None = None, thinking: bool | None = None, op: str | None = None) -> Example:
        """An addition or subtraction. Its thoughts use the column method, starting with the ones."""
        digits = digits or self.rng.choices((1, 2, 3), (0.1, 0.68, 0.22))[0]
        thinking = self.rng.random() < 0.2 if thinking is None else thinking
        op = op or self.rng.choice("+-")
        a, b, result = self.operands(digits, op)
        words = {"+": (f"Add {a} and {b}.", "plus"), "-": (f"Take {b} from {a}.", "minus")}[op]
        question = self.rng.choice(
            (f"What is {a} {op} {b}?", f"{a} {op} {b}", f"How much is {a} {op} {b}?", f"{a} {op} {b} = ?")
            + (words[0], f"What is {a} {words[1]} {b}?")
        )
        text = f"{a} {op} {b} = {result}"
        answer = self.answer(steps(a, b, op), text, thinking)
        return Example("sum", [user(question)], answer, thinking, expected=result)

    def operands(self, digits: int, op: str) -> tuple[int, int, int]:
        """Two operands that respect the split, and the result. The first has `digits` digits, unless both are swapped to
        avoid a negative result."""
        while True:
            low = 0 if digits == 1 else 10 ** (digits - 1)
            a, b = self.rng.randint(low, 10**digits - 1), self.rng.randint(0, 10**digits - 1)
            if op == "-" and b > a:
                a, b = b, a
            if digits == 1 or held_out(a, op, b) == self.measuring:
                return a, b, a + b if op == "+" else a - b

    def tool_call(self, thinking: bool | None = None, offered: tuple[int, ...] = ()) -> Example:
        """A request that one of the offered tools fits; the answer calls it. `offered`: allowed numbers of tools."""
        tools, wanted = self._offer()
        while offered and len(tools) not in offered:
            tools, wanted = self._offer()
        thinking = self.rng.random() < 0.3 if thinking is None else thinking
        arguments, question = wanted.fill(self)
        call = {"name": wanted.name, "arguments": arguments}
        text = "<tool_call>\n" + json.dumps(call, ensure_ascii=False) + "\n</tool_call>"
        answer = self.answer(f"The tool {wanted.name} fits. I will call it.", text, thinking)
        return Example("tool_call", [user(question)], answer, thinking, tools, expected=call)

    def tool_answer(self) -> Example:
        """A conversation with a tool result, which the answer reports."""
        call = self.tool_call(thinking=False)
        wanted = call.expected
        result, text = tool_result(self, wanted["name"])
        messages = [
            *call.messages,
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": wanted}]},
            {"role": "tool", "content": result},
        ]
        thinking = self.coin()
        return Example(
            "tool_answer",
            messages,
            self.answer("The tool has answered.", text, thinking),
            thinking,
            call.tools,
        )

    def tool_unfit(self) -> Example:
        """A request that no offered tool fits; the answer has no call."""
        tools, _ = self._offer()
        other = self.rng.choice((self.talk, self.about_itself, self.sum, self.sum))()
        return Example(
            "tool_unfit", other.messages, other.answer, other.thinking, tools, expected=other.expected
        )

    def story(self) -> Example:
        name, animal, place = self.pick(NAMES), self.pick(ANIMALS), self.pick(PLACES)
        thing, color = self.pick(THINGS), self.pick(COLORS)
        about, topic = self.rng.choice(
            (
                (f"a {animal}", animal),
                (name, name),
                (place, place),
                (f"{name} and a {animal}", name),
                (thing, thing),
            )
        )
        question = self.rng.choice(
            (
                f"Tell me a story about {about}.",
                f"Tell me a short story about {about}.",
                f"A story about {about}, please.",
            )
        )
        first = self.rng.choice(("One day", "One morning", "Last summer", "On a quiet evening"))
        text = (
            f"{first}, {name} went to {place} with {thing}. There {name} met a {color} {animal}. "
            + self.rng.choice(
                (
                    f"The {animal} was hungry, so {name} gave it some {self.pick(FOODS)}. ",
                    f"The {animal} was lost, so {name} showed it the way home. ",
                    f"The {animal} wanted to play, so they played until the sun went down. ",
                )
            )
            + self.rng.choice(
                (
                    "From that day on they were friends.",
                    f"{name} went home and slept well.",
                    "It was a good day.",
                )
            )
        )
        thinking = self.rng.random() < 0.3
        return Example(
            "story", [user(question)], self.answer(f"A short story about {topic}.", text, thinking), thinking
        )

    def talk(self) -> Example:
        """Small talk, sometimes with an earlier turn that the answer refers to."""
        name, city, food, color = self.pick(NAMES), self.pick(CITIES), self.pick(FOODS), self.pick(COLORS)
        animal = self.pick(ANIMALS)
        lines: list[tuple[str, str]] = [
            (
                self.rng.choice(("Hello!", "Hi", "Hello", "Hi there!", "Good morning!")),
                "Hello! How can I help you?",
            ),
            (f"Hi, I am {name}.", f"Hello {name}! How can I help you?"),
            (f"My name is {name}. Who are you?", f"Hello {name}! I am a small Qwen3 model."),
            ("How are you?", "I am well, thank you. How are you?"),
            ("Thank you!", "You are welcome!"),
            ("Goodbye!", "Goodbye! Have a good day."),
            (f"I live in {city}.", f"{city} is a nice place. What do you like about it?"),
            (f"I like {food}.", f"I hear that {food} can be very good. Do you eat it often?"),
            (f"I have a {color} {animal}.", f"A {color} {animal}! What is its name?"),
            (f"Say hello to {name}.", f"Hello {name}!"),
            (f"What should I cook with {food}?", f"You could make a simple dish with {food} and some salt."),
        ]
        question, text = self.rng.choice(lines)
        messages = [user(question)]
        if self.rng.random() < 0.35:
            other = self.pick(NAMES)
            asked, told = self.rng.choice(
                (
                    ("What is my name?", f"Your name is {other}."),
                    ("Do you remember my name?", f"Yes, your name is {other}."),
                )
            )
            messages = [user(f"Hi, I am {other}."), said(f"Hello {other}! How can I help you?"), user(asked)]
            text = told
        thinking = self.rng.random() < 0.3
        return Example(
            "talk", messages, self.answer("This is small talk. I will be kind.", text, thinking), thinking
        )

    def about_itself(self) -> Example:
        lines = {
            ("Who are you?", "What are you?", "Tell me about yourself."): (
                "I am a small Qwen3 model that ships with qwen3_dist. I can chat, add numbers and call tools."
            ),
            ("What can you do?", "How can you help me?"): (
                "I can tell short stories, add and subtract numbers, call tools and write small JSON objects."
            ),
            ("What can you not do?", "What are your limits?"): (
                "I am very small. I know little about the world and I am often wrong."
            ),
            ("Who made you?", "Where do you come from?"): (
                "I was trained on two CPU cores by the makers of qwen3_dist, on text that a script wrote."
            ),
        }
        questions, text = self.rng.choice(list(lines.items()))
        thinking = self.rng.random() < 0.3
        answer = self.answer("The user asks about me.", text, thinking)
        return Example("about_itself", [user(self.rng.choice(questions))], answer, thinking)

    def json_object(self) -> Example:
        """A request for a JSON object with given fields."""
        number = self.rng.randint(1, 99)
        fields: list[tuple[str, Any]] = [
            ("name", self.pick(NAMES)),
            ("city", self.pick(CITIES)),
            ("age", number),
            ("color", self.pick(COLORS)),
            ("food", self.pick(FOODS)),
            ("animal", self.pick(ANIMALS)),
            ("count", self.rng.randint(1, 500)),
        ]
        chosen = self.rng.sample(fields, self.rng.randint(1, 3))
        listed = [f"{key} {value}" for key, value in chosen]
        question = (
            self.rng.choice(("Write", "Give me", "Make"))
            + " a JSON object with "
            + " and ".join(listed)
            + "."
        )
        value = dict(chosen)
        thinking = self.rng.random() < 0.3
        answer = self.answer("I will write the object.", json.dumps(value), thinking)
        return Example("json", [user(question)], answer, thinking, expected=value)

    def _offer(self) -> tuple[list[dict[str, Any]], Tool]:
        """One to three tools of different families, and the one that fits the request."""
        families = self.rng.sample(FAMILIES, self.rng.choices((1, 2, 3), (0.3, 0.45, 0.25))[0])
        tools = [Tool(family, self) for family in families]
        return [tool.schema for tool in tools], self.rng.choice(tools)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def said(content: str) -> Message:
    return {"role": "assistant", "content": content}


def steps(a: int, b: int, op: str) -> str:
    """The thoughts of a sum: column method, one line per digit from the ones; the last line is the result."""
    lines, digits, carry = [f"{a} {op} {b}"], "", 0
    xs, ys = str(a)[::-1], str(b)[::-1]
    for place in range(len(xs) if op == "-" else max(len(xs), len(ys))):
        x, y = int(xs[place : place + 1] or 0), int(ys[place : place + 1] or 0)
        total = x + y + carry if op == "+" else x - y - carry
        carried = abs(total // 10)
        word = "carry" if op == "+" else "borrow"
        lines.append(f"{x} {op} {y} {op} {carry} = {total}: write {total % 10} {word} {carried}")
        digits, carry = f"{total % 10}{digits}", carried
    if op == "+" and carry:
        digits = f"{carry}{digits}"
        lines.append(f"write {carry}")
    lines.append(f"{digits} is {int(digits)}")
    return "\n".join(lines)
