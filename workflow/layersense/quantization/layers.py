"""What a layer is, read from its module names alone (no torch)."""

import re
from collections.abc import Sequence

import msgspec


class LayerName(msgspec.Struct, frozen=True):
    """Where a layer group stands in its model."""

    subsystem: str
    """``vision``, ``audio``, ``language``, ``projector``, ``head``, ``encoder``, ``decoder``,
    ``backbone``, ``neck`` or ``other``."""
    block: int | None
    """Number of its block (in a CNN, its stage) within the subsystem; None outside of blocks."""
    kind: str
    """``qkv``, ``o_proj``, ``gate_up``, ``down``, ``fc1``, ``fc2``, ``conv``, ``patch_embed``,
    ``merger``, ``projector``, ``experts``, ``router``, ``lm_head``, ``classifier`` or ``other``."""


_ROUTER = r"(^|\.)(gate|router|shared_expert_gate)$|\.router\."

# In each table the first pattern that is found in the name decides.
_SUBSYSTEMS = [
    # Heads: language models, classifiers, then detectors (DETR, torchvision, mmdetection, YOLO).
    (r"(^|\.)(lm_head|embed_out|output_layer|proj_out|score|classifier)(\.|$)", "head"),
    (r"^(fc|heads?)(\.|$)|(^|\.)(rpn|roi_heads|\w+_head)\.", "head"),
    (r"^(class_labels_classifier|bbox_predictor|class_embed|bbox_embed)(\.|$)", "head"),
    (r"^(model\.)+\d+\.((one2one_)?cv\d\.\d+\.|dfl\.|m\.\d+$)", "head"),
    # Between the towers: Qwen-VL's mergers, LLaVA, InternVL, SmolVLM, Gemma.
    (r"(^|\.)(\w*merger\w*|multi_modal_projector|mm_projector|mlp1|connector|aligner"
     r"|embed_vision|modality_projection)(\.|$)", "projector"),
    (r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|vpm|vit|deit|dinov2)\.", "vision"),
    (r"(^|\.)(audio_tower|audio_encoder)\.", "audio"),
    (r"(^|\.)(language_model|text_model)\.", "language"),
    # Detectors and CNNs.
    (r"(^|\.)(neck|fpn)\.", "neck"),
    (r"(^|\.)backbone\.|^(features|conv1|layer[1-4]|stem|stages)(\.|$)|^resnet\.", "backbone"),
    (r"^(model\.)+\d\.", "backbone"),  # YOLO numbers its layers: the backbone ends with 9, SPPF
    (r"^(model\.)+\d+\.", "neck"),
    (r"^(conv_proj|vit_embeddings)(\.|$)|^encoder\.layers\.encoder_layer_\d+\.", "vision"),
    # Encoder–decoders and encoders: T5, BART, Whisper, BERT, DETR.
    (r"(^|\.)encoder\.", "encoder"),
    (r"(^|\.)decoder\.", "decoder"),
    (r"(^|\.)(layers|h|blocks)\.\d+\.", "language"),
]  # fmt: skip

_BLOCKS = [
    r"(?:^|\.)(?:blocks?|layers?|h|deepstack_merger_list)\.(\d+)(?=\.|$)",
    r"\.encoder_layer_(\d+)\.",  # torchvision's ViT
    r"(?:^|\.)(?:layer|stages\.)(\d+)\.",  # stages of a ResNet, of a ConvNeXt
    r"^(?:model\.)+(\d+)\.",  # YOLO
]

_ATTENTION = (
    r"(self_|cross_|encoder_|linear_)?attn|(self_?|cross_?)?attention|SelfAttention|EncDecAttention"
)

_KINDS = [
    (_ROUTER, "router"),
    (r"\.experts(\.|$)|\.local_experts\.", "experts"),
    (r"(^|\.)(lm_head|embed_out|output_layer|proj_out)$", "lm_head"),
    (r"^(fc|score|class_labels_classifier|heads?(\.head)?)$|(^|\.)classifier(\.|$)", "classifier"),
    (r"patch_embed|(^|\.)conv_proj$", "patch_embed"),
    (r"merger", "merger"),
    (r"(^|\.)(multi_modal_projector|mm_projector|mlp1|connector|aligner|embed_vision"
     r"|modality_projection)\.", "projector"),
    (r"\.([qkv]_proj|qkv(_proj)?|c_attn|q_attn|query_key_value|query|key|value|Wqkv"
     r"|[qkv]_lin|q_[ab]_proj|kv_[ab]_proj\w*|in_proj_\w+)$", "qkv"),
    (rf"\.({_ATTENTION})\.[qkv]$", "qkv"),
    (rf"\.({_ATTENTION})\.(o_proj|out_proj|proj|c_proj|dense|out_lin|o|wo|output\.dense)$",
     "o_proj"),
    (r"\.(gate_proj|up_proj|gate_up_proj|w1|w3|wi_[01])$", "gate_up"),
    (r"\.(down_proj|w2|wo)$", "down"),
    (r"\.(fc1|linear_fc1|c_fc|wi|dense_h_to_4h|intermediate\.dense|lin1|linear1|linear_1"
     r"|mlp\.0)$", "fc1"),
    (r"\.(fc2|linear_fc2|mlp\.c_proj|dense_4h_to_h|output\.dense|lin2|linear2|linear_2"
     r"|mlp\.3)$", "fc2"),
]  # fmt: skip

_CONV = (
    r"(^|\.)\w*conv\w*(\.|$)|(^|\.)cv\d(\.|$)|\.downsample\.\d|(^|\.)fpn\.|\.m\.\d+$"
    r"|\.(cls_logits|bbox_\w+)$"
)


def describe_layer(module_names: Sequence[str]) -> LayerName:
    """Return where the layer group that holds ``module_names`` stands and what it does.

    All modules of a group stand in one place, so the first one's name decides; of the kind, the
    first that is recognised.

    Args:
        module_names: names of its modules in the model, at least one.
    """
    first = module_names[0]
    subsystem = next(
        (subsystem for pattern, subsystem in _SUBSYSTEMS if re.search(pattern, first)), "other"
    )
    found = (match for pattern in _BLOCKS if (match := re.search(pattern, first)))
    match = next(found, None)
    kinds = (kind for name in module_names for pattern, kind in _KINDS if re.search(pattern, name))
    convolution = subsystem in ("backbone", "neck") or re.search(_CONV, first)
    return LayerName(
        subsystem=subsystem,
        block=int(match[1]) if match else None,
        kind=next(kinds, "conv" if convolution else "other"),
    )


def is_router(module_names: Sequence[str]) -> bool:
    """Return whether one of ``module_names`` chooses the experts of a mixture of experts."""
    return any(re.search(_ROUTER, name) for name in module_names)
