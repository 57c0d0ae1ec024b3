"""A tiny model of each family, of random weights, saved like a real checkpoint."""

import json
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import CAPTIONS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torchvision.models import get_model

from layersense.models.torchvision_models import save_checkpoint

CATEGORIES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80 classes."""
LABELS = {
    "id2label": dict(enumerate(CATEGORIES)),
    "label2id": {name: number for number, name in enumerate(CATEGORIES)},
}


def enliven(model: torch.nn.Module) -> torch.nn.Module:
    """Give every weight a size at which signals neither die nor explode on their way.

    The initial weights of detectors are zero in places, for training's sake.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            torch.nn.init.normal_(parameter, std=(2 / fan_in) ** 0.5)
        elif parameter.abs().max() != 1:  # a bias; norms keep their scales of one
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def save(folder: Path, model: Any, *parts: Any) -> Path:
    enliven(model).save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    return folder


def tokenizer(**tokens: str) -> hf.PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on the captions, with these special tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        CAPTIONS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "</s>", "<s>", *tokens.values()],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )


# Encoder–decoders


def t5(folder: Path) -> Path:
    words = tokenizer()
    config = hf.T5Config(
        vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return save(folder, hf.T5ForConditionalGeneration(config), words)


def bart(folder: Path) -> Path:
    words = tokenizer()
    config = hf.BartConfig(
        vocab_size=len(words), d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
        bos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=1,
    )  # fmt: skip
    return save(folder, hf.BartForConditionalGeneration(config), words)


# Detectors


def yolos(folder: Path) -> Path:
    config = hf.YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=[64, 96], patch_size=16, num_detection_tokens=12, **LABELS,
    )  # fmt: skip
    processor = hf.YolosImageProcessor(size={"shortest_edge": 48, "longest_edge": 80})
    return save(folder, hf.YolosForObjectDetection(config), processor)


def _hgnet() -> Any:
    return hf.HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 16, 24, 32],
        stage_mid_channels=[8, 8, 8, 8], stage_out_channels=[16, 24, 32, 32],
        stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True], stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5], out_features=["stage2", "stage3", "stage4"],
        depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 32], embedding_size=8,
    )  # fmt: skip


def rt_detr(folder: Path, decoder_layers: int = 1) -> Path:
    backbone = hf.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 32], depths=[2, 2, 2, 2], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[24, 32, 32], encoder_hidden_dim=32,
        encoder_ffn_dim=64, encoder_attention_heads=4, d_model=32, num_queries=20,
        decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64, decoder_layers=decoder_layers,
        decoder_attention_heads=4, hidden_expansion=0.5, **LABELS,
    )  # fmt: skip
    processor = hf.RTDetrImageProcessor(size={"height": 96, "width": 96})
    return save(folder, hf.RTDetrForObjectDetection(config), processor)


def d_fine(folder: Path) -> Path:
    config = hf.DFineConfig(
        backbone_config=_hgnet(), encoder_in_channels=[24, 32, 32], encoder_hidden_dim=32,
        encoder_ffn_dim=64, encoder_attention_heads=4, d_model=32, num_queries=20,
        decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64, decoder_layers=2,
        decoder_attention_heads=4, hidden_expansion=0.5, depth_mult=0.34, **LABELS,
    )  # fmt: skip
    processor = hf.RTDetrImageProcessor(size={"height": 96, "width": 96})
    return save(folder, hf.DFineForObjectDetection(config), processor)


def retinanet(folder: Path) -> Path:
    arguments = {"num_classes": 81, "min_size": 64, "max_size": 96}
    model = get_model("retinanet_resnet50_fpn", weights=None, weights_backbone=None, **arguments)
    names = ["__background__", *CATEGORIES]
    return save_checkpoint(
        "retinanet_resnet50_fpn", enliven(model), folder, categories=names, **arguments
    )


def ssdlite(folder: Path) -> Path:
    name = "ssdlite320_mobilenet_v3_large"
    model = get_model(name, weights=None, weights_backbone=None, num_classes=81)
    names = ["__background__", *CATEGORIES]
    return save_checkpoint(name, enliven(model), folder, categories=names, num_classes=81)


def fcos(folder: Path) -> Path:
    arguments = {"num_classes": 81, "min_size": 64, "max_size": 96}
    model = get_model("fcos_resnet50_fpn", weights=None, weights_backbone=None, **arguments)
    names = ["__background__", *CATEGORIES]
    return save_checkpoint(
        "fcos_resnet50_fpn", enliven(model), folder, categories=names, **arguments
    )


def _yolo(description: str) -> Any:
    """A YOLO with one sixteenth of the smallest one's width; ultralytics is optional."""
    if find_spec("ultralytics") is None:
        pytest.skip("YOLO needs ultralytics: pip install --no-deps -r envs/yolo.lock")
    from layersense.models.yolo import import_ultralytics

    import_ultralytics()
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load

    network = yaml_model_load(description)
    network |= {"scales": {"n": [0.33, 0.0625, 256]}, "scale": "n"}
    model = DetectionModel(network, verbose=False)
    model.names = dict(enumerate(CATEGORIES))
    enliven(model)
    # Boxes of a size at which some overlap with the targets, at every level.
    for name, heads in model.model[-1].named_children():
        if name.endswith("cv2"):
            for branch in heads:
                torch.nn.init.normal_(branch[-1].weight, std=0.01)
    model.model[-1].bias_init()
    return model


def yolo(folder: Path, description: str = "yolov8.yaml") -> Path:
    from layersense.models.yolo import save_checkpoint as save_yolo

    return save_yolo(_yolo(description), folder, size=160)


def yolo_pickle(folder: Path) -> Path:
    """What training with ultralytics writes."""
    model = _yolo("yolo26.yaml")
    folder.mkdir(parents=True)
    arguments = {"imgsz": 160}
    torch.save({"model": model.half(), "ema": None, "train_args": arguments}, folder / "best.pt")
    return folder / "best.pt"


def yolo11(folder: Path) -> Path:
    return yolo(folder, "yolo11.yaml")


def yolo26(folder: Path) -> Path:
    return yolo(folder, "yolo26.yaml")


# Classifiers


def resnet(folder: Path) -> Path:
    config = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32], depths=[1, 1, 1], layer_type="basic", **LABELS
    )
    processor = hf.ConvNextImageProcessor(size={"shortest_edge": 64})
    return save(folder, hf.ResNetForImageClassification(config), processor)


def vit(folder: Path) -> Path:
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=64, patch_size=16, **LABELS,
    )  # fmt: skip
    processor = hf.ViTImageProcessor(size={"height": 64, "width": 64})
    return save(folder, hf.ViTForImageClassification(config), processor)


def convnext(folder: Path) -> Path:
    config = hf.ConvNextConfig(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], **LABELS)
    processor = hf.ConvNextImageProcessor(size={"shortest_edge": 64})
    return save(folder, hf.ConvNextForImageClassification(config), processor)


def torchvision_resnet(folder: Path) -> Path:
    model = get_model("resnet18", weights=None, num_classes=80)
    return save_checkpoint(
        "resnet18", enliven(model), folder, categories=CATEGORIES, size=64, num_classes=80
    )


# Segmenters


def segformer(folder: Path) -> Path:
    config = hf.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=32, **LABELS,
    )  # fmt: skip
    processor = hf.SegformerImageProcessor(size={"height": 96, "width": 96}, do_reduce_labels=True)
    return save(folder, hf.SegformerForSemanticSegmentation(config), processor)


def lraspp(folder: Path) -> Path:
    name = "lraspp_mobilenet_v3_large"
    model = get_model(name, weights=None, weights_backbone=None, num_classes=81)
    names = ["__background__", *CATEGORIES]
    return save_checkpoint(name, enliven(model), folder, categories=names, size=96, num_classes=81)


def deeplab(folder: Path) -> Path:
    name = "deeplabv3_mobilenet_v3_large"
    model = get_model(name, weights=None, weights_backbone=None, num_classes=81)
    names = ["__background__", *CATEGORIES]
    return save_checkpoint(name, enliven(model), folder, categories=names, size=96, num_classes=81)


def builder(folders: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a family's checkpoint, made once."""

    @cache
    def make(name: str) -> Path:
        return seeded(globals()[name], folders.mktemp(name.replace("_", "-")))

    return make


def seeded(make: Any, folder: Path, **arguments: Any) -> Path:
    """Make a checkpoint whose weights are the same every time."""
    torch.manual_seed(0)
    return make(folder, **arguments)


def glpn(folder: Path) -> Path:
    """A model of depth, which no task of layersense knows."""
    config = hf.GLPNConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=16,
    )  # fmt: skip
    return save(folder, hf.GLPNForDepthEstimation(config), hf.GLPNImageProcessor())


# Language models


def gpt2(folder: Path) -> Path:
    words = tokenizer()
    config = hf.GPT2Config(
        vocab_size=len(words), n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=2,
        eos_token_id=1,
    )  # fmt: skip
    return save(folder, hf.GPT2LMHeadModel(config), words)


def _decoder(words: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 512, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip


def smollm2(folder: Path) -> Path:
    """SmolLM2 is a Llama whose output layer is its embedding."""
    words = tokenizer()
    config = hf.LlamaConfig(**_decoder(words), tie_word_embeddings=True)
    return save(folder, hf.LlamaForCausalLM(config), words)


def qwen2(folder: Path) -> Path:
    words = tokenizer()
    return save(folder, hf.Qwen2ForCausalLM(hf.Qwen2Config(**_decoder(words))), words)


def qwen3(folder: Path) -> Path:
    words = tokenizer()
    return save(folder, hf.Qwen3ForCausalLM(hf.Qwen3Config(**_decoder(words))), words)


def gemma3(folder: Path) -> Path:
    words = tokenizer()
    config = hf.Gemma3TextConfig(**_decoder(words), layer_types=["full_attention"] * 2)
    return save(folder, hf.Gemma3ForCausalLM(config), words)


# Vision-language models

_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "</s>\n{% endfor %}"
)


def llava_onevision(folder: Path) -> Path:
    words = tokenizer(image="<image>", video="<video>")
    vision = hf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8, vision_use_head=False,
    )  # fmt: skip
    config = hf.LlavaOnevisionConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**_decoder(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]], vision_feature_layer=-1,
    )  # fmt: skip
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(
            size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]]
        ),
        tokenizer=words,
        video_processor=hf.LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_TEMPLATE.replace("IMAGE", "<image>"),
    )
    return save(folder, hf.LlavaOnevisionForConditionalGeneration(config), processor)


def _qwen3_vl_parts() -> tuple[Any, dict[str, Any], Any]:
    words = tokenizer(
        image="<|image_pad|>", video="<|video_pad|>", start="<|vision_start|>",
        end="<|vision_end|>",
    )  # fmt: skip
    processor = hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(
            patch_size=8, merge_size=2,
            size={"shortest_edge": 32 * 32, "longest_edge": 48 * 48},
        ),
        tokenizer=words,
        video_processor=hf.Qwen3VLVideoProcessor(patch_size=8, merge_size=2),
        chat_template=_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    ids = {
        f"{name}_token_id": words.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8,
        "out_hidden_size": 32, "num_position_embeddings": 36, "deepstack_visual_indexes": [0],
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True,
            "rope_theta": 10000.0}  # fmt: skip
    text = {**_decoder(words), "rope_parameters": rope}
    return processor, {"vision_config": vision, "text_config": text, **ids}, words


def qwen3_vl(folder: Path) -> Path:
    processor, keys, _ = _qwen3_vl_parts()
    return save(folder, hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(**keys)), processor)


# Mixtures of experts


def qwen3_moe(folder: Path, experts: int = 6, chosen: int = 2) -> Path:
    words = tokenizer()
    config = hf.Qwen3MoeConfig(
        **_decoder(words), num_experts=experts, num_experts_per_tok=chosen,
        moe_intermediate_size=32, decoder_sparse_step=1, norm_topk_prob=True,
    )  # fmt: skip
    return save(folder, hf.Qwen3MoeForCausalLM(config), words)


def many_experts(folder: Path) -> Path:
    """More experts than a short text has tokens."""
    return qwen3_moe(folder, experts=128, chosen=1)


def mixtral(folder: Path) -> Path:
    words = tokenizer()
    config = hf.MixtralConfig(**_decoder(words), num_local_experts=4, num_experts_per_tok=2)
    return save(folder, hf.MixtralForCausalLM(config), words)


def qwen3_vl_moe(folder: Path) -> Path:
    processor, keys, _ = _qwen3_vl_parts()
    text = {**keys["text_config"], "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32}  # fmt: skip
    config = hf.Qwen3VLMoeConfig(**{**keys, "text_config": text})
    return save(folder, hf.Qwen3VLMoeForConditionalGeneration(config), processor)


_OWN_MIXTURE = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_mixture"
    num_experts = 4
    num_experts_per_tok = 1


class Expert(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(size, size, bias=False) for _ in range(3)
        )

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config.hidden_size) for _ in range(config.num_experts))

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            out = out.index_add(0, rows, expert(flat[rows]) * weight[rows, None])
        return out.view_as(hidden)


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Mixture(config)
        self.post_init()
"""


def own_mixture(folder: Path) -> Path:
    """Linear layers for each expert, by Python code that comes with the checkpoint."""
    words = tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "own_mixture.py").write_text(_OWN_MIXTURE)
    classes: dict[str, Any] = {"__name__": "own_mixture"}
    exec(_OWN_MIXTURE, classes)
    config = classes["OwnConfig"](**_decoder(words))
    save(folder, classes["OwnForCausalLM"](config), words)
    written = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    written["auto_map"] = {key: f"own_mixture.{name}" for key, name in code.items()}
    (folder / "config.json").write_text(json.dumps(written))
    return folder
