"""Vocabulary of the world. No word has two meanings, so an answer is either right or wrong."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# A landmark's name is one word of each list.
FIRST = _words(
    "Amber Autumn Bitter Candle Cedar Copper Crooked Dusty Ember Frozen Gentle Golden Hidden "
    "Hollow Ivory Lonely Lucky Mellow Misty Narrow Noble Patient Quiet Rustic Scarlet Silver "
    "Thirsty Velvet Winter Wooden"
)
SECOND = _words(
    "Abbey Arch Arena Barn Bridge Castle Chapel Citadel Column Court Dome Fort Fountain Gallery "
    "Garden Gate Hall House Cabin Library Lodge Mill Palace Pier School Shrine Stair Temple "
    "Theatre Tower"
)
CITIES = _words("Ardun Belvik Corso Delmar Esteva Farnholt Gorlan Hestia Ilmar Jorvik Kelso Lunow")
# Builders and keepers.
PEOPLE = _words(
    "Abend Bauer Cordell Dupin Elster Fabre Gruber Halloran Ibsen Jansen Kovac Laurent Moreau "
    "Novak Okafor Perrin Quist Rossi Sato Tanaka Ueda Varga Wexler Yilmaz"
)
STONES = _words("granite slate marble brick chalk basalt limestone sandstone")
SHOWS = _words(
    "clocks kites maps masks lamps coins shells bells boats dolls drums fossils puppets swords "
    "stamps violins"
)
PRICES = tuple(str(price) for price in range(3, 43))
