"""Make the small backbones of the embedded world that ship with the package.

It is instruction-tuned from scratch on the training tasks, instruction in the prompt; then it is
frozen, and everything that the demo shows is done by adapters. `tasks.json` lists what it saw.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from tagi_ray import recipes
from tagi_ray.architecture import SHIPPED, is_causal
from tagi_ray.cluster import connect
from tagi_ray.config import Experiment
from tagi_ray.evaluate import load_weights
from tagi_ray.launch import fit
from tagi_ray.model import build_model
from tagi_ray.pipeline import open_run, prepare_data, trained_weights
from tagi_ray.prompts import render_input, render_instruction
from tagi_ray.shards import read_manifest
from tagi_ray.stages import StageSpec
from tagi_ray.synthetic import vocabulary, world
from tagi_ray.vocabulary import TOKENIZER

SPECIAL = ("<pad>", "</s>", "<unk>")
"""In the order of T5's ids."""


def word_tokenizer() -> Tokenizer:
    """Return a tokenizer with one entry for each word and mark that the world's prompts hold."""
    task = world().tasks[0]
    prompt = render_instruction("", task.positive_examples, "def_2pos") + render_input("")
    split = pre_tokenizers.Whitespace()
    texts = [prompt, *vocabulary(), ", :"]
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    ids = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[2]))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def train_demo_backbone(
    experiment: Experiment, output: str | None = None, say: Callable[[str], None] = print
) -> Path:
    """Train the backbone as the recipe says, and write it to a folder, or else to the package."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    shipped = SHIPPED["demo_decoder" if is_causal(experiment.backbone) else "demo"]
    folder = recipes.lasting("--output", output or shipped)
    folder.mkdir(parents=True, exist_ok=True)
    word_tokenizer().save(str(folder / TOKENIZER))
    experiment, run = open_run(experiment)
    shards = prepare_data(experiment, say)
    connect(experiment)
    seed = experiment.seeds[0]
    (rate,) = experiment.metatrain.learning_rates
    fit(StageSpec(experiment, "metatrain", run, seed, learning_rate=rate), say)
    model = build_model(experiment, run / "tokenizer", "metatrain", seed)
    load_weights(model, trained_weights(experiment, run, "metatrain", seed))
    model.backbone.model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # whoever installs the package reads it, whatever the umask here
    seen = {
        "recipe": experiment.name,
        "fingerprint": read_manifest(shards).fingerprint,
        "tasks": sorted(read_manifest(shards).names("train")),
    }
    (folder / "tasks.json").write_text(json.dumps(seen, indent=1) + "\n", "utf-8")
    return folder
