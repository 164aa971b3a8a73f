"""Pictures of words and of bars, drawn with Pillow's own font, and the questions that they settle.

Answers are short and lower case; a number that was rendered is answered in its digits, a number of things in words.
"""

from __future__ import annotations

from functools import lru_cache

from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from modalora.data.numbers import NUMBERS
from modalora.data.scenes import dice

_WORDS = (
    "apple", "baby", "bag", "ball", "bank", "bed", "bird", "boat", "book", "box", "bread", "bus", "cake", "car", "cat",
    "chair", "city", "clock", "cloud", "coat", "cold", "cow", "cup", "day", "desk", "dog", "door", "dream", "duck",
    "ear", "egg", "exit", "eye", "farm", "fast", "fire", "fish", "flag", "food", "fox", "game", "gate", "gift", "girl",
    "glass", "goat", "gold", "good", "hand", "hat", "help", "home", "horse", "hotel", "house", "ice", "jazz", "juice",
    "jump", "key", "kind", "king", "kite", "lamp", "leaf", "lemon", "light", "lion", "map", "milk", "moon", "mouse",
    "music", "name", "nest", "night", "north", "nose", "ocean", "open", "oven", "paper", "park", "pen", "piano",
    "queen", "quick", "quiet", "rain", "ring", "river", "road", "rock", "sale", "salt", "ship", "shoe", "shop", "snow",
    "star", "stop", "sun", "table", "taxi", "tea", "time", "train", "tree", "vase", "voice", "wall", "water", "wind",
    "wood", "word", "year", "yes", "zebra", "zero", "zoo",
)  # fmt: skip
_INKS = {
    "black": (10, 10, 10), "blue": (30, 80, 225), "red": (215, 30, 35), "green": (25, 140, 50),
    "purple": (130, 40, 165), "orange": (240, 125, 15),
}  # fmt: skip
_PAPERS = ((255, 255, 255), (248, 244, 230), (232, 240, 248), (222, 222, 222), (250, 236, 240))


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def word_picture(rng: Generator) -> tuple[Image.Image, list[tuple[str, str]]]:
    """Return a rendered common word or number of up to four digits, and (question, answer) pairs about it.

    The text is drawn as the answer gives it, lower case or digits.
    """
    roll = dice(rng)
    text = roll.choice(_WORDS) if roll.random() < 0.65 else str(roll.randrange(10 ** roll.randint(1, 4)))
    ink = roll.choice(tuple(_INKS))
    font = _font(roll.randrange(24, 61, 4))
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    columns = max(112, right - left + roll.randint(12, 90))
    rows = max(64, bottom - top + roll.randint(12, 90))
    image = Image.new("RGB", (columns, rows), roll.choice(_PAPERS))
    x, y = roll.randint(4, columns - (right - left) - 4), roll.randint(4, rows - (bottom - top) - 4)
    ImageDraw.Draw(image).text((x - left, y - top), text, font=font, fill=_INKS[ink])
    asked = "number" if text.isdigit() else "word"
    forms = ["What does the image say?", "Read the text.", "What is written here?", "What does the picture say?"]
    roll.shuffle(forms)
    pairs = [(forms[0], text), (f"Which {asked} is written in the picture?", text)]
    pairs.append((f"What color is the {roll.choice(('text', asked))}?", ink))
    units = "digits" if text.isdigit() else "letters"
    pairs.append((f"How many {units} does the {asked} have?", NUMBERS[len(text)]))
    return image, pairs


def chart_picture(rng: Generator) -> tuple[Image.Image, list[tuple[str, str]]]:
    """Return a chart of two to five labelled bars of different colours, and (question, answer) pairs about it."""
    roll = dice(rng)
    bars = roll.randint(2, 5)
    labels, colors = roll.sample("abcdefgh", bars), roll.sample(sorted(_INKS), bars)
    heights = [24 + 22 * step for step in roll.sample(range(7), bars)]
    thick, air = roll.randint(24, 38), roll.randint(10, 22)
    base = max(heights) + roll.randint(10, 40)
    image = Image.new("RGB", (bars * (thick + air) + air, base + 30), roll.choice(_PAPERS))
    pen = ImageDraw.Draw(image)
    font = _font(20)
    for place, (label, color, height) in enumerate(zip(labels, colors, heights, strict=True)):
        left = air + place * (thick + air)
        pen.rectangle((left, base - height, left + thick - 1, base - 1), fill=_INKS[color])
        pen.text((left + thick / 2, base + 2), label, font=font, fill=(20, 20, 20), anchor="ma")
    pen.line((air / 2, base, image.width - air / 2, base), fill=(20, 20, 20), width=2)
    high, low, one = heights.index(max(heights)), heights.index(min(heights)), roll.randrange(bars)
    first, second = roll.sample(range(bars), 2)
    pairs = [
        ("How many bars are there?", NUMBERS[bars]),
        ("Which bar is the tallest?", labels[high]),
        ("Which bar is the shortest?", labels[low]),
        ("What color is the tallest bar?", colors[high]),
        ("What color is the shortest bar?", colors[low]),
        (f"What color is bar {labels[one]}?", colors[one]),
        (f"Which bar is {colors[one]}?", labels[one]),
        (
            f"Is bar {labels[first]} taller than bar {labels[second]}?",
            "yes" if heights[first] > heights[second] else "no",
        ),
    ]
    roll.shuffle(pairs)
    return image, pairs
