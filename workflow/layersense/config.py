"""Pydantic models of ``config.yaml``: every key, its type, its default and what it means.

``config/README.md`` and ``workflow/schemas/config.schema.json`` are generated from this module.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""A name that becomes a file or folder name: letters, digits, dots, underscores and hyphens."""

Modality = Literal["image_text", "text", "text_pair", "image_boxes", "image_labels", "image_masks"]
Method = Literal["gradient", "kl_div"]
Engine = Literal["fused", "modelopt"]
KvCache = Literal["none", "fp8", "fp8_cast", "nvfp4", "nvfp4_cast"]
Target = Literal["generic", "vllm", "tensorrt-llm", "tensorrt"]

TASK_MODALITIES: dict[str, tuple[Modality, ...]] = {
    "causal-lm": ("text",),
    "image-text-to-text": ("image_text", "text"),
    "seq2seq-lm": ("text_pair",),
    "image-classification": ("image_labels",),
    "object-detection": ("image_boxes",),
    "semantic-segmentation": ("image_masks",),
}
"""What a batch of each task may hold; the first is the default."""
TASK_METHODS: dict[str, tuple[Method, ...]] = {"object-detection": ("gradient",)}
"""Methods of the tasks that do not have all: `kl_div` needs one output distribution."""
ROW_MODALITIES = ("image_text", "text")
"""What a batch holds where `calibration` counts its rows: the others draw from the same images,
of which there may be fewer."""
OUTSIDE_TASK = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
"""A task of the user's own: module and class."""

Task = Annotated[str, StringConstraints(pattern=rf"^({'|'.join(TASK_MODALITIES)}|{OUTSIDE_TASK})$")]

SCORE_SAMPLES = 128
"""How many rows a run scores that does not say so, if the calibration rows are as many."""


COCO_SPLITS = {"train2014": "2014", "val2014": "2014", "train2017": "2017", "val2017": "2017"}
"""COCO's splits with annotations → the year in the name of their zip."""
COCO_ANNOTATIONS = "http://images.cocodataset.org/annotations/annotations_trainval{year}.zip"
"""COCO's own address; its certificate is for another name, so it has no https."""


class Section(BaseModel):
    """A part of the config; unknown keys and values of another type are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class DatasetSection(Section):
    """What every kind of dataset shares."""

    calibration: int = Field(512, ge=1)
    """Rows in the calibration split; scoring uses the first of them."""
    heldout: int = Field(64, ge=0)
    """Rows in the held-out split, which shares no image with the calibration split."""
    seed: int = Field(0, ge=0)
    """Seed of the hash that draws both splits."""


class SampleDataset(DatasetSection):
    """The 27 photographs and 135 captions that come with layersense."""

    source: Literal["sample"]
    """`sample`: the embedded sample."""


class Fetch(Section):
    """What a COCO dataset fetches that is not there: annotations, then the sampled images alone."""

    annotations: str | None = Field(None, pattern=r"^https?://\S+$")
    """Address of a zip with `captions_{split}.json` or `instances_{split}.json`; default COCO's
    own, for its splits `train2014`, `val2014`, `train2017` and `val2017`."""
    connections: int = Field(4, ge=1, le=16)
    """Connections to the server at once."""


class CocoDataset(DatasetSection):
    """COCO in its own layout: `annotations/`, and one folder of images for each split."""

    source: Literal["coco"]
    """`coco`: COCO's JSON files and images."""
    root: str
    """Folder that holds `annotations/` and the image folders."""
    split: Name = "train2017"
    """COCO split, such as `train2017` or `val2017`; it names the three files below."""
    captions: str | None = None
    """Captions file, or one in a zip (`annotations.zip/captions.json`); default
    `{root}/annotations/captions_{split}.json`, or the one in a zip there or in `root`."""
    instances: str | None = None
    """Instances file (boxes and masks), in the same way; none where there is none."""
    images: str | None = None
    """Image folder, or a zip, which is not unpacked; default `{root}/{split}`, or
    `{root}/{split}.zip`."""
    fetch: Fetch | None = None
    """Fetch what is not there into `root`; `{}` with the defaults. Images come from the `coco_url`
    that the annotations name. Without it nothing is fetched."""

    @property
    def annotations_url(self) -> str | None:
        """Where the zip of annotations is fetched; None for an unknown split of no address."""
        if self.fetch is not None and self.fetch.annotations is not None:
            return self.fetch.annotations
        year = COCO_SPLITS.get(self.split)
        return year and COCO_ANNOTATIONS.format(year=year)


class ImagesDataset(DatasetSection):
    """Your own photographs, with a table of what they show."""

    source: Literal["images"]
    """`images`: a folder of images and a table."""
    images: str
    """Folder, or zip, that the table's image names are relative to."""
    table: str
    """CSV or JSONL file with the columns `image` and `text`."""


class TextDataset(DatasetSection):
    """Your own texts."""

    source: Literal["text"]
    """`text`: a JSONL file."""
    file: str
    """JSONL file with the key `text` in each line."""


Dataset = Annotated[
    SampleDataset | CocoDataset | ImagesDataset | TextDataset, Field(discriminator="source")
]


class DemoModel(Section):
    """A small Qwen2.5-VL that the workflow builds and trains on the embedded sample."""

    source: Literal["demo"]
    """`demo`: built by the workflow, no download."""

    @property
    def task(self) -> str:
        """The task of the demo model."""
        return "image-text-to-text"

    @property
    def trust_remote_code(self) -> bool:
        """The demo model runs no code but that of transformers."""
        return False


class CheckpointModel(Section):
    """A checkpoint in Hugging Face form: a hub id or a local directory."""

    source: Literal["checkpoint"] = "checkpoint"
    """`checkpoint`: may be left out."""
    checkpoint: str = Field(min_length=1)
    """Hub id such as `Qwen/Qwen2.5-VL-3B-Instruct`, a directory (`./…`, `/…` or `~/…`), or a
    detector of ultralytics as a local file, `./yolo11n.pt` (docs/tasks.md)."""
    task: Task
    """What the model does; it decides the loss and what a batch holds: `causal-lm`,
    `image-text-to-text`, `seq2seq-lm`, `image-classification`, `object-detection`,
    `semantic-segmentation`, or a task of your own as `package.module:Class` (docs/tasks.md)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; resolved to a commit when it is fetched."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint, such as what is in the pickle of a `.pt`
    file. Needs `revision` for a hub id, and is named in every report."""


def _model_source(value: Any) -> str | None:
    """Return which kind of model an entry is; `source: checkpoint` may be left out."""
    source = (
        value.get("source", "checkpoint")
        if isinstance(value, dict)
        else getattr(value, "source", None)
    )
    return source if isinstance(source, str) else None


Model = Annotated[
    Annotated[DemoModel, Tag("demo")] | Annotated[CheckpointModel, Tag("checkpoint")],
    Discriminator(_model_source),
]


class OwnFormat(Section):
    """A format of your own: a base, and what is different."""

    base: str
    """Name of a ModelOpt config (`FP8_DEFAULT_CFG`) or of its all-layers form."""
    weight: dict[str, Any] = {}
    """Attributes of the weight quantizer to change, as in ModelOpt's `QuantizerAttributeConfig`:
    `num_bits`, `axis`, `block_sizes`, `enable`…"""
    input: dict[str, Any] = {}
    """Attributes of the input quantizer to change."""
    algorithm: str | dict[str, Any] | None = None
    """Calibration algorithm, if not the base's: `max`, `awq_lite`, `smoothquant`…"""


class CostTable(Section):
    """A budget in a unit of your own: what each layer costs under each format."""

    file: str
    """CSV file with the columns `layer`, `format` (`NONE` for unquantized) and `cost`. A layer is a
    module, or a layer group as tables name it."""
    at_most: float = Field(gt=0)
    """Budget: the largest sum of costs, in the unit of the file."""
    unit: str = Field("ms", min_length=1)
    """What the costs are, for reports."""


class SearchSpace(Section):
    """Layers that choose from formats of their own."""

    layers: list[str] = Field(min_length=1)
    """The layers, as shell patterns on module names; of a layer group all or none must match."""
    quant_formats: list[str] = Field(min_length=1)
    """Formats that they may take, instead of the scheme's."""
    unquantized: bool = True
    """Whether they may stay unquantized."""


class Scheme(Section):
    """What to decide: which formats may be used, where, and at which budget. Names no data."""

    recipe: str | None = None
    """A search recipe of ModelOpt, `general/auto_quantize/…` or a file of that form, that stands
    for `quant_formats`, `effective_bits`, `exclude`, `cost_excluded`, `active_expert_ratio`,
    `search_spaces` and `kv_cache`; what is written beside it takes precedence. Method and samples
    are the run's."""

    quant_formats: list[str] = Field(min_length=1)
    """Formats that a layer may take, beside staying unquantized."""
    effective_bits: float | None = Field(None, gt=0, le=16)
    """Budget: average bits per weight over all searched layers. A scheme has one budget: this,
    `size_gb` or `cost_table`."""
    size_gb: float | None = Field(None, gt=0)
    """Budget: size of the whole checkpoint in GB (10^9 bytes), with all that is never searched."""
    cost_table: CostTable | None = None
    """Budget: a cost that you give by layer and format, such as a latency."""
    risk: float = Field(0.0, ge=0)
    """How many standard errors of a score count as damage: 0 minimises the scores, 1 or 2 avoid
    formats whose score is uncertain."""
    coverage_mode: Literal["full", "fraction"] = "full"
    """`full`: every layer may be quantized. `fraction`: only the least sensitive layers, up to
    `coverage_fraction`."""
    coverage_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the searched weight elements that may be quantized."""
    include: list[str] = Field(["*"], min_length=1)
    """Layers that may be quantized, as shell patterns on module names."""
    exclude: list[str] = []
    """Layers that stay unquantized, as shell patterns on module names."""
    search_spaces: list[SearchSpace] = []
    """Layers that choose from other formats than `quant_formats`; one layer matches one entry at
    most."""
    cost_excluded: list[str] = []
    """Layers that `effective_bits` does not count, as shell patterns on module names: they are
    searched, and neither their weights nor their bits enter the average."""
    active_expert_ratio: float | None = Field(None, gt=0, le=1)
    """Share of the routed experts that a token runs through: `effective_bits` counts their weights
    by that much, as ModelOpt's cost model `active_moe`; default all of them."""
    routers: bool = False
    """Whether the routers of a mixture of experts may be quantized."""
    unreached: Literal["keep", "quantize"] = "keep"
    """What happens to layers that the loss never reached: `keep` them unquantized, or `quantize`
    them as if they were insensitive."""
    objective: Literal["sum", "max"] = "sum"
    """What is minimised: the sum of the scores, or their maximum as ModelOpt does for `kl_div`."""
    target: Target = "generic"
    """What the recipe is to run on: which formats can stand together, which layers must agree and
    which cannot be quantized at all. `generic` restricts nothing; `tensorrt` is for ONNX files."""
    kv_cache: KvCache = "none"
    """Format of a language model's key-value cache, applied uniformly after the layers have theirs;
    `_cast` takes the type's own range instead of a calibrated one. It costs no bit of the budget
    and is part of verification, `quant_config.json` and `recipe.yaml`."""

    @property
    def all_formats(self) -> list[str]:
        """Every format that some layer may take."""
        spaces = (name for space in self.search_spaces for name in space.quant_formats)
        return list(dict.fromkeys([*self.quant_formats, *spaces]))


class Verify(Section):
    """How much of a run is verified: measured on the held-out rows, against what was predicted."""

    groups: int = Field(40, ge=2)
    """Layer groups to quantize alone, under each format."""
    points: int = Field(5, ge=1)
    """Recipes of each scheme's frontier to measure."""
    random: int = Field(20, ge=0)
    """Random recipes within 0.05 bits of each scheme's choice, to compare with."""
    refine: int = Field(0, ge=0)
    """Recipes to measure for each scheme in search of a better one at its bits, by swaps."""
    captions: bool = False
    """Let every whole recipe write a caption of each held-out photograph, and compare them with
    those of people (CIDEr-D). Takes up to 32 passes of the model for each; for vision-language
    models."""


class Run(Section):
    """What one GPU job measures: a model, on data, by a method; and the schemes to report."""

    model: str
    """Name of an entry of `models`."""
    dataset: str
    """Name of an entry of `datasets`."""
    schemes: list[str] = Field(min_length=1)
    """Names of entries of `schemes`; their formats are what is measured."""
    modality: Modality | None = None
    """What a batch holds; it follows from the model's task and is needed only for a
    vision-language model on captions alone (`text`), and for a task of your own."""
    method: Method = "gradient"
    """ModelOpt's sensitivity: `gradient` or `kl_div`."""
    engine: Engine | None = None
    """What measures: `fused` scores all formats in one backward pass and is the default for
    `gradient`; `modelopt` is stock `mtq.auto_quantize`, the reference, and what `kl_div` needs."""
    calibration_samples: int | None = Field(None, ge=1)
    """Rows (captions, images or pairs) that calibrate the quantizers; default all of the
    calibration split."""
    score_samples: int | None = Field(None, ge=1)
    """Rows that are scored, the first of the calibration rows; default 128, or all if fewer."""
    heldout_samples: int | None = Field(None, ge=1)
    """Held-out rows for verification; default all of the held-out split."""
    verify: Verify | None = None
    """Measure single groups and whole recipes on the held-out rows; `{}` with the defaults."""
    export: list[str] = []
    """Names of those of its schemes whose recipe `snakemake export` writes as a checkpoint."""
    batch_size: int = Field(4, ge=1)
    """Rows in a scoring batch; scores do not depend on it."""
    calibration_batch_size: int = Field(4, ge=1)
    """Rows in a calibration batch; padding enters the calibrated ranges, so it is never split."""
    max_length: int = Field(512, ge=8)
    """Longest sequence in tokens; a longer caption is cut."""
    min_pixels: int | None = Field(None, ge=1)
    """Smallest image in pixels, as the processor resizes it; default the processor's own."""
    max_pixels: int | None = Field(None, ge=1)
    """Largest image in pixels, as the processor resizes it; default the processor's own."""
    prompt: str = "Describe the image."
    """What the user's turn says beside the image."""
    seed: int = Field(0, ge=0)
    """Seed of torch; the rows are drawn by the dataset's own seed."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Weights' type while scoring; `auto` is the checkpoint's."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to score."""
    gpus: int = Field(1, ge=1)
    """GPUs that one job spreads the model over, for a model that does not fit onto one; scores
    do not depend on it."""

    @property
    def measured_by(self) -> Engine:
        """The engine, or the method's default."""
        return self.engine or ("fused" if self.method == "gradient" else "modelopt")


class ImportedManifest(Section):
    """A manifest that another implementation wrote, or ModelOpt's saved AutoQuantize state (`.pt`).

    It stands in the tables and the summary beside what is measured here, marked as imported. What
    it does not say stays empty, unless it is said here.
    """

    file: str
    """The manifest."""
    model: str | None = None
    """Name of its model, if it names none or another is better."""
    dataset: str | None = None
    """Name of its dataset, in the same way."""
    scheme: str | None = None
    """Name of its scheme, in the same way; a saved state is called like its file."""
    model_from_file_name: bool = False
    """Take the model's name from the file's, up to its first dot."""


class Report(Section):
    """How reports look; a change here re-renders reports alone."""

    title: str = "Layer sensitivity"
    """Heading of the reports."""
    top: int = Field(10, ge=1)
    """How many layers the short tables list."""


class Config(Section):
    """The whole of `config.yaml`."""

    datasets: dict[Name, Dataset] = Field(min_length=1)
    """Calibration databases to build."""
    models: dict[Name, Model] = Field(min_length=1)
    """Models to measure."""
    formats: dict[Name, OwnFormat] = {}
    """Formats of your own, beside those that come with ModelOpt."""
    schemes: dict[Name, Scheme] = Field(min_length=1)
    """What to decide."""
    runs: dict[Name, Run] = Field(min_length=1)
    """What to measure."""
    manifests: dict[Name, ImportedManifest] = {}
    """Results of other implementations; the name is that of a run in the tables."""
    report: Report = Report()
    """How reports look."""
    extensions: str | None = None
    """Folder in which ModelOpt's CUDA extensions are compiled, once for each kind of GPU and each
    version of torch and ModelOpt; default `TORCH_EXTENSIONS_DIR`, or `~/.cache/torch_extensions`.
    All jobs share it, so on a cluster all nodes have to see it."""
    # Lax: `--config frozen=true` arrives as text.
    frozen: bool = Field(False, strict=False)
    """Leave the measuring rules out: render what is there, name what is missing."""
