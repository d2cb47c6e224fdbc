"""Key words of the needles: an adjective and a noun, as RULER builds them (its own list is the package wonderwords)."""

from __future__ import annotations

import random

_ADJECTIVES_TEXT = """
able amber ancient bitter bold brave brief bright broad calm cheap clean clever cold crisp curious dark deep
eager early faint fair fierce fine firm gentle glad golden grand great happy heavy hollow honest humble jolly
keen kind large late lazy light little lone loud lucky mellow merry mild modest narrow neat noble odd plain
polite proud quick quiet rapid rare ready rough round rural sharp shy silent simple slow small smooth soft solid
sour steady steep strange strong sunny sweet swift tall tame tender thin tidy tiny vast warm wide wild wise
young
"""
ADJECTIVES = tuple(_ADJECTIVES_TEXT.split())
_NOUNS_TEXT = """
anchor apple arrow autumn badger barrel basket beacon bell bottle bridge brook bucket candle canyon carpet
castle cave cedar chapel circle cliff cloud copper coral cottage crow desert drum eagle ember engine falcon
feather fence field flute forest fountain fox garden gate glacier goat hammer harbor hawk heron hill horse
island jacket kettle ladder lake lamp lantern leaf lemon marble market meadow mirror moon mountain needle oak
ocean orchard otter owl paper pebble pepper pillow pine planet pond rabbit raven river rocket saddle sailor
salmon shadow ship silver spoon stone summer table temple thunder tiger tower tunnel turtle valley violin wagon
walnut whale willow winter
"""
NOUNS = tuple(_NOUNS_TEXT.split())


def draw_keys(rng: random.Random, count: int) -> list[str]:
    """Draw `count` different keys, such as "brave-otter"."""
    picked = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in picked]
