"""Text to ids and back: bytes, the words of scenes, or a tokenizer from a file of two packages.

cfjax appends its own special tokens after the ids of a tokenizer, which adds none itself.
"""

import hashlib
import re
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import PurePath
from typing import Protocol

from cfjax.data.scene_captions import WORDS
from cfjax.errors import UserError
from cfjax.paths import absolute

BYTES = "bytes"
SCENE_WORDS = "scene_words"
_KINDS = "'bytes', 'scene_words', or the path of a .json of Hugging Face's tokenizers or of a SentencePiece .model"


class Tokenizer(Protocol):
    """Text to ids and back; may be used by several threads and sent to other processes.

    Attributes:
      vocabulary_size: ids are 0 ... vocabulary_size - 1; special tokens of cfjax are not among them.
      name: "bytes", "scene_words", or the name of the file with the beginning of its checksum.
      checksum: "bytes", or the SHA-256 of the words or of the file in hexadecimal; by it a checkpoint
        knows whether ids mean what they meant.
    """

    vocabulary_size: int
    name: str
    checksum: str

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with no special tokens added.

        Raises:
          UserError: the text is no Unicode, as half of a surrogate pair is not.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD.

        The inverse of `encode` for bytes. Files may normalise a text, and what they drop is lost.

        Raises:
          UserError: an id is out of range.
        """
        ...


def open_tokenizer(name: str | PathLike) -> Tokenizer:
    """Opens a tokenizer.

    Args:
      name: "bytes": the UTF-8 of the text, 256 ids; "scene_words": the words of the captions of the
        embedded scenes, and no others; or the path of a `.json` of Hugging Face's `tokenizers`, or
        of a SentencePiece `.model`.

    Raises:
      UserError: there is no such file, it is of neither kind or damaged, or the package that reads
        it is not installed.
    """
    if fspath(name) == BYTES:
        return ByteTokenizer()
    if fspath(name) == SCENE_WORDS:
        return SceneWordTokenizer()
    suffix = PurePath(name).suffix.lower()
    if not fspath(name) or not (path := absolute(name)).exists():
        raise UserError(f"there is no tokenizer {fspath(name)!r}; pass {_KINDS}.")
    if suffix not in (".json", ".model") or path.is_dir():
        raise UserError(f"the tokenizer {path} is of no known kind; pass {_KINDS}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the tokenizer {path} can't be read: {error.strerror or error}; make it readable."
        ) from error
    try:
        of_kind = HuggingFaceTokenizer if suffix == ".json" else SentencePieceTokenizer
        return of_kind(content, path.name)
    except UserError:
        raise
    except Exception as error:  # both packages raise plain ones for what they can't parse
        package = "tokenizers" if suffix == ".json" else "sentencepiece"
        raise UserError(
            f"the tokenizer {path} can't be read by the package {package}, as it is damaged or of"
            f" another kind ({_first_line(error)}); copy it anew or pass {_KINDS}."
        ) from error


class ByteTokenizer:
    """The UTF-8 of a text; see `Tokenizer`."""

    vocabulary_size = 256
    name = BYTES
    checksum = BYTES

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(_checked(ids, self)).decode("utf-8", "replace")


class SceneWordTokenizer:
    """Words with single spaces between them, and commas; see `Tokenizer`.

    For captions of the embedded scenes alone: a model learns them in far fewer train steps than
    their bytes, and its sequences are a quarter as long.
    """

    name = SCENE_WORDS
    checksum = hashlib.sha256(" ".join(WORDS).encode()).hexdigest()
    _pieces = (",", *(f" {word}" for word in WORDS))
    vocabulary_size = len(_pieces)

    def __init__(self):
        self._ids = {piece: index for index, piece in enumerate(self._pieces)}

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`.

        Raises:
          UserError: besides, a word that no caption of scenes has.
        """
        _utf8(text)
        pieces = re.findall(",| ?[^ ,]*", f" {text}" if text else "")
        try:
            return [self._ids[piece] for piece in pieces if piece]
        except KeyError as error:
            raise UserError(
                f"the tokenizer scene_words has no {error.args[0].strip() or ' '!r} in {text!r}; write"
                f" captions with single spaces, of the words {', '.join(WORDS)}."
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._pieces[index] for index in _checked(ids, self)).removeprefix(" ")


class _FileTokenizer:
    """What tokenizers of files share."""

    def __init__(self, content: bytes, file_name: str):
        self.checksum = hashlib.sha256(content).hexdigest()
        self.name = f"{file_name} (sha256 {self.checksum[:12]})"


class HuggingFaceTokenizer(_FileTokenizer):
    """A JSON of Hugging Face's `tokenizers`; see `Tokenizer`.

    Truncation and padding that the file may ask for are switched off.
    """

    def __init__(self, content: bytes, file_name: str):
        """Reads the bytes of the file.

        Raises:
          UserError: the package is missing.
          Exception: of the package, for what it can't read.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise _not_installed("tokenizers") from error
        super().__init__(content, file_name)
        self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Ids may have gaps, so that their number would be too few.
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocabulary_size = max(ids, default=-1) + 1
        _require_tokens(self)

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(_checked(ids, self), skip_special_tokens=False)


class SentencePieceTokenizer(_FileTokenizer):
    """A SentencePiece model; see `Tokenizer`. Control pieces, such as `</s>`, decode to nothing."""

    def __init__(self, content: bytes, file_name: str):
        """Reads the bytes of the file.

        Raises:
          UserError: the package is missing.
          Exception: of the package, for what it can't read.
        """
        try:
            import sentencepiece
        except ImportError as error:
            raise _not_installed("sentencepiece") from error
        super().__init__(content, file_name)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocabulary_size = self._processor.vocab_size()
        _require_tokens(self)

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return self._processor.encode(text, out_type=int, add_bos=False, add_eos=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(_checked(ids, self))


def _not_installed(package: str) -> UserError:
    return UserError(
        f"this tokenizer is read by the package {package}, which is not installed; run"
        f" 'pip install {package}', or take the tokenizer 'bytes'."
    )


def _require_tokens(tokenizer: Tokenizer) -> None:
    if not tokenizer.vocabulary_size:
        raise ValueError("it has no tokens")


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text {text[:40]!r} can't be encoded: character {error.start} is half of a"
            " surrogate pair; remove it."
        ) from error


def _checked(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    ids = [int(it) for it in ids]
    for it in ids:
        if not 0 <= it < tokenizer.vocabulary_size:
            raise UserError(
                f"the id {it} is not one of the tokenizer {tokenizer.name}, whose ids are"
                f" 0...{tokenizer.vocabulary_size - 1}; remove special tokens before decoding."
            )
    return ids


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]
