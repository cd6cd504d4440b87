"""Numbers for people."""


def seconds(value: float) -> str:
    """Three digits and a unit."""
    unit, scale = ("s", 1) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("µs", 1e6)
    return f"{digits(value * scale)} {unit}"


def digits(value: float) -> str:
    """Three of them, without an exponent."""
    text = f"{value:#.3g}"
    return (f"{float(text):.0f}" if "e" in text else text).rstrip(".")
