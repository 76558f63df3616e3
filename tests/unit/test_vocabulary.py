"""Tokenizers: fitted, converted, and loaded with the light library."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tagi_ray.errors import ConfigError, DataError
from tagi_ray.sections import BackboneSettings, DataSettings
from tagi_ray.shard_writer import write_shards
from tagi_ray.vocabulary import TextTokenizer, prepare_tokenizer

MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"
T5, STORIES = MODELS / "t5_spiece", MODELS / "stories260K" / "hf"
GPT2 = MODELS / "gpt2_tokenizer"
SPECIAL = {"pad": 0, "eos": 1, "start": 0, "begin": None, "ends_texts": True}

TEXTS = [
    "Definition: Add the numbers.\n\nNow complete the following example -\nInput: 1  2.\nOutput: ",
    "Schöne Grüße, 日本 \t¿qué?",
    "",
    "a",
]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("fitted")
    write_shards(DataSettings(train_instances=20), folder / "shards", 0, parallel=False)
    settings = BackboneSettings(path="random", tokenizer="train", tokenizer_vocabulary=500)
    prepare_tokenizer(settings, folder / "shards", folder / "tokenizer")
    return TextTokenizer(folder / "tokenizer")


def test_fitted_tokenizer_has_t5_ids_and_loses_nothing(fitted):
    assert (fitted.pad_id, fitted.eos_id, fitted.start_id) == (0, 1, 0)
    assert fitted.size == 500
    rows = fitted.encode_batch(TEXTS, 1000)
    assert all(row[-1] == fitted.eos_id and row.count(fitted.eos_id) == 1 for row in rows)
    assert fitted.decode_batch(rows) == TEXTS


def test_end_token_is_kept_when_a_text_is_cut(fitted):
    (whole,) = fitted.encode_batch([TEXTS[0]], 1000)
    length = len(whole)
    rows, cut = fitted.encode_counted([TEXTS[0]], length)
    assert (rows, cut) == ([whole], [False])
    rows, cut = fitted.encode_counted([TEXTS[0], "a"], length - 1)
    assert cut == [True, False]
    assert rows[0] == [*whole[: length - 2], fitted.eos_id]
    assert fitted.lengths([TEXTS[0]]) == [length]


def test_decoding_stops_at_the_end_token_and_skips_padding(fitted):
    (ids,) = fitted.encode_batch(["red lamp"], 100)
    row = [fitted.start_id, *ids, *ids, fitted.pad_id]
    assert fitted.decode_batch([row, [], [fitted.pad_id] * 3]) == ["red lamp", "", ""]


def test_word_level_words_are_joined_by_spaces(tmp_path):
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "lamp": 4}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special.json").write_text(json.dumps(SPECIAL))
    tokenizer = TextTokenizer(tmp_path)
    assert tokenizer.encode_batch(["red lamp"], 9) == [[3, 4, 1]]
    assert tokenizer.decode_batch([[3, 4, 1, 0]]) == ["red lamp"]


@pytest.mark.skipif(not T5.exists(), reason="T5's sentencepiece model is not at ../shared")
def test_t5_ids_equal_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    prepare_tokenizer(BackboneSettings(path=str(T5)), tmp_path, tmp_path / "tokenizer")
    light = TextTokenizer(tmp_path / "tokenizer")
    heavy = transformers.AutoTokenizer.from_pretrained(str(T5))
    assert (light.pad_id, light.eos_id, light.start_id, light.size) == (0, 1, 0, len(heavy))
    rows = light.encode_batch(TEXTS, 1000)
    assert rows == heavy(TEXTS)["input_ids"]
    assert light.decode_batch(rows) == heavy.batch_decode(rows, skip_special_tokens=True)
    sentinel = heavy.convert_tokens_to_ids("<extra_id_0>")
    assert light.decode_batch([[sentinel, *rows[3]]]) == ["a"]


def test_texts_of_a_decoder_only_model_go_on_and_targets_end(tmp_path):
    prepare_tokenizer(BackboneSettings(path="demo"), tmp_path, tmp_path / "t", causal=True)
    light = TextTokenizer(tmp_path / "t")
    assert (light.ends_texts, light.begin_id) == (False, None)
    (ended,) = light.encode_batch(["Input Output"], 9)
    (open_,) = light.encode_batch(["Input Output"], 9, end=False)
    assert ended == [*open_, light.eos_id]
    assert len(open_) == light.lengths(["Input Output"])[0] == 2
    # A cut text has all its tokens, and none without one is left.
    rows, cut = light.encode_counted(["Input Output", "Input", ""], 1, end=False)
    assert (rows, cut) == ([open_[:1], open_[:1], [light.eos_id]], [True, False, False])


@pytest.mark.skipif(not STORIES.exists(), reason="the stories tokenizer is not at ../shared")
def test_a_begin_token_is_one_that_the_tokenizer_writes_itself(tmp_path):
    transformers = pytest.importorskip("transformers")
    prepare_tokenizer(BackboneSettings(path=str(STORIES)), tmp_path, tmp_path / "t", causal=True)
    light = TextTokenizer(tmp_path / "t")
    heavy = transformers.AutoTokenizer.from_pretrained(str(STORIES))
    assert (light.begin_id, light.eos_id) == (heavy.bos_token_id, heavy.eos_token_id)
    text = "Once upon a time, there was a cat."
    (ids,) = light.encode_batch([text], 99, end=False)
    assert [light.begin_id, *ids] == heavy(text)["input_ids"]


@pytest.mark.skipif(not GPT2.exists(), reason="GPT-2's tokenizer is not at ../shared")
def test_gpt2_has_no_begin_and_no_padding_of_its_own(tmp_path):
    shutil.copytree(GPT2, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')  # as a model has it
    settings = BackboneSettings(path=str(tmp_path / "gpt2"))
    prepare_tokenizer(settings, tmp_path, tmp_path / "t", causal=True)
    light = TextTokenizer(tmp_path / "t")
    assert light.size == 50257
    assert (light.pad_id, light.eos_id, light.begin_id) == (50256, 50256, None)
    rows = light.encode_batch(TEXTS, 1000)
    assert rows[3] == [64, 50256]
    assert light.decode_batch(rows) == TEXTS


def test_what_cannot_be_prepared_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"backbone\.tokenizer=train"):
        prepare_tokenizer(BackboneSettings(path="random"), tmp_path, tmp_path / "t")
    with pytest.raises(ConfigError, match="no is no folder here, and no id of the hub"):
        prepare_tokenizer(BackboneSettings(path=str(tmp_path / "no")), tmp_path, tmp_path / "t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"backbone\.tokenizer=.*empty: can't be loaded \("):
        prepare_tokenizer(BackboneSettings(path=str(tmp_path / "empty")), tmp_path, tmp_path / "t")
    with pytest.raises(DataError, match="holds no tokenizer"):
        TextTokenizer(tmp_path / "no")


@pytest.mark.parametrize("missing", ["tokenizer.json", "special.json"])
def test_a_file_that_is_missing_is_named(tmp_path, missing):
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special.json").write_text(json.dumps(SPECIAL))
    assert TextTokenizer(tmp_path).size == 2
    (tmp_path / missing).unlink()
    with pytest.raises(DataError, match=rf"holds no {missing}; prepare the data first"):
        TextTokenizer(tmp_path)
