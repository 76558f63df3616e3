"""The tokenizer of a run: prepared once, then loaded with the light `tokenizers` library alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from tagi_ray.errors import ConfigError, DataError
from tagi_ray.hub import tokenizer_folder
from tagi_ray.sections import BackboneSettings

TOKENIZER = "tokenizer.json"
SPECIAL = "special.json"


class TextTokenizer:
    """Texts to ids and back.

    A target ends with the end token. So do the other texts of an encoder-decoder; those of a
    decoder-only model go on in what follows them.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        for name in (TOKENIZER, SPECIAL):
            if not (folder / name).is_file():
                raise DataError(f"{folder}: holds no {name}; prepare the data first")
        special = json.loads((folder / SPECIAL).read_text(encoding="utf-8"))
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.pad_id: int = special["pad"]
        self.eos_id: int = special["eos"]
        self.start_id: int = special["start"]
        """What an encoder-decoder's target is predicted from."""
        self.begin_id: int | None = special["begin"]
        """What stands before a decoder-only model's texts; its backbone puts it there."""
        self.ends_texts: bool = special["ends_texts"]
        """Whether a text that is no target ends with the end token."""
        self.size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(
        self, texts: Sequence[str], max_tokens: int, end: bool = True
    ) -> list[list[int]]:
        """Return the ids of each text; the end token is kept when a text is cut to `max_tokens`."""
        return self.encode_counted(texts, max_tokens, end)[0]

    def encode_counted(
        self, texts: Sequence[str], max_tokens: int, end: bool = True
    ) -> tuple[list[list[int]], list[bool]]:
        """Return what `encode_batch` returns, and which of the texts were cut.

        end: whether the texts end with the end token. One without a token has it all the same.
        """
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [encoding.ids for encoding in encoded]
        longest = max_tokens - end
        cut = [len(ids) > longest for ids in rows]
        for ids in rows:
            del ids[longest:]
            if end or not ids:
                ids.append(self.eos_id)
        return rows, cut

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text uncut, with its end token if texts have one."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding) + self.ends_texts for encoding in encoded]

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row up to its first end token, without special tokens."""
        return self._tokenizer.decode_batch([self._before_end(row) for row in rows])

    def _before_end(self, row: Sequence[int]) -> list[int]:
        ids = list(row)
        return ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids


def prepare_tokenizer(
    settings: BackboneSettings, shards_folder: Path, out_folder: Path, causal: bool = False
) -> None:
    """Write the run's tokenizer: the backbone's own, a named one, or one fitted on the shards.

    causal: whether it is for a decoder-only model.
    """
    out_folder.mkdir(parents=True, exist_ok=True)
    name = settings.tokenizer or settings.path
    if name == "train":
        fitted = _fit(shards_folder, settings.tokenizer_vocabulary)
        _write(fitted, out_folder, pad=0, eos=1, causal=causal)
    elif name in ("demo", "demo_decoder"):  # one world, one tokenizer
        packaged = Path(__file__).parent / "demo_backbone" / TOKENIZER
        tokenizer = Tokenizer.from_file(str(packaged))
        vocabulary = tokenizer.get_vocab()
        pad, eos = vocabulary["<pad>"], vocabulary["</s>"]
        _write(tokenizer, out_folder, pad=pad, eos=eos, causal=causal)
    elif name == "random":
        raise ConfigError(
            ["backbone.path=random has no tokenizer: set backbone.tokenizer=train, or a folder"]
        )
    else:
        # A tokenizer of its own has revisions of its own; the revision names the backbone's.
        field = "backbone.tokenizer" if settings.tokenizer else "backbone.path"
        revision = None if settings.tokenizer else settings.revision
        _convert(name, tokenizer_folder(field, name, revision), out_folder, causal)


def _convert(name: str, folder: Path, out_folder: Path, causal: bool) -> None:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"backbone.tokenizer={name}: can't be loaded ({reason});"
            " name a local folder, or a hub model that can be reached"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"backbone.tokenizer={name}: has no fast form; name another")
    pad, eos, begin = loaded.pad_token_id, loaded.eos_token_id, None
    if causal:
        pad = eos if pad is None else pad  # which ids are padding, masks say
        # A begin token that a tokenizer knows and never writes was not trained with.
        ids = loaded("a")["input_ids"]
        begin = ids[0] if ids[0] == loaded.bos_token_id else None
    if pad is None or eos is None:
        raise DataError(f"backbone.tokenizer={name}: has no pad or no end token; name another")
    _write(backend, out_folder, pad=pad, eos=eos, begin=begin, causal=causal)


def _fit(shards_folder: Path, vocabulary: int) -> Tokenizer:
    """Fit byte-level BPE on the training split; bytes leave no character unknown."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(shards_folder), trainer)
    return tokenizer


def _training_texts(shards_folder: Path) -> Iterator[list[str]]:
    import pyarrow.parquet as pq

    from tagi_ray.shards import read_manifest

    for name in read_manifest(shards_folder).splits["train"].files:
        file = pq.ParquetFile(shards_folder / name)
        for batch in file.iter_batches(16, columns=["definitions", "inputs", "outputs"]):
            for row in batch.to_pylist():
                outputs = [output for outputs in row["outputs"] for output in outputs]
                yield row["definitions"] + row["inputs"] + outputs


def _write(
    tokenizer: Tokenizer,
    folder: Path,
    *,
    pad: int,
    eos: int,
    begin: int | None = None,
    causal: bool,
) -> None:
    special = {"pad": pad, "eos": eos, "start": pad, "begin": begin, "ends_texts": not causal}
    (folder / SPECIAL).write_text(json.dumps(special), encoding="utf-8")
    # Last, and in one step: where this file is, the tokenizer is complete.
    partial = folder / f"{TOKENIZER}.partial"
    tokenizer.save(str(partial))
    partial.replace(folder / TOKENIZER)
