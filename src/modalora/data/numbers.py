"""Numbers in words."""

from __future__ import annotations

from modalora.errors import DataError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = (
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBERS = (DIGITS + TEENS)[:13]  # zero to twelve: how many things of one sort a question counts


def number_words(number: int) -> str:
    """Return a number from 0 to 99 in lower-case words, "sixty three"."""
    if not 0 <= number <= 99:
        raise DataError(f"number={number} must lie in 0..99, such as 63")
    if number < 20:
        return (DIGITS + TEENS)[number]
    ten, one = divmod(number, 10)
    return TENS[ten - 2] + (f" {DIGITS[one]}" if one else "")
