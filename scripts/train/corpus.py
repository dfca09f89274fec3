"""The data of a training run: its tokenizer, its stream of tokens, the windows of a step."""

import filecmp
import hashlib
import io
import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from errors import UserError
from loading import checkpoint
from loading.files import make_folder, replacing, write_json
from loading.tokenizer import CANDIDATES, TOKENIZER_FILES, load_tokenizer
from scripts.common.ranks import Ranks
from scripts.common.texts import encode_texts, find_files, split_texts
from scripts.train.config import TrainConfig

# A line break is one token with the indentation after it ("▁" is sentencepiece's space).
BREAKS = ["\n" * count + "▁" * indent for count in (1, 2) for indent in range(0, 25, 4)]


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-fallback BPE on the lines of `texts` and write it to `path`; decoding what it encodes is exact."""
    lines = (line.strip(" ") for text in texts for line in text.split("\n"))
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for line in lines if line),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=BREAKS,
            input_sentence_size=400_000,
            shuffle_input_sentence=False,
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"vocab_size {vocab_size} does not suit this text: {str(error).splitlines()[-1]}") from None
    with replacing(path) as file:
        file.write(buffer.getvalue())


def open_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:
        raise UserError(f"tokenizer: {path} is not a sentencepiece model") from None


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file; the copy appears complete, by rename."""
    with source.open("rb") as original, replacing(path) as copy:
        shutil.copyfileobj(original, copy)


def write_tokenizer_json(processor: sentencepiece.SentencePieceProcessor, folder: Path) -> None:
    """Write the trained tokenizer a second time in the format of the `tokenizers` library, for transformers.

    A merge of two pieces ranks by the id of its result: sentencepiece numbers BPE pieces in the order it learned them.
    """
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    learned = [
        piece
        for i, piece in enumerate(pieces)
        if len(piece) > 1 and piece not in BREAKS and not (processor.is_byte(i) or i < 3)
    ]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in learned
        for cut in sorted(range(1, len(piece)), key=lambda cut: (ids.get(piece[:cut], 0), ids.get(piece[cut:], 0)))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    written = {i: piece.replace("▁", " ") for i, piece in enumerate(pieces[: 3 + len(BREAKS)])}  # found before all else
    added = [{"id": i, "content": piece, "special": i < 3, **special} for i, piece in written.items()]
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    bos = {"id": "<s>", "ids": [processor.bos_id()], "tokens": ["<s>"]}
    first, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "pre_tokenizer": None,
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [first, text],
                "pair": [first, text, second],
                "special_tokens": {"<s>": bos},
            },
            "decoder": {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {
                "type": "BPE",
                "unk_token": "<unk>",
                "fuse_unk": True,
                "byte_fallback": True,
                "dropout": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "ignore_merges": False,
                "vocab": {written.get(i, piece): i for piece, i in ids.items()},
                "merges": merges,
            },
        },
    )


def prepare_tokenizer(
    config: TrainConfig, texts: list[tuple[str, str]], out: Path, source: checkpoint.Source | None
) -> None:
    """Put tokenizer files into `out` (the checkpoint's, the given one, or a trained one) unless they are there."""
    if config.adapter_exits:
        return  # no model will stand beside it
    if source is not None:
        for name in TOKENIZER_FILES:
            here, there = source.folder / name, out / name
            if name in CANDIDATES and there.exists() and not (here.is_file() and filecmp.cmp(here, there, False)):
                raise UserError(f"output_dir holds another tokenizer than the checkpoint ({there}); give another one")
            if here.is_file() and not there.exists():
                there.parent.mkdir(exist_ok=True)
                copy_whole(here, there)
        return
    if config.tokenizer is not None:
        if not Path(config.tokenizer).is_file():
            raise UserError(f"tokenizer: {config.tokenizer} is not a file")
        open_tokenizer(Path(config.tokenizer))
        there = out / "tokenizer.model"
        if there.exists() and not filecmp.cmp(config.tokenizer, there, shallow=False):
            raise UserError(f"tokenizer: {there} is another one than {config.tokenizer}; give another --output_dir")
    if not (out / "tokenizer.model").exists():
        if config.tokenizer is None:
            train_tokenizer(dict(texts).values(), config.vocab_size, out / "tokenizer.model")
        else:
            copy_whole(Path(config.tokenizer), out / "tokenizer.model")
    processor = open_tokenizer(out / "tokenizer.model")
    if config.tokenizer is None and processor.vocab_size() != config.vocab_size:
        raise UserError(
            f"vocab_size: output_dir holds a tokenizer of {processor.vocab_size()} tokens, got "
            f"{config.vocab_size}; give another --output_dir"
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    flags = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    own = {"tokenizer_class": "LlamaTokenizer" if config.tokenizer else "PreTrainedTokenizerFast"}
    write_json(out / "tokenizer_config.json", own | names | flags | {"model_max_length": config.context})
    if config.tokenizer is None:
        write_tokenizer_json(processor, out)


class Data:
    """The text of a run: its files, split in two; the tokens of both parts; the tokenizer, copied into output_dir."""

    def __init__(self, config: TrainConfig, source: checkpoint.Source | None, ranks: Ranks):
        """Read the files and encode them. Raises UserError for files that are not there or too little text."""
        self.train_texts, self.heldout_texts = split_texts(find_files(config.data, config.glob), config.heldout)
        out = Path(config.output_dir)
        if ranks.leads:
            prepare_tokenizer(config, self.train_texts, make_folder(out), source)
        ranks.agreed(None)  # its files are there
        self.tokenizer = load_tokenizer(source.folder if source else out)
        self.tokens = encode_texts(self.tokenizer, self.train_texts)
        self.heldout = encode_texts(self.tokenizer, self.heldout_texts)
        if len(self.tokens) <= config.context:
            raise UserError(
                f"data: {len(self.tokens)} tokens are too few for one window of {config.context} (--context)"
            )
        self.hash = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()

    def listing(self) -> list[str]:
        """List every file with its size, training or held out."""
        lines = [f"# Python {platform.python_version()}: split, bytes, name"]
        for split, texts in (("train", dict(self.train_texts)), ("heldout", dict(self.heldout_texts))):
            lines += [f"{split}\t{len(text.encode())}\t{name}" for name, text in texts.items()]
        return lines


def batch_at(tokens: Tensor, step: int, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Return inputs and targets [B, T] of a step: windows of `context` in an order shuffled anew for each epoch.

    With `short_context`, only every `long_every`-th step sees whole windows; the others see them cut into shorter ones.
    """
    n_window = (len(tokens) - 1) // config.context
    picked = []
    for index in range(step * config.batch_size, (step + 1) * config.batch_size):
        epoch, place = divmod(index, n_window)
        if not picked or place == 0:
            order = torch.randperm(n_window, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch))
            shift = (epoch * 7919) % ((len(tokens) - 1) - n_window * config.context + 1)
        picked.append(int(order[place]) * config.context + shift)
    rows = torch.stack([tokens[start : start + config.context + 1] for start in picked]).long()
    inputs, targets = rows[:, :-1], rows[:, 1:]
    if config.short_context and step % config.long_every:
        inputs, targets = (part.reshape(-1, config.short_context) for part in (inputs, targets))
    return inputs, targets
