"""What scenes can hold and what is said of them: objects, backgrounds, layouts, captions; and what is held out.

236 objects: animals, plants, food, vehicles and things of the house that have an everyday name, look unlike each other
at 50 pixels, and carry no writing. Some are never seen in training: 40 objects, a tenth of all pairs, a tenth of all
combinations of object and background, and of object and place in a pair. `scene_held_out.json` names them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

HELD_OUT_FILE = Path(__file__).parent / "scene_held_out.json"
HELD_OUT_OBJECTS = 40
HELD_OUT_SHARE = 0.1

# emojibase's label, the usual name if it is another, other names.
OBJECTS = """
monkey face: monkey | gorilla | dog face: dog, puppy | poodle | wolf | fox | raccoon | cat face: cat, kitten | lion |
tiger face: tiger | moose | horse | unicorn | zebra | deer | cow face: cow | pig face: pig | goat | camel | giraffe |
elephant | rhinoceros: rhino, rhinoceros | mouse face: mouse | hamster | rabbit face: rabbit, bunny |
chipmunk: squirrel, chipmunk | hedgehog | bat | bear | polar bear | koala | panda | sloth | skunk | kangaroo |
turkey | rooster | baby chick: chick | bird: red bird | penguin | dove | eagle | duck | swan | owl | flamingo |
peacock | parrot | frog | crocodile: crocodile, alligator | turtle | lizard | snake | dragon | T-Rex: dinosaur |
spouting whale: whale | dolphin | seal | fish | tropical fish | blowfish: pufferfish | shark | octopus |
spiral shell: seashell, shell | jellyfish | crab | lobster | squid | snail | butterfly | bug: caterpillar | ant |
honeybee: bee | lady beetle: ladybug, ladybird | spider | scorpion | rose: rose, red rose | sunflower |
tulip: tulip, pink tulip | cherry blossom | evergreen tree: pine tree, fir tree | deciduous tree: tree | palm tree |
cactus | four leaf clover: clover, four leaf clover | maple leaf | mushroom | potted plant: plant, potted plant |
grapes: bunch of grapes | watermelon: slice of watermelon, watermelon | tangerine | lemon | banana | pineapple |
mango | red apple: red apple, apple | green apple | pear | peach | cherries: pair of cherries | strawberry |
kiwi fruit: kiwi | tomato | coconut | avocado | eggplant: eggplant, aubergine | carrot |
ear of corn: corn cob, ear of corn | hot pepper: chili pepper | broccoli | onion | potato | bread: loaf of bread |
croissant | pretzel | cheese wedge: piece of cheese | hamburger: hamburger, burger | french fries: box of fries |
pizza: slice of pizza, pizza | hot dog | sandwich | taco | egg | popcorn: box of popcorn |
soft ice cream: ice cream cone, ice cream | doughnut: donut, doughnut | cookie | birthday cake: birthday cake, cake |
shortcake: slice of cake | cupcake | candy | lollipop | honey pot: pot of honey | glass of milk |
hot beverage: cup of coffee, coffee cup | teapot | wine glass: glass of wine | beer mug: mug of beer |
locomotive: steam train, train | bus | ambulance | fire engine: fire truck | police car | taxi: taxi, yellow taxi |
automobile: car, red car | tractor | racing car: race car | motorcycle: motorcycle, motorbike |
bicycle: bicycle, bike | skateboard | anchor | sailboat: sailboat, sailing boat | ship | airplane: airplane, plane |
helicopter | rocket | flying saucer: ufo | sun | crescent moon: moon | ringed planet: planet |
star: star, yellow star | cloud | rainbow | umbrella | snowflake | snowman without snow: snowman | fire: flame, fire |
droplet: drop of water | high voltage: lightning bolt | soccer ball | baseball | basketball |
american football: football | boxing glove | kite | game die: die | puzzle piece | teddy bear | magic wand |
bullseye: target | saxophone | trumpet | accordion | guitar | violin | drum | ghost | alien | robot |
grinning face: smiley, happy face | jack-o-lantern: pumpkin | christmas tree | balloon: balloon, red balloon |
wrapped gift: gift, present | trophy | red heart: red heart, heart | blue heart | green heart | crown | top hat |
sunglasses: pair of sunglasses | t-shirt | jeans: pair of jeans | dress | backpack | running shoe: sneaker | ring |
gem stone: diamond | house | castle | tent | volcano | candle | light bulb | camera | television: television, tv |
laptop | telephone | headphone: pair of headphones | closed book: book, red book | pencil |
scissors: pair of scissors | key | hammer | axe | magnet | ladder | bomb | bell | chair | bed | bathtub | bucket |
envelope | package: box, cardboard box | balance scale: scale
"""

# Never held out: the README shows them, or people ask for them first.
SHOWN = set(
    " ".join(
        """
        dog, cat, fox, lion, panda, penguin, owl, frog, turtle, dinosaur, whale, fish, octopus, butterfly, bee,
        rose, tulip, sunflower, tree, cactus, mushroom, red apple, banana, strawberry, lemon, carrot, hamburger,
        slice of pizza, donut, birthday cake, ice cream cone, cup of coffee, steam train, car, bicycle,
        sailboat, airplane, rocket, sun, moon, star, cloud, rainbow, umbrella, snowman, soccer ball, balloon,
        gift, red heart, guitar, crown, house, castle, teddy bear, robot, ghost, pumpkin, smiley, tiger, rabbit,
        elephant, unicorn, duck, bus, cupcake, monkey, bear, horse, pig, cow, mouse, red bird, key, book,
        light bulb, camera, chair, diamond, flame
        """.split()
    ).split(", ")
)

COLOURS = {
    "white": (250, 250, 250),
    "grey": (150, 152, 156),
    "black": (28, 28, 32),
    "red": (216, 58, 58),
    "orange": (246, 150, 52),
    "yellow": (250, 218, 84),
    "green": (74, 168, 84),
    "turquoise": (72, 198, 196),
    "blue": (58, 108, 214),
    "purple": (132, 80, 190),
    "pink": (248, 152, 190),
    "brown": (130, 88, 56),
}

# What is said of a place, first the usual words.
PLACES = {
    "grass": ("on grass", "on the grass", "on a green meadow", "in a meadow"),
    "beach": ("on the beach", "at the beach", "on a beach by the sea"),
    "snow": ("in the snow", "in snow", "on a snowy day"),
    "night": ("at night", "under the stars", "under a starry sky"),
    "water": ("under water", "underwater", "deep under water"),
    "sunset": ("at sunset", "in front of a sunset", "in the evening sun"),
    "table": ("on a table", "on a wooden table", "on the table"),
    "rain": ("in the rain", "on a rainy day", "in rain"),
}

BACKGROUNDS = (*COLOURS, *PLACES)
SIZES = {"small": ("small", "little", "tiny"), "normal": ("",), "big": ("big", "large", "huge")}
LAYOUTS = ("one", "beside", "above", "two", "three")
ROLES = ("left", "right", "top", "bottom")
KINDS = ("train", "pair", "background", "role", "object")
"""What a scene may be drawn from: the training stream, or what was held out of it, of one kind."""


@dataclass(frozen=True)
class Object:
    """One thing: its usual name, which is its identity, other names, and emojibase's label."""

    name: str
    others: tuple[str, ...]
    label: str


@cache
def objects() -> dict[str, Object]:
    """All objects by name, in the table's order."""
    found = {}
    for entry in " ".join(OBJECTS.split()).split(" | "):
        label, _, names = entry.partition(": ")
        name, *others = names.split(", ") if names else [label]
        found[name] = Object(name, tuple(others), label)
    return found


def stable(*words: str) -> float:
    """A number in 0..1 that depends on the words alone."""
    return int.from_bytes(hashlib.sha256("/".join(words).encode()).digest()[:6], "big") / 2**48


def choose_held_out() -> dict:
    """What training never shows, by hashing of the names; the content of `scene_held_out.json`."""
    eligible = sorted((stable("object", name), name) for name in objects() if name not in SHOWN)
    missing = {name for _, name in eligible[:HELD_OUT_OBJECTS]}
    trained = [name for name in objects() if name not in missing]
    pairs: dict[str, list[str]] = {}
    for a, b in itertools.combinations(sorted(trained), 2):
        if stable("pair", a, b) < HELD_OUT_SHARE:
            pairs.setdefault(a, []).append(b)
    return {
        "objects": sorted(missing),
        "backgrounds": {b: [n for n in trained if stable("background", n, b) < HELD_OUT_SHARE] for b in BACKGROUNDS},
        "roles": {role: [n for n in trained if stable("role", n, role) < HELD_OUT_SHARE] for role in ROLES},
        "pairs": pairs,
    }


@dataclass(frozen=True)
class HeldOut:
    """What `scene_held_out.json` says, as sets."""

    objects: frozenset[str]
    backgrounds: frozenset[tuple[str, str]]
    roles: frozenset[tuple[str, str]]
    pairs: frozenset[tuple[str, str]]

    @classmethod
    def read(cls, path: Path = HELD_OUT_FILE) -> HeldOut:
        stored = json.loads(path.read_text())
        return cls(
            frozenset(stored["objects"]),
            frozenset((name, b) for b, names in stored["backgrounds"].items() for name in names),
            frozenset((name, role) for role, names in stored["roles"].items() for name in names),
            frozenset((a, b) for a, others in stored["pairs"].items() for b in others),
        )

    def kinds(self, scene: Scene) -> set[str]:
        """Of which kinds a scene is held out; none for a training scene."""
        roles = zip(scene.objects, scene.roles, strict=False)
        reasons = {
            "object": any(name in self.objects for name in scene.objects),
            "background": any((name, b) in self.backgrounds for name in scene.objects for b in scene.backgrounds),
            "role": any(role in self.roles for role in roles),
            "pair": tuple(sorted(scene.objects)) in self.pairs,
        }
        return {kind for kind, holds in reasons.items() if holds}


@dataclass(frozen=True)
class Scene:
    """What is to be seen. `objects` is one name, or two: left and right, or top and bottom.

    `background` is a colour, two colours `top>bottom`, a place, or "" for a pale one that no caption mentions.
    """

    layout: str
    objects: tuple[str, ...]
    background: str
    size: str = "normal"

    @property
    def count(self) -> int:
        return {"one": 1, "beside": 2, "above": 2, "two": 2, "three": 3}[self.layout]

    @property
    def roles(self) -> tuple[str, ...]:
        return {"beside": ("left", "right"), "above": ("top", "bottom")}.get(self.layout, ())

    @property
    def backgrounds(self) -> tuple[str, ...]:
        return tuple(self.background.split(">")) if self.background else ()


def draw_scene(rng: np.random.Generator, held_out: HeldOut, kind: str = "train") -> Scene:
    """A scene of the training stream, or one that is held out of it for one reason alone.

    A held-out pair is always a pair, a held-out background always a single object on a plain colour or in a place.
    """
    while True:
        scene = _draw(rng, held_out, kind)
        if held_out.kinds(scene) == (set() if kind == "train" else {kind}):
            return scene


def _draw(rng: np.random.Generator, held_out: HeldOut, kind: str) -> Scene:
    names = tuple(objects())
    weights = {
        "train": (0.4, 0.2, 0.18, 0.11, 0.11),
        "pair": (0, 0.5, 0.5, 0, 0),
        "role": (0, 0.5, 0.5, 0, 0),
        "background": (1, 0, 0, 0, 0),
        "object": (0.4, 0.2, 0.18, 0.11, 0.11),
    }[kind]
    layout = LAYOUTS[rng.choice(len(LAYOUTS), p=weights)]
    first = names[rng.integers(len(names))]
    if kind == "object":
        first = sorted(held_out.objects)[rng.integers(len(held_out.objects))]
    things = (first,)
    if layout in ("beside", "above"):
        second = names[rng.integers(len(names))]
        if kind == "pair":
            pairs = sorted(held_out.pairs)
            first, second = pairs[rng.integers(len(pairs))]
        if first == second:
            return _draw(rng, held_out, kind)
        things = (first, second) if rng.random() < 0.5 else (second, first)
    size = ("small", "normal", "big")[rng.choice(3, p=(0.15, 0.6, 0.25))] if layout == "one" else "normal"
    return Scene(layout, things, draw_background(rng, mentioned=kind == "background"), size)


def draw_background(rng: np.random.Generator, mentioned: bool = False) -> str:
    """A background of the training stream; if `mentioned`, a colour or a place."""
    draw = rng.random() * (0.7 if mentioned else 1.0)
    colours, places = tuple(COLOURS), tuple(PLACES)
    if draw < 0.45:
        return colours[rng.integers(len(colours))]
    if draw < 0.7:
        return places[rng.integers(len(places))]
    if draw < 0.8:
        top, bottom = rng.choice(len(colours), 2, replace=False)
        return f"{colours[top]}>{colours[bottom]}"
    return ""


_PLURALS = {
    "mouse": "mice", "wolf": "wolves", "die": "dice", "maple leaf": "maple leaves", "fish": "fish",
    "tropical fish": "tropical fish", "pufferfish": "pufferfish", "jellyfish": "jellyfish", "octopus": "octopuses",
    "cactus": "cacti", "snowman": "snowmen", "volcano": "volcanoes", "deer": "deer", "moose": "moose", "squid": "squid",
}  # fmt: skip


def plural(name: str) -> str:
    """ "dog" -> "dogs", "slice of pizza" -> "slices of pizza"."""
    head, of, rest = name.partition(" of ")
    if of:
        return f"{plural(head)} of {rest}"
    if name in _PLURALS:
        return _PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name in ("potato", "tomato", "mango") else "s")


def with_article(words: str) -> str:
    an = words[0] in "aeiou" and not words.startswith(("unicorn", "ufo", "one"))
    return f"{'an' if an else 'a'} {words}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many true captions; the first thing that it names is not always the left or the upper one."""

    def pick(*choices: str) -> str:
        return choices[rng.integers(len(choices))]

    def name(thing: str) -> str:
        others = objects()[thing].others
        return pick(*others) if others and rng.random() < 0.3 else thing

    if scene.layout == "one":
        size = pick(*SIZES[scene.size]) if scene.size != "normal" else ""
        if scene.size == "normal" and not scene.background and rng.random() < 0.2:
            text = name(scene.objects[0])
        else:
            text = with_article(f"{size} {name(scene.objects[0])}".strip())
    elif scene.layout == "two":
        text = f"{pick('two', 'two', 'two', '2')} {plural(name(scene.objects[0]))}"
    elif scene.layout == "three":
        text = f"{pick('three', 'three', 'three', '3')} {plural(name(scene.objects[0]))}"
    else:
        a, b = (with_article(name(thing)) for thing in scene.objects)
        text = pick(
            *{
                "beside": (f"{a} to the left of {b}", f"{a} left of {b}", f"{b} to the right of {a}",
                           f"{b} right of {a}", f"{a} next to {b}", f"{a} and {b}", f"{a} beside {b}",
                           f"{a} on the left and {b} on the right"),
                "above": (f"{a} above {b}", f"{a} over {b}", f"{b} below {a}", f"{b} under {a}", f"{a} above {b}",
                          f"{a} at the top and {b} at the bottom"),
            }[scene.layout]
        )  # fmt: skip
    if not scene.background:
        return text
    if scene.background in PLACES:
        words = PLACES[scene.background]
        place = words[0] if rng.random() < 0.5 else pick(*words)
        return f"{place}, {text}" if rng.random() < 0.1 else f"{text} {place}"
    if len(scene.backgrounds) == 2:
        top, bottom = scene.backgrounds
        where = pick(f"a gradient from {top} to {bottom}", f"a background from {top} to {bottom}")
        return f"{text} on {where}"
    colour = scene.background
    grounds = f"on a {colour} background", f"on a {colour} background", f"with a {colour} background", f"on {colour}"
    if rng.random() < 0.1:
        return f"{text}, {colour} background"
    return f"{text} {pick(*grounds)}".replace("a orange", "an orange")
