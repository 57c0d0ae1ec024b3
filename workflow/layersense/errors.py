"""The one exception that users are meant to see."""


class LayersenseError(Exception):
    """Bad input or an unusable machine, told in one clear sentence.

    The sentence names the file, the record or key, what was expected and how to fix it. The
    command line prints it first and without a traceback; anything else that escapes is a bug of
    ours and keeps its traceback.
    """


def one_line(text: str) -> str:
    """Return ``text`` with control characters written out as escapes.

    A name of a foreign file must not make a line of its own in a message or a log.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
