"""Units of axes, as the specification names them and as programs spell them.

OME-Zarr takes its names from UDUNITS-2 and only recommends them, so files hold
symbols, plurals and British spellings too. Words may be in any case; symbols
may not, since Mm is not mm. What is in no list is unknown: never one µm.
"""

import unicodedata

# Prefixes with their symbols; those without a name of OME-Zarr are left out.
_PREFIXES = {
    "yotta": ("Y", 24),
    "zetta": ("Z", 21),
    "exa": ("E", 18),
    "peta": ("P", 15),
    "tera": ("T", 12),
    "giga": ("G", 9),
    "mega": ("M", 6),
    "kilo": ("k", 3),
    "hecto": ("h", 2),
    "deci": ("d", -1),
    "centi": ("c", -2),
    "milli": ("m", -3),
    "micro": ("u", -6),
    "nano": ("n", -9),
    "pico": ("p", -12),
    "femto": ("f", -15),
    "atto": ("a", -18),
    "zepto": ("z", -21),
    "yocto": ("y", -24),
}
# Meters.
_LENGTHS = {
    "meter": 1.0,
    "angstrom": 1e-10,
    "ångström": 1e-10,
    "micron": 1e-6,
    "inch": 0.0254,
    "inches": 0.0254,
    "foot": 0.3048,
    "feet": 0.3048,
    "yard": 0.9144,
    "mile": 1609.344,
    "parsec": 3.0856775814913673e16,
}
_LENGTH_SYMBOLS = {"m": 1.0, "Å": 1e-10, "in": 0.0254, '"': 0.0254, "ft": 0.3048, "yd": 0.9144}
# Seconds.
_TIMES = {
    "second": 1.0,
    "sec": 1.0,
    "msec": 1e-3,
    "minute": 60.0,
    "min": 60.0,
    "hour": 3600.0,
    "day": 86400.0,
}
_TIME_SYMBOLS = {"s": 1.0, "h": 3600.0, "d": 86400.0}


for _name, (_letter, _exponent) in _PREFIXES.items():
    _factor = float(f"1e{_exponent}")
    _LENGTHS[f"{_name}meter"] = _LENGTH_SYMBOLS[f"{_letter}m"] = _factor
    _TIMES[f"{_name}second"] = _TIME_SYMBOLS[f"{_letter}s"] = _factor


def meters(unit: str | None) -> float | None:
    """Return the meters of one unit of length; ``None`` if it is unknown or none."""
    return _find(unit, _LENGTHS, _LENGTH_SYMBOLS)


def micrometers(unit: str | None) -> float | None:
    """Return the micrometers of one unit of length; ``None`` if it is unknown or none."""
    length = meters(unit)
    # Decimal powers stay exact.
    return None if length is None else float(f"{length * 1e6:.15g}")


def seconds(unit: str | None) -> float | None:
    """Return the seconds of one unit of time; ``None`` if it is unknown or none."""
    return _find(unit, _TIMES, _TIME_SYMBOLS)


def _find(unit: str | None, words: dict[str, float], symbols: dict[str, float]) -> float | None:
    # The micro sign, and the Å that is a sign of its own, become letters.
    text = unicodedata.normalize("NFKC", unit or "").strip().removesuffix(".")
    symbol = text.replace("μ", "u")
    if symbol in symbols:
        return symbols[symbol]
    word = symbol.lower().replace("metre", "meter")
    for name in (word, word.removesuffix("s")):
        if name in words:
            return words[name]
    # UM and Um can only be µm, while MM may be anything.
    return symbols.get(word) if word in ("um", "nm", "cm") else None
