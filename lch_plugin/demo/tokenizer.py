"""The demo tokenizer: one token for every word of the demo texts, bytes for everything else."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lch_plugin.demo.tasks import YEARS

END_OF_TEXT = "<|endoftext|>"

#: A word, two digits of a number, or one other character, each with the space before it.
_PIECES = Regex(r" ?\p{L}+| ?\d{1,2}| ?[^\s\p{L}\d]|\s")


def build_tokenizer(texts: Iterable[str], context_length: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that has every word of ``texts`` in its vocabulary.

    It has no merges: a word is either in the vocabulary as a whole or is spelled out in bytes, so
    that any text can be encoded. Every two-digit number is a token, and a year is two of them:
    " 1732" is " 17" and "32".
    """
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    numbers = " ".join(YEARS) + "".join(YEARS)
    pieces = {piece for text in (numbers, *texts) for piece, _ in splitter.pre_tokenize_str(text)}
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [END_OF_TEXT, *sorted(alphabet), *sorted(pieces - alphabet)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[],
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
