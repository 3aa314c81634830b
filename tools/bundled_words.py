"""Words for the bundled model's training conversations, and the split into training and held-out ones."""

from __future__ import annotations

import re
import zlib
from pydoc_data.topics import topics

NAMES = (
    "Mia Tom Lena Omar Ruth Ivan Sara Kofi Nina Paul Yuki Rosa Finn Aisha Jonas Clara Hugo Mei Leo Greta Amir Elsa "
    "Noah Zoe Karl Lucia Ben Priya Otto Hana Sam Vera Luis Ada Erik Maya Felix Ines Theo Iris Max Olga Raj Eva Dan "
    "Lily Marco Anna Peter Julia Ali Emma Nils Sofia Adam Kira Jack Wanda Ravi Tess"
).split()
CITIES = (
    "Paris Lima Oslo Cairo Rome Delhi Tokyo Berlin Madrid Vienna Dublin Athens Prague Lisbon Warsaw Quito Accra "
    "Hanoi Seoul Bogota Nairobi Zurich Boston Denver Dallas Geneva Milan Turin Porto Ghent Bergen Malmo Kyoto Osaka "
    "Tunis Dakar Perth Hobart Halifax Austin Leeds Bristol Cardiff Lyon Nantes Bern Graz Split Riga Tallinn"
).split()
ANIMALS = (
    "dog cat horse rabbit bird fox bear duck mouse owl goat frog sheep turtle hen pony squirrel swan".split()
)
PLACES = (
    "the garden|the park|the old house|the river|the sea|the market|the forest|the school|the hill|the kitchen|"
    "the library|the farm|the bridge|the lake|the village|the train station"
).split("|")
THINGS = (
    "a red ball|a small box|a warm coat|an old book|a blue kite|a silver key|a bag of apples|a wooden boat|"
    "a yellow hat|a round stone|a little bell|a piece of bread|a lamp|a map|a letter|a green scarf"
).split("|")
COLORS = "red blue green yellow white black brown grey orange purple pink silver".split()
FOODS = "bread soup rice apples cheese cake pasta salad eggs honey pears beans".split()
WEATHER = "sunny rainy cloudy windy snowy foggy warm cold".split()
TITLES = (
    "morning song|blue river|the long road|summer rain|quiet night|open door|golden field|last train".split(
        "|"
    )
)


SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvz" for vowel in "aeiou"]
ONSETS = "b bl br c ch cr d dr f fl fr g gl gr h j k kr l m n p ph pl pr qu r s sh sl sp st t th tr v w y z".split()
VOWELS = "a a e e i i o o u ai au ea ee ia ie oo ou ue".split()
CODAS = ["", "", "", *"b ck d f ft g l ld ll m n nd ng nt p r rd rg rn rt s sk ss st t th tt x".split()]
TOPIC_WORDS = sorted({word for text in topics.values() for word in re.findall(r"\b[A-Za-z]{3,9}\b", text)})


def held_out(*parts: object) -> bool:
    """Whether this combination is held out for evaluation: one in twelve, by hash."""
    return zlib.crc32("|".join(map(str, parts)).encode()) % 12 == 0
