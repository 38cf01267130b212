"""The files of a saved tokenizer, all of them: what each says, and whether what was loaded says the same.

A folder may spread one tokenizer over `tokenizer.json`, `tokenizer.model`, `tokenizer_config.json`,
`special_tokens_map.json`, `added_tokens.json`, `chat_template.jinja` (or `.json`) and `generation_config.json`. Loaders
read some of them and let one win where two differ; here files that contradict what was loaded, or each other, are
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vltrain.errors import InputError
from vltrain.files.strict_json import is_list, is_object, read_object, read_text, shown

MODEL, JSON = "tokenizer.model", "tokenizer.json"
CONFIG, SPECIAL, ADDED, GENERATION = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
PLAIN, MERGES = ("vocab.json", "vocab.txt", "spiece.model"), "merges.txt"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
KNOWN_FILES = (MODEL, JSON, CONFIG, SPECIAL, ADDED, *TEMPLATES)
_LLAMA_CLASSES = ("llamatokenizer", "llamatokenizerfast", "pretrainedtokenizerfast", "tokenizersbackend", "")
_ONE_OF_THEM = "keep the file that belongs to the weights, and remove or mend the other"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What the files say that are there.

    plain       vocab.json, vocab.txt and spiece.model, which tokenizer.json replaces, as it does merges.txt
    added       token -> id, and the file that says so
    named       `eos` and `bos` -> the token's text by each file that names one
    templates   file -> the chat template's source
    end_ids     ids that end an answer by generation_config.json
    """

    where: str
    model: Path | None = None
    json: Path | None = None
    plain: tuple[Path, ...] = ()
    merges: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    added: dict[str, tuple[int, str]] = field(default_factory=dict)
    named: dict[str, dict[str, str]] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    end_ids: tuple[int, ...] = ()

    def chat_template(self) -> str | None:
        """The one source that all files agree on. Raises InputError naming two that differ."""
        distinct = dict.fromkeys(self.templates.values())
        if len(distinct) > 1:
            files = " and ".join(list(self.templates)[:2])
            raise InputError(f"{self.where}: {files} hold different chat templates; {_ONE_OF_THEM}")
        return next(iter(distinct), None)

    def says_more_than(self, model: Any) -> list[str]:
        """The files that say what the sentencepiece model (a SentencePieceProcessor) does not."""
        rows = model.get_piece_size()
        more: list[str] = []
        more += [
            file for token, (number, file) in self.added.items() if number >= rows or model.id_to_piece(number) != token
        ]
        for name, number in (("eos", model.eos_id()), ("bos", model.bos_id())):
            piece = model.id_to_piece(number) if number >= 0 else None
            more += [file for file, token in self.named.get(name, {}).items() if token != piece]
        extra = [
            _content(token)
            for key in ("additional_special_tokens", "extra_special_tokens")
            for token in _listed(self.config.get(key))
        ]
        more += (
            [CONFIG] if any(token is not None and model.piece_to_id(token) == model.unk_id() for token in extra) else []
        )
        more += [CONFIG] if str(self.config.get("tokenizer_class") or "").lower() not in _LLAMA_CLASSES else []
        return list(dict.fromkeys([*more, *self.templates]))


def find_in(place: str, subfolder: str = "") -> Callable[[str], Path | None]:
    """Where the files of a folder are; of a hub name those that loading has fetched."""

    def in_folder(name: str) -> Path | None:
        path = Path(place, subfolder, name)
        return path if path.is_file() else None

    def in_cache(name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(place, f"{subfolder}/{name}" if subfolder else name)
        return Path(found) if isinstance(found, str) else None

    return in_folder if Path(place).is_dir() else in_cache


def read_files(where: str, find: Callable[[str], Path | None]) -> TokenizerFiles:
    """Reads the small files. `find`: name -> its path, or None where there is none. Raises InputError naming file and
    key."""
    objects = {
        name: read_object(path) for name in (CONFIG, SPECIAL, ADDED, GENERATION) if (path := find(name)) is not None
    }
    config, generation = objects.get(CONFIG, {}), objects.get(GENERATION, {})
    added = {token: (_id(number, find(ADDED), token), ADDED) for token, number in objects.get(ADDED, {}).items()}
    decoder: Any = config.get("added_tokens_decoder") or {}
    for number, token in decoder.items() if is_object(decoder) else ():
        content = _content(token)
        if content is None or not number.isdecimal():
            raise InputError(
                f"{find(CONFIG)}: added_tokens_decoder[{number!r}]: found {token!r:.80}, expected a token with its "
                "content"
            )
        if added.setdefault(content, (int(number), CONFIG))[0] != int(number):
            raise InputError(
                f"{find(CONFIG)}: the token {content!r} is {number}, but {added[content][0]} in {ADDED}; {_ONE_OF_THEM}"
            )
    _refuse_sampling(config, find(CONFIG))
    named = {
        name: {
            file: content
            for file in (CONFIG, SPECIAL)
            if (content := _content(objects.get(file, {}).get(f"{name}_token")))
        }
        for name in ("eos", "bos")
    }
    return TokenizerFiles(
        where=where,
        model=find(MODEL),
        json=find(JSON),
        plain=tuple(path for name in PLAIN if (path := find(name)) is not None),
        merges=find(MERGES),
        config=config,
        added=added,
        named=named,
        templates=_templates(config, find),
        end_ids=_end_ids(generation, find(GENERATION)),
    )


def require_agreement(files: TokenizerFiles, vocabulary: dict[str, int], named: dict[str, str | None]) -> None:
    """What was loaded is what each file says.

    Args:
        vocabulary: token -> id as loaded, added ones included.
        named: `eos` and `bos` -> the token's text as loaded, or None.

    Raises: InputError naming the file that says something else.
    """
    for token, (number, file) in files.added.items():
        if vocabulary.get(token) != number:
            read = vocabulary.get(token, "not there")
            raise InputError(
                f"{files.where}: {file} says that the token {token!r} is {number}, but as transformers reads the "
                f"folder it is {read}; {_ONE_OF_THEM}"
            )
    for name, by_file in files.named.items():
        for file, token in by_file.items():
            if token != named[name]:
                raise InputError(
                    f"{files.where}: {file} says that the {name} token is {token!r}, but as transformers reads "
                    f"the folder it is {named[name]!r}; {_ONE_OF_THEM}"
                )
    if files.json is not None:
        _require_vocabulary(files, vocabulary)
    elif files.model is not None:
        _require_known(files, set(pieces_of(files.model) or ()))


def _require_known(files: TokenizerFiles, tokens: set[str]) -> None:
    """No loader made up an id for the token that ends or begins a text. `tokens`: those of the vocabulary's own
    file."""
    for name, by_file in files.named.items():
        for file, token in by_file.items():
            if token not in tokens and token not in files.added:
                raise InputError(
                    f"{files.where}: {file} names the {name} token {token!r}, which no file of the vocabulary "
                    "holds, so that no row was learned for it; "
                    "fetch all of the tokenizer's files, or name a token that is there"
                )


def pieces_of(path: Path) -> dict[str, int] | None:
    """Piece -> id of a sentencepiece model's control and ordinary pieces; None for a file of another format, as
    LLaMA-3's of that name."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        return None
    skipped = (model.is_byte, model.is_unused)
    return {
        model.id_to_piece(number): number
        for number in range(model.get_piece_size())
        if not any(is_one(number) for is_one in skipped)
    }


def _require_vocabulary(files: TokenizerFiles, vocabulary: dict[str, int]) -> None:
    """tokenizer.json's tokens have their ids, and so have the pieces of a tokenizer.model beside it."""
    assert files.json is not None
    saved = read_object(files.json)
    own = dict(_pieces(saved.get("model")))
    for number, token in enumerate(saved.get("added_tokens") or ()):
        if not is_object(token) or type(token.get("content")) is not str or type(token.get("id")) is not int:
            raise InputError(
                f"{files.json}: added_tokens[{number}]: found {shown(token)}, expected an object with a text 'content' "
                "and a whole number 'id'; fetch the file anew"
            )
        own[token["content"]] = token["id"]
    _require_ids(own, vocabulary, files.json)
    _require_known(files, set(own))
    for path in (*files.plain, *([files.model] if files.model is not None else ())):
        _require_ids(_listed_in(path, vocabulary), vocabulary, path)
    if files.merges is not None:
        _require_merges(files.merges, saved.get("model"), vocabulary)


def _require_merges(path: Path, model: Any, vocabulary: dict[str, int]) -> None:
    """A merges.txt beside tokenizer.json has its merges, in their order; those that the vocabulary cannot make are
    nobody's."""
    own: list[tuple[str, ...]] = [
        tuple(one.split(" ")) if isinstance(one, str) else tuple(one)
        for one in (model.get("merges") or () if is_object(model) else ())
    ]
    lines = enumerate(read_text(path).split("\n"), start=1)
    listed = [
        (number, tuple(line.rstrip("\r").split(" ")))
        for number, line in lines
        if line.strip() and not (number == 1 and line.startswith("#version"))
    ]
    usable = [(number, pair) for number, pair in listed if all(token in vocabulary for token in (*pair, "".join(pair)))]
    for place, (number, pair) in enumerate(usable):
        if place >= len(own) or pair != own[place]:
            found = " ".join(own[place]) if place < len(own) else "none"
            raise InputError(
                f"{path}:{number}: the merge {' '.join(pair)!r}, where tokenizer.json has {found!r}; {_ONE_OF_THEM}"
            )


def _listed_in(path: Path, vocabulary: dict[str, int]) -> dict[str, int]:
    """Token -> id by a vocabulary's file beside tokenizer.json; of a sentencepiece model's pieces those that are tokens
    there, too."""
    if path.suffix == ".json":
        return read_object(path)
    if path.suffix == ".txt":
        return {
            token: number for number, line in enumerate(read_text(path).split("\n")) if (token := line.rstrip("\r"))
        }
    return {piece: number for piece, number in (pieces_of(path) or {}).items() if piece in vocabulary}


def _require_ids(own: dict[str, int], vocabulary: dict[str, int], file: Path) -> None:
    wrong = next((token for token, number in own.items() if vocabulary.get(token) != number), None)
    if wrong is not None:
        read = vocabulary.get(wrong, "not there")
        raise InputError(
            f"{file}: the token {wrong!r} is {own[wrong]}, but as transformers reads the folder it is {read}; "
            f"{_ONE_OF_THEM}"
        )


def _pieces(model: Any) -> list[tuple[str, int]]:
    vocabulary = model.get("vocab") if is_object(model) else None
    if is_object(vocabulary):
        return list(vocabulary.items())
    # A Unigram's: [piece, score] in the order of ids; of pieces that come twice the last one counts.
    return [(entry[0], number) for number, entry in enumerate(vocabulary or ()) if is_list(entry) and entry]


def _content(token: Any) -> str | None:
    """A token's text, which files write plainly or as an object; None for nothing."""
    if is_object(token):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _listed(tokens: Any) -> list[Any]:
    return list(tokens.values()) if is_object(tokens) else tokens if is_list(tokens) else []


def _id(number: Any, file: Path | None, token: str) -> int:
    if type(number) is not int or number < 0:
        raise InputError(f"{file}: the token {token!r}: found the id {number!r}, expected a whole number from 0")
    return number


def _refuse_sampling(config: dict[str, Any], file: Path | None) -> None:
    settings: Any = config.get("sp_model_kwargs") or {}
    if is_object(settings) and settings.get("enable_sampling"):
        raise InputError(
            f"{file}: sp_model_kwargs.enable_sampling: the same text would have other tokens each time; leave it out"
        )


def _templates(config: dict[str, Any], find: Callable[[str], Path | None]) -> dict[str, str]:
    found: dict[str, Any] = {CONFIG: config.get("chat_template")}
    jinja, as_json = (find(name) for name in TEMPLATES)
    if jinja is not None:
        try:
            found[jinja.name] = jinja.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{jinja}: cannot be read as a chat template ({error})") from None
    if as_json is not None:
        found[as_json.name] = read_object(as_json).get("chat_template")
    return {
        file: template
        for file, said in found.items()
        if (template := default_template(said, str(find(file)))) is not None
    }


def default_template(said: Any, where: str) -> str | None:
    """The template for plain chats where several are named. Raises InputError if none of them is called default."""
    if is_list(said):
        said = {entry.get("name"): entry.get("template") for entry in said if is_object(entry)}
    if is_object(said):
        if "default" not in said:
            raise InputError(
                f"{where}: chat_template: found templates {', '.join(map(str, said))}, expected one named 'default' "
                "among them"
            )
        said = said["default"]
    if said is not None and not isinstance(said, str):
        raise InputError(f"{where}: chat_template: found {said!r:.80}, expected a text")
    return said


def _end_ids(generation: dict[str, Any], file: Path | None) -> tuple[int, ...]:
    """Nothing where the file was only derived from the model's config, whose default it then repeats."""
    said = generation.get("eos_token_id")
    if said is None or generation.get("_from_model_config") is True:
        return ()
    ids: list[Any] = said if is_list(said) else [said]
    if not all(type(number) is int and number >= 0 for number in ids):
        raise InputError(f"{file}: eos_token_id: found {said!r:.80}, expected an id or a list of ids")
    return tuple(dict.fromkeys(ids))
