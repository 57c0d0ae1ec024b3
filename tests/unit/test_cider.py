"""Captions that models write, and what CIDEr-D makes of them: by hand, and by its authors' code."""

import math
import random
from collections import Counter
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import studies
import torch
import yaml
from msgspec import structs
from result_files import measured
from studies import sample_database, study
from test_verification import (
    FP8,
    INT4,
    decide,
    make_board,
)
from tiny_models import CAPTIONS, resolve_folder, save_images, save_tiny_qwen2_5_vl

from layersense import config, settings
from layersense.calibration.database import Row, open_database
from layersense.manifests.schema import encode_manifest
from layersense.models.tasks.cider import cider_d, words_of
from layersense.models.tasks.image_text_to_text import MOST_WRITTEN, write_captions
from layersense.models.tasks.metrics import CiderD
from layersense.models.tasks.protocol import IGNORED, Sampling
from layersense.recipes.decide import build_manifest
from layersense.recipes.quant_config import make_cache
from layersense.scoring.in_progress import InProgress
from layersense.validation import load_config
from layersense.verification.job import Wanted, one_of_each_photograph, verify_run
from layersense.verification.measure import Album, Measurer
from layersense.verification.plan import UNNAMED, Whole, make_plan, whole_digest
from layersense.verification.refine import search
from layersense.verification.store import Completed, MeasuredRecipe, read_verification

# --- the score ---


def test_words_are_lower_case_and_without_punctuation():
    text = "A man's black-and-white DOG, 3.5 metres (or 1,000) away."
    assert words_of(text) == [
        "a", "man", "'s", "black-and-white", "dog", "3.5", "metres", "or", "1,000", "away",
    ]  # fmt: skip


def test_cider_d_by_hand():
    # "a" stands in the references of both photographs and weighs nothing; "dog" and "a dog" agree.
    assert cider_d(["a dog", "a dog"], [["A dog."], ["a cat"]]) == pytest.approx([10 * 2 / 4, 0])
    # Of two dogs one counts, (min(2, 1) · 1) / (2 · 1); a word too many costs exp(−1 / 72).
    (clipped, _) = cider_d(["dog dog", "x"], [["dog"], ["cat"]])
    assert clipped == pytest.approx(10 / 4 * 0.5 * math.exp(-1 / 72))
    # The mean over references, and a whole caption repeated is 10.
    long = "two red buses wait here"
    (half, _) = cider_d([long, ""], [[long, "nothing of it"], ["cat"]])
    assert half == pytest.approx(5.0)
    # Words of the other photograph's references alone tell how rare they are.
    both = cider_d(["dog", "dog"], [["dog"], ["dog"]])
    assert both.tolist() == [0.0, 0.0]
    assert cider_d(["dog"], [["dog"]]).tolist() == [0.0]
    assert cider_d(["", "dog"], [["dog"], []]).tolist() == [0.0, 0.0]


def test_cider_d_is_that_of_its_authors_code():
    authors = pytest.importorskip(
        "pycocoevalcap.cider.cider",
        reason="pycocoevalcap (100 MB, with Java archives) is not installed",
    )
    generator = random.Random(0)
    words = ["a", "man", "dog", "on", "the", "street", "red", "black-and-white", "3.5"]

    def text():
        return " ".join(generator.choice(words) for _ in range(generator.randint(1, 14)))

    cases = []
    for photographs in range(2, 12):
        references = [[text() for _ in range(generator.randint(1, 5))] for _ in range(photographs)]
        cases.append(([generator.choice([text(), texts[0]]) for texts in references], references))
    for captions, references in cases:
        whole, each = authors.Cider().compute_score(
            dict(enumerate(references)), {n: [caption] for n, caption in enumerate(captions)}
        )
        assert cider_d(captions, references) == pytest.approx(each, abs=1e-12)
        records = [[one, texts] for one, texts in zip(captions, references, strict=True)]
        found = CiderD(None, 1).values(records, np.ones((1, len(records))))
        assert found == pytest.approx([whole], abs=1e-12)


def test_a_resample_keeps_the_idf_of_all_photographs():
    records = [["a dog", ["a dog"]], ["a cat", ["a dog", "a bus"]], ["red bus", ["red bus"]]]
    each = cider_d([text for text, _ in records], [texts for _, texts in records])
    counts = np.array([[1, 1, 1], [3, 0, 0], [0, 2, 1]])
    expected = [each.mean(), each[0], (2 * each[1] + each[2]) / 3]
    assert CiderD(None, 1).values(records, counts) == pytest.approx(expected)
    assert each[0] > 0
    assert np.isnan(CiderD(None, 1).values([], np.ones((1, 0)))).all()


# --- what models write ---


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    images = save_images(folder, ((64, 48), (112, 140), (56, 56)))
    rows = [
        Row(image_path=path, caption=text, position=i, image_id=i)
        for i, (path, text) in enumerate(zip(images, CAPTIONS, strict=False))
    ]
    checkpoint = resolve_folder(save_tiny_qwen2_5_vl(folder / "model"), "image-text-to-text")
    sampling = Sampling(max_length=128, modality="image_text")
    board, data = make_board("image-text-to-text", checkpoint, rows, sampling)
    cache = make_cache("fp8", [name for names in board.modules.values() for name in names])
    board.calibrate_cache(cache, data)
    loaded = data.task.load(checkpoint, dtype="float32", device="cpu")
    return board, data, loaded.processor, rows, sampling


def batches(vlm, size):
    _, data, processor, rows, sampling = vlm
    loaded = SimpleNamespace(processor=processor, prepared={})
    return data.task.batches(loaded, rows, sampling, size)


@torch.no_grad()
def by_hand(vlm, model, batch):
    """The most probable token each time, by whole passes over one sample."""
    _, _, processor, _, _ = vlm
    start = int((batch.labels[0] != IGNORED).int().argmax())
    aligned = [key for key, value in batch.inputs.items() if value.shape == batch.labels.shape]
    inputs = {**batch.inputs, **{key: batch.inputs[key][:, :start] for key in aligned}}
    written = []
    while len(written) < MOST_WRITTEN:
        token = model(**inputs, use_cache=False).logits[0, -1].argmax()
        if token == processor.tokenizer.eos_token_id:
            break
        written.append(int(token))
        more = {"input_ids": int(token), "attention_mask": 1}
        for key in aligned:
            inputs[key] = torch.cat(
                [inputs[key], torch.full((1, 1), more.get(key, 0), dtype=inputs[key].dtype)], dim=1
            )
    return processor.tokenizer.decode(written, skip_special_tokens=True).strip()


def test_captions_are_the_most_probable_token_each_time_whatever_the_batch(vlm):
    board, _, processor, _, _ = vlm
    int4 = dict.fromkeys(board.modules, INT4)
    for switched, kv_cache in (({}, "none"), (int4, "none"), (int4, "fp8")):
        board.switch(switched, kv_cache)
        model = board.model
        # Settings of the checkpoint that are not greedy do not count.
        model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
        alone = [write_captions(processor, model, batch)[0] for batch in batches(vlm, 1)]
        assert alone == [by_hand(vlm, model, batch) for batch in batches(vlm, 1)]
        (together,) = batches(vlm, 3)
        assert len(set((together.labels != IGNORED).int().argmax(dim=1).tolist())) > 1
        assert write_captions(processor, model, together) == alone
        assert all(alone)
    board.clear()


def test_recipes_write_captions_as_they_are_quantized_and_go_on_after_a_kill(
    vlm, tmp_path, monkeypatch
):
    board, data, processor, _, _ = vlm
    wrote = []

    def write(model, batch):
        wrote.append(batch.n_samples)
        return write_captions(processor, model, batch)

    board.switch(dict.fromkeys(board.modules, INT4))
    texts = [
        text for batch in batches(vlm, 2) for text in write_captions(processor, board.model, batch)
    ]
    board.clear()
    references = [[texts[0], "a dog"], [CAPTIONS[1], texts[1]], ["a cat"]]
    recipes = {
        "int4": Whole(dict.fromkeys(board.modules, INT4)),
        "fp8": Whole(dict.fromkeys(board.modules, FP8)),
        "same": Whole({}),
    }

    def measure(write, in_progress=None):
        album = Album([CiderD(write, MOST_WRITTEN)], batches(vlm, 2), references)
        judge = Measurer(
            board, data.task, data.batches, data.device, data.dtype, metrics=[], album=album
        )
        return judge.measure([], recipes, in_progress, {"int4", "same"})

    before, _, whole = measure(write)
    assert wrote == [2, 2, 2, 1, 1, 1]  # the unquantized model and two recipes, batch by batch
    (metric,) = whole["int4"].metrics
    assert metric.name == "CIDEr-D"
    assert metric.value == pytest.approx(cider_d(texts, references).mean())
    assert metric.value > 1 > before.metrics[0].value  # its own words are among the references
    assert whole["same"].metrics[0].value == before.metrics[0].value
    assert (whole["same"].metrics[0].difference, whole["same"].captions) == (0.0, True)
    assert (whole["fp8"].metrics, whole["fp8"].captions) == ([], False)

    class KilledError(Exception):
        pass

    def killed(model, batch):
        if batch.n_samples == 1:
            raise KilledError
        return write_captions(processor, model, batch)

    monkeypatch.setattr("layersense.scoring.in_progress.SAVE_SECONDS", 0.0)
    with pytest.raises(KilledError):
        measure(killed, InProgress(tmp_path / "in-progress", "x", Completed))
    wrote.clear()
    again = measure(write, InProgress(tmp_path / "in-progress", "x", Completed))
    assert wrote == [1, 1, 1]
    assert msgspec.to_builtins(again[0]) == msgspec.to_builtins(before)
    assert msgspec.to_builtins(again[2]) == msgspec.to_builtins(whole)


# --- a run ---


def test_a_photograph_is_shown_once():
    rows = [
        Row(None, str(position), image_id=image, position=position)
        for position, image in enumerate((4, 4, 7, None, 4, 7))
    ]
    assert [row.position for row in one_of_each_photograph(rows)] == [0, 2]


def test_what_the_search_solves_writes_captions_the_first_time_and_its_steps_none():
    manifest, options = decide(), config.Verify(points=3, random=4, captions=True)
    plan = make_plan([manifest], options)
    wanted = Wanted(plan, [manifest], "context", captions=True)
    held = measured([manifest], options)
    for digest, whole in wanted.recipes.items():
        held.recipes[digest].damage.digest = wanted.recipe_digest(whole)
    named = {one.digest for one in plan.recipes if one.role not in UNNAMED}
    assert set(wanted.missing_recipes(held)) == wanted.captioned == named
    for digest in named:
        held.recipes[digest].damage.captions = True
    assert wanted.missing_recipes(held) == {}
    rounds = []
    while following := wanted.missing_next(held, [manifest], plan, 4):
        rounds.append({digest: digest in wanted.captioned for digest in following})
        for digest, whole in following.items():
            own = held.recipes.get(digest)
            damage = structs.replace(
                own.damage if own else held.recipes[min(named)].damage,
                captions=digest in wanted.captioned,
            )
            held.recipes[digest] = MeasuredRecipe(recipe=whole.recipe, damage=damage)
    state = search(manifest, held, plan.singles, 4)
    assert state.solved is not None
    assert whole_digest(state.solved, "none") in wanted.captioned
    assert any(not captioned for one in rounds for captioned in one.values())
    # Nothing comes again, but what the search ended at.
    again = [digest for digest, times in Counter(d for one in rounds for d in one).items()
             if times > 1]  # fmt: skip
    assert set(again) <= {whole_digest(state.refined, "none")}


@pytest.mark.slow
def test_captions_that_are_asked_for_later_measure_named_recipes_alone(tmp_path):
    checkpoint = save_tiny_qwen2_5_vl(tmp_path / "model")
    run = {"modality": "image_text", "calibration_samples": 4, "score_samples": 4,
           "batch_size": 2, "max_length": 1024}  # fmt: skip
    found = study(tmp_path, checkpoint, "image-text-to-text", formats=[FP8], **run)
    database = sample_database(tmp_path)
    data = studies._config(str(checkpoint), "image-text-to-text", run)
    data["schemes"]["scheme"]["effective_bits"] = 12.0
    scheme = load_config(yaml.safe_load(yaml.safe_dump(data)), "test").schemes["scheme"]
    decided = build_manifest(found.scores, "run", "scheme", scheme, {})
    manifest = checkpoint / "study/manifest.json"
    manifest.write_bytes(encode_manifest(decided))
    out = checkpoint / "study/verification.json"

    def verify(**options):
        data["runs"]["run"]["verify"] = {"groups": 2, "points": 1, "random": 2, **options}
        parsed = load_config(yaml.safe_load(yaml.safe_dump(data)), "test")
        verified = settings.verify_settings(parsed, "run")
        count = verify_run(
            "run", verified, [manifest], model_file=checkpoint / "study/model.json",
            database_file=database, out=out,
        )  # fmt: skip
        return count, read_verification(out), parsed.runs["run"].verify

    _, plain, options = verify()
    with open_database(database) as opened:
        rows = opened.rows("caption", "heldout")
        photographs = {row.image_id for row in rows}
        (texts,) = opened.texts([rows[0].image_id])
    assert rows[0].caption in texts
    assert len(texts) > 1
    named = {one.digest for one in make_plan([decided], options).recipes
             if one.role not in UNNAMED}  # fmt: skip
    assert {metric.name for metric in plain.before.metrics} == {"token accuracy"}
    count, captioned, _ = verify(captions=True)
    judged = {
        digest for digest, one in captioned.recipes.items()
        if "CIDEr-D" in {metric.name for metric in one.damage.metrics}
    }  # fmt: skip
    assert named <= judged
    assert judged < set(captioned.recipes)  # random ones are there to compare their KL
    assert count == len(judged)
    assert captioned.singles == plain.singles
    assert len(photographs) > 1
    for digest in judged:
        metric = captioned.recipes[digest].damage.metrics[-1]
        assert 0 <= metric.low <= metric.value <= metric.high <= 10
    assert verify(captions=True)[0] == 0
    assert verify()[0] == 0
    kept = read_verification(out)
    assert [metric.name for metric in kept.before.metrics] == ["token accuracy", "CIDEr-D"]
