"""Check the config: all problems at once, before anything starts (no torch)."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from layersense import config as models
from layersense.calibration.archives import is_file, is_folder
from layersense.calibration.build import coco_files
from layersense.config import COCO_SPLITS, TASK_METHODS, TASK_MODALITIES, Config, OwnFormat
from layersense.config_file import read_config_file
from layersense.config_problems import Part, Path_, Problems, either, shown
from layersense.errors import LayersenseError
from layersense.export.allow import ONNX_TASKS, TASKS, menu, nearest_format, writes
from layersense.models.checkpoints import is_path, is_pickle
from layersense.models.outside import find_module, is_outside
from layersense.paths import RESERVED_RUNS, RESERVED_SCHEMES
from layersense.quantization.formats import (
    Format,
    UnknownFormatError,
    check_device,
    resolve_format,
)
from layersense.quantization.kv_cache import CACHE_TASKS, KV_CACHES, needs_cuda
from layersense.recipes.search_recipe import scheme_of
from layersense.recipes.targets import TARGETS, reads

BUDGETS = ("effective_bits", "size_gb", "cost_table")
"""Keys of a scheme of which it has one."""
_BOXES = "take COCO with an instances file, or the sample"
_LACKING: dict[str, dict[str, tuple[str, str]]] = {
    "image_text": {
        "text": (
            "texts and no images",
            "set `modality: text`, or take a dataset with images",
        )
    },
    "text_pair": {
        "text": ("no two texts of one image", "take a dataset of images with several texts each")
    },
    "image_labels": {"text": ("texts and no images", "take a dataset with images")},
    "image_boxes": {
        "text": ("texts and no boxes", _BOXES),
        "images": ("images and no boxes", _BOXES),
    },
    "image_masks": {
        "text": ("texts and no masks", _BOXES),
        "images": ("images and no masks", _BOXES),
    },
}
"""Modality → source of data that cannot have it → what it has, and what to do."""
_COCO_FILE = {
    "image_text": "captions",
    "text": "captions",
    "text_pair": "captions",
    "image_labels": "instances",
    "image_boxes": "instances",
    "image_masks": "instances",
}
"""Modality → which of COCO's files it needs."""
SECTIONS = ("datasets", "models", "formats", "schemes", "runs", "manifests")
"""Sections that map names to entries."""


def load_config_file(path: str | Path) -> Config:
    """Read a config file, check it and the files that it names, and return it.

    Raises:
        LayersenseError: see :func:`layersense.config_file.read_config_file` and
            :func:`load_config`.
    """
    return load_config(read_config_file(path), str(path))


def validate_config(path: str | Path) -> list[str]:
    """Return what is wrong with a config file and the files that it names, in sentences."""
    try:
        load_config_file(path)
    except LayersenseError as error:
        return [str(error)]
    return []


def load_config(data: Mapping[str, Any], file: str, *, check_files: bool = True) -> Config:
    """Check a config and return it.

    Types, unknown keys and all that depends on several entries are checked together: a wrong type
    in one place hides no problem in another.

    Args:
        data: content of the config, merged by Snakemake from files and the command line.
        file: where it comes from, for messages.
        check_files: whether the checkpoints and data that runs use must be there; relative paths
            are relative to the working directory.

    Raises:
        LayersenseError: a heading, then one line for each problem: file, key path, what was
            expected, what was found, and the nearest valid word.
    """
    plain = {**data, "schemes": _expanded(data.get("schemes"), file)}
    if "schemes" not in data:
        del plain["schemes"]
    checker = _Checker(plain, check_files)
    config: Config | None = None
    try:
        config = Config.model_validate(plain)
    except ValidationError as error:
        checker.add_errors(error.errors(include_url=False))
    checker.check()
    if checker.problems or config is None:
        lines = [f"{file}: {problem}" for problem in checker.problems]
        heading = f"the config has {len(lines)} problem{'s' if len(lines) > 1 else ''}:"
        raise LayersenseError("\n  ".join([heading, *lines]))
    return config


def _expanded(schemes: Any, file: str) -> Any:
    """Return schemes with the keys that their search recipes stand for.

    Raises:
        LayersenseError: a recipe cannot be read, or asks for what a scheme cannot say.
    """
    if not isinstance(schemes, dict):
        return schemes
    expanded = {}
    for name, scheme in schemes.items():
        expanded[name] = scheme
        if isinstance(scheme, dict) and isinstance(recipe := scheme.get("recipe"), str):
            try:
                keys = scheme_of(recipe)
            except LayersenseError as error:
                raise LayersenseError(f"{file}: schemes.{name}.recipe: {error}") from None
            if any(scheme.get(key) is not None for key in BUDGETS):
                del keys["effective_bits"]
            expanded[name] = {**keys, **scheme}
    return expanded


def check_gpus(config: Config, gpus: int | None) -> list[str]:
    """Return warnings about ``--resources gpu=…``, one sentence each.

    Snakemake does not count a resource that has no limit, and caps a request that exceeds it.

    Args:
        config: the config.
        gpus: the limit that Snakemake was given, None if none.
    """
    runs = [name for name, run in config.runs.items() if run.device == "cuda"]
    if config.frozen or not runs:
        return []
    if gpus is None:
        return [
            f"no `--resources gpu=N` is given, so {len(runs)} scoring job(s) with `device: cuda` "
            "may start at once and wait for each other's GPU; add `--resources gpu=1`, or as many "
            "GPUs as there are"
        ]
    if gpus < 1:
        return [
            f"`--resources gpu={gpus}` does not keep scoring jobs ({', '.join(runs)}) from "
            "starting, Snakemake only caps what they ask for; give `--resources gpu=1`, or "
            "`--config frozen=true` to measure nothing"
        ]
    return [
        f"run {name} asks for {config.runs[name].gpus} GPUs, and under `--resources gpu={gpus}` "
        f"its job gets {gpus}; give `--resources gpu={config.runs[name].gpus}` or more"
        for name in runs
        if config.runs[name].gpus > gpus
    ]


class _Checker(Problems):
    """The problems of one config that no single value shows."""

    def __init__(self, data: dict[str, Any], check_files: bool) -> None:
        super().__init__(data)
        try:  # as lax as the key itself
            self.frozen = TypeAdapter(bool).validate_python(data.get("frozen", False))
        except ValidationError:
            self.frozen = False
        self.check_files = check_files

    def check(self) -> None:
        """Run every check that is not about one value's type."""
        for section in SECTIONS:
            self._check_names(section)
        self._check_formats()
        for name, scheme in self.items("schemes"):
            self._check_scheme(name, scheme)
        for name, model in self.items("models"):
            self._check_model(name, model)
        for name, run in self.items("runs"):
            self._check_run(name, run)
        runs = {str(name).lower() for name in self.section("runs")}
        for name in self.section("manifests"):
            if isinstance(name, str) and name.lower() in runs:
                self.add(("manifests", name), "is the name of a run, too; rename one of them")
        if self.check_files:
            self._check_files()

    def _check_names(self, section: str) -> None:
        reserved = {
            "runs": RESERVED_RUNS,
            "manifests": RESERVED_RUNS,
            "schemes": RESERVED_SCHEMES,
        }.get(section, frozenset())
        first: dict[str, str] = {}
        for name in self.section(section):
            if not isinstance(name, str):
                continue
            other = first.setdefault(name.lower(), name)
            if other != name:
                self.add(
                    (section, name),
                    f"differs from `{other}` only in letter case, and both would be one file on "
                    "some machines; rename one of them",
                )
            if name.lower() in reserved:
                self.add(
                    (section, name), "is the name of a file or folder of the workflow; rename it"
                )

    def _own_formats(self) -> dict[str, OwnFormat]:
        """Return the own formats whose types are right."""
        wrong = {path[1] for path in self.bad if path[0] == "formats" and len(path) > 1}
        return {
            name: OwnFormat.model_validate(entry)
            for name, entry in self.section("formats").items()
            if isinstance(name, str) and name not in wrong
        }

    def _check_formats(self) -> None:
        self.own = self._own_formats()
        self.resolved: dict[str, Format] = {}
        for name in self.own:
            try:
                self.resolved[name] = resolve_format(name, self.own)
            except LayersenseError as error:
                self._add_reason(("formats", name), str(error))

    def _add_reason(self, path: Path_, reason: str) -> None:
        """Note a problem that the registry explains, which may name the key path itself."""
        dotted = ".".join(str(key) for key in path)
        if reason.startswith(dotted):
            rest, _, reason = reason.removeprefix(dotted).partition(": ")
            path = (*path, *(key for key in rest.split(".") if key))
        self.add(path, reason)

    def _resolve(self, name: Any, path: Path_) -> Format | None:
        """Return a format of a scheme, having noted why there is none."""
        if not isinstance(name, str):
            return None
        if name in self.section("formats"):
            return self.resolved.get(name)  # a broken one is told of where it stands
        if name not in self.resolved:
            try:
                self.resolved[name] = resolve_format(name, self.own)
            except UnknownFormatError as error:
                expected = "expected a format (docs/formats.md lists them)"
                self.add(path, f"{expected}, found {shown(name)}{error.hint}")
                return None
            except LayersenseError as error:
                self.add(path, str(error))
                return None
        return self.resolved[name]

    def _check_scheme(self, name: str, scheme: Part) -> None:
        path = ("schemes", name)
        formats: list[Format] = []
        whole = (*path, "search_spaces") not in self.bad
        for i, word in enumerate(scheme.get("quant_formats", ())):
            format = self._resolve(word, (*path, "quant_formats", i))
            if format is None:
                whole = False
            elif format in formats:
                self.add((*path, "quant_formats", i), f"names the format `{format.name}` twice")
            else:
                formats.append(format)
        for i, space in enumerate(scheme.get("search_spaces", ())):
            whole &= space is not None
            for j, word in enumerate(space["quant_formats"] if space else ()):
                format = self._resolve(word, (*path, "search_spaces", i, "quant_formats", j))
                if format is None:
                    whole = False
                elif format not in formats:
                    formats.append(format)
        if scheme.get("effective_bits") is None:
            for key in ("cost_excluded", "active_expert_ratio"):
                if scheme.get(key):
                    self.add((*path, key), "is for a budget in `effective_bits`; leave it out")
        self._check_target(path, scheme, formats)
        self._check_budget(path, scheme)
        bits = scheme.get("effective_bits")
        if formats and whole and bits is not None:
            lowest = min(formats, key=lambda format: format.effective_bits)
            if bits < lowest.effective_bits:
                self.add(
                    (*path, "effective_bits"),
                    f"expected at least {lowest.effective_bits:g}, the bits of `{lowest.name}`, "
                    "the smallest format of the scheme",
                    bits,
                )
        fraction = scheme.get("coverage_fraction", 1)
        if scheme.get("coverage_mode") == "full" and fraction != 1:
            self.add(
                (*path, "coverage_fraction"),
                "expected 1.0 or nothing under `coverage_mode: full`; set "
                "`coverage_mode: fraction` to limit the share",
                fraction,
            )

    def _check_target(self, path: Path_, scheme: Part, formats: Sequence[Format]) -> None:
        target = scheme.get("target")
        if not isinstance(target, str) or target not in TARGETS:
            return
        runtime = TARGETS[target]
        for format in formats:
            if reads(target, format) is None:
                self.add(
                    (*path, "quant_formats"),
                    f"{runtime.title} does not read `{format.name}`; expected "
                    f"{either(runtime.formats)}, or another `target`",
                )
        cache = scheme.get("kv_cache")
        read = [name for entry in runtime.caches for name in entry.formats]
        if cache in KV_CACHES and cache not in read:
            self.add(
                (*path, "kv_cache"),
                f"expected {either(['none', *read])}: {runtime.title} reads no key-value cache in "
                "another format",
                cache,
            )

    def _check_budget(self, path: Path_, scheme: Part) -> None:
        given = [key for key in BUDGETS if scheme.get(key) is not None]
        broken = any((*path, key) in self.bad for key in BUDGETS)
        if len(given) > 1:
            self.add((*path, given[1]), f"expected one budget, and {given[0]} is given already")
        elif not given and not broken and scheme:
            self.add(
                (*path, "effective_bits"),
                f"expected this key ({self._description((*path, 'effective_bits'))}) or another "
                f"budget ({either(BUDGETS[1:])}), found nothing",
            )

    def _check_model(self, name: str, model: Part) -> None:
        checkpoint = model.get("checkpoint")
        if not isinstance(checkpoint, str):
            return
        path = ("models", name)
        revision = model.get("revision", "wrong")
        if is_pickle(checkpoint) and not model.get("trust_remote_code"):
            self.add(
                (*path, "trust_remote_code"),
                f"expected `true` if you trust where {checkpoint} comes from, because it is a "
                "pickle, which can run code when it is loaded, found nothing",
            )
        if is_path(checkpoint):
            if revision is not None and revision != "wrong":
                self.add(
                    (*path, "revision"),
                    f"a directory ({checkpoint}) has no revisions; remove the key",
                    revision,
                )
        elif (checkpoint.count("/") > 1 or checkpoint.endswith("/")) and not self.frozen:
            self.add(
                (*path, "checkpoint"),
                "expected a hub id such as `owner/name`, or a directory that exists or is written "
                "as `./…`, `/…` or `~/…`",
                checkpoint,
            )
        elif model.get("trust_remote_code") and revision is None:
            self.add(
                (*path, "revision"),
                f"expected a commit of {checkpoint}, because `trust_remote_code` would run "
                "whatever code the hub serves that day, found nothing",
            )

    def _check_run(self, name: str, run: Part) -> None:
        path = ("runs", name)
        for key in ("model", "dataset"):
            self._check_reference((*path, key), run.get(key), f"{key}s")
        schemes = run.get("schemes", ())
        seen: Counter[str] = Counter()
        for i, scheme in enumerate(schemes):
            self._check_reference((*path, "schemes", i), scheme, "schemes")
            if isinstance(scheme, str):
                seen[scheme] += 1
                if seen[scheme] == 2:
                    self.add((*path, "schemes", i), f"names the scheme `{scheme}` twice")
        self._check_samples(path, run)
        self._check_modality(path, run)
        if run.get("engine") == "fused" and run.get("method") == "kl_div":
            self.add(
                (*path, "engine"), "expected `modelopt`, which alone measures `kl_div`", "fused"
            )
        self._check_verify(path, run)
        self._check_export(path, run)
        least, most = run.get("min_pixels"), run.get("max_pixels")
        if least is not None and most is not None and least > most:
            self.add((*path, "min_pixels"), f"expected at most `max_pixels`, {most}", least)
        for scheme in seen:
            self._check_cache(name, run, scheme)
        if run.get("device") == "cpu":
            self._check_cpu(path, run, seen)

    def _task(self, run: Part) -> Any:
        """Return the task of a run's model; None if it has none that can be looked at."""
        model = self.part("models", run.get("model"))
        demo = model.get("source") == "demo"
        return models.DemoModel(source="demo").task if demo else model.get("task")

    def _check_cache(self, name: str, run: Part, scheme: str) -> None:
        """Check that a run's model and device can have the key-value cache of a scheme."""
        cache, task = self.part("schemes", scheme).get("kv_cache"), self._task(run)
        if not isinstance(cache, str) or cache not in KV_CACHES:
            return
        if task in TASK_MODALITIES and task not in CACHE_TASKS:
            self.add(
                ("schemes", scheme, "kv_cache"),
                f"expected `none`, because a model with `task: {task}` (run `{name}`) keeps no "
                "keys and values",
                cache,
            )
        elif run.get("device") == "cpu" and needs_cuda(cache):
            self.add(
                ("runs", name, "device"),
                f"expected `cuda`: ModelOpt has no CPU code for `kv_cache: {cache}` (scheme "
                f"`{scheme}`)",
            )

    def _check_cpu(self, path: Path_, run: Part, schemes: Iterable[str]) -> None:
        if run.get("gpus", 1) > 1:
            self.add((*path, "gpus"), "expected 1 under `device: cpu`", run["gpus"])
        for scheme in schemes:
            for word in _format_words(self.part("schemes", scheme)):
                if isinstance(word, str) and (format := self.resolved.get(word)):
                    try:
                        check_device(format, "cpu")
                    except LayersenseError as error:
                        self.add((*path, "device"), f"{error} (scheme `{scheme}`)")

    def _check_verify(self, path: Path_, run: Part) -> None:
        if run.get("verify") is None:
            return
        dataset = self.part("datasets", run.get("dataset"))
        if dataset.get("heldout") == 0:
            self.add(
                (*path, "verify"),
                f"needs held-out rows; set `heldout` of dataset `{run['dataset']}`, or leave "
                "`verify` out",
            )
        if (run["verify"] or {}).get("captions"):
            task = self._task(run)
            texts = run.get("modality") == "text" or dataset.get("source") == "text"
            if isinstance(task, str) and (
                (task in TASK_MODALITIES and task != "image-text-to-text") or texts
            ):
                self.add(
                    (*path, "verify", "captions"),
                    "lets a vision-language model write captions of photographs, which "
                    f"{'texts alone are not' if texts else f'`task: {task}` does not'}; leave it "
                    "out",
                )

    def _check_export(self, path: Path_, run: Part) -> None:
        if "schemes" not in run:  # nothing is known of what may be exported
            return
        schemes, task = run["schemes"], self._task(run)
        if run.get("export") and task is not None and not menu(task):
            self.add(
                (*path, "export"),
                f"a model of task `{task}` is not exported, which those of "
                f"{either((*TASKS, *ONNX_TASKS))} are; leave `export` out",
            )
            return
        for i, scheme in enumerate(run.get("export", ())):
            if not isinstance(scheme, str):
                continue
            if scheme not in schemes:
                self.add(
                    (*path, "export", i),
                    f"expected one of the run's `schemes` ({either(map(str, schemes))})",
                    scheme,
                    [str(name) for name in schemes],
                )
                continue
            for word in _format_words(self.part("schemes", scheme)):
                format = self.resolved.get(word) if isinstance(word, str) else None
                if format is not None and writes(format, menu(task or TASKS[0])) is None:
                    self.add(
                        (*path, "export", i),
                        f"ModelOpt's exporter cannot write format `{word}` of scheme `{scheme}` as "
                        f"it is measured; the nearest one that it can is "
                        f"`{nearest_format(format, menu(task or TASKS[0]))}`",
                        scheme,
                    )

    def _check_reference(self, path: Path_, name: Any, section: str) -> None:
        names = [str(key) for key in self.section(section)]
        # Where the section itself is missing, that is the problem to tell.
        if isinstance(name, str) and name not in names and (names or section in self.data):
            self.add(
                path, f"expected the name of an entry of `{section}` ({either(names)})", name, names
            )

    def _check_samples(self, path: Path_, run: Part) -> None:
        dataset_name = run.get("dataset")
        dataset = self.part("datasets", dataset_name) if isinstance(dataset_name, str) else {}

        def limit(key: str, most: int | None, what: str) -> None:
            asked = run.get(key)
            if asked is not None and most is not None and asked > most:
                self.add((*path, key), f"expected at most {most}, {what}", asked)

        rows = dataset.get("calibration")
        limit("calibration_samples", rows, f"the calibration rows of dataset `{dataset_name}`")
        limit("heldout_samples", dataset.get("heldout"), "its dataset's `heldout`")
        asked = run.get("calibration_samples", 0)
        used = rows if asked is None else asked
        if used and "calibration_samples" in run and (rows is None or used <= rows):
            limit("score_samples", used, "the calibration rows that the run uses")

    def _check_modality(self, path: Path_, run: Part) -> None:
        task = self._task(run)
        if (*path, "modality") in self.bad or not isinstance(task, str):
            return
        if task not in TASK_MODALITIES:
            if is_outside(task) and run["modality"] is None:
                words = get_args(models.Modality)
                self.add(
                    (*path, "modality"),
                    f"expected {either(words)}, as `{task}` is not looked into, found nothing",
                )
                return
            allowed: Iterable[str] = get_args(models.Modality)
        else:
            allowed = TASK_MODALITIES[task]
        modality = run["modality"] or next(iter(allowed))
        if modality not in allowed:
            self.add(
                (*path, "modality"),
                f"expected {either(allowed)}, what a model with `task: {task}` takes",
                modality,
            )
            return
        methods = TASK_METHODS.get(task)
        if methods is not None and run.get("method") not in (None, *methods):
            self.add(
                (*path, "method"),
                f"expected {either(methods)}, because a model with `task: {task}` has no one "
                "output distribution",
                run["method"],
            )
        source = self.part("datasets", run.get("dataset")).get("source")
        if source in _LACKING.get(modality, {}):
            lack, fix = _LACKING[modality][source]
            self.add((*path, "modality"), f"dataset `{run['dataset']}` holds {lack}; {fix}")
        elif source == "coco" and task in TASK_MODALITIES and self.check_files:
            kind = _COCO_FILE[modality]
            if (missing := self._missing_coco_file(run["dataset"], kind)) is not None:
                self.add(
                    (*path, "dataset"),
                    f"dataset `{run['dataset']}` has no {kind}, which a model with `task: {task}` "
                    f"takes: {missing} is not there; name the file by `{kind}` of the dataset, or "
                    "take another dataset",
                )

    def _missing_coco_file(self, name: str, kind: str) -> Path | None:
        """Return where a dataset's captions or instances would be, if there are none."""
        wrong = any(found[:2] == ("datasets", name) for found in self.bad)
        if wrong or self.frozen:
            return None
        dataset = models.CocoDataset.model_validate(self.part("datasets", name))
        root = Path(dataset.root).expanduser()
        if dataset.fetch is not None or not root.is_dir():
            return None  # it comes, or that is told of where the dataset stands
        try:
            captions, instances, _ = coco_files(dataset)
        except LayersenseError:
            return None
        if (captions is None) is (instances is None):
            return None
        found = captions if kind == "captions" else instances
        there = root.absolute() / "annotations" / f"{kind}_{dataset.split}.json"
        return there if found is None else None

    # --- files ---

    def _check_files(self) -> None:
        inputs = [
            *(
                (("manifests", name, "file"), manifest.get("file"))
                for name, manifest in self.items("manifests")
            ),
            *(
                (("schemes", name, "cost_table", "file"), scheme["cost_table"].get("file"))
                for name, scheme in self.items("schemes")
                if isinstance(scheme.get("cost_table"), dict)
            ),
        ]
        for path, file in inputs:
            if self._check_file(path, file) and "{" in file:
                self.add(path, "Snakemake takes braces for wildcards; rename the file", file)
        if not self.frozen:  # which measures nothing, maybe far from data and checkpoints
            self._check_measured_files()

    def _check_measured_files(self) -> None:
        used: dict[str, set[str]] = {"datasets": set(), "models": set()}
        for _, run in self.items("runs"):
            for section, names in used.items():
                name = run.get(section.removesuffix("s"))
                if isinstance(name, str):
                    names.add(name)
        for name, model in self.items("models"):
            checkpoint = model.get("checkpoint")
            task = model.get("task")
            if (
                name in used["models"]
                and isinstance(task, str)
                and is_outside(task)
                and find_module(task) is None
            ):
                self.add(
                    ("models", name, "task"),
                    f"expected a class in a module that Python finds from {Path.cwd()}",
                    task,
                )
            if name in used["models"] and isinstance(checkpoint, str) and is_path(checkpoint):
                folder = not is_pickle(checkpoint)
                self._check_file(("models", name, "checkpoint"), checkpoint, folder=folder)
        for name, dataset in self.items("datasets"):
            if name in used["datasets"]:
                self._check_data(("datasets", name), dataset)

    def _check_data(self, path: Path_, dataset: Part) -> None:
        source = dataset.get("source")
        if source == "text":
            self._check_file((*path, "file"), dataset.get("file"))
        elif source == "images":
            self._check_file((*path, "images"), dataset.get("images"), folder=True)
            self._check_file((*path, "table"), dataset.get("table"))
        elif source == "coco" and isinstance(dataset.get("root"), str):
            wrong = {found[2] for found in self.bad if found[:2] == path and len(found) > 2}
            if not wrong & {"split", "captions", "instances", "images", "fetch"}:
                self._check_coco(path, models.CocoDataset.model_validate(dataset))
            elif "fetch" not in wrong:  # which files it means is not known
                self._check_file((*path, "root"), dataset["root"], folder=True)

    def _check_coco(self, path: Path_, dataset: models.CocoDataset) -> None:
        if dataset.fetch is not None:
            # What is not there comes before anything is measured.
            if dataset.annotations_url is None:
                self.add(
                    (*path, "fetch", "annotations"),
                    "expected the address of a zip, because COCO has annotations of "
                    f"{either(COCO_SPLITS)} alone",
                    dataset.split,
                )
            return
        if not self._check_file((*path, "root"), dataset.root, folder=True):
            return
        try:
            captions, instances, images = coco_files(dataset)
        except LayersenseError as error:
            self.add((*path, "root"), str(error))
            return
        notes = Path(dataset.root) / "annotations"
        if captions is None and instances is None:
            captions = notes / f"captions_{dataset.split}.json"
        self._check_file((*path, "images"), str(images), folder=True)
        for key, file in (("captions", captions), ("instances", instances)):
            self._check_file((*path, key), None if file is None else str(file))

    def _check_file(self, path: Path_, name: Any, *, folder: bool = False) -> bool:
        """Return whether a file or folder is there, having noted it if not."""
        if not isinstance(name, str):
            return False
        file = Path(name).expanduser()
        try:
            there = is_folder(file) if folder else is_file(file)
        except LayersenseError as error:  # a zip that is none
            self.add(path, str(error))
            return False
        if not there:
            what = "folder" if folder else "file"
            state = "is something else" if file.exists() else "is not there"
            self.add(path, f"expected a {what}, but {file.absolute()} {state}")
        return there


def _format_words(scheme: Part) -> list[Any]:
    """Return all formats that a scheme names."""
    words = list(scheme.get("quant_formats", ()))
    for space in scheme.get("search_spaces", ()):
        words += space["quant_formats"] if space else ()
    return words
