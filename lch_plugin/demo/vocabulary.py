"""The words the demo texts are made of.

Every word here, alone or in a plural made by :func:`plural`, is one token of the demo tokenizer.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


WOMEN = _words(
    "Mary Anna Alice Emma Julia Laura Sarah Emily Rachel Susan Helen Nora "
    "Clara Lucy Grace Ruth Jane Martha Diana Rose Olivia Irene Ella Eva"
)
MEN = _words(
    "John Tom Peter Paul David James Simon Henry George Mark Daniel Robert "
    "Frank Oscar Edward Philip Jack Samuel Victor Arthur Adam Ivan Eric Oliver"
)
NAMES = WOMEN + MEN

FRUIT = _words(
    "apple orange apricot avocado olive almond pear plum peach cherry lemon fig walnut mango"
)
ANIMALS = _words(
    "owl elephant eagle otter octopus iguana ostrich ox alligator antelope emu eel "
    "fox bear wolf lion tiger rabbit mouse monkey snake unicorn goat deer"
)
GOODS = _words(
    "umbrella envelope axe anchor arrow apron accordion album eraser onion egg hourglass heirloom "
    "kite drum lamp hat ring knife ball flute mirror uniform ukulele unicycle carpet basket"
)

OBJECTS = _words(
    "bottle book letter coin ticket map pencil cake flower candle gift scarf drink toy "
    "apple orange umbrella egg envelope"
)
PLACES = _words(
    "store park school market garden station library office beach museum kitchen bakery church "
    "harbour theatre farm hospital airport inn orchard"
)
FEELINGS = _words("tired hungry happy sad angry cold thirsty worried proud lonely bored excited")
ADJECTIVES = _words(
    "small big red green yellow white grey round soft strange lovely "
    "old empty ugly orange enormous expensive useful honest"
)

THINGS = _words(
    "key book box cup lamp picture chair bottle basket candle clock coat hat plate bell rope"
)
BEINGS = _words(
    "dog cat boy girl teacher farmer child sailor horse bird king doctor friend soldier nurse man"
)
LANDMARKS = _words(
    "cabinet door table tree house window boat wall fence gate tower bed bridge car wagon "
    "statue fountain stove shelf"
)
ENTRANCES = _words("key door path gate ticket road")
BUILDINGS = _words("cabinet house garden tower shed cellar castle cottage cave attic")
THING_STATES = _words("new broken clean dusty heavy old small red cheap wet ready")
BEING_STATES = _words("hungry tired happy quiet cold young lost asleep late busy ready")

EVENTS = _words(
    "war siege famine drought strike reign truce treaty voyage expedition exhibition project "
    "alliance plague revolt quarrel festival empire feud trial"
)

#: Invented words. Any two of them may follow each other, so only the context tells which one comes
#: next.
INVENTED = [
    onset + ending
    for onset in _words("Zel Mor Tol Ven Kas Dru Bel Har Quin Sor Lum Fen")
    for ending in _words("kin vash bry dar mox tine gul wick pona")
]

_SILENT_H = ("hour", "heir", "honest")
_SOUNDS_LIKE_YOU = ("uni", "uku", "use")
_IRREGULAR_PLURALS = {
    "mouse": "mice",
    "child": "children",
    "man": "men",
    "knife": "knives",
    "shelf": "shelves",
    "ox": "oxen",
    "deer": "deer",
}


def article(phrase: str) -> str:
    """The indefinite article of ``phrase``: "an" before a vowel *sound*, "a" otherwise."""
    if phrase.startswith(_SOUNDS_LIKE_YOU):
        return "a"
    return "an" if phrase[0] in "aeiou" or phrase.startswith(_SILENT_H) else "a"


def with_article(phrase: str) -> str:
    """``phrase`` after its indefinite article, as in "an apple"."""
    return f"{article(phrase)} {phrase}"


def plural(noun: str) -> str:
    """The plural of ``noun``."""
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def subject_pronoun(name: str) -> str:
    """The pronoun that stands for ``name`` as a subject: "she" or "he"."""
    return "she" if name in WOMEN else "he"
