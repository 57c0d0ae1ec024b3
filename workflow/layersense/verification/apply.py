"""`layersense apply`: a recipe on its model, checked module by module."""

import logging
from pathlib import Path

from layersense import paths
from layersense.errors import LayersenseError
from layersense.files import atomic_path
from layersense.models.checkpoints import read_checkpoint
from layersense.quantization.extensions import cache_folder
from layersense.quantization.formats import format_from_settings
from layersense.recipes.quant_config import read_quant_config

logger = logging.getLogger(__name__)


def apply_recipe(
    file: Path, model_file: Path | None, database_file: Path | None, out: Path | None
) -> str:
    """Quantize a model by a ``quant_config.json``, check it, and return a sentence about it.

    Args:
        file: the recipe.
        model_file: record of the checkpoint; default: where the workflow keeps it.
        database_file: calibration database; default: the same.
        out: where to save the quantized model by ModelOpt's `mto.save`; None saves nothing.

    Raises:
        LayersenseError: an input cannot be read or is another one than the recipe was made for,
            or the model is not quantized as the recipe says.
    """
    config = read_quant_config(file)
    model_file = model_file or _beside(file, paths.model(config.model_name))
    database_file = database_file or _beside(file, paths.calibration(config.dataset_name))
    for path, option in ((model_file, "--model"), (database_file, "--database")):
        if not path.exists():
            raise LayersenseError(f"{path}: is not there; say where it is with {option}")
    checkpoint = read_checkpoint(model_file)
    if checkpoint.digest != config.model_digest:
        raise LayersenseError(
            f"{checkpoint.id}: is not the checkpoint that the recipe was made for ({config.model}, "
            f"SHA-256 {config.model_digest[:12]}…); solve the scheme for this one"
        )
    import modelopt.torch.opt as mto

    from layersense.scoring.job import extensions_here, leased
    from layersense.verification.replay import apply_config, check_applied, load_calibration

    with leased(config.settings["device"]):
        formats = [
            format_from_settings(
                part.format,
                {
                    "weight": part.weight,
                    "input": part.input,
                    "algorithm": part.config["algorithm"],
                },
            )
            for part in config.parts
        ]
        extensions_here(formats, config.settings, cache_folder())
        loaded, calibration = load_calibration(config, checkpoint, database_file)
        model = apply_config(loaded.model, config, calibration)
        check_applied(model, config)
        if out is not None:
            with atomic_path(out) as temporary:
                mto.save(model, temporary)
    parts = ", ".join(f"{len(part.modules)} modules {part.format}" for part in config.parts)
    if config.kv_cache is not None:
        parts += f"{', ' if parts else ''}key-value cache {config.kv_cache.format}"
    saved = f", saved as {out}" if out else ""
    return f"{config.model}: {parts or 'nothing quantized'}; all as the recipe says{saved}"


def _beside(file: Path, wanted: str) -> Path:
    """Return where a file of the workflow is, in the results that a recipe lies in.

    A scheme's own recipe lies three folders deep in them, a refined one four.
    """
    places = [
        folder / Path(wanted).relative_to(paths.RESULTS) for folder in file.resolve().parents[2:4]
    ]
    return next((place for place in places if place.exists()), (*places, Path(wanted))[0])
