"""The three tokenizer formats, trained tiny on the spot: round trips, streaming, special tokens, chat, mistakes."""

import base64
import inspect
import io
import json
import re
import sys
import textwrap

import pytest
import sentencepiece

from loading.tokenizer import LLAMA3_SPLIT, MAX_CHUNK_CHARS, MAX_RUN_CHARS, Tokenizer, check_vocabulary, load_tokenizer
from tests.helpers.processes import DEMO

FORMATS = ("sentencepiece", "tiktoken", "json_byte_level", "json_llama2")
TEXTS = (
    "Hello world, how are you?",
    " two  spaces   and\ttabs\n\n\nnewlines\r\n  indented\n",
    "Ça va très bien, naïve café: größer, жизнь, 你好世界, नमस्ते",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 end",
    "it's 12345 — don't!!! `x_1 += 2**10`;\n",
    "",
    " ",
    "\n",
    "▁",
)
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = """
    {%- if messages[0]['role'] == 'system' %}
        {%- set system, turns = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n', messages[1:] %}
    {%- else %}
        {%- set system, turns = '', messages %}
    {%- endif %}
    {%- for message in turns %}
        {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
            {{- raise_exception('roles must alternate user/assistant') }}
        {%- endif %}
        {%- if message['role'] == 'user' %}
            {{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}
        {%- else %}
            {{- ' ' + message['content'] | trim + ' ' + eos_token }}
        {%- endif %}
    {%- endfor %}"""
CHATS = (
    [{"role": "user", "content": "Hello <b>you</b> & me 🙂"}],
    [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "  What's 2+2? "},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Sure?"},
    ],
)


@pytest.fixture(scope="session")
def corpus():
    return [line for module in (textwrap, inspect, json) for line in inspect.getsource(module).splitlines() if line]


@pytest.fixture(scope="session")
def sentencepiece_bytes(corpus):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def rank_bytes():
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    merges = [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", "é".encode(), b"in", b"  ", b"\n\n", b"\xf0\x9f"]
    tokens = [bytes([b]) for b in range(256)] + merges
    return b"\n".join(b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)) + b"\n"


@pytest.fixture(scope="session")
def json_texts(corpus):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    llama3 = tokenizers.Tokenizer(models.BPE())
    llama3.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    llama3.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    llama3.train_from_iterator(corpus, trainer)
    bos = ("<|begin_of_text|>", llama3.token_to_id("<|begin_of_text|>"))
    llama3.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[bos])

    special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    llama2 = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    llama2.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    llama2.train_from_iterator((line[:40] for line in corpus), trainer)
    state = json.loads(llama2.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are ordinary pieces, as in a real file
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    state["decoder"] = {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    return {"json_byte_level": llama3.to_str(), "json_llama2": json.dumps(state)}


@pytest.fixture
def make(tmp_path, request):
    """Write a checkpoint folder of one format, with JSON files given as name=content, and return its Tokenizer."""

    def make(kind: str, **files) -> Tokenizer:
        if kind == "sentencepiece":
            (tmp_path / "tokenizer.model").write_bytes(request.getfixturevalue("sentencepiece_bytes"))
        elif kind == "tiktoken":
            (tmp_path / "tokenizer.model").write_bytes(request.getfixturevalue("rank_bytes"))
        else:
            (tmp_path / "tokenizer.json").write_text(request.getfixturevalue("json_texts")[kind], encoding="utf-8")
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return load_tokenizer(tmp_path)

    return make


@pytest.mark.parametrize("kind", FORMATS)
def test_every_text_comes_back_from_its_ids(make, kind):
    tokenizer = make(kind)
    for text in TEXTS:
        if kind in ("sentencepiece", "json_llama2") and text == "▁":
            continue  # these formats cannot tell it from a space
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_id and ids[1:] == tokenizer.encode(text, bos=False)
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("kind", FORMATS)
def test_streaming_gives_the_same_text_and_never_half_a_character(make, kind):
    tokenizer = make(kind)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        stream = tokenizer.decode_stream()
        pieces = [stream.push([token_id]) for token_id in ids]
        assert not any("�" in piece for piece in pieces)
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_character_cut_short_waits_and_then_becomes_one_replacement_character(make, kind):
    tokenizer = make(kind)
    ids = tokenizer.encode("a🙂")
    stream = tokenizer.decode_stream()
    assert "".join(stream.push([token_id]) for token_id in ids[:-1]) == "a"
    assert stream.flush() == "�"
    assert tokenizer.decode(ids[:-1]) == "a�"


@pytest.mark.parametrize("kind", ("sentencepiece", "json_llama2"))
def test_a_continuation_keeps_the_space_before_its_first_word(make, kind):
    tokenizer = make(kind)
    ids = tokenizer.encode("qqq zzz", bos=False)  # letters that no piece joins over a space
    space = next(n for n in range(1, len(ids)) if tokenizer.decode(ids[n:], continues=True) == " zzz")
    assert tokenizer.decode(ids[space:]) == "zzz"
    assert tokenizer.decode(ids[:space]) + tokenizer.decode(ids[space:], continues=True) == "qqq zzz"


@pytest.mark.parametrize("kind", FORMATS)
def test_special_tokens_in_plain_text_are_ordinary_text_and_only_special_when_allowed(make, kind):
    tokenizer = make(kind)
    for name, token_id in tokenizer.special_tokens.items():
        text = f"before {name}after"
        if name != "<unk>":
            ids = tokenizer.encode(text, bos=False)
            assert token_id not in ids
            assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, bos=False, allow_special=True).count(token_id) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_special_tokens_and_ids_beyond_the_vocabulary_decode_to_nothing(make, kind):
    tokenizer = make(kind)
    special = [i for name, i in tokenizer.special_tokens.items() if name != "<unk>"]
    ids = tokenizer.encode("x y", bos=False)
    assert tokenizer.decode([*special, *ids, tokenizer.eos_ids[0], tokenizer.vocab_size + 7]) == "x y"


@pytest.mark.parametrize("kind", FORMATS)
def test_bos_is_never_doubled_and_is_left_out_where_the_checkpoint_says_so(make, kind):
    tokenizer = make(kind)
    name = next(name for name, i in tokenizer.special_tokens.items() if i == tokenizer.bos_id)
    assert tokenizer.encode(name + "hi", allow_special=True).count(tokenizer.bos_id) == 1
    assert make(kind, tokenizer_config={"add_bos_token": True}).encode("hi")[0] == tokenizer.bos_id
    assert tokenizer.bos_id not in make(kind, tokenizer_config={"add_bos_token": False}).encode("hi")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_eos_id_of_both_configs_counts_in_order(make, kind):
    own = {"sentencepiece": ("</s>",), "tiktoken": ("<|end_of_text|>", "<|eot_id|>"), "json_llama2": ("</s>",)}
    tokenizer = make(kind)
    names = own.get(kind, ("<|end_of_text|>", "<|eot_id|>"))
    assert tokenizer.eos_ids == tuple(tokenizer.special_tokens[name] for name in names)
    assert make(kind, tokenizer_config={"eos_token": {"content": names[-1]}}).eos_ids == (tokenizer.eos_ids[-1],)
    assert make(kind, generation_config={"eos_token_id": [9, 5]}).eos_ids == (9, 5)
    assert make(kind, config={"eos_token_id": 5, "bos_token_id": 3}).eos_ids == (5, 9)
    assert make(kind).bos_id == 3


def test_sentencepiece_agrees_with_the_library(make, sentencepiece_bytes):
    tokenizer = make("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_bytes)
    assert tokenizer.vocab_size == 600 and (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    for text in TEXTS:
        assert tokenizer.encode(text, bos=False) == processor.encode(text)
        assert tokenizer.decode(processor.encode(text)) == processor.decode(processor.encode(text))


@pytest.mark.parametrize("kind", ("json_byte_level", "json_llama2"))
def test_tokenizer_json_agrees_with_the_library(make, kind):
    tokenizer = make(kind)
    for text in TEXTS:
        ids = tokenizer.vocabulary.backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.decode(ids) == tokenizer.vocabulary.backend.decode(ids)


def test_tiktoken_has_llama_3s_special_tokens_in_their_places(make):
    tokenizer = make("tiktoken")
    first = tokenizer.vocab_size - 256
    places = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|reserved_special_token_0|>": 2,
        "<|finetune_right_pad_id|>": 4,
        "<|reserved_special_token_2|>": 5,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
        "<|reserved_special_token_3|>": 11,
        "<|reserved_special_token_247|>": 255,
    }
    assert {name: tokenizer.special_tokens[name] - first for name in places} == places
    assert len(tokenizer.special_tokens) == 256 and tokenizer.bos_id == first
    renamed = make(
        "tiktoken",
        tokenizer_config={"added_tokens_decoder": {str(first + 4): {"content": "<|mine|>", "special": True}}},
    )
    assert renamed.special_tokens["<|mine|>"] == first + 4
    assert "<|finetune_right_pad_id|>" not in renamed.special_tokens


def test_tiktoken_survives_very_long_texts_and_runs(make):
    tokenizer = make("tiktoken")
    for text in (" " * (3 * MAX_RUN_CHARS + 1), "hello" * MAX_RUN_CHARS, "hello wor\n" * (MAX_CHUNK_CHARS // 4)):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_added_to_a_sentencepiece_model_are_found_in_templates(make):
    added = {"600": {"content": "<|im_end|>", "special": True}, "601": {"content": "<tool>", "special": False}}
    tokenizer = make("sentencepiece", tokenizer_config={"added_tokens_decoder": added}, added_tokens={"<pad>": 602})
    assert tokenizer.vocab_size == 603
    ids = tokenizer.encode("hi<|im_end|><tool><pad>", bos=False, allow_special=True)
    assert ids[-3:] == [600, 601, 602] and tokenizer.decode(ids) == "hi<tool><pad>"


def test_sentencepiece_is_preferred_to_a_tokenizer_json_beside_it(make):
    make("json_llama2")
    assert type(make("sentencepiece").vocabulary).__name__ == "SentencePieceVocabulary"


def test_metas_file_in_original_is_used_and_a_missing_library_falls_back_to_the_other_file(
    make, tmp_path, rank_bytes, monkeypatch
):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(rank_bytes)
    assert type(load_tokenizer(tmp_path).vocabulary).__name__ == "TiktokenVocabulary"
    assert type(make("json_byte_level").vocabulary).__name__ == "JsonVocabulary"
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert type(load_tokenizer(tmp_path).vocabulary).__name__ == "TiktokenVocabulary"
    (tmp_path / "original" / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="tokenizer.json needs `pip install tokenizers`"):
        load_tokenizer(tmp_path)


def test_the_library_gets_no_say_in_bos_with_a_tokenizer_json(make):
    tokenizer = make("json_byte_level")
    assert tokenizer.encode("hi").count(tokenizer.bos_id) == 1
    assert tokenizer.bos_id not in tokenizer.encode("hi", bos=False)


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("prompt", (True, False))
@pytest.mark.parametrize("kind, template", (("json_byte_level", LLAMA3_TEMPLATE), ("json_llama2", LLAMA2_TEMPLATE)))
def test_chats_are_rendered_and_encoded_as_transformers_does(make, tmp_path, kind, template, messages, prompt):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle and is not installed")
    bos, eos = ("<|begin_of_text|>", "<|eot_id|>") if kind == "json_byte_level" else ("<s>", "</s>")
    settings = {"chat_template": template, "bos_token": {"content": bos}, "eos_token": eos}
    tokenizer = make(kind, tokenizer_config=settings)
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=bos, eos_token=eos, chat_template=template
    )
    expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.render_chat(messages, prompt) == expected
    expected = oracle.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    ids = tokenizer.apply_chat(messages, prompt)
    assert ids == list(expected)
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == expected.count(tokenizer.bos_id)


def test_a_dialog_becomes_the_ids_that_meta_trained_on(make, sentencepiece_bytes):
    tokenizer = make("sentencepiece", tokenizer_config={"chat_template": LLAMA2_TEMPLATE})
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_bytes)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "so"},
    ]
    expected = [1, *processor.encode("[INST] hi [/INST] yo "), 2, 1, *processor.encode("[INST] so [/INST]")]
    assert tokenizer.apply_chat(messages) == expected


def test_templates_may_be_several_by_name_or_a_file_and_use_what_transformers_offers(make, tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}]
    hello = [{"role": "user", "content": "<é>"}]
    assert make("sentencepiece", tokenizer_config={"chat_template": named}).render_chat(hello) == "<s>yes"
    assert make("sentencepiece", chat_template={"chat_template": "in a file"}).render_chat(hello) == "in a file"
    (tmp_path / "chat_template.jinja").write_text(
        "{% for message in messages %}\n  {% generation %}\n{{ message | tojson }}\n{% endgeneration %}\n"
        "{% break %}\n{% endfor %}\n{{ strftime_now('%Y') }}{{ tools is none }}"
    )
    rendered = make("sentencepiece").render_chat(hello)
    assert re.fullmatch(r'\{"role": "user", "content": "<é>"\}\n\d{4}True', rendered)


def test_chat_mistakes_are_one_clear_line(make, monkeypatch):
    with pytest.raises(ValueError, match="has no chat template"):
        make("sentencepiece").apply_chat(CHATS[0])
    tokenizer = make("sentencepiece", tokenizer_config={"chat_template": LLAMA2_TEMPLATE})
    with pytest.raises(ValueError, match="roles must alternate"):
        tokenizer.apply_chat([{"role": "assistant", "content": "me first"}])
    for broken in ("{% if %}", "{{ 'a' + 1 }}", "{{ messages[7].role }}"):
        with pytest.raises(ValueError, match="refused"):
            make("sentencepiece", tokenizer_config={"chat_template": broken}).apply_chat(CHATS[0])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match="pip install jinja2"):
        tokenizer.apply_chat(CHATS[0])


def test_a_folder_without_a_tokenizer_is_named_with_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "tokenizer.model, tokenizer.json" in str(error.value)


@pytest.mark.parametrize(
    "name, content",
    (
        ("tokenizer.model", b""),
        ("tokenizer.model", b"\x0a\xff\xff garbage"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"),
        ("tokenizer.model", b"IQ== 0\nnot a rank line\n"),
        ("tokenizer.json", b"{ half"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"decoder": {"type": "ByteLevel"}}'),
        ("tokenizer.json", b'{"decoder": null}'),
    ),
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_config_is_named(make, tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
        make("sentencepiece")


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_numbers(make):
    tokenizer = make("sentencepiece")
    check_vocabulary(tokenizer, 600)
    check_vocabulary(tokenizer, 640)
    with pytest.raises(ValueError, match="has 600 ids but the model's vocab_size is 599"):
        check_vocabulary(tokenizer, 599)


def test_bytes_of_another_encoding_in_a_prompt_are_refused_in_one_line():
    """Python carries undecodable bytes of the command line as surrogates; the libraries crash on them."""
    tokenizer = load_tokenizer(DEMO)
    with pytest.raises(ValueError, match="not UTF-8"):
        tokenizer.encode("a\udcffb")


def test_a_tiktoken_file_without_every_single_byte_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match="single bytes have no rank"):
        load_tokenizer(tmp_path)
