"""Numbers for people."""


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1 or unit == "µs":
            return f"{digits(value * scale)} {unit}"
    raise AssertionError


def digits(value: float) -> str:
    """Three of them, without an exponent."""
    text = f"{value:#.3g}"
    return (f"{float(text):.0f}" if "e" in text else text).rstrip(".")


def milliseconds(value: float) -> str:
    return digits(1000 * value)
