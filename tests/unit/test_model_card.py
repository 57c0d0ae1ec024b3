"""What the card of a checkpoint says of where it is from."""

import pytest
import score_files as sf

from layersense import config
from layersense.export.card import model_card
from layersense.export.store import Checked, Expected, Exported
from layersense.manifests.schema import Manifest
from layersense.recipes.decide import build_manifest


@pytest.fixture
def manifest() -> Manifest:
    scheme = config.Scheme(quant_formats=["FP8_ALL_LAYERS_CFG"], effective_bits=16)
    return build_manifest(sf.make_scores(), "demo", "fp8", scheme, {})


@pytest.mark.parametrize(
    ("id", "revision", "links"),
    [
        ("owner/model", "0123abc", True),
        ("./model", None, False),
        ("model", None, False),  # a folder of this name
        ("yolo11n.pt", None, False),
        ("demo", None, False),
    ],
)
def test_a_card_links_to_what_is_on_the_hub_alone(
    manifest: Manifest, id: str, revision: str | None, links: bool
) -> None:
    manifest.model.id, manifest.model.revision = id, revision
    expected = Expected(
        original="", quantized={}, shapes={}, formats={}, unquantized=[], changed=[],
        parameters=[], dtype="BF16",
    )  # fmt: skip
    checked = Checked(
        problems=[], vllm=[], tensors=1, bytes=1, quantized_bytes=1, compared=1, differing=0,
        worst_steps=0,
    )  # fmt: skip
    exported = Exported(
        run="demo", scheme="fp8", digest="", recipe_digest="", quant_algo="FP8", effective_bits=8,
        effective_bits_asked=8, kept={}, predicted_bytes=1, files={}, expected=expected,
        checked=checked, seconds={}, peak_memory_bytes=0, environment={},
    )  # fmt: skip
    assert (f"base_model: {id}\n" in model_card(manifest, exported, None)) == links
