"""Tokens as a reader sees them."""


def visible(text: str) -> str:
    """Text on one line, with the spaces at its ends and its line breaks to be seen."""
    text = text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    stripped = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    return "␣" * lead + stripped + "␣" * (len(text) - lead - len(stripped)) if stripped else "␣" * len(text)
