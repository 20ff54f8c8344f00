"""Text as token ids, by a tokenizer of the user's."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.inputs import Several

IDS, MASK = "input_ids", "attention_mask"


def tokenized(texts: Sequence[str], tokenizer: str, longest: int) -> Several:
    """`input_ids` (N, L) and `attention_mask` (N, L), int64: 1 where there is a token, 0 where
    there is padding.

    Args:
        tokenizer: the file `tokenizer.json` of the library tokenizers, or its folder.
        longest: texts are cut off after so many tokens; L is that of the longest.

    Raises:
        UserError: if the tokenizer cannot be read, or the library is not installed.
    """
    read = _tokenizer(tokenizer)
    read.enable_truncation(longest)
    read.no_padding()
    encoded = []
    length = 1
    for one in read.encode_batch(list(texts)):
        encoded.append(one.ids)
        length = max(length, len(one.ids))
    shape = (len(encoded), length)
    padding = _padding(read)
    ids = torch.full(shape, padding, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, own in enumerate(encoded):
        count = len(own)
        ids[row, :count] = torch.tensor(own, dtype=torch.int64)
        seen = max(1, count)  # without a token, the mean over none would be NaN
        mask[row, :seen] = 1
    return Several({IDS: ids, MASK: mask})


def _padding(tokenizer: Any) -> int:
    """The id of padding: the tokenizer's, or 0."""
    for token in ("[PAD]", "<pad>", "<|pad|>"):
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
    return 0


def _tokenizer(path: str) -> Any:
    if find_spec("tokenizers") is None:
        raise UserError(
            "data.text needs the library tokenizers; install it by: pip install 'slimfront[text]'"
        )
    from tokenizers import Tokenizer

    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"data.tokenizer: there is no file {file}; its folder is counted from here")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # of a kind of its own
        raise UserError(
            f"data.tokenizer: {file} cannot be read as a tokenizer.json: {first_line(error)}"
        ) from None


def trimmed(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A batch without the places that are padding in all of its examples; targets (N, L) of each
    place lose them too.

    On a GPU it stays as it is: to know how long it is, one would have to wait for it.
    """
    if not isinstance(inputs, Several) or inputs.is_cuda:
        return inputs, targets
    if MASK not in inputs.named:
        return inputs, targets
    mask = inputs.named[MASK]
    if mask.dim() != 2:
        return inputs, targets
    width = mask.shape[1]
    used = mask.any(0).nonzero()
    longest = 1
    if len(used):
        last = int(used.max())
        longest = last + 1
    if longest == width:
        return inputs, targets

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or tensor.shape[1] != width:
            return tensor
        return tensor[:, :longest]

    shorter = inputs.each(cut)
    if not isinstance(targets, Several):
        return shorter, cut(targets)
    # What a teacher made stands beside targets: of each place if these are.
    of_places = targets.first.dim() > 1 and targets.first.shape[1] == width
    if not of_places:
        return shorter, targets
    return shorter, targets.each(cut)
