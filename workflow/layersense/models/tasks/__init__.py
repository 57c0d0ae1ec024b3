"""Tasks by name: one file each, behind :class:`layersense.models.tasks.protocol.Task`."""

from importlib import import_module

from layersense.errors import LayersenseError
from layersense.models.outside import is_outside, load_task
from layersense.models.tasks.protocol import Task

_TASKS = {
    "causal-lm": ("causal_lm", "CausalLM"),
    "image-classification": ("image_classification", "ImageClassification"),
    "image-text-to-text": ("image_text_to_text", "ImageTextToText"),
    "object-detection": ("object_detection", "ObjectDetection"),
    "semantic-segmentation": ("semantic_segmentation", "SemanticSegmentation"),
    "seq2seq-lm": ("seq2seq_lm", "Seq2SeqLM"),
}
"""Name → module of this folder, and class in it."""


def get_task(name: str) -> Task:
    """Return the task called ``name``, such as ``image-text-to-text``, or one of the user's own.

    Raises:
        LayersenseError: there is no such task.
    """
    if is_outside(name):
        outside: Task = load_task(name)
        return outside
    if name not in _TASKS:
        raise LayersenseError(
            f"there is no task {name}; write one of {', '.join(_TASKS)}, or your own as "
            "`package.module:Class`"
        )
    module, class_name = _TASKS[name]
    task: Task = getattr(import_module(f"layersense.models.tasks.{module}"), class_name)()
    return task
