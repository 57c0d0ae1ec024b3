"""Tasks by name: one file each, behind :class:`layersense.models.tasks.protocol.Task`."""

from layersense.errors import LayersenseError
from layersense.models.tasks.causal_lm import CausalLM
from layersense.models.tasks.image_text_to_text import ImageTextToText
from layersense.models.tasks.protocol import Task

_TASKS: dict[str, Task] = {task.name: task for task in (CausalLM(), ImageTextToText())}


def get_task(name: str) -> Task:
    """Return the task called ``name``, such as ``image-text-to-text``.

    Raises:
        LayersenseError: there is no such task.
    """
    try:
        return _TASKS[name]
    except KeyError:
        raise LayersenseError(
            f"there is no task {name}; write one of {', '.join(sorted(_TASKS))}"
        ) from None
