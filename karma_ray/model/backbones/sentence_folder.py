"""Folders of the library sentence-transformers, from which an item encoder may start.

The library runs modules in a row: Transformer, Pooling, Dense and Normalize. They are read as
pooling, instruction, mean and W_e of the item encoder, so that a run starts with the vectors that
the library computes, up to their length. What the item encoder does not compute is refused.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from karma_ray.artifacts import join
from karma_ray.errors import InputError
from karma_ray.model.backbones.tokenizer import load_tokenizer
from karma_ray.node_cache import local_copy

LOG = logging.getLogger(__name__)
FIELD = "model.item_encoder.checkpoint"
MODULES, FACTS = "modules.json", "config_sentence_transformers.json"
MODES = ("lasttoken", "mean")
"""Pooling modes that the item encoder computes, by the library's newer names."""
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names under which the library looks for the prompt of documents."""
IDENTITIES = (None, "torch.nn.modules.linear.Identity", "torch.nn.Identity")
PROBE = "a plain text"
LONGEST = 128
"""Tokens up to which the length that an encoder was made for is kept; others read any document."""
SOLVED = 1e-5
"""Largest relative error of a mean that stands for the bias of a Dense."""


@dataclass(frozen=True)
class SentenceFolder:
    """What an item encoder takes over from such a folder."""

    root: str
    body: str
    """Folder of the Transformer: weights and tokenizer."""
    pool: Literal["eos", "emb_token", "mean"]
    """`emb_token` if another token than the end of text is put behind every text."""
    instruction: str
    """What the tokenizer puts before every text, and the prompt of documents."""
    max_tokens: int
    """Tokens that are read of a text, with its end and without the instruction."""
    end: int
    """The token behind every text."""
    dense: tuple[str, ...]
    """Folders of the linear layers, in their order."""

    def projection(self) -> tuple[Tensor, Tensor] | None:
        """Return the mean [d] and W_e [D, d] of the linear layers; None if there are none.

        Each adds W x + b, which in total is W_e (x - mean). Raises InputError if no mean gives b.
        """
        if not self.dense:
            return None
        whole, mean = None, torch.zeros(())
        for folder in self.dense:
            tensors = load_file(Path(folder) / "model.safetensors")
            weight = tensors["linear.weight"].double()
            whole = weight if whole is None else weight @ whole
            mean = mean.double().expand(whole.shape[1])
            if (bias := tensors.get("linear.bias")) is not None:
                shift = torch.linalg.lstsq(whole, -bias.double()[:, None], driver="gelsd")
                moved = shift.solution[:, 0]
                if (whole @ moved + bias).norm() > SOLVED * bias.norm():
                    raise _refused(self.root, f"has a bias in {folder} that no mean stands for")
                mean = mean + moved
        assert whole is not None
        return mean.float(), whole.float()


def sentence_folder(checkpoint: str) -> SentenceFolder | None:
    """Read a local folder, or the folder of its Transformer; None if it is an ordinary checkpoint.

    Raises InputError that names a module, or a setting of one, that would not be computed.
    """
    root = _root(checkpoint)
    if root is None:
        return None
    modules = [(_kind(entry), str(root / str(entry["path"]))) for entry in _json(root / MODULES)]
    kinds = [kind for kind, _ in modules]
    known = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense"), "Normalize"]
    if kinds not in (known, known[:-1]):
        raise _refused(
            root, f"runs the modules {', '.join(kinds)}, not Transformer, Pooling, any number of "
            "Dense, and Normalize"
        )  # fmt: skip
    body, pooling = Path(modules[0][1]), Path(modules[1][1])
    dense = tuple(folder for kind, folder in modules if kind == "Dense")
    for folder in dense:
        _check_dense(root, Path(folder))
    mode, with_prompt = _pooling(root, pooling)
    before, after, end = _frame(root, body)
    prompt = _document_prompt(root)
    if prompt and not with_prompt:
        raise _refused(root, f"leaves the prompt {prompt!r} out of the mean (include_prompt=false)")
    facts = _json(body / "sentence_bert_config.json") or {}
    if facts.get("do_lower_case"):
        raise _refused(root, "lowers the case of all texts (do_lower_case)")
    instruction = (before + prompt).strip()  # as `--set` takes it
    words = load_tokenizer(str(body), FIELD)
    put_before = len(words([instruction], add_special_tokens=False)["input_ids"][0])
    room = int(facts.get("max_seq_length") or words.model_max_length) - put_before
    if room < 2:
        raise _refused(root, f"leaves no room for a text behind {instruction!r}")
    pool: Literal["eos", "emb_token", "mean"] = "mean"
    if mode == "lasttoken":
        if len(after) != 1:
            raise _refused(root, "pools the last token, but puts no end of text behind texts")
        pool = "eos" if after[0] == end else "emb_token"
    elif after != [end]:
        LOG.warning("%s: the mean is taken with the end of text, which was not trained so", root)
    return SentenceFolder(
        str(root), str(body), pool, instruction, room, after[0] if after else end,
        dense,
    )  # fmt: skip


def own_fields(checkpoint: str) -> dict[str, Any]:
    """Return the configuration fields that such a folder decides; none for other folders."""
    folder = sentence_folder(checkpoint)
    if folder is None:
        return {}
    fields: dict[str, Any] = {"model.item_encoder.pool": folder.pool}
    if folder.instruction:
        fields["model.item_encoder.instruction"] = folder.instruction
    if folder.max_tokens <= LONGEST:
        fields["collate.max_item_tokens"] = folder.max_tokens
    return fields


def plain_body(checkpoint: str) -> str:
    """Return the folder of the Transformer for a folder of sentence-transformers, else itself."""
    root = _root(checkpoint)
    if root is None:
        return checkpoint
    body = str(_json(root / MODULES)[0]["path"])
    if "://" not in checkpoint:
        return str(root / body)
    return join(checkpoint, body) if root == Path(local_copy(checkpoint)) else checkpoint


def refuse_hub_name(checkpoint: str) -> None:
    """Raise InputError if a hub name is a model of sentence-transformers.

    Its pooling would be passed over, as only folders are read.
    """
    if "://" in checkpoint or Path(checkpoint).exists():
        return
    quiet = {"_raise_exceptions_for_missing_entries": False,
             "_raise_exceptions_for_connection_errors": False}  # fmt: skip
    try:
        found = cached_file(checkpoint, MODULES, **quiet)
    except (OSError, ValueError):
        return
    if found:
        raise _refused(
            checkpoint, "is a model of sentence-transformers; download it and name the folder, so "
            "that its pooling is read"
        )  # fmt: skip


def _root(checkpoint: str) -> Path | None:
    """Return the folder with the list of modules: this one, or the one above its Transformer."""
    folder = Path(local_copy(checkpoint))
    if (folder / MODULES).is_file():
        return folder
    if (folder.parent / MODULES).is_file() and folder.is_dir():
        entries = _json(folder.parent / MODULES)
        if entries and entries[0].get("path") == folder.name:
            return folder.parent
    return None


def _refused(root: Path | str, reason: str) -> InputError:
    return InputError(FIELD, str(root), reason)


def _json(path: Path) -> Any:
    """Return the content of a file, None if there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _refused(path.parent, f"has a damaged {path.name} ({error})") from None


def _kind(entry: dict[str, Any]) -> str:
    """Return the class of a module of the library; code of others keeps its whole name."""
    name = str(entry["type"])
    return name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name


def _pooling(root: Path, folder: Path) -> tuple[str, bool]:
    """Return the pooling mode and whether a prompt's tokens are pooled too."""
    facts = _json(folder / "config.json") or {}
    older = [
        name.removeprefix("pooling_mode_").removesuffix("_tokens")
        for name, chosen in facts.items()
        if name.startswith("pooling_mode_") and chosen
    ]
    found = facts.get("pooling_mode", older or "mean")
    modes = [found] if isinstance(found, str) else list(found)
    if len(modes) != 1 or modes[0] not in MODES:
        raise InputError(
            FIELD, str(root),
            f"pools by {' and '.join(modes)}, which an item encoder does not compute",
            choices=MODES,
        )  # fmt: skip
    return str(modes[0]), bool(facts.get("include_prompt", True))


def _check_dense(root: Path, folder: Path) -> None:
    """Raise InputError unless a Dense is a plain linear layer."""
    facts = _json(folder / "config.json") or {}
    activation = facts.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in IDENTITIES:
        raise _refused(root, f"has the activation {activation} in {folder.name}")
    if facts.get("use_residual") or "sentence_embedding" not in (
        facts.get("module_input_name", "sentence_embedding"),
    ):
        raise _refused(root, f"adds more than a linear layer in {folder.name}")
    if not (folder / "model.safetensors").is_file():
        raise _refused(root, f"has no model.safetensors in {folder.name}")


def _document_prompt(root: Path) -> str:
    facts = _json(root / FACTS) or {}
    prompts = {name: text for name, text in (facts.get("prompts") or {}).items() if text}
    for name in (*DOCUMENT_PROMPTS, facts.get("default_prompt_name")):
        if name in prompts:
            return str(prompts[name])
    return ""


def _frame(root: Path, body: Path) -> tuple[str, list[int], int]:
    """Return the text put before every text, the tokens behind it, and the end of text."""
    words = load_tokenizer(str(body), FIELD)
    (text,) = words([PROBE], add_special_tokens=False)["input_ids"]
    (whole,) = words([PROBE])["input_ids"]
    places = range(len(whole) - len(text) + 1)
    start = next((n for n in places if whole[n : n + len(text)] == text), None)
    if start is None:
        raise _refused(root, "has a tokenizer that reads a text otherwise among its special tokens")
    before, after = whole[:start], whole[start + len(text) :]
    end = int(words.convert_tokens_to_ids(words.text_marks.end_of_text))
    if not before:
        return "", after, end
    written = words.decode(before).strip()
    if words([written], add_special_tokens=False)["input_ids"][0] != before:
        raise _refused(root, f"puts tokens before texts that no text gives ({written!r})")
    return written, after, end
