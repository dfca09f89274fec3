"""Turn text into token ids and back, by the three formats of vocabulary that Llama checkpoints ship with.

`load_tokenizer(folder)` looks at the content of the files, never at the model's name:

    tokenizer.model           a sentencepiece model (Llama 2), or lines of base64 token and rank for tiktoken (Llama 3)
    tokenizer.json            of the `tokenizers` library
    original/tokenizer.model  the same as tokenizer.model; a Hugging Face folder has Meta's file of Llama 3 there

The first of them that is there is used. One that needs a package which is not installed is passed over.

Each format gives a *vocabulary*: how to cut text into ids, and the bytes of each id. Everything else is shared. Because
every token is just bytes, decoding is one join. Streaming is the same join, fed to an incremental UTF-8 decoder: a
character whose bytes are spread over several tokens comes out when its last byte has arrived, at O(1) per token.

Special tokens (<s>, <|eot_id|>, ...) written in a prompt are ordinary text; only a chat template's output is read with
`allow_special=True`. As in transformers, special tokens that stand in a chat message are therefore read as such, too.
"""

import base64
import codecs
import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from errors import UserError
from loading.files import read_json, read_text

CANDIDATES = ("tokenizer.model", "tokenizer.json", "original/tokenizer.model")
TOKENIZER_FILES = (  # all files read here, to be copied along when a checkpoint moves to another folder
    *CANDIDATES,
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
)
OWN_BOS = ("<|begin_of_text|>", "<s>")  # the usual names, for checkpoints whose JSON files give none
OWN_EOS = ("<|end_of_text|>", "<|eot_id|>", "</s>")

LLAMA3_SPLIT = (  # how Llama 3 cuts text into words before it merges bytes; \p{L} are letters, \p{N} digits
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL_TOKENS = 256
LLAMA3_NAMED = {  # offset from the first special id -> name, in Llama 3.1; 3.0 has reserved tokens for some of them
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
MAX_RUN_CHARS, MAX_CHUNK_CHARS = 20_000, 200_000  # beyond these tiktoken's regex gets slow or overflows its stack


class Tokenizer:
    """Encodes and decodes text: a vocabulary together with what the checkpoint's JSON files say about it."""

    def __init__(self, vocabulary: "Vocabulary", folder: Path):
        self.vocabulary = vocabulary
        self.folder = folder
        self.settings = _read_json(folder / "tokenizer_config.json")
        self.special_tokens: dict[str, int] = vocabulary.special_tokens
        self.vocab_size = len(vocabulary.token_bytes)  # largest id + 1
        # A chat model often lists its end-of-turn token in only one of the two files, so the ids of both count.
        configs = [_read_json(folder / name) for name in ("config.json", "generation_config.json")]
        bos_ids = _ids_named(configs, "bos_token_id") or self._own_ids("bos_token", OWN_BOS)
        eos_ids = _ids_named(configs, "eos_token_id") or self._own_ids("eos_token", OWN_EOS)
        self.bos_id: int | None = bos_ids[0] if bos_ids else None
        self.eos_ids: tuple[int, ...] = tuple(eos_ids)
        self.adds_bos = self.bos_id is not None and self.settings.get("add_bos_token") is not False

    def encode(self, text: str, bos: bool = True, allow_special: bool = False) -> list[int]:
        """Return the ids of `text`, after BOS where the checkpoint wants one; never two BOS in a row.

        allow_special: read special tokens written in the text as such, instead of as ordinary characters. Raises
        UserError for text that is not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # Python carries undecodable bytes of the command line as surrogates
            raise UserError(f"text is not UTF-8: {text[:40]!r}") from None
        ids = self.vocabulary.encode(text, allow_special)
        return [self.bos_id, *ids] if bos and self.adds_bos and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        """Return the text of `ids`; special tokens, and ids that the tokenizer does not know, have none.

        continues: see decode_stream.
        """
        stream = self.decode_stream(continues)
        return stream.push(ids) + stream.flush()

    def decode_stream(self, continues: bool = False) -> "DecodeStream":
        """Start decoding token by token.

        continues: keep the space before the first word, because the text will be printed after a prompt.
        """
        strip = self.vocabulary.strips_first_space and not continues
        return DecodeStream(self.vocabulary.token_bytes, strip)

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """Write `messages` ([{"role": ..., "content": ...}]) as text, by the checkpoint's own chat template."""
        source = _chat_template(self.folder, self.settings)
        id_names = {token_id: name for name, token_id in self.special_tokens.items()}
        names = {"bos_token": id_names.get(self.bos_id), "eos_token": id_names.get(next(iter(self.eos_ids), None))}
        names |= {key: self._own_name(key) for key in self.settings if key.endswith("_token")}
        names = {key: name for key, name in names.items() if isinstance(name, str)}
        return _render(
            source, messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **names
        )

    def apply_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a conversation. BOS is left to the template: adding one here could double it."""
        return self.encode(self.render_chat(messages, add_generation_prompt), bos=False, allow_special=True)

    def _own_name(self, key: str) -> str | None:
        """Look up "bos_token" or the like in tokenizer_config.json, where it is a string or {"content": string}."""
        name = self.settings.get(key)
        return name.get("content") if isinstance(name, dict) else name

    def _own_ids(self, key: str, usual_names: tuple[str, ...]) -> list[int]:
        """Return the ids of the token named under `key`, or of the usual names that the vocabulary has."""
        name = self._own_name(key)
        names = [name] if name in self.special_tokens else usual_names
        return [self.special_tokens[name] for name in names if name in self.special_tokens]


class DecodeStream:
    """Turns ids into text as they arrive, never half a character; the pieces join to `decode(all ids)`."""

    def __init__(self, token_bytes: list[bytes], strip_first_space: bool):
        self.token_bytes = token_bytes
        self.strip_first_space = strip_first_space
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # wrong bytes become U+FFFD, incomplete ones wait

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids; return the text that they complete, possibly ""."""
        known = len(self.token_bytes)  # a model's vocabulary may be padded to more ids than the tokenizer has
        data = b"".join(self.token_bytes[i] for i in map(int, ids) if i < known)
        if self.strip_first_space and data:
            data, self.strip_first_space = data.removeprefix(b" "), False
        return self.utf8.decode(data)

    def flush(self) -> str:
        """Return what is left of a character that was never completed: "" or U+FFFD."""
        return self.utf8.decode(b"", final=True)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder. Raises UserError if it is missing or damaged, or needs a package."""
    folder, missing = Path(folder), []
    for file in (folder / name for name in CANDIDATES):
        if file.is_file():
            try:
                return Tokenizer(_read_vocabulary(file, _added_tokens(folder)), folder)
            except ModuleNotFoundError as error:  # an optional package; another format may be lying next to this one
                missing.append(f"{file} needs `pip install {error.name}`")
    if missing:
        raise UserError("cannot read the tokenizer: " + ", or ".join(missing))
    raise UserError(f"no tokenizer in {folder}: looked for {', '.join(CANDIDATES)}")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError if the tokenizer has ids for which a model with `vocab_size` embeddings has none."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer in {tokenizer.folder} has {tokenizer.vocab_size} ids but the model's vocab_size is "
            f"{vocab_size}: use the tokenizer files that came with this checkpoint"
        )


class Vocabulary:
    """Cuts text into ids and knows the bytes of each id; the base of one class a file format.

    A subclass sets these three, and defines `encode_plain(text) -> ids` or an `encode` of its own.
    """

    token_bytes: list[bytes]  # by id; special tokens have none
    special_tokens: dict[str, int]
    strips_first_space: bool  # encoding puts a space before every text, which decoding takes away

    def add_tokens(self, tokens: dict[int, dict]) -> None:
        """Enter tokens, {id: {"content": str, "special": bool}}, into the tables; they replace what had these ids."""
        self.token_bytes += [b""] * (max(tokens, default=-1) + 1 - len(self.token_bytes))
        for token_id, token in tokens.items():
            self.special_tokens[token["content"]] = token_id
            self.token_bytes[token_id] = b"" if token.get("special") else token["content"].encode()
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self.special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nothing

    def encode(self, text: str, allow_special: bool) -> list[int]:
        """Return the ids of `text`; special tokens in it are looked for only with `allow_special`."""
        ids, start = [], 0
        for match in self.special_pattern.finditer(text) if allow_special else ():
            ids += self.encode_plain(text[start : match.start()]) + [self.special_tokens[match[0]]]
            start = match.end()
        return ids + self.encode_plain(text[start:])


class SentencePieceVocabulary(Vocabulary):
    """Reads Llama 2's format: pieces of text in which "▁" is a space, and <0x00>..<0xFF> for bytes in no other piece.

    Each stretch between special tokens gets a leading space of its own, as Meta encodes the turns of a dialog.
    """

    def __init__(self, data: bytes, added: dict[int, dict]):
        processor = SentencePieceProcessor(model_proto=data)
        pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
        self.token_bytes = [_piece_bytes(piece) for piece in pieces]
        self.token_bytes[processor.unk_id()] = " ⁇ ".encode()  # as sentencepiece prints it
        self.special_tokens = {}
        control = {i: {"content": piece, "special": True} for i, piece in enumerate(pieces) if processor.is_control(i)}
        self.add_tokens(control | added)
        self.strips_first_space = processor.normalize("a") != "a"
        self.encode_plain = processor.encode


class TiktokenVocabulary(Vocabulary):
    """Reads Llama 3's format: byte sequences by rank; 256 special ids follow after the last rank."""

    def __init__(self, data: bytes, added: dict[int, dict]):
        import tiktoken

        lines = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise UserError(f"{len(missing)} of the 256 single bytes have no rank")
        self.encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
        first = max(ranks.values()) + 1
        self.token_bytes = [b""] * (first + LLAMA3_SPECIAL_TOKENS)
        for token, rank in ranks.items():
            self.token_bytes[rank] = token
        self.special_tokens = {}
        reserved = (offset for offset in range(LLAMA3_SPECIAL_TOKENS) if offset not in LLAMA3_NAMED)
        names = {offset: f"<|reserved_special_token_{n}|>" for n, offset in enumerate(reserved)} | LLAMA3_NAMED
        self.add_tokens({first + offset: {"content": name, "special": True} for offset, name in names.items()} | added)
        self.strips_first_space = False

    def encode_plain(self, text: str) -> list[int]:
        return [i for chunk in _bounded_chunks(text) for i in self.encoding.encode_ordinary(chunk)]


class JsonVocabulary(Vocabulary):
    """Reads a Hugging Face tokenizer.json, of either kind of Llama: the library cuts the text, we keep the bytes.

    The library also recognises, in plain text, added tokens that the file does not mark as special.
    """

    def __init__(self, data: bytes):
        from tokenizers import Tokenizer as Backend

        decoder = json.loads(data).get("decoder") or {}
        steps = {step.get("type"): step for step in decoder.get("decoders", [decoder])}
        if not steps.keys() & {"ByteLevel", "Metaspace", "Replace"}:
            raise UserError(f"its decoder is {[*steps]}; a Llama's is ByteLevel, Metaspace or Replace")
        self.backend = Backend.from_buffer(data)
        alphabet = _byte_alphabet() if "ByteLevel" in steps else None
        ids = self.backend.get_vocab()
        self.token_bytes = [b""] * (max(ids.values()) + 1)
        for piece, token_id in ids.items():
            self.token_bytes[token_id] = _piece_bytes(piece, alphabet)
        self.special_tokens = {}
        added = self.backend.get_added_tokens_decoder()
        self.add_tokens({i: {"content": token.content, "special": token.special} for i, token in added.items()})
        metaspace = steps.get("Metaspace", {"prepend_scheme": "never"})
        self.strips_first_space = "Strip" in steps or metaspace.get("prepend_scheme") != "never"

    def encode(self, text: str, allow_special: bool) -> list[int]:
        self.backend.encode_special_tokens = not allow_special  # True means "encode them as ordinary text"
        return self.backend.encode(text, add_special_tokens=False).ids  # its post-processor would add another BOS


def _read_vocabulary(file: Path, added: dict[int, dict]) -> Vocabulary:
    """Recognise the format of `file` by its content and read it. Raises UserError if it is none of the three."""
    data = file.read_bytes()
    try:
        if file.suffix == ".json":
            return JsonVocabulary(data)
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
            return TiktokenVocabulary(data, added)
        if not data:
            raise UserError("it is empty")
        return SentencePieceVocabulary(data, added)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the libraries raise RuntimeError, or plain Exception, for a file they cannot parse
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {file}: damaged, or a git-lfs pointer? ({reason})") from error


def _piece_bytes(piece: str, alphabet: dict[str, int] | None = None) -> bytes:
    """Return the bytes that a piece stands for, in sentencepiece's notation or, with an alphabet, in GPT-2's."""
    if alphabet is not None:
        return bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else piece.encode()
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Map GPT-2's characters to bytes: printable Latin-1 stands for itself, U+0100 and on for the other 68 in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _bounded_chunks(text: str) -> Iterator[str]:
    """Yield `text` whole, or cut where it or a run of (non-)space in it is too long for tiktoken's regex."""
    start = 0
    for run in re.finditer(r"\s+|\S+", text) if len(text) > MAX_RUN_CHARS else ():
        if run.end() - start > MAX_CHUNK_CHARS:
            yield text[start : run.start()]
            start = run.start()
        for cut in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _read_json(file: Path) -> dict:
    """Read the object in a JSON file, {} if there is no such file."""
    return read_json(file) if file.is_file() else {}


def _ids_named(configs: list[dict], key: str) -> list[int]:
    """Collect the token ids under `key`, a number or a list in each of `configs`: in order, each id once."""
    values = [config.get(key) for config in configs]
    ids = [i for value in values for i in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(i for i in ids if isinstance(i, int) and i >= 0))


def _added_tokens(folder: Path) -> dict[int, dict]:
    """Collect, by id, the tokens that JSON files add to tokenizer.model; added_tokens.json is the old way to do so."""
    old = {i: {"content": content} for content, i in _read_json(folder / "added_tokens.json").items()}
    new = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    return old | {int(i): token for i, token in new.items()}


def _chat_template(folder: Path, settings: dict) -> str:
    """Return the text of the checkpoint's chat template; a file of its own comes first, as in transformers."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    template = _read_json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not template:
        raise UserError(f"the tokenizer in {folder} has no chat template: use a chat checkpoint, or a plain prompt")
    return template


def _render(source: str, **variables) -> str:
    """Render a chat template as transformers does; in a sandbox, because templates come from strangers."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError as error:
        raise UserError("chat templates need `pip install jinja2`") from error

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    for tag, harmless in {"generation": "if true", "endgeneration": "endif"}.items():  # only training needs these tags
        source = re.sub(rf"(\{{%[-+]?\s*){tag}(?=\s*[-+]?%\}})", rf"\1{harmless}", source)
    try:
        return environment.from_string(source).render(**variables)
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: for example, text + None
        raise UserError(f"the chat template refused the messages: {error}") from error
