"""The one exception that users are meant to see."""


class LayersenseError(Exception):
    """Bad input or an unusable machine, told in one clear sentence.

    The sentence names the file, the record or key, what was expected and how to fix it. The
    command line prints it first and without a traceback; anything else that escapes is a bug of
    ours and keeps its traceback.
    """
