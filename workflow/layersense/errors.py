"""The one exception that users are meant to see, and a failure that many libraries word."""


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


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the machine.

    torch has a class of its own for its allocator on a GPU alone; on a CPU, in cuBLAS and in the
    driver it is a ``RuntimeError`` whose words tell.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
