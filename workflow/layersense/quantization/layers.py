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
    ``merger``, ``projector``, ``experts``, ``router``, ``lm_head``, ``classifier``,
    ``class_head``, ``box_head`` or ``other``."""


# D-FINE's gateways mix two inputs of a decoder layer and choose no expert.
_ROUTER = r"(^|\.)(?<!gateway\.)(gate|router|shared_expert_gate)$|\.router\."
_CLASS_HEAD = (
    r"(^|\.)(class_labels_classifier|class_embed|enc_score_head|classification_head|lqe_layers"
    r"|cls_score|cls_logits)(\.|$)|^(model\.)+\d+\.(one2one_)?cv3\.\d+\."
)
_BOX_HEAD = (
    r"(^|\.)(bbox_predictor|bbox_embed|enc_bbox_head|pre_bbox_head|regression_head|bbox_pred"
    r"|bbox_reg)(\.|$)|^(model\.)+\d+\.(one2one_)?cv2\.\d+\.|^(model\.)+\d+\.dfl\."
)

# In each table the first pattern that is found in the name decides.
_SUBSYSTEMS = [
    # Heads: language models, classifiers, then detectors (DETR, torchvision, mmdetection, YOLO).
    (r"(^|\.)(lm_head|embed_out|output_layer|proj_out|score|classifier)(\.|$)", "head"),
    (r"^(fc|heads?)(\.|$)|(^|\.)(rpn|roi_heads|\w+_head)\.", "head"),
    (_CLASS_HEAD, "head"),
    (_BOX_HEAD, "head"),
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
    (_CLASS_HEAD, "class_head"),
    (_BOX_HEAD, "box_head"),
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


_IMAGE_NECK = r"(^|\.)(encoder_input_proj|decoder_input_proj|input_projection)(\.|$)"
_IMAGE_BACKBONE = (
    r"^(resnet|regnet|convnext\w*|mobilenet\w*|mobilevit\w*|efficientnet|swin\w*|segformer|pvt\w*|vit"
    r"|deit|beit|dinov2\w*|data2vec_vision|poolformer|focalnet|cvt|van|levit|glpn|dpt)\."
)


def describe_image_layer(module_names: Sequence[str]) -> LayerName:
    """Return the same for a model that reads images alone.

    What is neither its neck, its encoder and decoder nor its head is the backbone, whether that is
    convolutions or a transformer.
    """
    layer = describe_layer(module_names)
    first = module_names[0]
    subsystem = layer.subsystem
    if re.search(_IMAGE_NECK, first):
        subsystem = "neck"
    elif re.search(r"(^|\.)(enc_output|query_pos_head)(\.|$)", first):
        subsystem = "decoder"  # what makes the decoder's queries, and their positions
    elif subsystem not in ("head", "neck", "encoder", "decoder") or re.search(
        _IMAGE_BACKBONE, first
    ):
        subsystem = "backbone"
    kind = "conv" if layer.kind == "other" and subsystem in ("backbone", "neck") else layer.kind
    return LayerName(subsystem=subsystem, block=layer.block, kind=kind)


def is_router(module_names: Sequence[str]) -> bool:
    """Return whether one of ``module_names`` chooses the experts of a mixture of experts."""
    return any(re.search(_ROUTER, name) for name in module_names)
