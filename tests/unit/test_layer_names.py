"""A test per family: names as the models have them, meanings written by hand."""

import json

import pytest

from layersense.quantization.layers import (
    LayerName,
    describe_image_layer,
    describe_layer,
    is_router,
)


def check(expected: dict[str, tuple[str, int | None, str]]) -> None:
    described = {names: describe_layer(names.split()) for names in expected}
    assert described == {names: LayerName(*parts) for names, parts in expected.items()}


def test_qwen2_5_vl() -> None:
    language = "model.language_model.layers.11"
    check(
        {
            "model.visual.patch_embed.proj": ("vision", None, "patch_embed"),
            "model.visual.blocks.31.attn.qkv": ("vision", 31, "qkv"),
            "model.visual.blocks.0.attn.proj": ("vision", 0, "o_proj"),
            "model.visual.blocks.7.mlp.gate_proj model.visual.blocks.7.mlp.up_proj": (
                "vision",
                7,
                "gate_up",
            ),
            "model.visual.blocks.7.mlp.down_proj": ("vision", 7, "down"),
            "model.visual.merger.mlp.0": ("projector", None, "merger"),
            "model.visual.merger.mlp.2": ("projector", None, "merger"),
            " ".join(f"{language}.self_attn.{x}_proj" for x in "qkv"): ("language", 11, "qkv"),
            f"{language}.self_attn.o_proj": ("language", 11, "o_proj"),
            f"{language}.mlp.gate_proj {language}.mlp.up_proj": ("language", 11, "gate_up"),
            f"{language}.mlp.down_proj": ("language", 11, "down"),
            "lm_head": ("head", None, "lm_head"),
        }
    )


def test_qwen2_5_vl_by_its_older_names() -> None:
    check(
        {
            "visual.patch_embed.proj": ("vision", None, "patch_embed"),
            "visual.blocks.3.attn.qkv": ("vision", 3, "qkv"),
            "visual.merger.mlp.0": ("projector", None, "merger"),
            "model.layers.3.self_attn.q_proj": ("language", 3, "qkv"),
            "language_model.layers.3.mlp.down_proj": ("language", 3, "down"),
        }
    )


def test_qwen3_vl() -> None:
    check(
        {
            "model.visual.blocks.2.mlp.linear_fc1": ("vision", 2, "fc1"),
            "model.visual.blocks.2.mlp.linear_fc2": ("vision", 2, "fc2"),
            "model.visual.merger.linear_fc1": ("projector", None, "merger"),
            "model.visual.deepstack_merger_list.1.linear_fc2": ("projector", 1, "merger"),
            "model.language_model.layers.35.self_attn.o_proj": ("language", 35, "o_proj"),
        }
    )


def test_llava() -> None:
    check(
        {
            "model.vision_tower.vision_model.encoder.layers.4.self_attn.out_proj": (
                "vision",
                4,
                "o_proj",
            ),
            "model.vision_tower.vision_model.encoder.layers.4.mlp.fc1": ("vision", 4, "fc1"),
            "model.vision_tower.vision_model.embeddings.patch_embedding": (
                "vision",
                None,
                "patch_embed",
            ),
            "model.multi_modal_projector.linear_1": ("projector", None, "projector"),
            "model.language_model.layers.0.mlp.up_proj": ("language", 0, "gate_up"),
        }
    )


def test_llama_qwen_and_smollm() -> None:
    check(
        {
            "model.layers.0.self_attn.q_proj model.layers.0.self_attn.k_proj": (
                "language",
                0,
                "qkv",
            ),
            "model.layers.29.self_attn.o_proj": ("language", 29, "o_proj"),
            "model.layers.29.mlp.gate_proj": ("language", 29, "gate_up"),
            "model.layers.29.mlp.down_proj": ("language", 29, "down"),
            "lm_head": ("head", None, "lm_head"),
        }
    )


def test_gpt2_and_gpt_neox() -> None:
    check(
        {
            "transformer.h.5.attn.c_attn": ("language", 5, "qkv"),
            "transformer.h.5.attn.c_proj": ("language", 5, "o_proj"),
            "transformer.h.5.mlp.c_fc": ("language", 5, "fc1"),
            "transformer.h.5.mlp.c_proj": ("language", 5, "fc2"),
            "gpt_neox.layers.2.attention.query_key_value": ("language", 2, "qkv"),
            "gpt_neox.layers.2.attention.dense": ("language", 2, "o_proj"),
            "gpt_neox.layers.2.mlp.dense_h_to_4h": ("language", 2, "fc1"),
            "gpt_neox.layers.2.mlp.dense_4h_to_h": ("language", 2, "fc2"),
            "embed_out": ("head", None, "lm_head"),
        }
    )


def test_mixtures_of_experts() -> None:
    expert = "model.layers.1.mlp.experts.0"
    check(
        {
            f"{expert}.gate_proj {expert}.up_proj {expert}.down_proj": ("language", 1, "experts"),
            "model.layers.1.mlp.experts": ("language", 1, "experts"),
            "model.layers.1.block_sparse_moe.experts.7.w2": ("language", 1, "experts"),
            "model.layers.1.mlp.shared_expert.down_proj": ("language", 1, "down"),
            "model.layers.1.mlp.gate": ("language", 1, "router"),
            "model.layers.1.mlp.shared_expert_gate": ("language", 1, "router"),
            "model.layers.1.block_sparse_moe.gate": ("language", 1, "router"),
        }
    )


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("model.layers.1.mlp.gate", True),
        ("model.layers.1.block_sparse_moe.gate", True),
        ("model.layers.1.mlp.router", True),
        ("transformer.blocks.0.ffn.router.layer", True),
        ("model.layers.1.mlp.shared_expert_gate", True),
        ("model.layers.1.mlp.gate_proj", False),
        ("model.layers.1.mlp.shared_expert.gate_proj", False),
        ("model.layers.1.mlp.experts", False),
    ],
)
def test_routers(name: str, router: bool) -> None:
    assert is_router([name]) is router


def test_t5() -> None:
    check(
        {
            "encoder.block.3.layer.0.SelfAttention.q": ("encoder", 3, "qkv"),
            "encoder.block.3.layer.0.SelfAttention.o": ("encoder", 3, "o_proj"),
            "encoder.block.3.layer.1.DenseReluDense.wi": ("encoder", 3, "fc1"),
            "encoder.block.3.layer.1.DenseReluDense.wi_0": ("encoder", 3, "gate_up"),
            "decoder.block.5.layer.1.EncDecAttention.k": ("decoder", 5, "qkv"),
            "decoder.block.5.layer.2.DenseReluDense.wo": ("decoder", 5, "down"),
            "lm_head": ("head", None, "lm_head"),
        }
    )


def test_bart_whisper_and_bert() -> None:
    check(
        {
            "model.encoder.layers.2.self_attn.v_proj": ("encoder", 2, "qkv"),
            "model.encoder.layers.2.fc1": ("encoder", 2, "fc1"),
            "model.decoder.layers.2.encoder_attn.out_proj": ("decoder", 2, "o_proj"),
            "model.decoder.layers.2.fc2": ("decoder", 2, "fc2"),
            "model.encoder.conv1": ("encoder", None, "conv"),
            "proj_out": ("head", None, "lm_head"),
            "bert.encoder.layer.4.attention.self.query": ("encoder", 4, "qkv"),
            "bert.encoder.layer.4.attention.output.dense": ("encoder", 4, "o_proj"),
            "bert.encoder.layer.4.intermediate.dense": ("encoder", 4, "fc1"),
            "bert.encoder.layer.4.output.dense": ("encoder", 4, "fc2"),
        }
    )


def test_vit() -> None:
    check(
        {
            "conv_proj": ("vision", None, "patch_embed"),
            "encoder.layers.encoder_layer_3.mlp.0": ("vision", 3, "fc1"),
            "encoder.layers.encoder_layer_3.mlp.3": ("vision", 3, "fc2"),
            "heads.head": ("head", None, "classifier"),
            "vit.embeddings.patch_embeddings.projection": ("vision", None, "patch_embed"),
            "vit.encoder.layer.3.attention.attention.key": ("vision", 3, "qkv"),
            "vit.encoder.layer.3.attention.output.dense": ("vision", 3, "o_proj"),
            "classifier": ("head", None, "classifier"),
        }
    )


def test_resnet() -> None:
    check(
        {
            "conv1": ("backbone", None, "conv"),
            "layer1.0.conv2": ("backbone", 1, "conv"),
            "layer4.1.downsample.0": ("backbone", 4, "conv"),
            "fc": ("head", None, "classifier"),
        }
    )


def test_retinanet() -> None:
    check(
        {
            "backbone.body.conv1": ("backbone", None, "conv"),
            "backbone.body.layer3.5.conv3": ("backbone", 3, "conv"),
            "backbone.fpn.inner_blocks.0.0": ("neck", None, "conv"),
            "backbone.fpn.extra_blocks.p6": ("neck", None, "conv"),
            "head.classification_head.conv.0.0": ("head", None, "class_head"),
            "head.classification_head.cls_logits": ("head", None, "class_head"),
            "head.regression_head.bbox_reg": ("head", None, "box_head"),
        }
    )


def test_yolo() -> None:
    check(
        {
            "model.0.conv": ("backbone", 0, "conv"),
            "model.model.4.m.1.cv2.conv": ("backbone", 4, "conv"),
            "model.9.cv1.conv": ("backbone", 9, "conv"),
            "model.15.cv1.conv": ("neck", 15, "conv"),
            "model.model.22.cv2.0.0.conv": ("head", 22, "box_head"),
            "model.22.cv3.2.2": ("head", 22, "class_head"),
            "model.22.dfl.conv": ("head", 22, "box_head"),
            "model.24.m.0": ("head", 24, "conv"),
        }
    )


def test_detr() -> None:
    check(
        {
            "model.backbone.conv_encoder.model.layer2.0.conv1": ("backbone", 2, "conv"),
            "model.encoder.layers.0.self_attn.q_proj": ("encoder", 0, "qkv"),
            "model.decoder.layers.5.encoder_attn.k_proj": ("decoder", 5, "qkv"),
            "class_labels_classifier": ("head", None, "class_head"),
            "bbox_predictor.layers.1": ("head", 1, "box_head"),
        }
    )


def check_images(expected: dict[str, tuple[str, int | None, str]]) -> None:
    described = {name: describe_image_layer([name]) for name in expected}
    assert described == {name: LayerName(*parts) for name, parts in expected.items()}


def test_rt_detr_and_d_fine() -> None:
    check_images(
        {
            "model.backbone.model.encoder.stages.1.layers.0.layer.0.convolution": (
                "backbone",
                0,
                "conv",
            ),
            "model.encoder_input_proj.2.0": ("neck", None, "conv"),
            "model.encoder.aifi.0.layers.0.self_attn.q_proj": ("encoder", 0, "qkv"),
            "model.encoder.lateral_convs.1.conv": ("encoder", None, "conv"),
            "model.enc_output.0": ("decoder", None, "other"),
            "model.enc_score_head": ("head", None, "class_head"),
            "model.enc_bbox_head.layers.1": ("head", 1, "box_head"),
            "model.decoder.query_pos_head.layers.0": ("decoder", 0, "other"),
            "model.decoder.layers.3.gateway.gate": ("decoder", 3, "other"),
            "model.decoder.class_embed.2": ("head", None, "class_head"),
            "model.decoder.bbox_embed.2.layers.0": ("head", 0, "box_head"),
        }
    )
    assert not is_router(["model.decoder.layers.3.gateway.gate"])


def test_backbones_of_models_that_read_images_alone() -> None:
    check_images(
        {
            "vit.layers.1.attention.q_proj": ("backbone", 1, "qkv"),
            "encoder.layers.encoder_layer_3.mlp.0": ("backbone", 3, "fc1"),
            "convnext.encoder.stages.2.layers.0.dwconv": ("backbone", 0, "conv"),
            "segformer.stages.1.blocks.0.mlp.fc1": ("backbone", 0, "fc1"),
            "backbone.4.block.2.fc1": ("backbone", 2, "fc1"),
            "decode_head.classifier": ("head", None, "classifier"),
            "classifier.low_classifier": ("head", None, "classifier"),
            "fc": ("head", None, "classifier"),
        }
    )


def test_a_name_of_no_family() -> None:
    check({"something.new": ("other", None, "other")})


def test_every_layer_of_the_foreign_manifests_is_recognised(shared_data) -> None:
    subsystems = set()
    for file in sorted((shared_data / "manifests").glob("*.json")):
        for handle in json.loads(file.read_text())["layer_sensitivity"]:
            layer = describe_layer([handle.removesuffix(".quant_recipe")])
            subsystems.add(layer.subsystem)
            assert layer.kind != "other", handle
    assert subsystems == {"vision", "language", "projector", "head"}
