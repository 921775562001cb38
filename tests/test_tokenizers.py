"""Text to ids and back: bytes, and files of two packages, equal to what the packages give."""

import concurrent.futures
import hashlib
import io
import pickle
import sys

import numpy as np
import pytest

from cfjax.data.scene_captions import phrasings
from cfjax.data.scenes import ScenesSource
from cfjax.data.tokenizers import open_tokenizer
from cfjax.errors import UserError

SENTENCES = [
    "a cat sat on the mat",
    "ein grüner Käfer im März",
    "two dogs play with a red ball on the beach",
    "猫 坐 在 垫子 上 🐈",
]
TEXTS = [*SENTENCES, "", " ", "an unknown wörd: ∀x", "line\nbreak\tand\0zero", "e\u0301 é 🏳️‍🌈"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers of files")


@pytest.fixture(scope="module")
def hugging_face(folder):
    """A byte-level BPE with special tokens, and with truncation and padding that it asks for."""
    package = pytest.importorskip("tokenizers")
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = package.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    path = folder / "bpe.json"
    tokenizer.save(str(path))
    oracle = package.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(path))
    return path, oracle


@pytest.fixture(scope="module")
def sentence_piece(folder):
    """A unigram model with pieces for bytes, so that no character is unknown."""
    package = pytest.importorskip("sentencepiece")
    content = io.BytesIO()
    package.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_writer=content,
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = folder / "unigram.model"
    path.write_bytes(content.getvalue())
    return path, package.SentencePieceProcessor(model_file=str(path))


def test_bytes_are_utf8():
    tokenizer = open_tokenizer("bytes")
    assert (tokenizer.vocabulary_size, tokenizer.name) == (256, "bytes")
    assert tokenizer.checksum == "bytes"
    assert tokenizer.encode("aß") == [0x61, 0xC3, 0x9F]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0x61, 0xC3, 0x62]) == "a\ufffdb"
    assert tokenizer.decode(np.array([97, 98], np.int32)) == "ab"


def test_scene_words_are_those_of_all_captions():
    tokenizer = open_tokenizer("scene_words")
    assert tokenizer.encode("") == []
    assert len(tokenizer.encode("a red three, which is left of a blue seven")) == 11
    for grid_size in (2, 3):
        source = ScenesSource("train", 24, grid_size, 300)
        captions = {it for index in range(300) for it in phrasings(source.scene_at(index))}
        ids = [tokenizer.encode(caption) for caption in captions]
        assert [tokenizer.decode(it) for it in ids] == list(captions)
        assert len({tuple(it) for it in ids}) == len(captions)
    assert pickle.loads(pickle.dumps(tokenizer)).checksum == tokenizer.checksum


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("a purple three", "'purple'"),
        ("A red three", "'A'"),
        ("red  three", "' '"),
        ("red three ", "' '"),
        (" red three", "' '"),
        ("red\nthree", r"'red\nthree'"),
    ],
)
def test_scene_words_refuse_others(text, unknown):
    sentence = refusal(lambda: open_tokenizer("scene_words").encode(text))
    assert f"scene_words has no {unknown} in {text!r}" in sentence
    assert "of the words a, above, and," in sentence


@pytest.mark.oracle
def test_hugging_face_json_is_read_as_the_package_does(hugging_face):
    path, oracle = hugging_face
    tokenizer = open_tokenizer(path)
    assert tokenizer.vocabulary_size == oracle.get_vocab_size() == 300
    assert len(oracle.encode("a cat").ids) == len(tokenizer.encode("a cat")) + 2
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode(SENTENCES[2])) > 4  # not truncated
    assert tokenizer.decode([0, *tokenizer.encode("a cat"), 1]) == "<s>a cat</s>"
    assert tokenizer.decode(tokenizer.encode("ß")[:1]) == "\ufffd"


@pytest.mark.oracle
def test_ids_of_a_hugging_face_json_may_have_gaps(folder):
    package = pytest.importorskip("tokenizers")
    model = package.models.WordLevel({"a": 0, "cat": 7, "?": 2}, unk_token="?")
    package.Tokenizer(model).save(str(folder / "gaps.json"))
    tokenizer = open_tokenizer(folder / "gaps.json")
    assert tokenizer.vocabulary_size == 8
    assert tokenizer.encode("cat") == [7]
    assert tokenizer.decode([7]) == "cat"


@pytest.mark.oracle
def test_sentence_piece_models_are_read_as_the_package_does(sentence_piece):
    path, oracle = sentence_piece
    tokenizer = open_tokenizer(str(path))
    assert tokenizer.vocabulary_size == oracle.vocab_size()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text)
        assert oracle.bos_id() not in ids and oracle.eos_id() not in ids
        assert tokenizer.decode(ids) == oracle.decode(ids)
    for text in SENTENCES:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    byte = tokenizer.encode("∀")[-3:][0]
    assert tokenizer.decode([byte]) == "\ufffd"


@pytest.mark.oracle
def test_names_tell_files_apart(hugging_face, sentence_piece, folder):
    """And what is opened may be sent to other processes, and used by threads."""
    (bpe, _), (unigram, _) = hugging_face, sentence_piece
    for path in (bpe, unigram):
        tokenizer = open_tokenizer(path)
        checksum = hashlib.sha256(path.read_bytes()).hexdigest()
        assert tokenizer.checksum == checksum
        assert tokenizer.name == f"{path.name} (sha256 {checksum[:12]})"
        sent = pickle.loads(pickle.dumps(tokenizer))
        assert sent.encode(SENTENCES[1]) == tokenizer.encode(SENTENCES[1])
        assert sent.checksum == checksum
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            of_threads = list(pool.map(tokenizer.encode, TEXTS * 20))
        assert of_threads == [tokenizer.encode(text) for text in TEXTS] * 20
    changed = folder / "changed" / bpe.name
    changed.parent.mkdir()
    changed.write_text(bpe.read_text().replace("</s>", "<e>"))
    assert open_tokenizer(changed).checksum != open_tokenizer(bpe).checksum


def refusal(make):
    with pytest.raises(UserError) as error:
        make()
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_what_is_no_tokenizer_is_refused(tmp_path):
    assert "there is no tokenizer 'byte'; pass 'bytes', 'scene_words', or the path" in refusal(
        lambda: open_tokenizer("byte")
    )
    assert "there is no tokenizer ''" in refusal(lambda: open_tokenizer(""))
    missing = tmp_path / "missing.json"
    assert f"there is no tokenizer '{missing}'" in refusal(lambda: open_tokenizer(missing))
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "folder.json").mkdir()
    for name in ("vocab.txt", "folder.json"):
        assert f"{name} is of no known kind; pass 'bytes'" in refusal(
            lambda name=name: open_tokenizer(tmp_path / name)
        )


@pytest.mark.oracle
def test_damaged_files_are_refused(hugging_face, sentence_piece, tmp_path):
    (bpe, _), (unigram, _) = hugging_face, sentence_piece
    empty = b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}'
    for name, contents in {
        "bad.json": [b"", b"{}", b"[1]", b"\xff\xfe", bpe.read_bytes()[:500], empty],
        "bad.model": [b"", b"no model " * 9, unigram.read_bytes()[:200], bpe.read_bytes()],
    }.items():
        for content in contents:
            (tmp_path / name).write_bytes(content)
            sentence = refusal(lambda name=name: open_tokenizer(tmp_path / name))
            package = "tokenizers" if name == "bad.json" else "sentencepiece"
            assert f"{name} can't be read by the package {package}" in sentence


@pytest.mark.oracle
def test_what_can_not_be_decoded_or_encoded_is_refused(hugging_face, sentence_piece):
    for name in ("bytes", "scene_words", hugging_face[0], sentence_piece[0]):
        tokenizer = open_tokenizer(name)
        end = tokenizer.vocabulary_size
        tokenizer.decode([end - 1])
        for bad in (end, -1):
            sentence = refusal(lambda tokenizer=tokenizer, bad=bad: tokenizer.decode([1, bad]))
            assert f"the id {bad} is not one of the tokenizer {tokenizer.name}" in sentence
            assert f"ids are 0...{end - 1};" in sentence
        sentence = refusal(lambda tokenizer=tokenizer: tokenizer.encode("ab\ud800"))
        assert "character 2 is half of a surrogate pair" in sentence


@pytest.mark.parametrize(
    ("name", "package"), [("a.json", "tokenizers"), ("a.model", "sentencepiece")]
)
def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    sentence = refusal(lambda: open_tokenizer(tmp_path / name))
    assert f"the package {package}, which is not installed; run 'pip install {package}'" in sentence
