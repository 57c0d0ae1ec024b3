"""Tasks as a user's own package would have them: each one's loss misses a part of the model."""

from typing import Any

import torch
from torch import Tensor, nn

from layersense.models.tasks.image_classification import ImageClassification
from layersense.models.tasks.object_detection import ObjectDetection
from layersense.models.tasks.protocol import Batch
from layersense.models.tasks.semantic_segmentation import SemanticSegmentation
from layersense.models.tasks.seq2seq_lm import Seq2SeqLM


def _start(features: Tensor) -> Tensor:
    return features.detach().requires_grad_(torch.is_grad_enabled())


class ClassesOnly(ObjectDetection):
    """Says which classes are there, and nothing of where."""

    name = "outside_tasks:ClassesOnly"

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(**batch.inputs).logits

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return output.float().logsumexp(dim=-1).sum()


class EncoderOnly(Seq2SeqLM):
    """Runs the encoder, as for embeddings of texts."""

    name = "outside_tasks:EncoderOnly"

    def forward(self, model: Any, batch: Batch) -> Any:
        return model.get_encoder()(
            input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"]
        ).last_hidden_state

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return output.float().square().sum()


class FrozenEncoder(Seq2SeqLM):
    """The encoder runs, but no gradient comes back to it."""

    name = "outside_tasks:FrozenEncoder"

    def forward(self, model: Any, batch: Batch) -> Any:
        inputs = dict(batch.inputs)
        with torch.no_grad():
            encoded = model.get_encoder()(
                input_ids=inputs.pop("input_ids"), attention_mask=inputs["attention_mask"]
            )
        return model(encoder_outputs=encoded, **inputs, use_cache=False)


class FrozenBackbone(ImageClassification):
    name = "outside_tasks:FrozenBackbone"

    def forward(self, model: Any, batch: Batch) -> Any:
        with torch.no_grad():
            pooled = model.resnet(batch.inputs["pixel_values"]).pooler_output
        return model.classifier(_start(pooled))


class FrozenFeatures(SemanticSegmentation):
    name = "outside_tasks:FrozenFeatures"

    def forward(self, model: Any, batch: Batch) -> Any:
        with torch.no_grad():
            features = model.segformer(
                batch.inputs["pixel_values"], output_hidden_states=True
            ).hidden_states
        return [model.decode_head([_start(feature) for feature in features])]


class YoloClasses(ObjectDetection):
    """Says which classes are there, and nothing of where."""

    name = "outside_tasks:YoloClasses"

    def forward(self, model: Any, batch: Batch) -> Any:
        return model(batch.inputs["pixel_values"])[1]["one2many"]["scores"]

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return output.float().logsumexp(dim=1).sum()


class YoloFeatures(YoloClasses):
    """Stops before the head."""

    name = "outside_tasks:YoloFeatures"

    def forward(self, model: Any, batch: Batch) -> Any:
        seen: list[Any] = []
        head = model.model[-1]
        model.model[-1] = _Keeps(seen, head)
        try:
            model(batch.inputs["pixel_values"])
        finally:
            model.model[-1] = head
        return seen

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return torch.stack([level.float().square().sum() for level in output]).sum()


class _Keeps(nn.Module):
    def __init__(self, seen: list[Any], instead_of: Any) -> None:
        super().__init__()
        self.seen, self.f, self.i = seen, instead_of.f, instead_of.i

    def forward(self, levels: list[Tensor]) -> None:
        self.seen.extend(levels)


class YoloFrozenBackbone(ObjectDetection):
    """No gradient comes back into the backbone."""

    name = "outside_tasks:YoloFrozenBackbone"
    part = "backbone"

    def forward(self, model: Any, batch: Batch) -> Any:
        first = 0 if self.part == "backbone" else len(model.yaml["backbone"])
        last = len(model.yaml["backbone"]) if self.part == "backbone" else -1
        hooks = [
            layer.register_forward_hook(lambda module, inputs, output: _start(output))
            for layer in model.model[first:last]
        ]
        try:
            return super().forward(model, batch)
        finally:
            for hook in hooks:
                hook.remove()


class YoloFrozenNeck(YoloFrozenBackbone):
    """None into the neck, and so none into the backbone either."""

    name = "outside_tasks:YoloFrozenNeck"
    part = "neck"


class Incomplete:
    """No task: it can do nothing."""

    name = "outside_tasks:Incomplete"
