"""Text classifiers of the transformers library: any encoder with `inputs_embeds`, read from a folder or the hub.

    out = classifier([CLS] e_1 ... e_n [SEP]),  e_t = E[token t]

DistilBERT, BERT, RoBERTa and their kin (Devlin et al., "BERT", NAACL 2019; Wolf et al., "Transformers", EMNLP 2020).
Special tokens are a part of the network and no part of the text: they are put around the words inside `forward`, where
no method finds them, so they get no attribution and are never taken away. What is taken away becomes the mask token,
which the pre-training has seen at any place, or `<unk>` where the tokenizer has none.

The library's code cannot be traced with torch.fx. A layer here is what the words' features pass through behind a
block, `block1` ..., with the special tokens left out; a bottleneck there is optimised through the whole network.
Weights come from safetensors alone, and no code comes with them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ibxai.backbones.text import TextBackbone
from ibxai.backbones.tracing import Untraceable
from ibxai.errors import BadSample, UserError
from ibxai.types import Text

log = logging.getLogger(__name__)

# their positions are counted from behind the padding's number
_COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "mpnet", "longformer")
_LENGTHS = (5, 2)  # words of the texts on which a network is compared with itself
_ENCODERS = "Give an encoder that leaves padding out, such as DistilBERT, BERT or RoBERTa."
_SAME = 1e-3  # by how much its outputs may differ there, relative to the largest


@dataclass(frozen=True)
class HF:
    """weights: a folder with config.json, model.safetensors and tokenizer.json, or a name on the hub, which is taken
    from the local cache unless `download`. max_tokens: the first of a text that are read, special tokens not counted.
    layers: role -> block; none: at a quarter, a half and three quarters of the blocks, the bottleneck at a half.
    """

    name: str
    weights: str
    download: bool = False
    max_tokens: int = 256
    layers: dict[str, str] = field(default_factory=dict)

    modality: ClassVar[str] = "text"

    def load(self, max_passes: int) -> TextBackbone:
        """The frozen network. Raises UserError where the files or the library are not there, or the network is none
        that this can explain.
        """
        model, tokenizer = self._pretrained()
        frame, tokens = Frame.of(tokenizer), Subwords(tokenizer, self.max_tokens)
        self._check_length(model.config, frame)
        network = Framed(model, frame).eval()
        _check_same(network, self.weights)
        table, roles = model.get_input_embeddings().weight, self.layers or _roles(network.depth)
        backbone = TextBackbone(network, table, tokens, roles, self.name, False, max_passes)
        backbone.layers = {name: shape for name, shape in backbone.layers.items() if name in network.ports}
        backbone.class_names = _class_names(model.config)
        log.info("%s is %s: it reads the first %d tokens", self.name, self.weights, self.max_tokens)
        return backbone

    def _pretrained(self) -> tuple[Any, Any]:
        """(model, tokenizer) of the library, in float32."""
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError as error:
            raise UserError("This needs transformers, which is not installed: pip install 'ibxai[hf]'") from error
        folder = Path(self.weights).expanduser()
        source = str(folder) if folder.is_dir() else self.weights
        common: dict[str, Any] = {"local_files_only": not self.download, "trust_remote_code": False}
        try:
            with _quiet():
                tokenizer = AutoTokenizer.from_pretrained(source, **common)
                model, told = AutoModelForSequenceClassification.from_pretrained(
                    source,
                    **common,
                    use_safetensors=True,
                    dtype=torch.float32,
                    attn_implementation="eager",  # the same plain products on every device
                    output_loading_info=True,
                )
        except Exception as error:  # the library raises errors of many kinds, all meaning "not like this"
            reason = " ".join(str(error).split())[:150]
            raise UserError(
                f"backbone.weights={self.weights} cannot be loaded ({type(error).__name__}: {reason}).\n"
                "Give a folder with config.json, model.safetensors and tokenizer.json, or a name on the hub that lies "
                "in the local cache (backbone.download=true fetches it)."
            ) from error
        if absent := sorted(told["missing_keys"]):
            raise UserError(
                f"backbone.weights={self.weights} is no trained classifier: it lacks {', '.join(absent[:3])}.\n"
                "Give one that was fine-tuned to classify texts: its head would be random."
            )
        if not tokenizer.is_fast:
            raise UserError(
                f"The tokenizer of {self.weights} does not tell where its tokens stand in the text.\n"
                "Put a tokenizer.json into the folder: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )
        return model, tokenizer

    def _check_length(self, config: Any, frame: Frame) -> None:
        """Raises UserError when a text may be longer than the network has positions."""
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None:
            return
        most = positions - len(frame.before) - len(frame.behind)
        if config.model_type in _COUNT_FROM_PADDING:
            most -= config.pad_token_id + 1
        if not 1 <= self.max_tokens <= most:
            raise UserError(f"backbone.max_tokens={self.max_tokens}: {self.weights} reads 1 to {most} tokens.")


@contextmanager
def _quiet() -> Iterator[None]:
    """The library's progress bars and reports are off inside: what is wrong is said in two lines."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts before and behind a text, by number."""

    before: tuple[int, ...]
    behind: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        found = tokenizer.backend_tokenizer.encode("a")
        marks = found.special_tokens_mask
        inside = [place for place, special in enumerate(marks) if not special]
        first, last = (inside[0], inside[-1] + 1) if inside else (len(marks), len(marks))
        return cls(tuple(found.ids[:first]), tuple(found.ids[last:]))


@dataclass(frozen=True)
class Subwords:
    """A pretrained tokenizer as a `Tokeniser`: its tokens without the special ones, and their places in the text.

    digest: of the tokenizer's file, for a run's identity. unknown: the token that stands for one that is taken away.
    Raises UserError when the tokenizer has none.
    """

    tokenizer: InitVar[Any]
    max_tokens: int
    unknown: int = field(init=False)
    digest: str = field(init=False)

    modality: ClassVar[str] = "text"

    def __post_init__(self, tokenizer: Any) -> None:
        kept = [number for number in (tokenizer.mask_token_id, tokenizer.unk_token_id) if number is not None]
        if not kept:
            raise UserError("The tokenizer has neither a mask nor an unknown token to stand for what is taken away.")
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        object.__setattr__(self, "_backend", backend)
        object.__setattr__(self, "unknown", kept[0])
        object.__setattr__(self, "digest", hashlib.sha256(backend.to_str().encode()).hexdigest()[:16])

    def __call__(self, text: Text) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(token numbers, long [T], no regions) of one text. Raises BadSample when it holds no token."""
        found = self._encoded(text).ids[: self.max_tokens]
        if not found:
            raise BadSample("the text holds no word")
        return torch.tensor(found), {}

    def spans(self, text: Text) -> list[tuple[int, int]]:
        """Where each token's characters stand in the text: (start, end), in order. A character that several tokens
        share, as the bytes of an emoji do, is the first one's.
        """
        spans, behind = [], 0
        for start, end in self._encoded(text).offsets[: self.max_tokens]:
            start = max(start, behind)
            behind = max(end, start)
            spans.append((start, behind))
        return spans

    def _encoded(self, text: Text) -> Any:
        return self._backend.encode(text.text, add_special_tokens=False)  # type: ignore[attr-defined]  # of __post_init__


class Framed(nn.Module):
    """Embeddings with a last channel that is 1 at tokens and 0 in the padding, [B, T, D + 1] -> outputs [B, K].

    Behind each block the words' features [B, T, H] pass through a module of their own, `block1` ..., where a method
    may read and exchange them. ports: the names of these, none where the blocks are not a list of modules.
    """

    def __init__(self, model: Any, frame: Frame) -> None:
        super().__init__()
        self.model, self.frame = model, frame
        depth = model.config.num_hidden_layers
        lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
        self._blocks = tuple(next(lists, nn.ModuleList()))
        self.ports = tuple(f"block{number}" for number in range(1, len(self._blocks) + 1))
        for port in self.ports:
            self.add_module(port, nn.Identity())

    @property
    def depth(self) -> int:
        return len(self.ports)

    def forward(self, inputs: Tensor) -> Tensor:
        if isinstance(inputs, fx.Proxy):
            raise Untraceable("the code of transformers is not made for torch.fx")
        valid = inputs[..., -1] > 0
        framed, attended = self._with_specials(inputs[..., :-1], valid)
        with ExitStack() as stack:
            for block, port in zip(self._blocks, self.ports, strict=True):
                stack.enter_context(block.register_forward_hook(self._through(self.get_submodule(port), valid)))
            return self.model(inputs_embeds=framed, attention_mask=attended.long()).logits

    def _with_specials(self, words: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings [B, L, D], which are read, bool [B, L]): what comes behind follows each text's last word."""
        table, frame = self.model.get_input_embeddings().weight, self.frame
        before = table[list(frame.before)].expand(len(words), -1, -1)
        room = words.new_zeros(len(words), len(frame.behind), words.shape[2])
        framed = torch.cat([before, words, room], 1)
        places = torch.arange(framed.shape[1], device=words.device)
        ends = len(frame.before) + valid.sum(1, keepdim=True)
        for number, token in enumerate(frame.behind):
            framed = torch.where((places == ends + number)[..., None], table[token], framed)
        return framed, places < ends + len(frame.behind)

    def _through(self, port: nn.Module, valid: Tensor) -> Callable[..., Any]:
        """A hook that leads the words' features through a module, and the special tokens' past it."""
        first, last = len(self.frame.before), len(self.frame.before) + valid.shape[1]

        def hook(block: nn.Module, args: Any, out: Any) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            words = hidden[:, first:last]
            # the places of a shorter text's padding hold what comes behind its last word
            words = torch.where(valid[..., None], port(words), words)
            hidden = torch.cat([hidden[:, :first], words, hidden[:, last:]], 1)
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        return hook


def _check_same(network: Framed, weights: str) -> None:
    """Raises UserError when texts of different lengths together are not what each is to the library by itself, as where
    the answer is read at the last place of the padded text.
    """
    table, frame = network.model.get_input_embeddings().weight, network.frame
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(len(table), (length,), generator=generator) for length in _LENGTHS]
    tokens = nn.utils.rnn.pad_sequence(rows, True)
    valid = torch.arange(max(_LENGTHS)) < torch.tensor(_LENGTHS)[:, None]
    framed = [torch.tensor([*frame.before, *row.tolist(), *frame.behind]) for row in rows]
    with torch.no_grad():
        try:
            found = network(torch.cat([table[tokens], valid[..., None].float()], 2))
        except NotImplementedError as error:
            raise UserError(f"{weights} takes no embeddings in the place of tokens: {error}.\n{_ENCODERS}") from error
        wanted = torch.cat([network.model(input_ids=row[None]).logits for row in framed])
    if not (found - wanted).abs().max() <= _SAME * wanted.abs().max():
        raise UserError(
            f"{weights} ({network.model.config.model_type}) answers otherwise when a text is padded.\n{_ENCODERS}"
        )


def _roles(depth: int) -> dict[str, str]:
    """role -> block. Behind the last block the special token alone may be read."""
    if not depth:
        return {}
    early, mid, late = (f"block{max(depth * quarter // 4, 1)}" for quarter in (1, 2, 3))
    return {"early": early, "mid": mid, "late": late, "bottleneck": mid}


def _class_names(config: Any) -> Sequence[str] | None:
    """What the network calls its outputs; None where it was never told."""
    names = tuple(config.id2label[number] for number in range(config.num_labels))
    return None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names
