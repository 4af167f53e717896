"""Durations in words."""


def duration(seconds: float) -> str:
    """Rounded to seconds, or from an hour on to minutes: `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
